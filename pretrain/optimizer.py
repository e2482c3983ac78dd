"""AdamW with weight decay on matrices only, and the gradient norm that is logged and clipped."""

import torch
from torch import Tensor, nn


def build(model: nn.Module, betas: tuple[float, float], eps: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the (sharded) parameters. Norm weights, which are vectors, are not decayed."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=parameters[0].device.type == "cuda")


def clip(model: nn.Module, max_norm: float) -> Tensor:
    """Scale gradients so that their norm over all ranks is at most `max_norm`; the norm before, a scalar tensor."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    # Under FSDP the norm is a DTensor holding this rank's part; the whole one is wanted.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
