"""A repository as one text, dependencies first (DeepSeek-Coder's paper, section 2.2, algorithm 1).

The model learned from whole repositories: every file after the files that it imports, each with a comment line that
holds its path. The corpus and the prompt of `complete --repo` must agree on that form, so both call these functions.
A repository is a plain {path: text} with forward slashes; nothing here reads a disk.

    imports(files)          which file depends on which: regular expressions, and one module of rules per language
    order(files, edges)     the files of each connected component in the order of training (graph.py)
    pieces(files)           their texts, each behind its path comment
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from ..languages import LANGUAGES, comment_line, language_of
from . import c, csharp, go, graph, javascript, jvm, paths, php, python, ruby, rust, text
from .graph import METHODS, Edges, components, is_test

__all__ = [
    "METHODS",
    "MODULES",
    "SIGNS",
    "Edges",
    "components",
    "concatenate",
    "imports",
    "is_manifest",
    "is_test",
    "order",
    "path_comment",
    "path_in_comment",
    "pieces",
    "related",
]

SIGNS = ("language", "hash")  # of path comments

_MANIFEST = re.compile(
    r"(?:^|/)(?:go\.mod|Cargo\.toml|pyproject\.toml|[^/]+\.csproj|(?:package|composer|[^/]*config[^/]*)\.json)$"
)

# What decides the order beside this file: a corpus is made anew when one of them changes.
MODULES = (c, csharp, go, graph, javascript, jvm, paths, php, python, ruby, rust, text)

Find = Callable[[Mapping[str, str], Mapping[str, str]], Edges]

# Languages whose files can depend on each other, and the function that finds how:
# (their files, every file of the repository) -> edges.
_FAMILIES: tuple[tuple[tuple[str, ...], Find], ...] = (
    (("Python",), python.edges),
    (("Java", "Kotlin", "Scala"), jvm.edges),
    (("C#",), csharp.edges),
    (("C", "C++", "CUDA"), c.edges),
    (("JavaScript", "TypeScript"), javascript.edges),
    (("Go",), go.edges),
    (("Rust",), rust.edges),
    (("PHP",), php.edges),
    (("Ruby",), ruby.edges),
)


def imports(files: Mapping[str, str]) -> Edges:
    """path -> the paths in `files` that it depends on, never itself -> whether strongly.

    A weak dependency is one that need not be read first: an import inside a function, of types only, of a package as a
    whole, a name of the same package that is used without an import. What does not resolve to a file is ignored.
    Every path has an entry. Dependencies are read for the languages of `_FAMILIES`; files of others have none.
    """
    by_language: dict[str, dict[str, str]] = defaultdict(dict)
    for path, content in files.items():
        language = language_of(path)
        if language is not None:
            by_language[language.name][path] = content
    edges: Edges = {path: {} for path in files}
    for languages, find in _FAMILIES:
        family = {path: content for language in languages for path, content in by_language[language].items()}
        for path, dependencies in find(family, files).items() if family else ():
            edges[path] = {other: strong for other, strong in dependencies.items() if other != path}
    return edges


def is_manifest(path: str) -> bool:
    """Whether a file says what names mean in the imports of others: the path of a Go module, the name of a package, a
    path alias. The rules of the languages look into it, or where it lies; as a text it is in no document of theirs.
    """
    return _MANIFEST.search(path) is not None


def related(path: str) -> frozenset[str]:
    """The names of the languages whose files may depend on a file or be its dependencies; its own where no other is."""
    language = language_of(path)
    name = language.name if language else ""
    return next((frozenset(languages) for languages, _ in _FAMILIES if name in languages), frozenset((name,)) - {""})


def order(files: Iterable[str], edges: Edges | None = None, method: str = "feedback", seed: int = 0) -> list[list[str]]:
    """`graph.order`, with `imports(files)` for the edges if none are given; then `files` are {path: text}."""
    if edges is None:
        assert isinstance(files, Mapping), "edges are found in the files' texts"
        edges = imports(files)
    return graph.order(files, edges, method, seed)


def path_comment(path: str, sign: str = "language") -> str:
    """The line before a file's text: its path as a comment of its language.

    sign: "language", or "hash" for `#` in every language, the form that the authors gave for the released models
    (DeepSeek-Coder issue 116). For Python both are the same.
    """
    path = path.replace("\\", "/")
    return ("#" + path if sign == "hash" else comment_line(path, path)) + "\n"


def path_in_comment(line: str) -> str | None:
    """The path of a path comment of either sign, without its line end; None for any other line."""
    for language in LANGUAGES:
        path = line.removeprefix(language.comment).removesuffix(language.comment_end)
        if path != line and language_of(path) is language and path_comment(path) == line + "\n":
            return path
    return line[1:] if line.startswith("#") and language_of(line[1:]) else None


def pieces(files: Iterable[tuple[str, str]], sign: str = "language") -> list[str]:
    """The text of each (path, text) inside a document: path comment, text ending in a newline, and a blank line
    before the next file. Joined, they are the document. sign: see `path_comment`."""
    texts = [path_comment(path, sign) + text + ("" if text.endswith("\n") else "\n") for path, text in files]
    return [text + "\n" for text in texts[:-1]] + texts[-1:]


def concatenate(files: Iterable[tuple[str, str]], sign: str = "language") -> str:
    """The document of some files in the given order, as the model saw repositories in training."""
    return "".join(pieces(files, sign))
