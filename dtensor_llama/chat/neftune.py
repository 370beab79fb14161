"""NEFTune: noise on the embeddings, in training only, makes fine-tuned answers better. Jain et al. 2023,
arXiv:2310.05914.

Each of the L tokens x D dims of an example gets uniform noise within alpha / sqrt(L D). The noise is computed
from the seed, the step, the row and the place in it, not drawn: every rank of any layout makes the same for
the tokens it has.
"""

from collections import deque

import torch
from torch import Tensor, nn

from dtensor_llama.data.reader import Batch


class Neftune:
    """Call `add_to` once and `next_step` before each step; a forward without noise waiting (validation) gets
    none."""

    def __init__(self, alpha: float, seed: int, share=lambda per_token: per_token):
        """share: (B, T) of whole rows -> of the tokens whose embeddings this rank has, in their order."""
        self.alpha, self.seed, self.share, self.waiting = alpha, seed, share, deque()

    def add_to(self, embedding: nn.Module) -> None:
        embedding.register_forward_hook(self._add)

    def next_step(self, step: int, first_row: int, micros: list[Batch]) -> None:
        """micros: this rank's, whole rows with positions; first_row: how many rows of the global batch come
        before."""
        self.waiting.clear()
        for micro in micros:
            B, T = micro.tokens.shape
            rows = first_row + torch.arange(B)[:, None]
            # (B, T): all different
            places = ((self.seed % 2**22 << 40) + (step << 20) + rows) * T + torch.arange(T)
            scale = self.alpha / lengths_of(micro.positions).float().sqrt()  # (B, T)
            self.waiting.append((self.share(places), self.share(scale)))
            first_row += B

    def _add(self, embedding: nn.Module, args: tuple, x: Tensor) -> Tensor:
        if not self.waiting:
            return x
        places, scale = (one.to(x.device) for one in self.waiting.popleft())
        return x + (uniform(places, x.shape[-1]) * (scale / x.shape[-1] ** 0.5)[..., None]).to(x.dtype)


def lengths_of(positions: Tensor) -> Tensor:
    """(B, T) -> (B, T): how many tokens the document of each token has; positions restart at 0 where one
    begins."""
    documents = (positions == 0).cumsum(1)  # (B, T): which one, from 1
    counts = torch.zeros(positions.shape[0], positions.shape[1] + 1, dtype=torch.int64)
    return counts.scatter_add_(1, documents, torch.ones_like(documents)).gather(1, documents)


def uniform(places: Tensor, n: int) -> Tensor:
    """(...) int64 -> (..., n) float32 in [-1, 1): the same for the same place, on any device (splitmix64's
    mixing)."""
    # 0x9E3779B97F4A7C15
    x = places[..., None] * n + torch.arange(n, device=places.device) + -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):  # as signed 64-bit numbers
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    x = x ^ (x >> 31 & (1 << 33) - 1)
    return (x >> 40 & (1 << 24) - 1).float() / 2**23 - 1
