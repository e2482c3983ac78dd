"""A small real corpus, its tokenizer and token files: packages of the running Python's standard library."""

from pathlib import Path

import pytest

from pretrain import corpus, demo, tokenizer, tokens
from pretrain.corpus import crawl
from pretrain.corpus.sources import find

PACKAGES = (
    "json",
    "asyncio",
    "email",
    "http",
    "logging",
    "importlib",
    "unittest",
    "tomllib",
    "wsgiref",
    "curses",
    "xml",
)


@pytest.fixture(scope="session")
def library() -> Path:
    import json

    return Path(json.__file__).parents[1]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, library) -> Path:
    """A folder with `corpus`, `tokenizer` and `tokens`."""
    return prepare(tmp_path_factory.mktemp("prepared"), [str(library / name) for name in PACKAGES])


@pytest.fixture(scope="session")
def whole_library(tmp_path_factory) -> Path:
    """The same from every package of the standard library."""
    return prepare(tmp_path_factory.mktemp("library"), demo.repositories())


def prepare(folder: Path, sources: list[str]) -> Path:
    corpus.build(sources, folder / "corpus", progress=False)
    texts = (text for document in corpus.documents(folder / "corpus") for text in document.texts)
    tokenizer.save(tokenizer.train(texts, 1024), folder / "tokenizer")
    made = tokenizer.Tokenizer.load(folder / "tokenizer")
    tokens.build(folder / "corpus", made, folder / "tokens", valid=0.1, progress=False)
    return folder


@pytest.fixture(scope="session")
def write():
    """A function that puts {path: content} into a folder and returns the folder."""

    def write(root, files):
        for path, content in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())
        return root

    return write


@pytest.fixture(scope="session")
def crawled():
    return _crawled


def _crawled(sources, out, limits=None):
    """(kept rows, {path: reason}, {repository: what is known of it}) of a crawl. What could not be read is raised."""
    limits = limits or crawl.Limits()
    kept, dropped, about = [], {}, {}
    for shard in crawl.plan(find([str(source) for source in sources], out), out, limits):
        result = crawl.crawl_shard(out, shard, limits)
        kept += result.tables["part"].to_pylist()
        dropped |= {(row["repo"], row["path"]): row["reason"] for row in result.tables["dropped"].to_pylist()}
        about |= {row["repo"]: row for row in result.tables["repositories"].to_pylist()}
        for reason in result.about.get("unread", {}).values():
            raise ValueError(reason)
    return kept, dropped, about
