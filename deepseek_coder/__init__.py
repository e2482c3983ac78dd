"""DeepSeek-Coder from scratch: the decoder, its tokenizer and prompts, generation."""

import sys

import kernels

# Hugging Face publishes another package under the import name `kernels`; with it nothing here can work. Every program
# of the project comes through here first, so this is where one line can be said instead of a traceback.
if getattr(kernels, "PROJECT", None) != "deepseek-coder-torch":
    print(
        f"error: the package `kernels` at {kernels.__file__} is Hugging Face's, not DeepSeek-Coder's; both cannot live "
        "in one environment: run `pip uninstall kernels`, then install deepseek-coder-torch again",
        file=sys.stderr,
    )
    sys.exit(2)

from . import prompts
from .config import ModelConfig
from .generation import generate
from .model import Decoder
from .tokenizer import Tokenizer
from .weights import load, save

__all__ = ["Decoder", "ModelConfig", "Tokenizer", "generate", "load", "prompts", "save"]
