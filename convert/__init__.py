"""Other people's checkpoint formats: names, shapes and files; nothing of the model itself.

Importing the package is cheap, because the commands of the other packages take `convert.command` from here; torch and
the readers are imported when a checkpoint is opened.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import Checkpoint


def open_checkpoint(path: str | Path) -> "Checkpoint":
    """Open a Hugging Face folder or a .gguf file; only headers are read.

    Raises FileNotFoundError or ValueError: one sentence with the path, what is wrong and what to do.
    """
    from .gguf import open_gguf
    from .huggingface import open_folder

    path = Path(path)
    if path.suffix == ".gguf" and not path.is_dir():
        return open_gguf(path)
    if path.is_file():
        raise ValueError(f"{path}: is neither a model folder nor a .gguf file; give the folder that holds config.json")
    return open_folder(path)
