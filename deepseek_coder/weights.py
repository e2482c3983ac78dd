"""A model folder <-> a `Decoder`, through `convert`.

Foreign tensors are streamed one at a time into the rows of our fused weights, so that loading needs the model once
and one tensor beside it, whatever the size; saving splits the rows again.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import convert
from convert import names
from convert.checkpoint import Checkpoint
from convert.writer import DEFAULT_SHARD_SIZE, write_folder

from .config import ModelConfig
from .model import Decoder
from .tokenizer import Tokenizer


def load(
    path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[Decoder, Tokenizer]:
    """A model and its tokenizer from a Hugging Face folder or a `.gguf` file.

    device: default cuda if there is one, otherwise cpu. dtype: default bfloat16 on a GPU and float32 on a CPU.
    The model is in eval mode. Raises ValueError or FileNotFoundError with one sentence that says what to do.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    checkpoint = convert.open_checkpoint(path)
    with checkpoint:
        tokenizer = Tokenizer(checkpoint.tokenizer_files, str(path))
        config = config_of(checkpoint)
        # Rows may be more than tokens, as padding; an id without a row would end in an index error much later.
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"{path}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the weights rows for "
                f"{config.vocab_size} ids; tokenizer and weights belong to different models, download both again"
            )
        with torch.device("meta"):
            model = Decoder(config).to(dtype)
        model = model.to_empty(device=device)
        copy_weights(model, checkpoint)
    return model.eval(), tokenizer


def config_of(checkpoint: Checkpoint) -> ModelConfig:
    """The checkpoint's config, with the EOS ids of generation_config.json where it names some."""
    eos = checkpoint.generation_config.get("eos_token_id")
    return ModelConfig.from_dict({**checkpoint.config, **({} if eos is None else {"eos_token_id": eos})})


@torch.no_grad()
def copy_weights(model: Decoder, checkpoint: Checkpoint) -> None:
    """Fill every parameter of `model` from the checkpoint's tensors, converted to the parameter's dtype."""
    parameters = dict(model.named_parameters())
    for name, parts in names.fused(model.config.to_dict()).items():
        row = 0
        for part in parts:
            parameters[name][row : row + part.shape[0]].copy_(checkpoint.tensor(part.name))
            row += part.shape[0]


def split_weights(config: ModelConfig, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and tensors of our fused `weights`, one at a time."""
    for name, parts in names.fused(config.to_dict()).items():
        row = 0
        for part in parts:
            yield part.name, weights[name][row : row + part.shape[0]]
            row += part.shape[0]


def save(
    path: str | Path,
    model: Decoder,
    tokenizer: Tokenizer,
    *,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    force: bool = False,
) -> None:
    """Write a Hugging Face folder (transformers-4 form), as a whole or not at all.

    Tensors keep the model's dtype. An existing folder is refused unless `force`.
    """
    write_folder(
        path,
        model.config.to_dict(),
        split_weights(model.config, dict(model.named_parameters())),
        tokenizer_files=tokenizer.files,
        max_shard_size=max_shard_size,
        force=force,
    )
