"""Other people's checkpoint formats: names, shapes and files; nothing of the model itself.

Importing the package is cheap, because the commands of the other packages take `convert.command` from here; torch and
the readers are imported when a checkpoint is opened.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import Checkpoint


def open_checkpoint(path: str | Path) -> "Checkpoint":
    """Open a Hugging Face folder, a .gguf file, a training checkpoint, or Meta's or llama2.c's weights.

    Only headers are read. Raises FileNotFoundError or ValueError: one sentence with the path, what is wrong and what to
    do.
    """
    from .gguf import open_gguf
    from .huggingface import open_folder
    from .meta import Consolidated, Llama2C

    path = Path(path)
    if path.suffix == ".gguf" and not path.is_dir():
        return open_gguf(path)
    if path.is_file():
        with path.open("rb") as file:
            # A single pickled shard ends like a file of llama2.c and is a zip archive or begins as a pickle.
            pickled = file.read(2) in (b"PK", b"\x80\x02")
        if path.suffix in (".pt", ".pth"):
            return Consolidated(path)
        if path.suffix == ".bin" and not pickled:
            return Llama2C(path)
        raise ValueError(f"{path}: is neither a model folder nor a .gguf file; give the folder that holds config.json")
    if (path / ".metadata").is_file():
        # Imported here, because torch.distributed takes its time.
        from .dcp import open_training

        return open_training(path)
    if (path / "params.json").is_file() and not (path / "config.json").is_file():
        return Consolidated(path)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ValueError(f"{path}: is a LoRA adapter; give its base model, and the adapter with --merge-adapter")
    return open_folder(path)
