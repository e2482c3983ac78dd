"""A small real corpus, its tokenizer and token files: packages of the running Python's standard library."""

from pathlib import Path

import pytest

from pretrain import corpus, demo, tokenizer, tokens

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
