"""GPU kernels and their plain PyTorch references: attention, RMSNorm, RoPE, SwiGLU, the loss, the KV cache, sampling.

Every op works on every device. On a GPU with triton the op runs its Triton kernel, elsewhere its reference; `backend()`
says which, and chooses. The kernels know shapes and dtypes, and nothing of the model. Importing this package imports
torch, not triton.
"""

from .attention import flash_attn_func, flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func
from .dispatch import backend
from .kv_cache import apply_rope_and_write_kv, flash_attn_with_kvcache, write_kv
from .loss import linear_cross_entropy
from .norm import rms_norm
from .rope import apply_rope
from .sampling import sample
from .swiglu import swiglu

# Hugging Face publishes another package called `kernels`; this tells them apart.
PROJECT = "deepseek-coder-torch"

__all__ = [
    "PROJECT",
    "apply_rope",
    "apply_rope_and_write_kv",
    "backend",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "linear_cross_entropy",
    "rms_norm",
    "sample",
    "swiglu",
    "write_kv",
]
