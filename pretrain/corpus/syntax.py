"""Does a file parse? The paper screened with a compiler; a tree-sitter grammar needs neither headers nor packages.

tree-sitter reads on after an error, so what is measured is how much of a file it could not read.
"""

import re

from tree_sitter import Node

from ..grammars import GRAMMARS, parser

_CPP = re.compile(
    r"^[ \t]*(?:namespace\b|template[ \t]*<|class[ \t]+\w|using[ \t]+\w|(?:public|private|protected)[ \t]*:)|\w::\w",
    re.M,
)


def error_share(path: str, language: str, text: str, enough: float = 0.0) -> float | None:
    """The share of a file's bytes that its grammar could not read; None for a language without a grammar.

    Those are what stands loose in an error. What could be read within one is none: a brace that `#ifdef` has
    twice makes one error of a whole file, with all of its functions in it.
    A header is read as C++ or C as its words tell; where that leaves a larger share than `enough`, it counts as what it
    reads better as.
    """
    if path.endswith(".tsx"):
        language = "TSX"
    elif path.endswith(".h") and language in ("C", "C++"):
        language = "C++" if _CPP.search(text) else "C"
    if language not in GRAMMARS:
        return None
    source = text.encode()
    share = _share(language, source)
    if share > enough and path.endswith(".h"):  # reading C++ as C takes ten times as long
        share = min(share, _share("C" if language == "C++" else "C++", source))
    return share


def _share(language: str, source: bytes) -> float:
    root = parser(language).parse(source).root_node
    wrong = 0
    nodes: list[Node] = [root] if root.has_error else []
    while nodes:
        node = nodes.pop()
        read = [child for child in node.children if child.child_count]
        if node.is_error:
            wrong += node.end_byte - node.start_byte - sum(child.end_byte - child.start_byte for child in read)
        nodes += [child for child in node.children if child.has_error and (child.child_count or not node.is_error)]
    return wrong / max(len(source), 1)
