"""Text from a trained model: one token after another, over a cache of keys and values."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dtensor_llama.model import KVCache, Llama


def generate(
    model: Llama,
    tokens: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """As generate_batch for one prompt: yields each new id, the stop id too."""
    for (token,) in generate_batch(model, [tokens], max_new_tokens, temperature, top_p, stop_ids, generator):
        yield token


@torch.no_grad()
def generate_batch(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
) -> Iterator[list[int | None]]:
    """Continue prompts of any lengths together; yields, as they are found, the new id of each, None after its
    stop id.

    temperature 0 is greedy. top_p keeps the smallest set of tokens whose probability reaches it (Holtzman et
    al. 2020, arXiv:1904.09751). `generator` lives on the model's device. A model split over tp gives every
    rank the same ids, if their generators are in the same state. Prompts of unequal lengths need the kernel
    sdpa or math.
    """
    device, longest = model.lm_head.weight.device, max(map(len, prompts))
    padding = [longest - len(tokens) for tokens in prompts]
    cache = KVCache(longest + max_new_tokens, torch.tensor(padding, device=device) if any(padding) else None)
    new = torch.tensor([[0] * n + tokens for n, tokens in zip(padding, prompts, strict=True)], device=device)
    running = [True] * len(prompts)
    for _ in range(max_new_tokens):
        # (B, V): the last position's only
        logits = model.lm_head(model.model(new, cache=cache)[:, -1]).float()
        new = sample(logits, temperature, top_p, generator)[:, None]  # (B, 1); of ended rows nobody cares
        ids = [token if goes_on else None for token, goes_on in zip(new[:, 0].tolist(), running, strict=True)]
        yield ids
        running = [token is not None and token not in stop_ids for token in ids]
        if not any(running):
            return


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """Ids (B,) drawn from softmax(logits / temperature), logits (B, V), cut to its top_p nucleus; likewise ()
    of (V,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, ids = (logits / temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities  # mass of likelier tokens
    probabilities[before >= top_p] = 0  # the first is always kept: before = 0
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)


class TextStream:
    """The text of ids that arrive one by one: `put` returns what is new of it, whole characters only, `end`
    the rest.

    ids: what comes before, shown as new at the first put. The whole is decoded each time: one token may be a
        part of a character, or a space that depends on what comes before.
    """

    def __init__(self, tokenizer, ids: list[int]):
        self.tokenizer, self.ids, self.shown = tokenizer, list(ids), ""

    def put(self, token: int) -> str:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._new(text)

    def end(self) -> str:
        return self._new(self.tokenizer.decode(self.ids))

    def _new(self, text: str) -> str:
        new, self.shown = text[len(self.shown) :], text
        return new
