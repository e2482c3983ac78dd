"""What `python -m convert --inspect PATH` prints: a model in one table, with what is missing."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import names, open_checkpoint
from .adapter import describe_adapter
from .checkpoint import TOKENIZER_FILES, Checkpoint
from .huggingface import read_config


def print_description(path: Path) -> None:
    """Print the table. Raises ValueError or FileNotFoundError when there is not even a config."""
    table = Table("", str(path), title_justify="left")
    for what, value in _describe(path):
        # Some of it comes from the file: nothing that speaks to the terminal.
        table.add_row(what, "".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in value))
    Console(markup=False, emoji=False, highlight=False).print(table)


def _describe(path: Path) -> list[tuple[str, str]]:
    """Rows of the table: what, value. Whatever is missing becomes a row, as long as there is a config."""
    if (path / "adapter_config.json").is_file():
        return describe_adapter(path)
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        with open_checkpoint(path) as checkpoint:
            missing = [] if checkpoint.shapes else ["weights: this file holds a vocabulary only"]
            try:
                tokenizer = list(checkpoint.tokenizer_files)
            except ValueError as error:
                tokenizer, missing = [], [*missing, f"tokenizer: {error}"]
            if not tokenizer and not missing:
                missing = ["tokenizer"]
            return _rows(checkpoint.config, checkpoint if checkpoint.shapes else None, tokenizer, missing)
    config = read_config(folder)
    tokenizer = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    missing = [] if {"tokenizer.json", "tokenizer.model"} & set(tokenizer) else ["tokenizer.json"]
    try:
        with open_checkpoint(folder) as checkpoint:
            return _rows(config, checkpoint, tokenizer, missing)
    except (ValueError, OSError) as error:
        return _rows(config, None, tokenizer, [*missing, str(error)])


def _rows(
    config: dict[str, Any], checkpoint: Checkpoint | None, tokenizer: list[str], missing: list[str]
) -> list[tuple[str, str]]:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    scaling = config["rope_scaling"]
    parameters = sum(math.prod(shape) for shape in names.huggingface(config).values())
    rows = [
        ("architecture", config["architectures"][0]),
        ("layers", f"{config['num_hidden_layers']} of width {config['hidden_size']} / {config['intermediate_size']}"),
        ("attention", f"{heads} heads of {names.head_dim(config)}, {kv_heads} for keys and values"),
        (
            "positions",
            f"{config['max_position_embeddings']}, rope theta {config['rope_theta']:g}"
            + (f", linear factor {scaling['factor']:g}" if scaling else ""),
        ),
        ("vocabulary", f"{config['vocab_size']}{', tied head' if config['tie_word_embeddings'] else ''}"),
        ("parameters", f"{parameters:,}"),
    ]
    if checkpoint is not None:
        counts = Counter(checkpoint.stored.values())
        size = sum(file.stat().st_size for file in checkpoint.weight_files)
        rows += [
            ("dtypes", ", ".join(f"{kind} ({count} tensors)" for kind, count in counts.most_common())),
            ("shards", f"{len(checkpoint.weight_files)}, {size / 1e9:,.2f} GB"),
        ]
    else:
        rows.append(("dtypes", config.get("torch_dtype", "unknown")))
    rows.append(("tokenizer", ", ".join(tokenizer) or "none"))
    rows.append(("missing", "\n".join(missing) or "nothing"))
    return rows
