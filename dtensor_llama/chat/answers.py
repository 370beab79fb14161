"""Answers of a model in the middle of its training, on the ranks it is sharded over."""

from torch.distributed.fsdp import FSDPModule

from dtensor_llama.chat.packing import PackedExamples
from dtensor_llama.data.tokenizer import Tokenizer
from dtensor_llama.generate import continue_whole_rows
from dtensor_llama.model import Llama


def held_out_prompts(rows: PackedExamples, n_prompts: int, n_new: int) -> list[list[int]]:
    """Return the ids of the first held-out examples up to their first answer.

    Only examples with room for n_new more tokens are taken."""
    prompts = []
    for row in rows.validation_rows():
        for example in rows.examples_of(int(row)):
            span = rows.span_of(example)
            first = int(rows.corpus.trained[span].argmax())
            if 0 < first <= rows.seq_len - n_new and len(prompts) < n_prompts:
                prompts.append(rows.corpus.tokens[span][:first].tolist())
    return prompts


def answer(
    model: Llama,
    prompts: list[list[int]],
    n_new: int,
    stop_ids: list[int],
    tokenizer: Tokenizer,
    tp: int,
) -> list[tuple[str, str]]:
    """Return the likeliest (prompt, answer) texts.

    All ranks enter and do the same, as a sharded forward gathers weights. tp: the size of that axis, which
    the number of tokens must divide by under sequence parallelism."""
    if not prompts:
        return []
    answers = continue_whole_rows(model, prompts, n_new, tuple(stop_ids), row_multiple=tp)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # without a backward they would stay gathered, and become stale
    return [(tokenizer.decode(ids), tokenizer.decode(new)) for ids, new in zip(prompts, answers, strict=True)]
