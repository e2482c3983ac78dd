"""A recipe: one short TOML that says everything about a training run. Unknown keys are errors, not ignored."""

import dataclasses
import itertools
import math
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek_coder.config import ModelConfig

from . import fim
from .mixture import Mix

_EPOCHS = "a table of folders and numbers above 0, and not given beside data.weights"
# What the blocks may compute in; weights and optimizer state stay in float32.
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Model:
    """Sizes of a new model, or `released` = the name of a DeepSeek-Coder whose sizes to take (RoPE is as given here).

    Vocabulary, BOS and EOS come from the tokenizer of the token folder. vocab_multiple: embedding rows are padded
    to a multiple of it.
    """

    released: str = ""
    hidden_size: int = 0
    intermediate_size: int = 0
    num_layers: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 128
    rope_theta: float = 100000.0
    rope_factor: float = 1.0
    tie_embeddings: bool = False
    init_std: float = 0.006
    vocab_multiple: int = 128


@dataclass(frozen=True)
class Data:
    """tokens: folder made by `python -m pretrain tokens`. window: tokens in a training window.

    Instead of `tokens` several folders, in a table [data.weights] of folder = share of the tokens, or [data.epochs] of
    folder = how often it is read (`mixture.py`); only ratios count.
    fim_rate: share of documents that become FIM samples. fim_modes, fim_spans: each of them takes one of these, all as
    likely; a name given twice is twice as likely (`fim.py` says what they are).
    fim_loss: "all" tokens of FIM samples are trained on, or only the "middle".
    packing: "best_fit", whole documents that do not see each other; or "concat", as DeepSeek-Coder did: all in a row,
    cut where a window ends, and every token sees the whole window before it. workers: loader processes (0: none).
    """

    tokens: str = "tokens"
    weights: dict[str, float] = field(default_factory=dict)
    epochs: dict[str, float] = field(default_factory=dict)
    window: int = 4096
    fim_rate: float = 0.5
    fim_modes: tuple[str, ...] = ("psm",)
    fim_spans: tuple[str, ...] = ("char",)
    fim_loss: str = "all"
    packing: str = "best_fit"
    workers: int = 0

    @property
    def source(self) -> str | Mix:
        return Mix(self.weights, self.epochs) if self.weights or self.epochs else self.tokens


@dataclass(frozen=True)
class Optimizer:
    """AdamW and the three-stage schedule (`schedule.py`); defaults are DeepSeek's."""

    learning_rate: float = 5.3e-4
    warmup_steps: int = 2000
    stage_ends: tuple[float, ...] = (0.8, 0.9)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class Train:
    """run: the folder that receives metrics and checkpoints. batch: windows in an optimizer step, over all devices;
    micro_batch: windows in one forward of one device. The `_every` are in steps, 0 for never.
    validate_windows: held-out windows to validate on, 0 for all.

    init: a model folder to start from instead of random weights ("" for random).
    device, dtype: "" picks cuda with bfloat16 compute if there is a GPU, otherwise cpu with float32.
    """

    run: str = "run"
    steps: int = 1000
    batch: int = 8
    micro_batch: int = 1
    seed: int = 0
    init: str = ""
    validate_every: int = 0
    validate_windows: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    log_every: int = 10
    device: str = ""
    dtype: str = ""


@dataclass(frozen=True)
class Recipe:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)

    def model_config(self, vocab_size: int, bos: int | None, eos: int) -> ModelConfig:
        """The model's configuration for a tokenizer of `vocab_size` tokens."""
        rows = -(-vocab_size // self.model.vocab_multiple) * self.model.vocab_multiple
        rope: dict[str, Any] = {"rope_theta": self.model.rope_theta, "rope_factor": self.model.rope_factor}
        special: dict[str, Any] = {"bos_token_id": bos, "eos_token_ids": (eos,), "init_std": self.model.init_std}
        if self.model.released:
            try:
                config = ModelConfig.released(self.model.released)
            except KeyError as error:
                raise ValueError(f"model.released: {error.args[0]}") from None
            padded: dict[str, Any] = {
                "vocab_size": max(rows, config.vocab_size),
                "max_position_embeddings": self.data.window,
            }
            return dataclasses.replace(config, **padded, **rope, **special)
        sizes: dict[str, Any] = {
            key: getattr(self.model, key)
            for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        }
        return ModelConfig(
            vocab_size=rows,
            max_position_embeddings=self.data.window,
            tie_embeddings=self.model.tie_embeddings,
            **sizes,
            **rope,
            **special,
        )


def load(path: str | Path, changes: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe. changes: `section.key=value` (a TOML value, or a bare word for text), applied on top.

    Raises FileNotFoundError for a missing file; ValueError naming the file and the key for anything not understood.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe; recipes are TOML files, see pretrain/recipes")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML ({error})") from None
    for change in changes:
        key, equals, text = change.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not dot:
            raise ValueError(f"--set {change}: write section.key=value, such as train.steps=100")
        raw.setdefault(section, {})[name] = _value(text.strip())
    return from_dict(raw, str(path))


def from_dict(raw: dict[str, Any], source: str) -> Recipe:
    """A checked recipe from nested dicts; `source` names it in errors."""
    sections = {f.name: f.default_factory for f in dataclasses.fields(Recipe)}
    for name in raw:
        if name not in sections:
            raise ValueError(f"{source}: unknown section [{name}]; sections are {', '.join(sections)}")
    made = {
        name: _section(kind, raw.get(name, {}), f"{source}: {name}")  # type: ignore[arg-type]
        for name, kind in sections.items()
    }
    recipe = Recipe(**made)  # type: ignore[arg-type]
    _check(recipe, source)
    return recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)


def _check(recipe: Recipe, source: str) -> None:
    data, optimizer, train = recipe.data, recipe.optimizer, recipe.train
    ends, betas = optimizer.stage_ends, optimizer.betas
    numbers = all(isinstance(value, int | float) for value in (*ends, *betas))

    def positive(table: dict[str, float]) -> bool:
        return all(type(value) in (int, float) and 0 < value < math.inf for value in table.values())

    counts = [
        (f"{section}.{name}", value >= 0, "0 or more")
        for section in ("data", "optimizer", "train")
        for name, value in vars(getattr(recipe, section)).items()
        if isinstance(value, int)
    ]
    rules = [
        *counts,
        ("model.vocab_multiple", recipe.model.vocab_multiple >= 1, "1 or more"),
        ("data.fim_rate", 0 <= data.fim_rate <= 1, "between 0 and 1"),
        ("data.fim_modes", _some_of(data.fim_modes, fim.MODES), f"a list of {', '.join(fim.MODES)}"),
        ("data.fim_spans", _some_of(data.fim_spans, fim.SPANS), f"a list of {', '.join(fim.SPANS)}"),
        ("data.fim_loss", data.fim_loss in ("all", "middle"), '"all" or "middle"'),
        ("data.packing", data.packing in ("best_fit", "concat"), '"best_fit" or "concat"'),
        ("data.weights", positive(data.weights), "a table of folders and numbers above 0"),
        ("data.epochs", positive(data.epochs) and not (data.epochs and data.weights), _EPOCHS),
        ("optimizer.learning_rate", 0 < optimizer.learning_rate < math.inf, "above 0"),
        (
            "optimizer.stage_ends",
            numbers and all(a < b for a, b in itertools.pairwise((0, *ends))) and (not ends or ends[-1] <= 1),
            "increasing fractions of the steps, such as [0.8, 0.9]",
        ),
        (
            "optimizer.betas",
            numbers and len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
            "two numbers from 0 to below 1, such as [0.9, 0.95]",
        ),
        ("train.micro_batch", train.micro_batch >= 1, "1 or more"),
        (
            "train.batch",
            train.batch >= 1 and train.batch % max(train.micro_batch, 1) == 0,
            f"a multiple of train.micro_batch, {train.micro_batch}",
        ),
        ("train.device", train.device in ("", "cpu", "cuda"), '"cpu", "cuda" or "" for what is there'),
        ("train.dtype", train.dtype in ("", *DTYPES), f'one of {", ".join(DTYPES)}, or "" for the device\'s own'),
    ]
    for key, holds, wanted in rules:
        if not holds:
            section, name = key.split(".")
            raise ValueError(f"{source}: {key} is {getattr(getattr(recipe, section), name)!r}; it must be {wanted}")


def _some_of(values: tuple[typing.Any, ...], known: tuple[str, ...]) -> bool:
    return len(values) > 0 and all(value in known for value in values)


def _section(kind: type, raw: Any, where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: a section [{where.rsplit(' ', 1)[-1]}] is expected, found {raw!r}")
    values = {}
    for key, value in raw.items():
        if key not in fields:
            raise ValueError(f"{where}.{key} is not a known key; known are {', '.join(fields)}")
        default = {} if fields[key].default is dataclasses.MISSING else fields[key].default  # the tables of data
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(default, tuple) and isinstance(value, list):
            value = tuple(value)
        if type(value) is not type(default):
            raise ValueError(f"{where}.{key} is {value!r}; {type(default).__name__} is expected")
        values[key] = value
    return kind(**values)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
