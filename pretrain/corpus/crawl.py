"""Repositories become tables of files: (repo, path, language, text), sorted, in UTF-8 with `\\n` at the line ends.

A repository is never split, so that every later stage sees all of it in one shard. Repositories go into shards in the
order of their names until a shard holds `shard_bytes`, by a size known before anything is fetched: a folder's from its
files, an archive's from its packed size, a git URL's by a plain guess.

Whether a repository changed since the last run is told without reading it: a folder by the paths, sizes and
modification times of its files, an archive by its own size and time, a git URL by the URL and commit. So a clone is
never refreshed; for a newer state take another output folder.

Nothing in a repository can stop the crawl. A file that is left out, and a repository that is refused or cannot be read,
is written down with its reason; the next run tries again what could not be read.

    crawl/part-*.parquet            repo, path, language, text
    crawl/dropped-*.parquet         repo, path, reason
    crawl/manifests-*.parquet       repo, path, text of what imports are read by (go.mod, package.json, ...), never
                                    trained on for that; of a language of ours it stands in part-* as well
    crawl/repositories-*.parquet    repo and what is known of it; `dropped` says why it has no files, if so
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from deepseek_coder.folders import MAX_FILE_BYTES, OWN_RECORDS, VENDORED, vendored, walk
from deepseek_coder.languages import language_of
from deepseek_coder.repository import is_manifest

from . import archives, encodings, licences
from .clones import clone, folder_of, head
from .generated import generated
from .sources import Repository, is_repository
from .stage import DROPPED, FILES, Result, Shard, add, fingerprint, tally


@dataclass(frozen=True)
class Limits:
    max_file_bytes: int = MAX_FILE_BYTES
    max_repository_files: int = 500_000  # a repository with more is passed over: it must fit in memory
    max_repository_bytes: int = 2 << 30  # of its kept files
    # compare=False: these four do not change what a shard becomes, so that another value of them redoes nothing.
    # shard_bytes, of text: small enough that a lost shard is cheap and its tables fit in memory.
    shard_bytes: int = field(default=64 << 20, compare=False)
    clone_seconds: int = field(default=600, compare=False)
    clone_tries: int = field(default=3, compare=False)
    # A folder where clones stay for other runs; without, they go when their files are in the tables.
    cache: str = field(default="", compare=False)
    # Which repositories: by what the list of repositories says, licences also by their licence files. What is not
    # known of a repository does not satisfy a condition on it.
    min_stars: int = 0
    min_forks: int = 0
    created_from: str = ""  # the first and last day, as 2023-01-31
    created_until: str = ""
    licences: tuple[str, ...] = ()  # SPDX ids, "permissive" for all of licences.py, "none" for no licence found

    def __post_init__(self) -> None:
        for key in ("created_from", "created_until"):
            if getattr(self, key) and not re.fullmatch(r"\d{4}-\d\d-\d\d", getattr(self, key)):
                raise ValueError(f'{key} in [crawl] is {getattr(self, key)!r}; write a day like "2023-01-31"')


MANIFESTS = pa.schema([("repo", pa.string()), ("path", pa.string()), ("text", pa.string())])
REPOSITORIES = pa.schema(
    [
        ("repo", pa.string()),
        ("url", pa.string()),
        ("commit", pa.string()),
        ("licence", pa.string()),
        ("stars", pa.int64()),
        ("forks", pa.int64()),
        ("created", pa.string()),
        ("dropped", pa.string()),
    ]
)

_GIT_GUESS = 16 << 20  # bytes of text expected behind a git URL
_ARCHIVE_RATIO = 4  # text usually shrinks to a quarter

# A file on its way in: its path, and its bytes or why it is left out.
Found = tuple[str, bytes | str]


class _Refused(Exception):
    """A whole repository stays out of the corpus, for this reason."""


def plan(repositories: list[Repository], out: Path, limits: Limits) -> list[Shard]:
    """Whole repositories, in order, in shards of about `shard_bytes`."""
    groups: list[list[tuple[Repository, str]]] = []
    room = 0
    for repository in repositories:
        size, state = _measure(repository, out, limits)
        if not groups or size > room:
            groups.append([])
            room = limits.shard_bytes
        room -= size
        groups[-1].append((repository, state))
    shards = []
    for number, group in enumerate(groups):
        key = fingerprint([(asdict(replace(repository, login="")), state) for repository, state in group])
        shards.append(Shard(f"{number:05}", tuple(repository for repository, _ in group), key))
    return shards


@dataclass
class _Table:
    """Columns, not rows: a million small files are a million strings and nothing around them."""

    schema: pa.Schema
    columns: list[list[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.columns = [[] for _ in self.schema]

    def append(self, *row: Any) -> None:
        for column, value in zip(self.columns, row, strict=True):
            column.append(value)

    def finish(self) -> pa.Table:
        """Sorted by the first two columns. The lists are emptied one by one, or all would be in memory twice."""
        order = sorted(range(len(self.columns[0])), key=lambda row: (self.columns[0][row], self.columns[1][row] or ""))
        arrays = []
        for column, kind in zip(self.columns, self.schema, strict=True):
            arrays.append(pa.array([column[row] for row in order], kind.type))
            column.clear()
        return pa.Table.from_arrays(arrays, schema=self.schema)


def crawl_shard(out: Path, shard: Shard, limits: Limits) -> Result:
    files, dropped, manifests, repositories = map(_Table, (FILES, DROPPED, MANIFESTS, REPOSITORIES))
    tables = (files, dropped, manifests)
    counts: dict[str, Any] = {"repositories": len(shard.inputs)}
    cache = Path(limits.cache).expanduser() if limits.cache else out / "cache"
    unread = {}
    for repository in shard.inputs:
        why = None
        mine = [len(table.columns[0]) for table in tables]
        try:
            _refuse_by_facts(repository, limits)
            repository, found = _open(repository, out, cache, limits)
            repository, foreign = _take(repository, found, *tables, limits)
            _refuse_by_licence(repository, limits)
            add(counts, {"encodings": foreign} if foreign else {})
        except _Refused as reason:
            why = str(reason)
            add(counts, {"repositories_dropped": {why: 1}})
        except ValueError as error:
            why = unread[repository.name] = str(error)
            add(counts, {"repositories_unread": 1})
        if why:  # nothing of a repository, or all of it
            for table, length in zip(tables, mine, strict=True):
                for column in table.columns:
                    del column[length:]
        url = repository.location if repository.kind == "git" else None
        facts = (repository.commit, repository.licence, repository.stars, repository.forks, repository.created)
        repositories.append(repository.name, url, *facts, why)
    kinds = {"part": files, "dropped": dropped, "manifests": manifests, "repositories": repositories}
    made = {kind: table.finish() for kind, table in kinds.items()}
    counts |= tally(made["part"], made["dropped"])
    if not limits.cache and not unread:  # all of the shard is in memory: the clones have served
        for repository in shard.inputs:
            if repository.kind == "git":
                shutil.rmtree(folder_of(repository.location, repository.commit, cache), ignore_errors=True)
    return Result(made, counts, {"unread": unread} if unread else {})


def _open(repository: Repository, out: Path, cache: Path, limits: Limits) -> tuple[Repository, Iterator[Found]]:
    location = Path(repository.location)
    if repository.kind == "git":
        commit = repository.commit
        how = (limits.clone_seconds, limits.clone_tries, repository.login)
        location = clone(repository.location, commit, cache, *how)
        repository = replace(repository, commit=head(location))
    return repository, _archive(location, limits) if repository.kind == "archive" else _folder(location, out, limits)


def _take(
    repository: Repository,
    found: Iterator[Found],
    files: _Table,
    dropped: _Table,
    manifests: _Table,
    limits: Limits,
) -> tuple[Repository, dict[str, int]]:
    """Puts a repository's files into the tables; returns it with its licence, and how many files were not UTF-8."""
    licence_texts = []
    foreign: dict[str, int] = {}
    number = size = 0
    for path, content, encoding, reason in _texts(found, limits):
        number += 1
        if number > limits.max_repository_files:
            raise _Refused(f"more than {limits.max_repository_files} files")
        text = content.replace("\r\n", "\n").replace("\r", "\n") if "\r" in content else content
        language = language_of(path)
        if not reason and licences.is_licence_file(path):
            licence_texts.append(text)
        if not reason and is_manifest(path):
            manifests.append(repository.name, path, text)
        if not reason and language is None:
            reason = "unknown language"
        elif not reason and generated(path, text):
            reason = "generated"
        if reason:
            dropped.append(repository.name, path.encode("utf-8", "backslashreplace").decode(), reason)
            continue
        assert language is not None
        if encoding != "utf-8":
            foreign[encoding] = foreign.get(encoding, 0) + 1
        size += len(text) if text.isascii() else len(text.encode())
        if size > limits.max_repository_bytes:
            raise _Refused(f"more than {limits.max_repository_bytes} bytes")
        files.append(repository.name, path, language.name, text)
    licence = repository.licence or licences.detect(licence_texts) or None
    return replace(repository, licence=licence), foreign


def _texts(found: Iterator[Found], limits: Limits) -> Iterator[tuple[str, str, str, str]]:
    """(path, text, encoding, why it is left out) of each file; those whose encoding is to be guessed come last."""
    unknown: list[tuple[str, bytes]] = []
    size = 0
    for path, content in found:
        read = ("", "", content) if isinstance(content, str) else encodings.read(content)
        if read is not None:
            yield path, *read
            continue
        assert isinstance(content, bytes)
        unknown.append((path, content))
        size += len(content)
        if size > limits.max_repository_bytes:
            raise _Refused(f"more than {limits.max_repository_bytes} bytes in unknown encodings")
    for (path, _), guessed in zip(unknown, encodings.guess([data for _, data in unknown]), strict=True):
        yield path, *guessed


# ---- which repositories ----------------------------------------------------------------------------------------------


def _refuse_by_facts(repository: Repository, limits: Limits) -> None:
    if limits.min_stars and (repository.stars or 0) < limits.min_stars:
        raise _Refused("stars")
    if limits.min_forks and (repository.forks or 0) < limits.min_forks:
        raise _Refused("forks")
    day = (repository.created or "")[:10]
    if limits.created_from and not day >= limits.created_from:
        raise _Refused("created")
    if limits.created_until and (not day or day > limits.created_until):
        raise _Refused("created")
    if repository.licence:
        _refuse_by_licence(repository, limits)


def _refuse_by_licence(repository: Repository, limits: Limits) -> None:
    licence, wanted = repository.licence, limits.licences
    if not wanted or (licence or "none").lower() in (name.lower() for name in wanted):
        return
    if not ("permissive" in wanted and licences.permissive(licence)):
        raise _Refused("licence")


# ---- one file --------------------------------------------------------------------------------------------------------


def _refused(path: str, size: int, limits: Limits) -> str:
    """Why a file is not even read; "" if it is."""
    if not path.isprintable():
        return "unprintable path"  # a line break would leave the path comment
    if language_of(path) is None:
        needed = licences.is_licence_file(path) or is_manifest(path)
        return "" if needed and size <= licences.MAX_BYTES else "unknown language"
    if size > limits.max_file_bytes:
        return "too large"
    return "vendored" if vendored(path) else ""


def _measure(repository: Repository, out: Path, limits: Limits) -> tuple[int, str]:
    """About how much text a repository holds, and a hash that changes when it does."""
    if repository.kind == "git":
        return _GIT_GUESS, ""
    if repository.kind == "archive":
        status = os.stat(repository.location)
        return status.st_size * _ARCHIVE_RATIO, fingerprint(status.st_size, status.st_mtime_ns)
    size, state = 0, hashlib.sha256()
    for number, (path, entry) in enumerate(_walk(Path(repository.location), out)):
        if number > limits.max_repository_files:
            break  # it will be refused
        name = path.encode("utf-8", "surrogateescape")
        if isinstance(entry, str):
            state.update(b"%b\0%b\n" % (name, entry.encode()))
        else:
            status = entry.stat(follow_symlinks=False)
            state.update(b"%b\0%d %d\n" % (name, status.st_size, status.st_mtime_ns))
            size += 0 if _refused(path, status.st_size, limits) else status.st_size
    return size, state.hexdigest()


# ---- folders ---------------------------------------------------------------------------------------------------------


def _walk(root: Path, out: Path) -> Iterator[tuple[str, os.DirEntry[str] | str]]:
    """What `walk` finds, less the corpus itself and the repositories in a folder that is none (sources.py)."""
    nested_too = is_repository(root)
    return walk(root, lambda folder: folder == out or (not nested_too and is_repository(folder)))


def _folder(root: Path, out: Path, limits: Limits) -> Iterator[Found]:
    for path, entry in _walk(root, out):
        if isinstance(entry, str):
            yield path, entry
            continue
        try:
            reason = _refused(path, entry.stat(follow_symlinks=False).st_size, limits)
            if reason:
                yield path, reason
                continue
            with open(entry.path, "rb") as file:  # a Path for each file is a tenth of the crawl
                yield path, file.read()
        except OSError:
            yield path, "unreadable"


def _archive(file: Path, limits: Limits) -> Iterator[Found]:
    """The files of an archive; one folder around everything is taken off."""
    found: dict[str, bytes | str] = {}  # of two members of one name the later counts, as when unpacking
    size = 0

    def refuse(path: str, stated: int) -> str:
        # Whether there is a folder around everything is not known yet.
        inner = path.partition("/")[2]
        return "" if inner and not _refused(inner, stated, limits) else _refused(path, stated, limits)

    for path, content in archives.contents(file, refuse, max(limits.max_file_bytes, licences.MAX_BYTES)):
        if OWN_RECORDS.intersection(path.split("/")):
            continue
        found[path] = content
        size += len(content) if isinstance(content, bytes) else 0
        if len(found) > limits.max_repository_files or size > limits.max_repository_bytes:
            raise _Refused(f"more than {limits.max_repository_files} files or {limits.max_repository_bytes} bytes")
    tops = {path.split("/", 1)[0] if "/" in path else "" for path in found}
    around = len(tops.pop()) + 1 if len(tops) == 1 and "" not in tops else 0
    folders = set()
    for path, content in found.items():
        path = path[around:]
        parts = path.split("/")
        cut = next((i for i, part in enumerate(parts[:-1]) if part in VENDORED), None)
        if cut is not None:
            folders.add("/".join(parts[: cut + 1]) + "/")
        elif isinstance(content, bytes):
            yield path, _refused(path, len(content), limits) or content
        else:
            yield path, content
    yield from ((path, "vendored folder") for path in sorted(folders))
