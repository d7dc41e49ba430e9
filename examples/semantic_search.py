"""Semantic search over the documentation of the installed Python packages, with a faiss index.

    pip install faiss-cpu
    python examples/semantic_search.py --model runs/demo/encoder-contrastive "read a file line by
    line"

The first run embeds every docstring of the held-out packages and writes the index; later runs only
read it.
"""

import argparse
from pathlib import Path

import faiss

from qwen3_encdec.data.package_docs import Docstring, package_docs
from qwen3_encdec.embedding.encoder import TextEncoder


def build_index(encoder: TextEncoder, documents: list[Docstring]) -> faiss.Index:
    """Index inner products, which are cosines since embeddings have length 1.

    For a million documents, faiss.index_factory has faster indexes.
    """
    texts = [document.text for document in documents]
    embeddings = encoder.encode(texts, prompt_name="document", progress=True)
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings)
    return index


def search(
    encoder: TextEncoder,
    index: faiss.Index,
    documents: list[Docstring],
    query: str,
    number: int = 5,
) -> list[tuple[float, Docstring]]:
    """Return the documents nearest to a query, nearest first, with their cosines."""
    number = min(number, index.ntotal)  # faiss fills up with the index -1
    cosines, places = index.search(encoder.encode([query], prompt_name="query"), number)
    return [
        (float(cosine), documents[place])
        for cosine, place in zip(cosines[0], places[0], strict=True)
    ]


def main() -> None:
    """Index once, then answer the queries."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("queries", nargs="+")
    parser.add_argument("--model", type=Path, required=True, help="encoder folder")
    parser.add_argument("--index", type=Path, help="file of the index [MODEL/documentation.faiss]")
    parser.add_argument("--number", type=int, default=5, help="documents to show")
    arguments = parser.parse_args()

    encoder, documents = TextEncoder(arguments.model, max_tokens=128), package_docs("heldout")
    file = arguments.index or arguments.model / "documentation.faiss"
    index = faiss.read_index(str(file)) if file.exists() else build_index(encoder, documents)
    if index.ntotal != len(documents):
        raise SystemExit(f"{file} is an index of other packages; delete it to rebuild")
    if not file.exists():
        faiss.write_index(index, str(file))
    for query in arguments.queries:
        print(query)
        for cosine, document in search(encoder, index, documents, query, arguments.number):
            print(f"  {cosine:.3f}  {document.name}: {' '.join(document.text.split())[:90]}")


if __name__ == "__main__":
    main()
