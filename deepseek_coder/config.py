"""The shape of a model, and every released DeepSeek-Coder as data.

A `ModelConfig` holds only what changes the arithmetic: sizes, RoPE, epsilon, special ids. Its JSON form is the
`config.json` of a Hugging Face folder in the transformers-4 form, which every engine reads.

Numbers that are often misquoted: the 33B model has 8 KV *heads* (the paper's "group size 8"), `rope_theta` is 100000,
RoPE positions are divided by 4 at every length, and `max_position_embeddings` 16384 is already the extended context.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Llama-shaped decoder.

    rope_factor: linear scaling; positions are divided by it at every length. 1.0 is plain RoPE.
    eos_token_ids: generation stops at any of them; the first one ends training documents.
    init_std: standard deviation of the initial weights (DeepSeek LLM report, section 2.3).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    rope_theta: float = 100000.0
    rope_factor: float = 1.0
    max_position_embeddings: int = 16384
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    init_std: float = 0.006
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = {
            name: getattr(self, name)
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "max_position_embeddings",
            )
        }
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, not {self.head_dim}")
        if self.rope_factor <= 0 or self.rope_theta <= 0 or self.rms_norm_eps <= 0:
            raise ValueError("rope_factor, rope_theta and rms_norm_eps must be positive")

    @classmethod
    def released(cls, name: str) -> "ModelConfig":
        """The configuration of a released model, such as `deepseek-coder-1.3b-base`.

        Raises KeyError, listing the names, for any other name.
        """
        if name not in RELEASED:
            raise KeyError(f"{name!r} is not a released DeepSeek-Coder; released are: {', '.join(RELEASED)}")
        return RELEASED[name]

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelConfig":
        """From a `config.json` in the transformers-4 form, as `convert` returns it (already checked)."""
        eos = config.get("eos_token_id")
        scaling = config.get("rope_scaling")
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            rope_theta=float(config["rope_theta"]),
            rope_factor=float(scaling["factor"]) if scaling else 1.0,
            max_position_embeddings=config["max_position_embeddings"],
            rms_norm_eps=config["rms_norm_eps"],
            tie_embeddings=config["tie_word_embeddings"],
            init_std=config.get("initializer_range", 0.02),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        )

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` of a Hugging Face folder, transformers-4 form, without a dtype."""
        eos = self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.init_std,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "llama",
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": None if self.rope_factor == 1.0 else {"factor": self.rope_factor, "type": "linear"},
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_embeddings,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }

    @property
    def num_parameters(self) -> int:
        """Every trained number, the input embedding included (a tied head counts once)."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_matmul_parameters + embeddings + (2 * self.num_layers + 1) * self.hidden_size

    @property
    def num_matmul_parameters(self) -> int:
        """Weights of the blocks' linear layers: attention and MLP, without norms, embedding and head."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token adds to the KV cache at 2 bytes a number (bf16)."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim


# Sizes: paper (arXiv 2401.14196), table 2, and the official config.json files. The v1.5 model comes from
# DeepSeek-LLM-7B: other vocabulary, 4K context, RoPE base 10000 without scaling, no FIM tokens.
_1_3B = ModelConfig(
    vocab_size=32256,
    hidden_size=2048,
    intermediate_size=5504,
    num_layers=24,
    num_heads=16,
    num_kv_heads=16,
    rope_factor=4.0,
    init_std=0.02,
    bos_token_id=32013,
    eos_token_ids=(32014,),
)
_6_7B = dataclasses.replace(
    _1_3B, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32
)
_5_7B_MQA = dataclasses.replace(_6_7B, num_kv_heads=1)
_33B = dataclasses.replace(
    _1_3B, hidden_size=7168, intermediate_size=19200, num_layers=62, num_heads=56, num_kv_heads=8
)
_7B_V1_5 = dataclasses.replace(
    _6_7B,
    vocab_size=102400,
    num_layers=30,
    rope_theta=10000.0,
    rope_factor=1.0,
    max_position_embeddings=4096,
    bos_token_id=100000,
    eos_token_ids=(100001,),
)


def _instruct(base: ModelConfig, eot: int) -> ModelConfig:
    """Instruct models differ from their base in the id that ends a turn, and in nothing else here."""
    return dataclasses.replace(base, eos_token_ids=(eot,))


RELEASED: dict[str, ModelConfig] = {
    "deepseek-coder-1.3b-base": _1_3B,
    "deepseek-coder-1.3b-instruct": _instruct(_1_3B, 32021),
    "deepseek-coder-5.7bmqa-base": _5_7B_MQA,
    "deepseek-coder-6.7b-base": _6_7B,
    "deepseek-coder-6.7b-instruct": _instruct(_6_7B, 32021),
    "deepseek-coder-33b-base": _33B,
    "deepseek-coder-33b-instruct": _instruct(_33B, 32021),
    "deepseek-coder-7b-base-v1.5": _7B_V1_5,
    "deepseek-coder-7b-instruct-v1.5": _instruct(_7B_V1_5, 100015),
}
