"""Git repositories: shallow clones, each at a stated commit if there is one, kept in a cache of folders."""

import hashlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path


def folder_of(url: str, commit: str | None, cache: Path) -> Path:
    return cache / hashlib.sha256(f"{url}\n{commit or ''}".encode()).hexdigest()


def clone(url: str, commit: str | None, cache: Path, seconds: int, tries: int) -> Path:
    """The work tree of a URL at a commit (None: the default branch's); one that is in the cache is used again.

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
            _fetch(url, commit, unfinished, seconds)
            break
        except subprocess.TimeoutExpired:
            reason = f"git clone took over {seconds} s; raise [crawl] clone_seconds"
        except subprocess.CalledProcessError as error:
            said = " ".join(error.stderr.split()) or f"exit status {error.returncode}"
            reason = f"git clone failed ({said}); check the URL, or take it out of the sources"
        if attempt == tries:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise ValueError(f"{url}: {reason}")
        time.sleep(2 ** (attempt - 1))
    os.replace(unfinished, folder)
    return folder


def _fetch(url: str, commit: str | None, folder: Path, seconds: int) -> None:
    if commit is None:
        _git("clone", "--quiet", "--depth", "1", "--", url, str(folder), seconds=seconds)
        return
    at = ("-C", str(folder))
    _git("init", "--quiet", str(folder))
    _git(*at, "remote", "add", "origin", url)
    try:
        _git(*at, "fetch", "--quiet", "--depth", "1", "origin", commit, seconds=seconds)
    except subprocess.CalledProcessError:  # a server that gives out branches only: fetch them whole
        _git(*at, "fetch", "--quiet", "origin", seconds=seconds)
    _git(*at, "checkout", "--quiet", "--detach", commit, seconds=seconds)


def head(clone: Path) -> str:
    try:
        return _git("-C", str(clone), "rev-parse", "--verify", "HEAD")
    except subprocess.CalledProcessError:
        return ""  # a repository without any commit


def _git(*arguments: str, seconds: int = 60) -> str:
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
            env=os.environ | quiet,
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
