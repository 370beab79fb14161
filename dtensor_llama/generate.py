"""Text from a trained model: one token after another, over a cache of keys and values."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dtensor_llama.model import KVCache, Llama


@torch.no_grad()
def generate(
    model: Llama,
    tokens: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Continue `tokens` (one row), yielding each new id as it is found; ends after a stop id (which is yielded too).

    temperature 0 is greedy. top_p keeps the smallest set of tokens whose probability reaches it (Holtzman et al. 2020,
    arXiv:1904.09751). `generator` lives on the model's device.
    """
    device = model.lm_head.weight.device
    cache = KVCache(len(tokens) + max_new_tokens)
    new = torch.tensor([tokens], device=device)
    for _ in range(max_new_tokens):
        logits = model.lm_head(model.model(new, cache=cache)[0, -1]).float()      # (V,): the last position's only
        new = sample(logits, temperature, top_p, generator).view(1, 1)
        yield new.item()
        if new.item() in stop_ids:
            return


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """One id (scalar int64) drawn from softmax(logits / temperature), logits (V,), cut to its top_p nucleus."""
    if temperature == 0:
        return logits.argmax()
    probabilities, ids = (logits / temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities                             # (V,): mass of likelier tokens
    probabilities[before >= top_p] = 0                                            # the first is always kept: before = 0
    return ids[torch.multinomial(probabilities, 1, generator=generator)[0]]
