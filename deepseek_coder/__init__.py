"""DeepSeek-Coder from scratch: the decoder, its tokenizer and prompts, generation.

What needs torch is imported when it is first asked for: a process that works on a corpus needs the languages and the
repositories only, and torch costs each of them seconds and 200 MB.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Hugging Face publishes another package under the import name `kernels`; with it nothing here can work. Every program
# of the project comes through here first, so this is where one line can be said instead of a traceback. Ours is told
# by its text, because importing it imports torch.
if (found := find_spec("kernels")) and not (
    found.origin and 'PROJECT = "deepseek-coder-torch"' in Path(found.origin).read_text("utf-8")
):
    print(
        f"error: the package `kernels` at {found.origin} is Hugging Face's, not DeepSeek-Coder's; both cannot live "
        "in one environment: run `pip uninstall kernels`, then install deepseek-coder-torch again",
        file=sys.stderr,
    )
    sys.exit(2)

from . import prompts
from .config import ModelConfig
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .generation import generate
    from .model import Decoder
    from .weights import load, save
else:
    _HOMES = {"Decoder": "model", "generate": "generation", "load": "weights", "save": "weights"}

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)


__all__ = ["Decoder", "ModelConfig", "Tokenizer", "generate", "load", "prompts", "save"]
