"""Public clients against our server, as their users write it; `make test-clients` installs them."""

import numpy as np
import pytest

from tests.test_serving import TEXTS, encoder, running, url  # noqa: F401

REASON = "needs the clients: make test-clients"


def near(found, expected):
    return np.allclose(np.array(found, dtype=np.float32), expected, atol=1e-5)


def test_openai(encoder, url, monkeypatch):  # noqa: F811
    openai = pytest.importorskip("openai", reason=REASON)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.embeddings.create(model="mean", input=TEXTS)
    assert near([row.embedding for row in answer.data], encoder.encode(TEXTS))
    assert answer.truncated == [4]
    assert answer.usage.prompt_tokens > 0
    cut = client.embeddings.create(
        model="mean", input="One.", dimensions=8, encoding_format="float"
    )
    assert near(cut.data[0].embedding, encoder.encode(["One."], dimensions=8)[0])
    prompted = client.embeddings.create(
        model="mean", input="One.", extra_body={"prompt_name": "query"}
    )
    assert near(prompted.data[0].embedding, encoder.encode("One.", prompt_name="query"))
    assert [model.id for model in client.models.list()] == ["mean"]
    assert client.models.retrieve("mean").id == "mean"
    with pytest.raises(openai.BadRequestError, match="must be between 1 and 40"):
        client.embeddings.create(model="mean", input="a", dimensions=4000)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    monkeypatch.setenv("QWEN3_ENCDEC_API_KEY", "secret")
    with running(encoder) as guarded:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{guarded}/v1", api_key="wrong").models.list()
        right = openai.OpenAI(base_url=f"{guarded}/v1", api_key="secret")
        assert right.embeddings.create(model="mean", input="a").data


def test_openai_from_many_coroutines(encoder, url):  # noqa: F811
    openai = pytest.importorskip("openai", reason=REASON)
    import asyncio

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            asked = [client.embeddings.create(model="mean", input=f"text {i}") for i in range(64)]
            return await asyncio.gather(*asked)

    found = [answer.data[0].embedding for answer in asyncio.run(ask())]
    assert near(found, encoder.encode([f"text {i}" for i in range(64)]))


def test_langchain(encoder, url):  # noqa: F811
    langchain = pytest.importorskip("langchain_openai", reason=REASON)
    settings = {"model": "mean", "base_url": f"{url}/v1", "api_key": "none"}
    client = langchain.OpenAIEmbeddings(**settings, check_embedding_ctx_length=False)
    assert near(client.embed_documents(TEXTS[1:]), encoder.encode(TEXTS[1:]))
    assert near(client.embed_query("One."), encoder.encode("One."))


def test_llama_index(encoder, url):  # noqa: F811
    module = pytest.importorskip("llama_index.embeddings.openai", reason=REASON)
    client = module.OpenAIEmbedding(model_name="mean", api_base=f"{url}/v1", api_key="none")
    assert near(client.get_text_embedding_batch(TEXTS[1:4]), encoder.encode(TEXTS[1:4]))
    assert near(client.get_query_embedding("One."), encoder.encode("One."))


def test_chroma(encoder, url):  # noqa: F811
    chromadb = pytest.importorskip("chromadb", reason=REASON)
    from chromadb.utils.embedding_functions import OpenAIEmbeddingFunction

    embed = OpenAIEmbeddingFunction(api_base=f"{url}/v1", api_key="none", model_name="mean")
    collection = chromadb.EphemeralClient().create_collection("texts", embedding_function=embed)
    collection.add(ids=[str(i) for i in range(3)], documents=TEXTS[1:4])
    found = collection.query(
        query_texts=[TEXTS[2]], n_results=1, include=["embeddings", "documents"]
    )
    assert found["documents"] == [[TEXTS[2]]]
    assert near(found["embeddings"][0], encoder.encode([TEXTS[2]]))
