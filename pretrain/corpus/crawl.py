"""Repositories become tables of files: (repo, path, language, text), sorted, with `\\n` at the line ends.

A repository is never split, so that every later stage sees all of it in one shard. Repositories go into shards in the
order of their names until a shard holds `shard_bytes`, by a size known before anything is fetched: a folder's from its
files, an archive's from its packed size, a git URL's by a plain guess.

Whether a repository changed since the last run is told without reading it: a folder by the paths, sizes and
modification times of its files, an archive by its own size and time, a git URL by the URL. So a clone is never
refreshed; for a newer state take another output folder.

Every file that is left out is written down with its reason. Nothing in a repository can stop the crawl, except an
archive with a member that climbs out of its folder: that was made to do harm, and the whole archive is refused.
"""

import hashlib
import lzma
import os
import posixpath
import re
import shutil
import stat
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO

import pyarrow as pa

from deepseek_coder.languages import language_of

from .sources import VENDORED, Repository, is_repository
from .stage import DROPPED, FILES, Result, Shard, fingerprint, tally


@dataclass(frozen=True)
class Limits:
    max_file_bytes: int = 1 << 20  # hardly anything above it is written by hand
    shard_bytes: int = 64 << 20  # of text: small enough that a lost shard is cheap and its tables fit in memory
    clone_seconds: int = 600


_GIT_GUESS = 16 << 20  # bytes of text expected behind a git URL
_ARCHIVE_RATIO = 4  # text usually shrinks to a quarter

_OWN_RECORDS = frozenset((".git", ".hg", ".svn"))  # not files of the repository

# A file on its way in: its path, and its bytes or why it is left out.
Found = tuple[str, bytes | str]


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
        key = fingerprint([(asdict(repository), state) for repository, state in group])
        shards.append(Shard(f"{number:05}", tuple(repository for repository, _ in group), key))
    return shards


def crawl_shard(out: Path, shard: Shard, limits: Limits) -> Result:
    kept, dropped, about = [], [], {}
    for repository in shard.inputs:
        location = Path(repository.location)
        about[repository.name] = dict(repository.about)
        if repository.kind == "git":
            location = _clone(repository.location, out / "cache", limits)
            about[repository.name] |= {"url": repository.location, "commit": _commit(location)}
        found = _archive(location, limits) if repository.kind == "archive" else _folder(location, out, limits)
        for path, content in found:
            language = language_of(path)
            text, reason = _text(content) if isinstance(content, bytes) else ("", content)
            if reason:
                printable = path.encode("utf-8", "backslashreplace").decode()
                dropped.append({"repo": repository.name, "path": printable, "reason": reason})
            else:
                assert language is not None
                kept.append({"repo": repository.name, "path": path, "language": language.name, "text": text})
    for rows in (kept, dropped):
        rows.sort(key=lambda row: (row["repo"], row["path"]))
    for repository in shard.inputs:  # all of the shard is in memory: the clones have served
        if repository.kind == "git":
            shutil.rmtree(_clone_folder(repository.location, out / "cache"), ignore_errors=True)
    tables = {"part": pa.Table.from_pylist(kept, FILES), "dropped": pa.Table.from_pylist(dropped, DROPPED)}
    return Result(tables, tally(kept, dropped) | {"repositories": len(shard.inputs)}, {"repositories": about})


def _text(data: bytes) -> tuple[str, str]:
    """(text, "") or ("", reason)."""
    if b"\0" in data:
        return "", "binary"
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n"), ""
    except UnicodeDecodeError:
        return "", "not UTF-8"


def _refused(path: str, size: int, limits: Limits) -> str:
    """Why a file is not even read; "" if it is."""
    if not path.isprintable():
        return "unprintable path"  # a line break would leave the path comment
    if language_of(path) is None:
        return "unknown language"
    return "too large" if size > limits.max_file_bytes else ""


def _measure(repository: Repository, out: Path, limits: Limits) -> tuple[int, str]:
    """About how much text a repository holds, and a hash that changes when it does."""
    if repository.kind == "git":
        return _GIT_GUESS, ""
    if repository.kind == "archive":
        status = os.stat(repository.location)
        return status.st_size * _ARCHIVE_RATIO, fingerprint(status.st_size, status.st_mtime_ns)
    size, state = 0, hashlib.sha256()
    for path, entry in sorted(_walk(Path(repository.location), "", out), key=lambda found: found[0]):
        name = path.encode("utf-8", "surrogateescape")
        if isinstance(entry, str):
            state.update(b"%b\0%b\n" % (name, entry.encode()))
        else:
            status = entry.stat(follow_symlinks=False)
            state.update(b"%b\0%d %d\n" % (name, status.st_size, status.st_mtime_ns))
            size += 0 if _refused(path, status.st_size, limits) else status.st_size
    return size, state.hexdigest()


# ---- folders and clones ----------------------------------------------------------------------------------------------


def _walk(root: Path, folder: str, out: Path) -> Iterator[tuple[str, os.DirEntry[str] | str]]:
    """(path under root, entry) of every regular file, and (path, reason) of what is passed over."""
    try:
        entries = list(os.scandir(root / folder))
    except OSError:
        yield folder + "/", "unreadable"
        return
    for entry in entries:
        path = f"{folder}/{entry.name}" if folder else entry.name
        if entry.is_symlink():
            yield path, "symbolic link"
        elif entry.is_dir():
            below = Path(entry.path)
            if entry.name in VENDORED:
                yield path + "/", "vendored folder"
            elif is_repository(below) and not is_repository(root):
                continue  # a repository of its own (sources.py)
            elif entry.name not in _OWN_RECORDS and below != out:
                yield from _walk(root, path, out)
        elif entry.is_file():
            yield path, entry
        else:
            yield path, "not a regular file"


def _folder(root: Path, out: Path, limits: Limits) -> Iterator[Found]:
    for path, entry in _walk(root, "", out):
        if isinstance(entry, str):
            yield path, entry
            continue
        reason = _refused(path, entry.stat(follow_symlinks=False).st_size, limits)
        try:
            yield path, reason or Path(entry.path).read_bytes()
        except OSError:
            yield path, "unreadable"


def _clone_folder(url: str, cache: Path) -> Path:
    return cache / hashlib.sha256(url.encode()).hexdigest()


def _clone(url: str, cache: Path, limits: Limits) -> Path:
    """The clone of a URL; one that an interrupted run completed is used again."""
    folder = _clone_folder(url, cache)
    if not folder.exists():
        unfinished = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        try:
            _git("clone", "--quiet", "--depth", "1", "--", url, str(unfinished), seconds=limits.clone_seconds)
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"{url}: git clone took over {limits.clone_seconds} s; raise [crawl] clone_seconds"
            ) from None
        except subprocess.CalledProcessError as error:
            said = " ".join(error.stderr.split()) or f"exit status {error.returncode}"
            raise ValueError(
                f"{url}: git clone failed ({said}); check the URL, or take it out of the sources"
            ) from None
        os.replace(unfinished, folder)
    return folder


def _commit(clone: Path) -> str:
    try:
        return _git("-C", str(clone), "rev-parse", "--verify", "HEAD")
    except subprocess.CalledProcessError:
        return ""  # a repository without any commit


def _git(*arguments: str, seconds: int = 60) -> str:
    # No question may be asked: there is nobody at the terminal of a crawl.
    quiet = {"GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": "ssh -o BatchMode=yes", "GIT_LFS_SKIP_SMUDGE": "1"}
    try:
        done = subprocess.run(
            ["git", *arguments],
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env=os.environ | quiet,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise ValueError("the program git is not installed; install it, or give folders and archives only") from None
    return done.stdout.strip()


# ---- archives --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    path: str
    size: int
    kind: str  # "file", "link" or "other"
    link: str | None  # where a link leads, from the archive's root
    open: Callable[[], IO[bytes] | None] | None  # of a file


def _archive(file: Path, limits: Limits) -> Iterator[Found]:
    """The files of an archive, read without unpacking it; one folder around everything is taken off.

    Raises ValueError for an archive that is damaged, or has a member or link that leaves the archive's folder.
    """
    found: dict[str, bytes | str] = {}  # of two members of one name the later counts, as when unpacking
    try:
        for member in _zip_members(file) if file.name.lower().endswith(".zip") else _tar_members(file):
            path = _inside(member.path, file)
            if member.link is not None:
                _inside(member.link, file)
            if not _OWN_RECORDS.intersection(path.split("/")):
                found[path] = _member_content(member, path, limits)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError) as error:
        said = " ".join(str(error).split())  # tarfile's runs over several lines
        raise ValueError(f"{file}: this archive cannot be read ({said}); fetch it again, or take it out") from error
    tops = {path.split("/", 1)[0] if "/" in path else "" for path in found}
    around = len(tops.pop()) + 1 if len(tops) == 1 and "" not in tops else 0
    vendored = set()
    for path, content in found.items():
        parts = path[around:].split("/")
        cut = next((i for i, part in enumerate(parts[:-1]) if part in VENDORED), None)
        if cut is None:
            yield path[around:], content
        else:
            vendored.add("/".join(parts[: cut + 1]) + "/")
    yield from ((path, "vendored folder") for path in vendored)


def _inside(path: str, file: Path) -> str:
    """A member's path in one form, if it stays within the archive's folder."""
    plain = posixpath.normpath(path.replace("\\", "/"))
    if plain.startswith(("/", "../")) or plain == ".." or re.match("[A-Za-z]:", plain):
        raise ValueError(f"{file}: its member or link {path!r} leads out of the archive; do not trust it, take it out")
    return plain


def _member_content(member: _Member, path: str, limits: Limits) -> bytes | str:
    if member.kind != "file":
        return "symbolic link" if member.kind == "link" else "not a regular file"
    reason = _refused(path, member.size, limits)
    if reason:
        return reason
    stream = member.open() if member.open else None
    assert stream is not None
    with stream:
        data = stream.read(limits.max_file_bytes + 1)  # the size that the archive states may be a lie
    return data if len(data) <= limits.max_file_bytes else "too large"


def _tar_members(file: Path) -> Iterator[_Member]:
    with tarfile.open(file) as archive:
        for info in archive:
            if info.isdir():
                _inside(info.name, file)
            elif info.issym():
                target = posixpath.join(posixpath.dirname(info.name), info.linkname)
                yield _Member(info.name, 0, "link", target, None)
            elif info.islnk():
                yield _Member(info.name, 0, "link", info.linkname, None)
            elif info.isreg():
                yield _Member(info.name, info.size, "file", None, partial(archive.extractfile, info))
            else:
                yield _Member(info.name, 0, "other", None, None)


def _zip_members(file: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.is_dir():
                _inside(info.filename, file)
            elif stat.S_ISLNK(info.external_attr >> 16):
                with archive.open(info) as stream:
                    target = stream.read(4096).decode("utf-8", "replace")
                target = posixpath.join(posixpath.dirname(info.filename), target)
                yield _Member(info.filename, 0, "link", target, None)
            else:
                yield _Member(info.filename, info.file_size, "file", None, partial(archive.open, info))
