"""Searching source text at the speed of `str.find`.

A regular expression that may begin at any line tries every line. But each statement that is looked for holds a fixed
word, which few lines do: the word is found first, and the expression tried only at the beginning of its statement.
"""

import re
from collections.abc import Collection, Iterator

from .paths import Nearest


def matches(text: str, word: str, pattern: re.Pattern[str], ends: str = "\n;") -> Iterator[re.Match[str]]:
    """The places where `pattern` matches at the beginning of a line or behind one of `ends`, and holds `word`.

    Every character is looked at a bounded number of times, however long its line is.
    """
    if text.startswith("\ufeff"):
        text = " " + text[1:]
    done, begins, at = 0, True, 0  # text before `done` is finished; begins: a statement begins there
    while (at := text.find(word, at)) != -1:
        start = max(text.rfind(end, done, at) for end in ends) + 1
        while text.endswith("\\\n", done, start):  # the line before goes on here
            start = text.rfind("\n", done, start - 1) + 1
        if start or begins:
            match = pattern.match(text, start or done)
            if match is not None and match.end() > at:
                yield match
                at = done = match.end()
                begins = False
                continue
        at = done = at + len(word)
        begins = False


# Every byte that can be neither part of a name nor the dot between two becomes a space; bytes of other scripts count as
# letters.
_NAMES = bytes(b if b >= 128 or chr(b).isalnum() or chr(b) in "_." else ord(" ") for b in range(256))


def words(text: str) -> set[bytes]:
    """The names in a text, `a.b` as one and `.b` behind a bracket, as UTF-8: ten times faster than an expression."""
    return set(text.encode("utf-8", "surrogatepass").translate(_NAMES).split())


def first_names(text: str) -> set[bytes]:
    """The names in a text that do not stand behind a dot: of `a.b` only a."""
    return {word.partition(b".")[0] for word in words(text)}


class Declarations:
    """Names that files declare in namespaces ("a.b"), and the files that another file means by them."""

    def __init__(self) -> None:
        self.files = Nearest()
        self._namespaces: dict[bytes, set[str]] = {}  # name -> where it is declared
        self._pairs: set[tuple[str, str]] = set()  # (qualified name, file)

    def add(self, namespace: str, name: str, path: str, implicit: bool = True) -> None:
        """implicit: the name can be used without an import, by files of the namespace and by those that open it."""
        qualified = f"{namespace}.{name}"
        if (qualified, path) in self._pairs:
            return
        self._pairs.add((qualified, path))
        self.files.add(qualified, path)
        if implicit:
            self._namespaces.setdefault(name.encode("utf-8", "surrogatepass"), set()).add(namespace)

    def find(self, qualified: str, importer: str, drop: int = 2) -> str | None:
        """The file of a qualified name; the last parts, up to `drop`, may name something inside it."""
        for _ in range(drop + 1):
            path = self.files.find(qualified, importer)
            if path is not None:
                return path
            qualified = qualified.rpartition(".")[0]
        return None

    def used(self, text: str, namespaces: Collection[str], importer: str) -> Iterator[tuple[str, str]]:
        """(namespace, file) of every name in the text that one of the open namespaces declares, not the file itself."""
        for word in first_names(text) & self._namespaces.keys():
            for namespace in sorted(self._namespaces[word].intersection(namespaces)):
                qualified = f"{namespace}.{word.decode('utf-8', 'surrogatepass')}"
                path = self.files.find(qualified, importer)
                if path is not None and (qualified, importer) not in self._pairs:
                    yield namespace, path
