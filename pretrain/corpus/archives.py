"""The files of .tar.* and .zip archives, read without unpacking them.

Nothing is ever written, so an archive cannot write outside of its folder; still, one with a member or a link that
climbs out was made to do harm, and the whole archive is refused.
"""

import lzma
import posixpath
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

_ERRORS = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError)


@dataclass(frozen=True)
class _Member:
    path: str
    size: int
    kind: str  # "file", "link" or "other"
    link: str | None  # where a link leads, from the archive's root
    open: Callable[[], IO[bytes] | None] | None  # of a file


def contents(file: Path, refuse: Callable[[str, int], str], limit: int) -> Iterator[tuple[str, bytes | str]]:
    """(path, content) of each member in the archive's order, or (path, reason); a path may come twice.

    refuse: of a path and a stated size, why this file is not even read, or "". limit: bytes read of a file at most.
    Raises ValueError for an archive that is damaged, or has a member or link that leaves the archive's folder.
    """
    try:
        for member in _zip_members(file) if file.name.lower().endswith(".zip") else _tar_members(file):
            path = _inside(member.path, file)
            if member.link is not None:
                _inside(member.link, file)
            if member.kind == "file":
                yield path, refuse(path, member.size) or _read(member, limit)
            else:
                yield path, "symbolic link" if member.kind == "link" else "not a regular file"
    except _ERRORS as error:
        said = " ".join(str(error).split())  # tarfile's runs over several lines
        raise ValueError(f"{file}: this archive cannot be read ({said}); fetch it again, or take it out") from error


def _read(member: _Member, limit: int) -> bytes | str:
    stream = member.open() if member.open else None
    assert stream is not None
    with stream:
        data = stream.read(limit + 1)  # the size that the archive states may be a lie
    return data if len(data) <= limit else "too large"


def _inside(path: str, file: Path) -> str:
    """A member's path in one form, if it stays within the archive's folder."""
    plain = posixpath.normpath(path.replace("\\", "/"))
    if plain.startswith(("/", "../")) or plain == ".." or re.match("[A-Za-z]:", plain):
        raise ValueError(f"{file}: its member or link {path!r} leads out of the archive; do not trust it, take it out")
    return plain


def _tar_members(file: Path) -> Iterator[_Member]:
    with tarfile.open(file) as archive:
        for info in archive:
            archive.members = []  # type: ignore[attr-defined]  # or it keeps one object for each of a million members
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
