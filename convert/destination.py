"""Puts a finished file or folder in its place; nobody may ever see half a model.

Everything is written under a temporary name beside the destination and renamed at the end; whatever happens before
that, a full disk or a killed process, leaves the destination as it was. A process killed between the two renames that
replace an old folder leaves it set aside, and the next call for the same destination puts it back.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def temporary_of(destination: Path) -> Path:
    """Where the new file or folder grows. The name is fixed, so that the next call finds what a killed process left."""
    return destination.parent / f".{destination.name}.tmp"


def _set_aside(destination: Path) -> Path:
    """Where a replaced folder waits until the new one is in place."""
    return destination.parent / f".{destination.name}.old"


@contextmanager
def writing(destination: Path) -> Iterator[None]:
    """Turns what the disk refuses into one sentence; the temporary files that the error might name are gone by then."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # The safetensors library reports a full disk as its own error.
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise OSError(
            f"{destination}: cannot be written ({reason}); free some space or choose another disk or folder"
        ) from None


def recover(destination: Path) -> None:
    """Put an old folder back that a killed process set aside for a new one that never came, or finish deleting it."""
    temporary, old = temporary_of(destination), _set_aside(destination)
    if old.exists() and _is_free(destination):
        old.rename(destination)
    elif old.exists():
        shutil.rmtree(temporary, ignore_errors=True)
        _delete(old, temporary)


def _delete(old: Path, temporary: Path) -> None:
    """Under the temporary name it is never put back, should the deletion be interrupted half-way."""
    old.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def _is_free(destination: Path) -> bool:
    return not destination.exists() or (destination.is_dir() and not any(destination.iterdir()))


def refuse_existing_folder(destination: Path, force: bool) -> None:
    """FileExistsError for whatever is in the way of a new model folder; `force` allows replacing another one."""
    if _is_free(destination):
        return
    if not destination.is_dir():
        raise FileExistsError(f"{destination}: is a file; choose another destination")
    if not force:
        raise FileExistsError(
            f"{destination}: exists and is not empty; choose another folder or add --force (force=True)"
        )
    # Replacing deletes the old folder, so a slip such as the home folder must not pass.
    known = ("config.json", "tokenizer.json", "adapter_config.json")
    if not any((destination / name).is_file() for name in known) or any(
        entry.is_dir() for entry in destination.iterdir()
    ):
        raise FileExistsError(
            f"{destination}: is no plain model folder (config.json and files only), so it is not replaced; "
            "choose another destination or delete it yourself"
        )


@contextmanager
def new_folder(path: str | Path, force: bool, resumable: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A temporary folder that is put in place of `path` at the end and is gone after an error.

    resumable   says whether the caller can go on with a temporary folder that it finds; such a folder is left where it
                is, and one that is being filled survives Ctrl-C

    Raises FileExistsError for a destination in the way, OSError for what the disk refuses.
    """
    destination = Path(path).resolve()
    temporary = temporary_of(destination)
    with writing(destination):
        recover(destination)
        if resumable is None or not resumable(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
    refuse_existing_folder(destination, force)
    with writing(destination):
        temporary.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        with writing(destination):
            for file in temporary.iterdir():
                flush_to_disk(file)
            move_into_place(destination)
    except BaseException as error:
        if resumable is None or isinstance(error, Exception):
            shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def new_file(path: str | Path, force: bool) -> Iterator[Path]:
    """A temporary file, put in place of `path` at the end; gone after an error. Raises like `new_folder`."""
    destination = Path(path).resolve()
    temporary = temporary_of(destination)
    if destination.is_dir():
        raise FileExistsError(f"{destination}: is a folder; choose another destination")
    if destination.exists() and not force:
        raise FileExistsError(f"{destination}: exists; choose another file or add --force (force=True)")
    with writing(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        with writing(destination):
            flush_to_disk(temporary)
            temporary.replace(destination)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(file: Path) -> None:
    """Wait until the file is on the disk, and let go of its pages: who reads it next reads what the disk holds."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def move_into_place(destination: Path) -> None:
    """Rename the temporary folder to `destination`; an existing one is set aside first and deleted last."""
    temporary, old = temporary_of(destination), _set_aside(destination)
    if _is_free(destination):
        temporary.replace(destination)
        return
    destination.rename(old)
    try:
        temporary.rename(destination)
    except BaseException:
        old.rename(destination)
        raise
    _delete(old, temporary)
