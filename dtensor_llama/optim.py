"""AdamW as LLaMA-2 was trained (arXiv:2307.09288, sec. 2.2)."""

import torch
from torch import nn


def build_adamw(model: nn.Module, lr: float, weight_decay: float, betas=(0.9, 0.95), eps: float = 1e-5) -> torch.optim.AdamW:
    """torch's fused AdamW over the model's parameters, plain or DTensor; vectors (norms) are not decayed.

    Built after parallelize, since the optimizer steps the shards this rank holds.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps, fused=True)
