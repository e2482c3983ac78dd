"""A small real corpus, its tokenizer and token files: packages of the running Python's standard library."""

from pathlib import Path

import pytest

from pretrain import corpus, tokenizer, tokens

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
    folder = tmp_path_factory.mktemp("prepared")
    corpus.build([str(library / name) for name in PACKAGES], folder / "corpus", progress=False)
    texts = (text for document in corpus.documents(folder / "corpus") for text in document.texts)
    tokenizer.save(tokenizer.train(texts, 1024), folder / "tokenizer")
    made = tokenizer.Tokenizer.load(folder / "tokenizer")
    tokens.build(folder / "corpus", made, folder / "tokens", valid=0.1, progress=False)
    return folder
