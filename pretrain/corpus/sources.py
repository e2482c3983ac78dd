"""What the sources on the command line name: repositories, each a folder, a git URL or an archive.

A folder with .git is a repository. In a folder without, every folder below that has .git is one, and what remains
around them is one more. A list (.jsonl or .csv) has one repository in each row, under `url` or `path` (counted from the
list's own folder); its other columns, say stars and licence, are kept in the crawl's manifest.
"""

import csv
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
LISTS = (".jsonl", ".csv")

_URL = re.compile(r"(https?|ssh|file)://.+|[\w.-]+@[\w.-]+:.+")  # not git's `ext::`, which runs commands

# Folders that hold other people's code or a program's output, wherever they stand.
# fmt: off
VENDORED = frozenset((
    "node_modules", "bower_components", "vendor", "vendored", "third_party", "thirdparty", "third-party",
    "site-packages", "dist-packages", "__pycache__", ".venv", "venv", ".tox", ".nox", ".eggs",
    ".mypy_cache", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints",
))
# fmt: on


@dataclass(frozen=True)
class Repository:
    name: str  # unique in a corpus
    kind: str  # "folder", "git" or "archive"
    location: str  # an absolute path, or the URL
    about: dict[str, Any] = field(default_factory=dict)  # the other columns of a list


def find(sources: list[str], out: Path) -> list[Repository]:
    """The repositories of all sources, sorted by name; a repository that is named twice counts once.

    out: the corpus folder as an absolute path, never read as a source. Of two repositories of one name the later is
    called name~2.
    Raises FileNotFoundError or ValueError for a source that does not exist or is of no known kind.
    """
    if not sources:
        raise ValueError("no sources given; name folders, git URLs, archives, or .jsonl and .csv lists of them")
    located: dict[tuple[str, str], Repository] = {}
    for source in sources:
        for repository in _of_list(Path(source), out) if source.endswith(LISTS) else _of_one(source, out):
            located.setdefault((repository.kind, repository.location), repository)
    named: dict[str, Repository] = {}
    for repository in located.values():
        name, number = repository.name, 1
        while name in named:
            number += 1
            name = f"{repository.name}~{number}"
        named[name] = Repository(name, repository.kind, repository.location, repository.about)
    return [named[name] for name in sorted(named)]


def _of_one(source: str, out: Path, about: dict[str, Any] | None = None) -> list[Repository]:
    about = about or {}
    if _URL.fullmatch(source):
        return [Repository(_url_name(source), "git", source, about)]
    if "://" in source:
        raise ValueError(
            f"{source}: not a URL that git clones here; give one with https://, ssh://, file:// or git@host:"
        )
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"{source}: no such source; name a folder, a git URL, an archive or a .jsonl or .csv list"
        )
    path = path.resolve()
    if path.is_dir():
        return _of_folder(path, out, about)
    for suffix in ARCHIVES:
        if path.name.lower().endswith(suffix):
            return [Repository(path.name[: -len(suffix)], "archive", str(path), about)]
    raise ValueError(
        f"{source}: not a folder, a git URL or an archive ({', '.join(ARCHIVES)}); pack it, or name its folder"
    )


def _url_name(url: str) -> str:
    """https://host/owner/name.git -> owner/name; file:///any/where/name -> name."""
    parts = [part for part in re.split(r"[/:]", url.rstrip("/").removesuffix(".git")) if part]
    return parts[-1] if url.startswith("file://") else "/".join(parts[-2:])


def _of_folder(root: Path, out: Path, about: dict[str, Any]) -> list[Repository]:
    if is_repository(root):
        return [Repository(root.name, "folder", str(root), about)]
    found = [Repository(root.name, "folder", str(root), about)]
    for folder, names, _ in os.walk(root):
        names[:] = sorted(name for name in names if name not in VENDORED and Path(folder, name) != out)
        if is_repository(Path(folder)):
            names.clear()
            found.append(Repository(Path(folder).relative_to(root).as_posix(), "folder", folder, about))
    return found


def is_repository(folder: Path) -> bool:
    return (folder / ".git").exists()  # a folder, or in a work tree a file


def _of_list(path: Path, out: Path) -> list[Repository]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such list of repositories") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: this list cannot be read ({error}); write it as UTF-8") from error
    rows: list[tuple[int, Any]] = []
    if path.suffix == ".csv":
        reader = csv.DictReader(text.splitlines())
        rows = [(reader.line_num, row) for row in reader]
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    rows.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error}); write one object per line") from error
    found = []
    for number, row in rows:
        about = dict(row) if isinstance(row, dict) else {}
        url, file = about.pop("url", None), about.pop("path", None)
        if not (isinstance(url, str) and url) and not (isinstance(file, str) and file):
            raise ValueError(f"{path}, line {number}: names no repository; give it a `url` or a `path`")
        try:
            found += _of_one(url or str(path.parent / Path(file).expanduser()), out, about)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{path}, line {number}: {error}") from None
    return found
