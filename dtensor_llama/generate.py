"""Text from a trained model: one token after another, over a cache of keys and values."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dtensor_llama.model import Llama


class KVCache:
    """Holds the keys and values of the tokens already seen, (B, max_tokens, K, E) per layer, filled in order.

    padding: (B,), how many places at the start of each sequence hold no token, so that sequences of unequal
        length end together.
    """

    def __init__(self, max_tokens: int, padding: Tensor | None = None):
        self.max_tokens, self.n_seen, self.padding = max_tokens, 0, padding
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, T, K, E) of the new tokens; return those of all, (B, n_seen + T, K, E)."""
        if layer not in self.layers:
            self.layers[layer] = tuple(x.new_empty(x.shape[0], self.max_tokens, *x.shape[2:]) for x in (k, v))
        end = self.n_seen + k.shape[1]
        for stored, new in zip(self.layers[layer], (k, v), strict=True):
            stored[:, self.n_seen : end] = new
        return tuple(x[:, :end] for x in self.layers[layer])


class Sampling(NamedTuple):
    """Describes how the next token is chosen."""

    temperature: float = 0.0  # 0: always the likeliest token (greedy)
    top_p: float = 1.0  # keep the smallest set of tokens whose probability reaches this (arXiv:1904.09751)
    generator: torch.Generator | None = None  # on the model's device


GREEDY = Sampling()


@torch.no_grad()
def generate_batch(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    sampling: Sampling = GREEDY,
) -> Iterator[list[int | None]]:
    """Continue prompts of any lengths together; yields the new id of each prompt, None after its stop id.

    A model split over tp gives every rank the same ids, if their generators are in the same state. Prompts of
    unequal lengths need the attention kernel sdpa or math.
    """
    device, longest = model.lm_head.weight.device, max(map(len, prompts))
    padding = [longest - len(tokens) for tokens in prompts]
    cache = KVCache(longest + max_new_tokens, torch.tensor(padding, device=device) if any(padding) else None)
    padded = [[0] * n + tokens for n, tokens in zip(padding, prompts, strict=True)]
    prompt_ids = torch.tensor(padded, device=device)

    def next_logits(new: Tensor | None) -> Tensor:
        hidden = model.model(prompt_ids if new is None else new[:, None], cache=cache)
        return model.lm_head(hidden[:, -1]).float()  # (B, V): of the last position only

    yield from _choose(next_logits, len(prompts), max_new_tokens, stop_ids, sampling)


@torch.no_grad()
def continue_whole_sequences(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    token_multiple: int,
) -> list[list[int]]:
    """Continue prompts greedily, without a cache: whole sequences are computed anew for each token. Returns
    the new ids of each prompt, the stop id included.

    A model in the middle of its training can do this on the ranks that it is sharded over, because this is
    the forward of its training. token_multiple: the number of tokens in a sequence must be a multiple of it;
    under sequence parallelism it is the number of tp ranks.
    """
    longest = max(map(len, prompts)) + max_new_tokens
    device = next(model.parameters()).device
    n_tokens = -(-longest // token_multiple) * token_multiple
    sequences = torch.zeros(len(prompts), n_tokens, dtype=torch.int64, device=device)
    for sequence, prompt in zip(sequences, prompts, strict=True):
        sequence[: len(prompt)] = torch.tensor(prompt)
    index = torch.arange(len(prompts), device=device)
    ends = torch.tensor([len(prompt) for prompt in prompts], device=device)

    def next_logits(new: Tensor | None) -> Tensor:
        if new is not None:
            sequences[index, ends] = new
            ends.add_(1)
        return model(sequences)[index, ends - 1]  # (B, V), from (B, T, V)

    new_ids = [[] for _ in prompts]
    for ids in _choose(next_logits, len(prompts), max_new_tokens, stop_ids, GREEDY):
        for answer, token in zip(new_ids, ids, strict=True):
            answer += [] if token is None else [token]
    return new_ids


def _choose(
    next_logits: Callable[[Tensor | None], Tensor],
    n_sequences: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
) -> Iterator[list[int | None]]:
    """Choose tokens until every sequence has ended; yields the new id of each, None after its stop id.

    next_logits: (B, V) of the position after the last, from the (B,) tokens chosen last, None at the
        beginning. It gets tokens of sequences that have ended too, whose values do not matter.
    """
    running, new = [True] * n_sequences, None
    for _ in range(max_new_tokens):
        new = sample(next_logits(new), *sampling)
        ids = [token if goes_on else None for token, goes_on in zip(new.tolist(), running, strict=True)]
        yield ids
        running = [token is not None and token not in stop_ids for token in ids]
        if not any(running):
            return


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw ids (B,) from softmax(logits / temperature), cut to its top_p nucleus; logits are (B, V).

    temperature 0 takes the likeliest token."""
    if temperature == 0:
        return logits.argmax(-1)
    # At a tiny temperature the quotients would be inf, of which softmax makes nan.
    from_largest = logits - logits.amax(-1, keepdim=True)
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    probabilities, ids = (from_largest / temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities  # the probability of likelier tokens
    probabilities[before >= top_p] = 0  # the first is always kept: before = 0
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)


class TextStream:
    """Decodes ids that arrive one by one: `put` returns the new text in whole characters, `end` the rest.

    ids: what comes before, which is part of the new text at the first put. The whole text is decoded each
        time, since one token may be a part of a character, or a space that depends on what comes before.
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
