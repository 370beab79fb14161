"""Answers of a model in the middle of its training, on the ranks it is spread over."""

import torch
from torch.distributed.fsdp import FSDPModule

from dtensor_llama import Llama
from dtensor_llama.chat.packing import PackedExamples
from dtensor_llama.data.tokenizer import Tokenizer


def held_out_prompts(rows: PackedExamples, n_prompts: int, n_new: int) -> list[list[int]]:
    """Ids of the first held-out examples up to their first answer, those with room for `n_new` tokens."""
    prompts = []
    for row in rows.validation_rows():
        for example in rows.examples_of(int(row)):
            span = slice(rows.starts[example], rows.starts[example] + rows.lengths[example])
            first = int(rows.corpus.trained[span].argmax())
            if 0 < first <= rows.seq_len - n_new and len(prompts) < n_prompts:
                prompts.append(rows.corpus.tokens[span][:first].tolist())
    return prompts


@torch.no_grad()
def answer(
    model: Llama,
    prompts: list[list[int]],
    n_new: int,
    stop_ids: list[int],
    tokenizer: Tokenizer,
    tp: int,
    device: torch.device,
) -> list[tuple[str, str]]:
    """The likeliest (prompt, answer) texts. All ranks enter and do the same: a sharded forward gathers
    weights. Whole rows anew for each token: no cache to be split, and few enough of them not to matter."""
    if not prompts:
        return []
    longest = max(map(len, prompts)) + n_new
    tokens = torch.full((len(prompts), -(-longest // tp) * tp), tokenizer.eos_id or 0, device=device)
    ends, open_rows = [len(prompt) for prompt in prompts], set(range(len(prompts)))
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = torch.tensor(prompt)
    for _ in range(n_new):
        logits = model(tokens)  # (B, T, V)
        for i, token in enumerate(logits[range(len(ends)), [end - 1 for end in ends]].argmax(-1).tolist()):
            if i in open_rows:
                tokens[i, ends[i]] = token
                ends[i] += 1
                open_rows -= {i} if token in stop_ids else set()
        if not open_rows:
            break
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # without a backward they would stay gathered, and become stale
    return [
        (tokenizer.decode(prompt), tokenizer.decode(tokens[i, len(prompt) : ends[i]].tolist()))
        for i, prompt in enumerate(prompts)
    ]
