"""Adds NEFTune: noise on the embeddings, in training only, which makes fine-tuned answers better.

Each of the L tokens x D dims of an example gets uniform noise within alpha / sqrt(L D). Source: Jain et al.
2023, arXiv:2310.05914. The noise does not come from a random generator. It is computed from the seed, the
step, the sequence and the place in the sequence, so that every rank of any layout makes the same noise for
its tokens.
"""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dtensor_llama.data.reader import Batch
from dtensor_llama.data.sequences import splitmix64


class Neftune:
    """Adds noise to the embeddings of the microbatches that next_step has announced.

    Call `add_to` once, and `next_step` before each step. A forward that was not announced, as in validation,
    gets no noise.
    """

    def __init__(self, alpha: float, seed: int, share: Callable[[Tensor], Tensor]):
        """Keep the settings; the noise starts with add_to and next_step.

        share: maps (B, T) of whole sequences to the tokens whose embeddings this rank has, in their order"""
        self.alpha, self.seed, self.share, self.waiting = alpha, seed, share, deque()

    def add_to(self, embedding: nn.Module) -> None:
        """Hook the noise to the output of the embedding, (B, T, D) or this rank's part of it."""
        embedding.register_forward_hook(self._add)

    def next_step(self, step: int, dp_rank: int, microbatches: list[Batch]) -> None:
        """Announce the microbatches of a step, whose forwards come next and in this order.

        microbatches: those of this dp rank, whole sequences with positions; all dp ranks have equally many
        """
        self.waiting.clear()
        first_sequence = dp_rank * sum(len(batch.tokens) for batch in microbatches)
        for batch in microbatches:
            B, T = batch.tokens.shape
            sequence = first_sequence + torch.arange(B)[:, None]
            # (B, T): no two tokens of a run have the same place.
            places = ((self.seed % 2**22 << 40) + (step << 20) + sequence) * T + torch.arange(T)
            scale = self.alpha / lengths_of(batch.positions).float().sqrt()  # (B, T)
            self.waiting.append((self.share(places), self.share(scale)))
            first_sequence += B

    def _add(self, embedding: nn.Module, args: tuple, x: Tensor) -> Tensor:
        if not self.waiting:
            return x
        places, scale = (one.to(x.device) for one in self.waiting.popleft())
        D = x.shape[-1]
        return x + (uniform(places, D) * (scale / D**0.5)[..., None]).to(x.dtype)


def lengths_of(positions: Tensor) -> Tensor:
    """Return (B, T): the number of tokens in the document of each token.

    positions: (B, T), which restart at 0 in each document"""
    documents = (positions == 0).cumsum(1)  # (B, T): the number of the document, from 1
    counts = torch.zeros(positions.shape[0], positions.shape[1] + 1, dtype=torch.int64)
    return counts.scatter_add_(1, documents, torch.ones_like(documents)).gather(1, documents)


def uniform(places: Tensor, n: int) -> Tensor:
    """Map places (...) int64 to (..., n) float32 in [-1, 1): equal for equal places, on any device."""
    x = splitmix64(places[..., None] * n + torch.arange(n, device=places.device))
    return (x >> 40 & (1 << 24) - 1).float() / 2**23 - 1
