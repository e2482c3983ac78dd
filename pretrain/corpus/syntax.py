"""Does a file parse? The paper screened with a compiler; a tree-sitter grammar needs neither headers nor packages.

tree-sitter reads on after an error, so what is measured is how much of a file it could not read. The grammars are
single wheels: the one package that holds all of them fetches them from the network when first used.
"""

import importlib
from functools import cache

from tree_sitter import Language, Node, Parser

# Language -> (module, function); a language without a grammar is not checked.
_GRAMMARS = {
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


@cache
def _parser(language: str) -> Parser:
    module, function = _GRAMMARS[language]
    return Parser(Language(getattr(importlib.import_module(module), function)()))


def error_share(path: str, language: str, text: str) -> float | None:
    """The share of a file's bytes that its grammar could not read; None for a language without a grammar.

    Those are what stands loose in an error. What could be read within one is none: a brace that `#ifdef` has
    twice makes one error of a whole file, with all of its functions in it.
    A header may be C or C++, and counts as what it reads better as.
    """
    if path.endswith(".tsx"):
        language = "TSX"
    if language not in _GRAMMARS:
        return None
    source = text.encode()
    share = _share(language, source)
    if share and path.endswith(".h"):
        share = min(share, _share("C++", source))
    return share


def _share(language: str, source: bytes) -> float:
    root = _parser(language).parse(source).root_node
    wrong = 0
    nodes: list[Node] = [root] if root.has_error else []
    while nodes:
        node = nodes.pop()
        read = [child for child in node.children if child.child_count]
        if node.is_error:
            wrong += node.end_byte - node.start_byte - sum(child.end_byte - child.start_byte for child in read)
        nodes += [child for child in node.children if child.has_error and (child.child_count or not node.is_error)]
    return wrong / max(len(source), 1)
