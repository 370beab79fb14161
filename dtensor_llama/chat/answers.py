"""Lets a model answer questions in the middle of its training, on all ranks over which it is sharded."""

from dtensor_llama.chat.packing import PackedExamples
from dtensor_llama.data.tokenizer import Tokenizer
from dtensor_llama.generate import continue_whole_sequences
from dtensor_llama.model import Llama
from dtensor_llama.shards import reshard


def held_out_prompts(sequences: PackedExamples, n_prompts: int, n_new: int) -> list[list[int]]:
    """Return the ids of at most n_prompts held-out examples, each up to its first answer.

    Only examples that leave room for n_new more tokens in a sequence are taken."""
    prompts = []
    for number in sequences.validation_sequences():
        for example in sequences.examples_of(int(number)):
            span = sequences.span_of(example)
            first = int(sequences.corpus.trained[span].argmax())
            if 0 < first <= sequences.seq_len - n_new and len(prompts) < n_prompts:
                prompts.append(sequences.corpus.tokens[span][:first].tolist())
    return prompts


def answer(
    model: Llama,
    prompts: list[list[int]],
    n_new: int,
    stop_ids: list[int],
    tokenizer: Tokenizer,
    tp: int,
) -> list[tuple[str, str]]:
    """Return one (prompt, answer) pair of texts for each prompt. Answers are decoded greedily.

    This is a collective: a sharded forward gathers weights, so all ranks call it with the same arguments.
    n_new: the most new tokens in an answer
    stop_ids: the tokens that end an answer
    tp: the size of that axis. Under sequence parallelism it must divide the number of tokens, so sequences
        are padded to a multiple of it."""
    if not prompts:
        return []
    answers = continue_whole_sequences(model, prompts, n_new, tuple(stop_ids), token_multiple=tp)
    reshard([model])
    return [(tokenizer.decode(ids), tokenizer.decode(new)) for ids, new in zip(prompts, answers, strict=True)]
