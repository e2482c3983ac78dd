"""What every checkpoint offers, whatever the format of its files.

Opening reads headers only. Tensors come one at a time through `tensor`, so that a model larger than memory can be
converted, and a loader that copies each tensor into place never holds the model twice.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from . import names

OFFICIAL_WEIGHTS = (
    "official weights are at huggingface.co/deepseek-ai/deepseek-coder-1.3b-base, -6.7b-instruct and so on"
)
# What may lie in a Hugging Face folder beside the weights and belongs to the tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class Deferred(NamedTuple):
    """A tensor of `nbytes` bytes that a writer makes when its turn comes, with room for it."""

    nbytes: int
    make: Callable[[], torch.Tensor]


class Checkpoint(ABC):
    """A finished model on disk, with Hugging Face names. A context manager; `close` releases the files.

    source              the folder or file
    config              config.json in the transformers-4 form (see `normalise_config`)
    generation_config   generation_config.json, {} when there is none
    shapes              tensor name -> shape, from headers only
    dtypes              tensor name -> the dtype that `tensor` returns
    stored              tensor name -> the format in the file: "BF16", "Q4_1", ...
    """

    source: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    stored: dict[str, str]

    @property
    @abstractmethod
    def tokenizer_files(self) -> dict[str, bytes]:
        """File name -> content, for those of `TOKENIZER_FILES` that are there."""

    @property
    @abstractmethod
    def weight_files(self) -> list[Path]:
        """The files that hold the tensors."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name` on the CPU, shape `shapes[name]`, dtype `dtypes[name]`. KeyError for an unknown name."""

    @abstractmethod
    def close(self) -> None:
        """Release the files. Tensors handed out stay valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """File name -> content, for those of `TOKENIZER_FILES` that a folder holds."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype`, rounded to nearest. ValueError if float16, whose range is small, cannot hold it."""
    if dtype == tensor.dtype:
        return tensor
    converted = tensor.to(dtype)
    # Infinite weights would give NaN much later.
    if dtype is torch.float16 and max(map(abs, converted.aminmax())) == torch.inf:
        raise ValueError(f"tensor {name} has values that float16 cannot hold; use --dtype bfloat16 or float32")
    return converted


def check(checkpoint: Checkpoint) -> None:
    """Compare names and shapes with what the config says; ValueError names the first tensor that differs."""
    expected = names.huggingface(checkpoint.config)
    where = checkpoint.source
    for name, shape in expected.items():
        if name not in checkpoint.shapes:
            raise ValueError(
                f"{where}: tensor {name} {shape} is missing; download the model again or correct its config"
            )
        if checkpoint.shapes[name] != shape:
            raise ValueError(
                f"{where}: tensor {name} has shape {checkpoint.shapes[name]}, but the config says {shape}; "
                "weights and config belong to different models"
            )
    for name in checkpoint.shapes:
        if name not in expected:
            raise ValueError(
                f"{where}: unexpected tensor {name!r:.100} {checkpoint.shapes[name]}; "
                "only plain Llama models are supported"
            )
