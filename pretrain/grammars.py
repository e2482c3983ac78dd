"""tree-sitter's grammars, each a small wheel of its own: the one package that holds all of them fetches them from the
network when first used. Nothing is imported before a parser is asked for."""

import importlib
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tree_sitter import Parser

# Language -> (module, function); a language without a grammar is neither checked nor cut by its syntax.
GRAMMARS = {
    "C": ("tree_sitter_c", "language"),
    "C#": ("tree_sitter_c_sharp", "language"),
    "C++": ("tree_sitter_cpp", "language"),
    "Go": ("tree_sitter_go", "language"),
    "Java": ("tree_sitter_java", "language"),
    "JavaScript": ("tree_sitter_javascript", "language"),
    "Kotlin": ("tree_sitter_kotlin", "language"),
    "PHP": ("tree_sitter_php", "language_php"),
    "Python": ("tree_sitter_python", "language"),
    "Ruby": ("tree_sitter_ruby", "language"),
    "Rust": ("tree_sitter_rust", "language"),
    "Scala": ("tree_sitter_scala", "language"),
    "TypeScript": ("tree_sitter_typescript", "language_typescript"),
    "TSX": ("tree_sitter_typescript", "language_tsx"),
}


PACKAGES = sorted({"tree-sitter", *(module.replace("_", "-") for module, _ in GRAMMARS.values())})


@cache
def parser(language: str) -> "Parser":
    """The parser of one of GRAMMARS."""
    from tree_sitter import Language, Parser

    module, function = GRAMMARS[language]
    return Parser(Language(getattr(importlib.import_module(module), function)()))


def missing() -> list[str]:
    """Those of PACKAGES that are not installed."""
    return [package for package in PACKAGES if find_spec(package.replace("-", "_")) is None]
