"""LoRA adapters in PEFT's layout: read, merged into a base model, written.

An adapter adds `scale * B @ A` to a matrix (out, in): A is (r, in), B (out, r), the scale alpha / r, or
alpha / sqrt(r) with rank-stabilised LoRA. On disk every matrix of the Hugging Face layout has its own pair. In memory
q, k, v and gate, up are fused; a pair for a fused matrix is split exactly, each part getting A and its rows of B. In
the other direction parts with pairs of their own stay apart, as LoRA keeps one pair for each part.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from . import names
from .checkpoint import Checkpoint
from .destination import new_folder, writing
from .files import open_tensors
from .json_files import read_json

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WHOLE = {
    "base_model.model.model.embed_tokens.weight": "model.embed_tokens.weight",
    "base_model.model.lm_head.weight": "lm_head.weight",
    "base_model.model.lm_head.base_layer.weight": "lm_head.weight",
}
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Settings of PEFT that change the arithmetic in a way that is not computed here.
_REFUSED = (
    *("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices"),
    *("layer_replication", "target_parameters", "alora_invocation_tokens", "monteclora_config", "use_bdlora"),
    *("arrow_config", "kasa_config"),
)
# Beginnings that leave the base model as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, ...) take something out of it,
# which PEFT computes again when it loads the adapter.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


class Pair(NamedTuple):
    """A (r, in) and B (out, r) of one matrix, in the dtype of the file, and the factor in front of their product."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class Adapter(NamedTuple):
    """What an adapter changes, under Hugging Face names such as model.layers.0.self_attn.q_proj.weight.

    replaced    whole embeddings and heads: PEFT stores them too when one of them is adapted
    """

    source: Path
    pairs: dict[str, Pair]
    replaced: dict[str, torch.Tensor]

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` with the adapter added, in its own dtype, as PEFT's merge_and_unload computes it on a CPU."""
        if name in self.replaced:
            weight = self.replaced[name].to(weight.dtype)
        if name not in self.pairs:
            return weight
        pair = self.pairs[name]
        # PEFT loads adapters as float32, multiplies and adds there, and rounds the sum once.
        delta = (pair.b.float() @ pair.a.float()).mul_(pair.scale)
        merged = torch.empty_like(weight)
        # Some rows at a time, as both terms in float32 and the result would be five times a bfloat16 matrix.
        for out, term, other in zip(merged.split(1024), weight.split(1024), delta.split(1024), strict=True):
            out.copy_(term + other)
        return merged


class Merged(Checkpoint):
    """A checkpoint with an adapter merged into its tensors as they are read."""

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter
        self.source, self.config, self.generation_config = base.source, base.config, base.generation_config
        self.shapes, self.dtypes, self.stored = base.shapes, base.dtypes, base.stored

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        return self._base.tokenizer_files

    @property
    def weight_files(self) -> list[Path]:
        return [*self._base.weight_files, _weights_of(self._adapter.source), self._adapter.source / _CONFIG]

    def tensor(self, name: str) -> torch.Tensor:
        return self._adapter.merge(name, self._base.tensor(name))

    def close(self) -> None:
        self._base.close()


def open_adapter(folder: str | Path, config: dict[str, Any]) -> Adapter:
    """Read an adapter for a model with this config (transformers-4 form) and check it against the model's shapes.

    Raises FileNotFoundError or ValueError: one sentence with the file, what is wrong and what to do.
    """
    folder = Path(folder)
    settings = _settings(folder)
    file = _weights_of(folder)
    found: dict[str, dict[str, torch.Tensor]] = {}
    replaced: dict[str, torch.Tensor] = {}
    shapes = names.huggingface(config)
    tensors = open_tensors(file)
    try:
        for key, (shape, _) in tensors.contents().items():
            if key in _WHOLE and shapes.get(_WHOLE[key]) == shape:
                replaced[_WHOLE[key]] = tensors.tensor(key)
                continue
            match = _KEY.fullmatch(key)
            if match is None:
                raise ValueError(
                    f"{file}: {key!r:.100} is no LoRA matrix of a linear layer; merge it with PEFT instead"
                )
            found.setdefault(match[1], {})[match[2]] = tensors.tensor(key)
    finally:
        tensors.close()
    pairs: dict[str, Pair] = {}
    for module, both in found.items():
        if set(both) != {"A", "B"}:
            raise ValueError(f"{file}: {module} has no lora_{'AB'[('A' in both)]}; save the adapter again")
        a, b = both["A"], both["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.is_floating_point():
            raise ValueError(f"{file}: {module} has A {tuple(a.shape)}, B {tuple(b.shape)}; save the adapter again")
        scale = _scale(settings, module, a.shape[0], folder / _CONFIG)
        pairs |= {name: Pair(*split, scale) for name, split in split_fused(f"{module}.weight", a, b, config).items()}
    if not pairs:
        raise ValueError(f"{file}: holds no LoRA matrices; save the adapter again")
    for name, pair in pairs.items():
        shape = (pair.b.shape[0], pair.a.shape[1])
        if shapes.get(name) != shape:
            raise ValueError(
                f"{file}: {name} is adapted as {shape}, the model has {shapes.get(name, 'no such matrix')}; adapter "
                "and model do not belong together"
            )
    return Adapter(folder, pairs, replaced)


def split_fused(
    name: str, a: torch.Tensor, b: torch.Tensor, config: dict[str, Any]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Hugging Face name -> (A, B) for one of our names; a fused matrix's parts share A and take their rows of B.

    A Hugging Face name comes back as it is. B (rows, r) of a fused matrix must have all its rows, else ValueError.
    """
    parts = names.fused(config).get(name)
    if parts is None:
        return {name: (a, b)}
    rows = [part.shape[0] for part in parts]
    if sum(rows) != b.shape[0]:
        raise ValueError(f"{name}: lora_B has {b.shape[0]} rows, the fused matrix {sum(rows)}; it is of another model")
    return {part.name: (a, rows_of_b) for part, rows_of_b in zip(parts, b.split(rows), strict=True)}


def write_adapter(
    path: str | Path,
    config: dict[str, Any],
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    alpha: float,
    *,
    base_model: str | None = None,
    force: bool = False,
) -> None:
    """Write an adapter folder that PEFT and vLLM load.

    config      of the base model, transformers-4 form
    pairs       Hugging Face or fused name, such as layers.0.attention.wqkv.weight -> A (r, in) and B (out, r), float
    alpha       the scale is alpha / r, with the rank of each pair
    base_model  where the base model is to be found, a note for PEFT

    Raises ValueError for matrices that are not the model's; FileExistsError and OSError as `write_folder`.
    """
    split = {k: v for name, (a, b) in pairs.items() for k, v in split_fused(name, a, b, config).items()}
    shapes = names.huggingface(config)
    tensors = {}
    for name, (a, b) in split.items():
        linear = len(shapes.get(name, ())) == 2 and name != "model.embed_tokens.weight"
        if not linear or shapes[name] != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit; the model has the linear layer "
                f"{shapes[name] if linear else 'not'}"
            )
        for letter, matrix in (("A", a), ("B", b)):
            # A copy: parts of a fused matrix share A, and files hold no shared tensors.
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_{letter}.weight"
            tensors[key] = matrix.detach().cpu().contiguous().clone()
    modules = {name.removesuffix(".weight"): a.shape[0] for name, (a, _) in split.items()}
    # By their last name, unless some layers have no pair: PEFT would make one up for them.
    targets = sorted({module.rpartition(".")[2] for module in modules})
    if len(modules) != len(targets) * config["num_hidden_layers"]:
        targets = sorted(modules)
    usual = max(set(modules.values()), key=list(modules.values()).count)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": usual,
        "rank_pattern": {module: rank for module, rank in modules.items() if rank != usual},
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "inference_mode": True,
    }
    with new_folder(path, force) as temporary, writing(Path(path).resolve()):
        save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"})
        (temporary / _CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def describe_adapter(folder: Path) -> list[tuple[str, str]]:
    """Rows of `--inspect`: what, value."""
    settings, missing = _settings(folder), "nothing"
    targets = settings.get("target_modules")
    try:
        _weights_of(folder)
    except FileNotFoundError as error:
        missing = str(error)
    return [
        ("adapter", "LoRA, merge it with --merge-adapter"),
        ("base model", str(settings.get("base_model_name_or_path") or "unknown")),
        ("rank", f"{settings['r']}, alpha {settings['lora_alpha']}"),
        ("matrices", ", ".join(sorted(map(str, targets))) if isinstance(targets, list) else str(targets or "unknown")),
        ("missing", missing),
    ]


def _weights_of(folder: Path) -> Path:
    for name in (_WEIGHTS, "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder}: no {_WEIGHTS}; an adapter folder holds it and {_CONFIG}")


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / _CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; an adapter folder holds {_CONFIG} and {_WEIGHTS}")
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type {settings.get('peft_type')!r:.80} is not supported; only LORA is")
    for key in _REFUSED:
        if settings.get(key):
            raise ValueError(f"{file}: {key} is not supported; merge this adapter with PEFT instead")
    beginning = settings.get("init_lora_weights")
    if beginning not in _PLAIN_BEGINNINGS:
        raise ValueError(
            f"{file}: init_lora_weights {beginning!r:.80} changes the base model too, which is not supported; merge "
            "this adapter with PEFT instead"
        )
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias {settings['bias']!r:.80} is not supported; only models without biases are")
    patterns = {**_patterns(settings, "rank_pattern", file), **_patterns(settings, "alpha_pattern", file)}
    for key, value in {"r": settings.get("r"), "lora_alpha": settings.get("lora_alpha"), **patterns}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
            raise ValueError(f"{file}: {key} is {value!r:.80}; it must be a positive number")
    return settings


def _patterns(settings: dict[str, Any], key: str, file: Path) -> dict[str, Any]:
    patterns = settings.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{file}: {key} is {patterns!r:.80}; it must be an object")
    for pattern in patterns:
        # PEFT takes any regular expression here; one from a stranger can run for years.
        if not re.fullmatch(r"\^?(\w|\.|\\\.){1,200}", pattern):
            raise ValueError(f"{file}: {key} {pattern!r:.80} is more than a module's name; merge it with PEFT instead")
    return patterns


def _scale(settings: dict[str, Any], module: str, rank: int, file: Path) -> float:
    """alpha / r, or alpha / sqrt(r), with the patterns' values where they name the module, as PEFT finds them."""

    def find(key: str, default: float) -> float:
        for pattern, value in (settings.get(key) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        return default

    expected = find("rank_pattern", settings["r"])
    if rank != expected:
        raise ValueError(f"{file}: {module} has rank {rank}, the config says {expected}; save the adapter again")
    return find("alpha_pattern", settings["lora_alpha"]) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
