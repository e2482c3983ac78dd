"""Git repositories: shallow clones, each at a stated commit if there is one, kept in a cache of folders."""

import hashlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from .sources import without_login


def folder_of(url: str, commit: str | None, cache: Path) -> Path:
    return cache / hashlib.sha256(f"{url}\n{commit or ''}".encode()).hexdigest()


def clone(url: str, commit: str | None, cache: Path, seconds: int, tries: int, login: str = "") -> Path:
    """The work tree of a URL at a commit (None: the default branch's); one that is in the cache is used again.

    login: user:password or a token for an http(s) URL. It is not kept in the clone, and no message holds it.
    Raises ValueError when git fails `tries` times or needs more than `seconds`, or the commit is not there.
    """
    folder = folder_of(url, commit, cache)
    if folder.exists():
        return folder
    unfinished = folder.with_name(folder.name + ".tmp")
    cache.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, tries + 1):
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            _fetch(url, commit, unfinished, seconds, _logged_in(url, login))
            break
        except subprocess.TimeoutExpired:
            reason = f"git clone took over {seconds} s; raise [crawl] clone_seconds"
        except subprocess.CalledProcessError as error:
            said = without_login(" ".join(error.stderr.split())) or f"exit status {error.returncode}"
            reason = f"git clone failed ({said}); check the URL, or take it out of the sources"
        if attempt == tries:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise ValueError(f"{url}: {reason}")
        time.sleep(2 ** (attempt - 1))
    os.replace(unfinished, folder)
    return folder


def _logged_in(url: str, login: str) -> dict[str, str]:
    """Environment variables by which git asks for a URL with a login, which the command and the clone are without."""
    scheme, _, rest = url.partition("://")
    if not login or not scheme.lower().startswith("http"):
        return {}
    host = rest.partition("/")[0]
    count = int(os.environ.get("GIT_CONFIG_COUNT") or 0)
    rewrite = (f"url.{scheme}://{login}@{host}/.insteadOf", f"{scheme}://{host}/")
    return {
        "GIT_CONFIG_COUNT": str(count + 1),
        f"GIT_CONFIG_KEY_{count}": rewrite[0],
        f"GIT_CONFIG_VALUE_{count}": rewrite[1],
    }


def _fetch(url: str, commit: str | None, folder: Path, seconds: int, settings: dict[str, str]) -> None:
    if commit is None:
        _git("clone", "--quiet", "--depth", "1", "--", url, str(folder), seconds=seconds, settings=settings)
        return
    at = ("-C", str(folder))
    _git("init", "--quiet", str(folder))
    _git(*at, "remote", "add", "origin", url)
    try:
        _git(*at, "fetch", "--quiet", "--depth", "1", "origin", commit, seconds=seconds, settings=settings)
    except subprocess.CalledProcessError:  # a server that gives out branches only: fetch them whole
        _git(*at, "fetch", "--quiet", "origin", seconds=seconds, settings=settings)
    _git(*at, "checkout", "--quiet", "--detach", commit, seconds=seconds)


def head(clone: Path) -> str:
    try:
        return _git("-C", str(clone), "rev-parse", "--verify", "HEAD")
    except subprocess.CalledProcessError:
        return ""  # a repository without any commit


def _git(*arguments: str, seconds: int = 60, settings: dict[str, str] | None = None) -> str:
    # No question may be asked: there is nobody at the terminal of a crawl. Hooks of the user stay out.
    quiet = {"GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": "ssh -o BatchMode=yes", "GIT_LFS_SKIP_SMUDGE": "1"}
    command = ["git", "-c", "core.hooksPath=/dev/null", *arguments]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | quiet | (settings or {}),
            start_new_session=True,
        )
    except FileNotFoundError:
        raise ValueError("the program git is not installed; install it, or give folders and archives only") from None
    with process:
        try:
            said, complaints = process.communicate(timeout=seconds)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # its helpers too, who would wait for a silent server for ever
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, said, complaints)
    return said.strip()
