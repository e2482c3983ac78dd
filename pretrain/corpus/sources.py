"""What the sources on the command line name: repositories, each a folder, a git URL or an archive.

A folder with .git is a repository. In a folder without, every folder below that has .git is one, and what remains
around them is one more. A list (.jsonl or .csv) has one repository in each row, under `url` or `path` (counted from the
list's own folder); of its other columns `stars`, `forks`, `licence` (or `license`), `created` and `commit` are read.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deepseek_coder.folders import VENDORED

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
LISTS = (".jsonl", ".csv")

_URL = re.compile(r"(https?|ssh|file)://.+|\w[\w.-]*@\w[\w.-]*:.+")  # not git's `ext::`, which runs commands
# Secrets in URLs: user:password or a token; of ssh, which needs the user, the password.
_LOGIN = re.compile(r"(?<=https://)[^/\s]*@|(?<=http://)[^/\s]*@|(?<=ssh://)([^/\s:@]*):[^/\s]*(?=@)", re.IGNORECASE)


@dataclass(frozen=True)
class Repository:
    name: str  # unique in a corpus
    kind: str  # "folder", "git" or "archive"
    location: str  # an absolute path, or the URL without a login
    # What a list says of it, None where it is silent. They choose repositories, and the one that keeps a duplicate.
    stars: int | None = None
    forks: int | None = None
    licence: str | None = None  # an SPDX expression
    created: str | None = None  # 2023-01-31, with or without a time behind it
    commit: str | None = None  # its id in hexadecimal digits: the state to take, of a git repository
    login: str = field(default="", repr=False)  # user:password or token of its URL, for git: in no table or message


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
        named[name] = replace(repository, name=name)
    return [named[name] for name in sorted(named)]


def _of_one(source: str, out: Path) -> list[Repository]:
    if _URL.fullmatch(source):
        location = without_login(source)
        secret = _LOGIN.search(source)
        return [Repository(_url_name(location), "git", location, login=secret[0].removesuffix("@") if secret else "")]
    if "://" in source:
        raise ValueError(
            f"{without_login(source)}: not a URL that git clones here; give one with https://, ssh://, file:// or "
            "git@host:"
        )
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"{source}: no such source; name a folder, a git URL, an archive or a .jsonl or .csv list"
        )
    path = path.resolve()
    if path.is_dir():
        return _of_folder(path, out)
    for suffix in ARCHIVES:
        if path.name.lower().endswith(suffix):
            return [Repository(path.name[: -len(suffix)], "archive", str(path))]
    raise ValueError(
        f"{source}: not a folder, a git URL or an archive ({', '.join(ARCHIVES)}); pack it, or name its folder"
    )


def without_login(text: str) -> str:
    """A text without the logins of the URLs in it."""
    return _LOGIN.sub(lambda match: match[1] or "", text)


def _url_name(url: str) -> str:
    """https://host/owner/name.git -> owner/name; file:///any/where/name -> name."""
    parts = [part for part in re.split(r"[/:]", url.rstrip("/").removesuffix(".git")) if part]
    return parts[-1] if url.startswith("file://") else "/".join(parts[-2:])


def _of_folder(root: Path, out: Path) -> list[Repository]:
    if is_repository(root):
        return [Repository(root.name, "folder", str(root))]
    found = [Repository(root.name, "folder", str(root))]
    folders = [str(root)]
    while folders:  # os.walk calls itself before Python 3.12, and folders may be nested more deeply than calls
        try:
            below = [entry.path for entry in os.scandir(folders.pop()) if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue  # the crawl records it
        for folder in sorted(below):
            if Path(folder).name in VENDORED or Path(folder) == out:
                continue
            if is_repository(Path(folder)):
                found.append(Repository(Path(folder).relative_to(root).as_posix(), "folder", folder))
            else:
                folders.append(folder)
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
        rows = list(_of_csv(path, text))
    else:
        for number, line in enumerate(text.split("\n"), 1):  # splitlines also splits at what JSON texts may hold
            if line.strip():
                try:
                    rows.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error}); write one object per line") from error
    found = []
    for number, row in rows:
        try:
            found += _of_row(row if isinstance(row, dict) else {}, path.parent, out)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{path}, line {number}: {error}") from None
    return found


def _of_csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row), with columns' names in lower case and without blanks around; cells without a column are left out."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # one of the columns may be a readme
    reader = csv.DictReader(io.StringIO(text), restval="")
    try:
        for row in reader:
            yield reader.line_num, {name.strip().lower(): cell.strip() for name, cell in row.items() if name}
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error}); quote what holds commas") from error


def _of_row(row: dict[str, Any], folder: Path, out: Path) -> list[Repository]:
    url, file = row.get("url"), row.get("path")
    if not (isinstance(url, str) and url) and not (isinstance(file, str) and file):
        raise ValueError("names no repository; give it a `url` or a `path`")
    facts: dict[str, Any] = {name: _count(row.get(name), name) for name in ("stars", "forks")}
    licence = row.get("licence") or row.get("license")
    if licence == "NOASSERTION":  # what forges say of a licence that they do not know; its file may tell
        licence = None
    for name, value, form in (
        ("licence", licence, r"[\w.+() -]+"),
        ("created", row.get("created"), r"\d{4}-\d\d-\d\d.*"),
        ("commit", row.get("commit"), r"[0-9a-fA-F]{7,64}"),
    ):
        if value and not (isinstance(value, str) and re.fullmatch(form, value)):
            raise ValueError(f"its {name} is {value!r}; write it like {_EXAMPLES[name]}, or leave it out")
        facts[name] = value or None
    found = _of_one(url or str(folder / Path(str(file)).expanduser()), out)
    if facts["commit"]:
        found = [_at_commit(repository) for repository in found]
    return [replace(repository, **facts) for repository in found]


_EXAMPLES = {"licence": "Apache-2.0", "created": "2023-01-31", "commit": "6d43fb980f9fee3c892a914eda09951f772ad10d"}


def _count(value: Any, name: str) -> int | None:
    if value in (None, ""):
        return None
    # Tables in which some numbers are missing often have the others as 12.0.
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,18}(\.0+)?", str(value)):
        raise ValueError(f"its {name} are {value!r}; write a whole number, or leave it out")
    return int(str(value).partition(".")[0])


def _at_commit(repository: Repository) -> Repository:
    """A folder at a commit is a clone of it: its work tree may hold anything."""
    if repository.kind == "folder" and is_repository(Path(repository.location)):
        return replace(repository, kind="git", location=Path(repository.location).as_uri())
    if repository.kind != "git":
        raise ValueError(f"{repository.location} has no commits; leave `commit` out")
    return repository
