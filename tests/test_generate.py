"""Greedy text equals transformers' token by token: alone, in a batch of unequal prompts, split over tp; and
as it streams."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from pool import run_on
from recipe import ROOT, recipe

from dtensor_llama import Llama, LlamaConfig, load_hf
from dtensor_llama.attention import WholeSequences
from dtensor_llama.data.tokenizer import load_tokenizer
from dtensor_llama.generate import Sampling, TextStream, continue_whole_sequences, generate_batch, sample
from dtensor_llama.model import init_weights
from parallel import ParallelConfig, build_mesh
from parallel.tensor import apply_tensor_parallel

SHARED = Path(os.environ.get("DTENSOR_LLAMA_SHARED_DATA", ROOT.parent / "shared" / "data"))
CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)  # a wide range: sure of its next token
PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], [1, 2, 3], [90, 1, 90, 1, 90, 1, 90, 1, 90, 1, 90]]
N = 16


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What transformers says after each prompt alone."""
    import transformers

    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.to_hf())).eval()
    ours = Llama(CONFIG)
    theirs.load_state_dict(ours.state_dict())
    inputs = [torch.tensor([prompt]) for prompt in PROMPTS]
    return [
        theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=N, do_sample=False, eos_token_id=None
        )[0, ids.shape[1] :].tolist()
        for ids in inputs
    ]


def columns(steps) -> list[list[int]]:
    return [list(ids) for ids in zip(*steps, strict=True)]


@pytest.mark.parametrize("kernel", ["sdpa", "math"])
def test_a_batch_of_unequal_prompts_says_what_transformers_says_to_each(expected, kernel):
    model = Llama(CONFIG)
    model.attention = WholeSequences(kernel)
    assert columns(generate_batch(model, PROMPTS, N)) == expected
    assert [columns(generate_batch(model, [prompt], N))[0] for prompt in PROMPTS] == expected
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)  # else equality would mean little


def split_and_generate(tp: int) -> list[list[int]]:
    mesh = build_mesh(ParallelConfig(tp=tp, dp_shard=1), "cpu")
    with torch.device("meta"):
        model = Llama(CONFIG)
    apply_tensor_parallel(model, mesh["tp"], sequence_parallel=False)
    model.to_empty(device="cpu")
    init_weights(model, seed=0)
    return columns(generate_batch(model, PROMPTS, 6))


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.slow)])  # 4: key/value heads are shared
def test_split_over_tp_it_says_the_same_on_every_rank(expected, tp):
    assert run_on(tp, split_and_generate, tp) == [[row[:6] for row in expected]] * tp


def test_a_sequence_that_ended_says_no_more_and_the_others_go_on(expected):
    stop = expected[1][5]
    answers = columns(generate_batch(Llama(CONFIG), PROMPTS, N, stop_ids=(stop,)))
    for answer, whole in zip(answers, expected, strict=False):
        end = whole.index(stop) + 1 if stop in whole else N
        assert answer == (whole[:end] + [None] * (N - end))[: len(answer)]
    assert answers[1][-1] is None


@pytest.mark.parametrize("token_multiple", [1, 8])
def test_without_a_cache_the_likeliest_tokens_are_those_with_one(expected, token_multiple):
    stop = expected[1][5]
    answers = continue_whole_sequences(Llama(CONFIG), PROMPTS, N, (stop,), token_multiple)
    assert answers == [
        whole[: whole.index(stop) + 1] if stop in whole else whole for whole in (ids[:N] for ids in expected)
    ]


def test_draws_follow_the_seed_in_a_batch_too():
    def draw(seed):
        return columns(
            generate_batch(
                Llama(CONFIG),
                PROMPTS,
                N,
                sampling=Sampling(1.0, 0.9, torch.Generator().manual_seed(seed)),
            )
        )

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-320])
def test_at_a_tiny_temperature_the_likeliest_token_is_drawn(temperature):
    logits = torch.tensor([[1.0, 3.0, -2.0], [-5.0, -7.0, -6.0]])
    assert sample(logits, temperature, top_p=1.0).tolist() == [1, 0]


class Bytes:
    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def test_streamed_text_is_whole_characters_and_together_the_whole_text():
    text = "naïve 你好 🦙 \N{REPLACEMENT CHARACTER}!"
    stream = TextStream(Bytes(), [])
    pieces = [stream.put(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.end() == text
    assert [piece for piece in pieces if piece] == [*"naïve 你好 🦙 ", "\N{REPLACEMENT CHARACTER}!"]
    assert stream.put(0xF0) == "" and stream.end() == "\N{REPLACEMENT CHARACTER}"  # cut within a character


# ---- the recipe ----


def test_many_prompts_come_back_in_order_and_as_alone(inputs, tmp_path):
    lines = ["def main(", "import", "    return [value for value in values if", "x"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines[2:]) + "\n\n")
    common = ["--model", inputs / "model", "--max-new-tokens", 12]
    ended = recipe(
        "generate",
        *common,
        "--prompt",
        lines[0],
        "--prompt",
        lines[1],
        "--json",
        "--prompts-file",
        tmp_path / "prompts.txt",
        "--batch-size",
        3,
    )
    assert ended.status == 0, ended
    rows = [json.loads(line) for line in ended.out.splitlines()]
    assert [row["prompt"] for row in rows] == lines
    for row in rows:
        alone = recipe("generate", *common, "--prompt", row["prompt"])
        assert alone.out.rstrip("\n").endswith(row["text"].rstrip("\n"))


@pytest.mark.skipif(
    not (SHARED / "stories260K").exists(), reason="the trained weights stories260K are not on this machine"
)
def test_trained_weights_tell_the_known_story_on_two_ranks():
    ended = recipe(
        "generate",
        "--model",
        SHARED / "stories260K",
        "--prompt",
        "Once upon a time",
        "--max-new-tokens",
        58,
        "--parallel.tp",
        2,
        ranks=2,
    )
    assert ended.status == 0, ended
    assert ended.out.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    )


def test_a_chat_remembers_and_an_answer_is_what_the_template_asks_for_on_two_ranks_too(inputs, tmp_path):
    pytest.importorskip("dtensor_llama.chat.template")
    folder = shutil.copytree(inputs / "model", tmp_path / "model")
    flags = ["--model", folder, "--chat", "--max-new-tokens", 8]

    def chat(context: int, *more, ranks: int = 1) -> str:
        config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": context}
        (folder / "config.json").write_text(json.dumps(config))
        ended = recipe("generate", *flags, *more, ranks=ranks, typed="Hello\n\nAnd you?\n")
        assert ended.status == 0, ended
        return ended.out

    first, second = chat_alone(folder, ["Hello", "And you?"])
    assert chat(512) == f"{first}\n{second}\n"
    assert chat(512, "--parallel.tp", 2, ranks=2) == f"{first}\n{second}\n"  # only rank 0 has a terminal
    for split, ranks in ([], 1), (["--parallel.tp", 2], 2):
        once = recipe(
            "generate", *flags, *split, "--prompt", "Hello", "--prompt", "And you?", "--json", ranks=ranks
        )
        (alone,) = chat_alone(folder, ["And you?"])
        assert [json.loads(line)["text"] for line in once.out.splitlines()] == [first, alone]
    forgetful = (
        f"{first}\n(the oldest question and answer are forgotten: the model's context is full)\n{alone}\n"
    )
    assert chat(64) == chat(64, "--parallel.tp", 2, ranks=2) == forgetful


def chat_alone(folder: Path, questions: list[str]) -> list[str]:
    """The answers of a chat, spelt out."""
    from dtensor_llama.chat.template import ChatTemplate

    config, tokenizer = LlamaConfig.from_hf(folder), load_tokenizer(folder)
    model, template, turns, answers = Llama(config), ChatTemplate(tokenizer), [], []
    load_hf(model, folder)
    for question in questions:
        turns.append({"role": "user", "content": question})
        turn = template.encode_prompt(turns)
        (ids,) = columns(generate_batch(model, [turn], 8, stop_ids=(config.eos_token_id,)))
        answers.append(tokenizer.decode([i for i in ids if i != config.eos_token_id]))
        turns.append({"role": "assistant", "content": answers[-1].strip()})
    return answers


def test_a_template_that_ends_no_answer_or_takes_no_system_prompt(inputs, tmp_path):
    folder = shutil.copytree(inputs / "model", tmp_path / "model")
    write = "{% for turn in messages %}{{ turn.role + ': ' + turn.content + '\n' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(write)
    flags = ["--model", folder, "--chat", "--max-new-tokens", 4]
    ended = recipe("generate", *flags, typed="Hello\n")
    assert ended.status == 0 and ended.out.count("\n") >= 1, ended
    assert "note: answers end at the model's EOS token only" in ended.err and ended.err.count("\n") == 1
    when = "{% if messages[0].role == 'system' or 'no' in messages[-1].content %}"
    refuse = "{{ raise_exception('no!') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(when + refuse + write)
    ended = recipe("generate", *flags, "--system", "Be kind.", typed="Hello\n")
    assert ended.status == 2 and ended.err.endswith("says: no!\n") and not ended.out, ended
    ended = recipe("generate", *flags, typed="no\nHello\n")  # the chat goes on after what cannot be asked
    assert ended.status == 0 and "not asked: " in ended.err and ended.out.count("\n") >= 1, ended


def test_a_pipe_of_prompts_is_for_one_process(inputs, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    flags = ["--model", inputs / "model", "--prompts-file", tmp_path / "pipe", "--parallel.tp", 2]
    ended = recipe("generate", *flags, ranks=2)
    assert ended.status == 2 and "is a pipe" in ended.err and ended.err.count("\n") == 1, ended


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--max-new-tokens", 0, "--prompt", "a"], "--max-new-tokens 0"),
        ([], "--prompt is missing"),
        (["--prompts-file", "no/such/file"], "--prompts-file no/such/file"),
        (["--prompts-file", os.devnull], "a --prompts-file that is not empty"),
        (["--prompt", "a", "--parallel.tp", 2], "torchrun --nproc-per-node 2"),
        (["--prompt", "a", "--parallel.tp", 3], "does not divide the 4 query heads"),
        (["--prompt", "a", "--system", "b"], "--system is for --chat"),
        (["--prompt", "a", "--seed", 2**64], f"--seed {2**64} is not possible"),
    ],
)
def test_what_it_cannot_do_it_says_in_a_line(inputs, arguments, said):
    ended = recipe("generate", "--model", inputs / "model", *arguments)
    assert ended.status == 2 and said in ended.err and ended.err.count("\n") == 1, ended
