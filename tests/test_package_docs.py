"""The docstring corpus, on site-packages made for the test."""

import gc
import json
from importlib.metadata import distributions
from pathlib import Path

import pytest

from qwen3_encdec.data import package_docs as module
from qwen3_encdec.data.package_docs import is_heldout, package_docs, summary_pairs

LONG = "and this sentence makes the docstring long enough to be a document."


def install(site: Path, name: str, files: dict[str, str], version: str = "1.0") -> None:
    """Lay out a distribution as pip does."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for path, source in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(source)
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages"
    names = [f"package{i}" for i in range(40)]
    assert 1 <= sum(map(is_heldout, names)) <= 12
    for name in names:
        doc = f"Summary line of {name} here.\n\n    The body of {name} is indented, {LONG}\n    "
        install(folder, name, {f"{name}/__init__.py": f'"""{doc}"""\n'})
    installed = lambda: distributions(path=[str(folder)])  # noqa: E731
    monkeypatch.setattr(module, "distributions", installed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def everything() -> list:
    return sorted(package_docs("train") + package_docs("heldout"))


def test_garbage_collection_stays_off(site):
    gc.disable()
    try:
        package_docs("train")
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_documents_are_parsed_not_run(site):
    source = f'''
"""Module with a docstring, {LONG}"""
raise SystemExit("imported")

class Outer:
    """Class docstring, {LONG}"""

    async def method(self):
        r"""Method docstring with a \\backslash, {LONG}

            indented more

        back
        """

        def inner():
            """Inner docstring, {LONG}"""

if True:
    def conditional():
        """Conditional docstring, {LONG}"""
else:
    try:
        pass
    except ValueError:
        def handler():
            """Handler docstring, {LONG}"""

def short():
    """Short."""

variable = """No docstring but a string, {LONG}"""
'''
    files = {"new/mod.py": source, "new/tests/test_mod.py": source, "new/_vendor/mod.py": source}
    broken = {"new/broken.py": f'"""Broken, {LONG}"""\ndef (', "new/latin.py": ""}
    install(site, "new", {**files, **broken, "qwen3_encdec/x.py": f'"""Ours, {LONG}"""'})
    (site / "new/latin.py").write_bytes(b'"""\xe9' + LONG.encode() + b'"""')
    found = {doc.name: doc.text for doc in everything() if doc.package == "new"}
    names = ["", ".Outer", ".Outer.method", ".Outer.method.inner", ".conditional", ".handler"]
    assert sorted(found) == [f"new.mod{name}" for name in names]
    text = f"Method docstring with a \\backslash, {LONG}\n\n    indented more\n\nback"
    assert found["new.mod.Outer.method"] == text
    assert not any("Ours" in doc.text for doc in everything())


def test_equal_texts_are_kept_once(site):
    twin = f'"""A docstring that two packages share, {LONG}"""'
    for name in ("aaa", "zzz"):
        install(site, name, {f"{name}.py": twin})
    assert [doc.package for doc in everything() if "share" in doc.text] == ["aaa"]


def test_the_split_is_by_package_and_never_changes(site):
    train, heldout = package_docs("train"), package_docs("heldout")
    assert train
    assert heldout
    assert not {doc.package for doc in train} & {doc.package for doc in heldout}
    assert all(is_heldout(doc.package) for doc in heldout)
    held = {"networkx": True, "datasets": True, "torch": False, "transformers": False}
    assert {name: is_heldout(name) for name in held} == held


def test_the_order_is_the_same_from_scan_and_cache_and_new_versions_are_scanned(site, monkeypatch):
    first = package_docs("train")
    (cache,) = (site.parent / "cache" / "qwen3-encdec").glob("*-train.jsonl")
    texts = [json.loads(line)["text"] for line in cache.read_text().splitlines()]
    assert sorted(texts) == sorted(document.text for document in first) != texts
    with monkeypatch.context() as context:
        context.setattr(module, "_scan", lambda installed: pytest.fail("scanned again"))
        assert package_docs("train") == first
    cache.unlink()
    assert package_docs("train") == first
    install(site, "more", {"more.py": f'"""More words, {LONG}"""'})
    assert any(doc.package == "more" for doc in everything())


def test_summary_pairs(site):
    body = "The body of the pair is long enough to be asked for, number"
    docs = {
        "good": f"A good summary\n    over two lines.\n\n    {body} one.",
        "no_body": f"A summary without a body, {LONG}",
        "brief": f"Brief.\n\n    {body} two.",
        "same_summary": f"An ambiguous summary line.\n\n    {body} three.",
        "same_summary_too": f"An ambiguous Summary line.\n\n    {body} four.",
        "same_body": f"One summary of it.\n\n    {body} five.",
        "same_body_too": f"Another summary of it.\n\n    {body} five.",
    }
    functions = [f'def {name}():\n    """{doc}"""\n' for name, doc in docs.items()]
    install(site, "pairs", {"pairs.py": "".join(functions)})
    pairs = summary_pairs("train") + summary_pairs("heldout")
    mine = [(summary, text) for summary, text in pairs if text.startswith(body)]
    assert mine == [("A good summary over two lines.", f"{body} one.")]
    assert len(pairs) == 41
    assert len({summary for summary, _ in pairs}) == len({text for _, text in pairs}) == 41
