"""Paths with forward slashes, and the nearest of several files that a name may mean."""

from collections.abc import Container, Iterator

# Names and folders deeper than this are not looked into: hostile input would make their prefixes quadratic.
DEPTH = 32


def folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def name_of(path: str) -> str:
    return path.rpartition("/")[2]


def stem_of(path: str) -> str:
    """The path without its last extension: "a/b.test" of a/b.test.ts."""
    name = path.rfind("/") + 1
    dot = path.rfind(".", name + 1)
    return path if dot == -1 else path[:dot]


def join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and name else folder or name


def normal(folder: str, relative: str) -> str | None:
    """The path that `relative` means in `folder`, without `.` and `..`; None when it leaves the repository."""
    parts = folder.split("/") if folder else []
    for part in relative.split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def ancestors(folder: str) -> Iterator[str]:
    """The folder itself, its parent, ..., the repository ""."""
    yield folder
    while folder:
        folder = folder_of(folder)
        yield folder


def suffixes(path: str, wanted: Container[str]) -> Iterator[str]:
    """The ends of a path that begin at a folder's name, the whole path included, of those that are wanted."""
    start = len(path)
    for _ in range(DEPTH):
        start = path.rfind("/", 0, start)
        if path[start + 1 :] in wanted:
            yield path[start + 1 :]
        if start == -1:
            break


class Nearest:
    """name -> files, and which of them is meant: the one that shares the most folders with the file that asks.

    Of equally near ones the first by (folder depth, length, path): x.cs before x.part.cs. With many files of one name,
    their folders' tree is indexed at the first question, so that 100,000 files of one name that are asked for 100,000
    times take no quadratic time.
    """

    def __init__(self) -> None:
        self._files: dict[str, list[str]] = {}
        self._trees: dict[str, dict[str, list[str]]] = {}  # name -> folder -> the two first files below it

    def add(self, name: str, path: str) -> None:
        """All of a name's files are added before it is asked for."""
        self._files.setdefault(name, []).append(path)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def find(self, name: str, importer: str) -> str | None:
        """The file meant by `name` in the file `importer`, never that file itself."""
        files = self._files.get(name)
        if files is None:
            return None
        if len(files) == 1:
            return None if files[0] == importer else files[0]
        tree = self._trees.get(name) or self._trees.setdefault(name, _tree(files))
        for folder in ancestors(folder_of(importer)):
            for path in tree.get(folder, ()):
                if path != importer:
                    return path
        return None


def _tree(files: list[str]) -> dict[str, list[str]]:
    tree: dict[str, list[str]] = {}
    for path in sorted(set(files), key=lambda path: (path.count("/"), len(path), path)):
        for folder in ancestors(folder_of(path)):
            first = tree.setdefault(folder, [])
            if len(first) < 2:
                first.append(path)
    return tree
