"""Files that are whole or not there, and the one sentence for a disk that refuses."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises ValueError, naming `path` and what to do, for an OSError inside; that of a full disk names no file."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror or error}); free space there or choose another folder, and "
            "run the same command again"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`with replacing(path) as temporary`: the file written to `temporary` becomes `path` if nothing was raised."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all. Raises ValueError when the disk refuses."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
