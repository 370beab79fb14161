"""Generate text with a trained model: continue prompts, many at once, or chat.

The model is on one process, or split over several by tensor parallelism.

    python recipes/generate.py --model runs/pretrain/hf --prompt 'Once upon a time' --max-new-tokens 100
    python recipes/generate.py --model runs/pretrain/hf --prompts-file prompts.txt --json > answers.jsonl
    torchrun --nproc-per-node 2 recipes/generate.py --model runs/sft/hf --chat --parallel.tp 2

The text of a single prompt, and of an answer in a chat, is printed as it is produced.
"""

import codecs
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    from dtensor_llama.terminal import end_quietly_on_ctrl_c

    end_quietly_on_ctrl_c()  # the imports below take seconds

import torch
import torch.distributed as dist
from tyro.conf import UseAppendAction

from dtensor_llama import Llama, LlamaConfig, UsageError, load_hf
from dtensor_llama.atomic import is_first_rank
from dtensor_llama.attention import WholeSequences, choose_attention
from dtensor_llama.cli import AtLeast, FilePath, Launch, at_least, check_numbers, read_launch, run_recipe
from dtensor_llama.data.tokenizer import Tokenizer, load_tokenizer
from dtensor_llama.errors import BadRecord
from dtensor_llama.generate import Sampling, TextStream, generate_batch
from dtensor_llama.generation_config import ends_of, read_generation_config
from dtensor_llama.places import refuse_hub_name
from dtensor_llama.terminal import stdout_speaks_utf8
from dtensor_llama.weights import check_hf
from parallel import ParallelConfig, build_mesh
from parallel.config import Job, check_parallel
from parallel.mesh import start_process_group, stop_process_group
from parallel.tensor import apply_tensor_parallel

WAIT_FOR_A_PERSON_S = 7 * 24 * 3600  # how long other tp ranks wait in a collective while the user types
NUMBERS = [
    *at_least(1, "max_new_tokens", "batch_size", "parallel.tp"),
    AtLeast("temperature", 0),
    AtLeast("seed", 0, below=2**64),  # torch takes no larger one
]


@dataclass(frozen=True)
class SplitConfig:
    tp: int = 1  # processes that share each matrix and the cache of keys and values


@dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts with the model in a Hugging Face folder, or chat with it."""

    model: FilePath  # Hugging Face folder with config.json, safetensors and tokenizer
    # text to continue; with --chat a question; may be given several times
    prompt: UseAppendAction[tuple[str, ...]] = ()
    prompts_file: FilePath | None = None  # more of them, one a line
    # write prompts as the tokenizer's chat template does; without a prompt: talk, Ctrl-D ends
    chat: bool = False
    system: str | None = None  # with --chat: the system prompt
    json: bool = False  # print a line {"prompt", "text"} for each prompt
    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: always the likeliest token (greedy); 1: the probabilities of the model
    top_p: float = 1.0  # draw only from the likeliest tokens that together have this probability
    seed: int = 0  # of the draws, at a temperature above 0
    batch_size: int = 16  # prompts that are continued together: more are faster and take more memory
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "flash", "sdpa", "math"] = "auto"
    parallel: SplitConfig = field(default_factory=SplitConfig)


def main(cfg: GenerateConfig) -> None:
    launch = read_launch()
    device = launch.take_device()
    dtype, tp = getattr(torch, cfg.dtype), cfg.parallel.tp

    # ---- 1. What is refused, before anything is loaded -----------------------------------------------------
    check_flags(cfg)
    config, tokenizer = LlamaConfig.from_hf(cfg.model), load_tokenizer(cfg.model, "model")
    check_model(cfg, config, tokenizer, launch.world_size)
    template = chat_template(tokenizer) if cfg.chat else None
    texts = read_prompts(cfg)
    if not texts and not cfg.chat:
        raise UsageError(
            "--prompt is missing; give texts to continue, a --prompts-file that is not empty, or --chat."
        )
    prompts = [encode(cfg, text, tokenizer, template) for text in texts]
    longest = max(map(len, prompts), default=0) + cfg.max_new_tokens
    if longest > config.max_position_embeddings and launch.is_main:
        print(
            f"note: up to {longest} tokens with --max-new-tokens, and the model was trained on at most "
            f"{config.max_position_embeddings}; what comes after those may make no sense",
            file=sys.stderr,
        )
    if template:
        encode(cfg, "a", tokenizer, template)  # a template may refuse the system prompt
    stop_ids = find_stop_ids(cfg, config, template, launch)
    kernel = attention_kernel(cfg, device, prompts)
    with torch.device("meta"):
        model = Llama(config)
    check_hf(model, cfg.model)

    # ---- 2. The model: whole, or this rank's heads and columns ---------------------------------------------
    model.to(dtype)
    if tp > 1:
        start_process_group(device, tp, timeout_s=WAIT_FOR_A_PERSON_S if cfg.chat else 600)
        mesh = build_mesh(ParallelConfig(tp=tp, dp_shard=1), device.type)
        # Each step has one token, so there is no sequence to shard.
        apply_tensor_parallel(model, mesh["tp"], sequence_parallel=False)
    model.to_empty(device=device)
    load_hf(model, cfg.model)
    model.attention = WholeSequences(kernel)
    # Every rank draws the same tokens.
    sampling = Sampling(cfg.temperature, cfg.top_p, torch.Generator(device).manual_seed(cfg.seed))
    writer = Writer(model, tokenizer, cfg.max_new_tokens, stop_ids, sampling, is_chat=cfg.chat)

    # ---- 3. Text -------------------------------------------------------------------------------------------
    def show(text: str) -> None:
        if launch.is_main:
            print(text, end="", flush=True)

    if not texts:
        talk(cfg, config.max_position_embeddings, template, writer, show)
    elif len(texts) == 1 and not cfg.json:
        writer.continue_all(prompts, show)
    else:
        for first in range(0, len(texts), cfg.batch_size):
            batch = slice(first, first + cfg.batch_size)
            more = writer.continue_all(prompts[batch])
            for number, (text, new) in enumerate(zip(texts[batch], more, strict=True), first + 1):
                if cfg.json:
                    line = {"prompt": text, "text": new}
                    show(json.dumps(line, ensure_ascii=not stdout_speaks_utf8()) + "\n")
                else:
                    show(f"==== {number} of {len(texts)}: {text}\n{new}\n")
    stop_process_group()


@dataclass(frozen=True)
class Writer:
    """Continues prompts with one model and one way to draw tokens."""

    model: Llama
    tokenizer: Tokenizer
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    sampling: Sampling
    is_chat: bool

    def continue_all(self, prompts: list[list[int]], show: Callable[[str], None] | None = None) -> list[str]:
        """Return the text that follows each prompt. `show` is called with the text of a single prompt as it
        comes, which begins with the prompt except in a chat."""
        ids = [[] for _ in prompts]
        streams = [TextStream(self.tokenizer, [] if self.is_chat else tokens) for tokens in prompts]
        steps = generate_batch(self.model, prompts, self.max_new_tokens, self.stop_ids, self.sampling)
        for step in steps:
            for own, stream, token in zip(ids, streams, step, strict=True):
                if token is not None and token not in self.stop_ids:
                    own.append(token)
                    if show:
                        show(stream.put(token))
        if show:
            show(streams[0].end() + "\n")
        decode = self.tokenizer.decode
        if self.is_chat:
            return [decode(own) for own in ids]
        wholes = [decode(tokens + own) for tokens, own in zip(prompts, ids, strict=True)]
        starts = [decode(tokens) for tokens in prompts]
        return [whole[len(start) :] for whole, start in zip(wholes, starts, strict=True)]


def check_flags(cfg: GenerateConfig) -> None:
    """Raise UsageError for flags that are not possible, or not together."""
    check_numbers(cfg, NUMBERS)
    if not 0 < cfg.top_p <= 1:
        raise UsageError(f"--top-p {cfg.top_p} is not possible; it must be above 0 and at most 1.")
    refuse_hub_name(cfg.model, "model")
    if not Path(cfg.model).is_dir():
        raise UsageError(
            f"--model {cfg.model} is not a folder; text comes from trained weights, e.g. runs/pretrain/hf."
        )
    if cfg.system is not None and not cfg.chat:
        raise UsageError("--system is for --chat; a prompt to continue has no system prompt.")


def check_model(cfg: GenerateConfig, config: LlamaConfig, tokenizer: Tokenizer, world_size: int) -> None:
    """Raise UsageError for a tokenizer of another model, a model that tp cannot split, or another number of
    processes than tp has."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(
            f"--model {cfg.model}: its tokenizer has {tokenizer.vocab_size} tokens and its config.json a "
            f"vocabulary of {config.vocab_size}; they do not belong together."
        )
    tp = cfg.parallel.tp
    check_parallel(ParallelConfig(tp=tp, dp_shard=1, sequence_parallel=False), Job(config, seq_len=1))
    if world_size != tp:
        command = f"torchrun --nproc-per-node {tp}" if tp > 1 else "plain python"
        raise UsageError(
            f"--parallel.tp {tp} needs as many processes and torchrun started {world_size}; launch with "
            f"{command}."
        )


def attention_kernel(cfg: GenerateConfig, device: torch.device, prompts: list[list[int]]) -> str:
    """Return the kernel that was asked for, or the fastest that can continue these prompts."""
    kernel, _ = choose_attention(cfg.attention, device, getattr(torch, cfg.dtype))
    if kernel == "flash" and len(set(map(len, prompts))) > 1:  # it takes no mask for the padding
        if cfg.attention == "flash":
            raise UsageError(
                "--attention flash cannot continue prompts of unequal lengths at once; use --batch-size 1 or "
                "--attention sdpa."
            )
        return "sdpa"
    return kernel


def talk(cfg: GenerateConfig, context: int, template, writer: Writer, show) -> None:
    """Hold a conversation with the user at the terminal of rank 0, until the end of the input.

    context: how many tokens the model was trained on; older turns are left out beyond it
    """
    is_main = is_first_rank()
    system, turns = system_turn(cfg), []
    while True:
        typed = [None]
        if is_main:
            with contextlib.suppress(EOFError):
                typed = [input("> " if sys.stdin.isatty() else "")]
        if dist.is_initialized():
            dist.broadcast_object_list(typed, src=0)
        if typed[0] is None:
            return
        if not typed[0].strip():
            continue
        try:
            question = {"role": "user", "content": as_text(typed[0], "the question")}
            tokens = template.encode_prompt([*system, *turns, question])
        except UsageError as error:
            if is_main:
                print(f"not asked: {error}", file=sys.stderr, flush=True)
            continue
        turns.append(question)
        while len(tokens) + cfg.max_new_tokens > context and len(turns) > 1:
            del turns[:2]
            tokens = template.encode_prompt(system + turns)
            show("(the oldest question and answer are forgotten: the model's context is full)\n")
        turns.append({"role": "assistant", "content": writer.continue_all([tokens], show)[0].strip()})


def system_turn(cfg: GenerateConfig) -> list[dict]:
    return [{"role": "system", "content": as_text(cfg.system, "--system")}] if cfg.system else []


def read_prompts(cfg: GenerateConfig) -> list[str]:
    """Return the prompts of --prompt and --prompts-file. Only a newline ends a line of the file: other
    separators of Unicode, such as a form feed or U+2028, are part of a prompt."""
    prompts = [as_text(prompt, "--prompt") for prompt in cfg.prompt]
    if cfg.prompts_file is None:
        return prompts
    if cfg.parallel.tp > 1 and Path(cfg.prompts_file).is_fifo():
        raise UsageError(
            f"--prompts-file {cfg.prompts_file} is a pipe, of which each of the --parallel.tp "
            f"{cfg.parallel.tp} processes would read a part; write the prompts to a file."
        )
    try:
        data = Path(cfg.prompts_file).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UsageError(f"--prompts-file {cfg.prompts_file} cannot be read ({error.strerror}).") from None
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise UsageError(
                f"--prompts-file {cfg.prompts_file}, line {number}: byte "
                f"0x{line[error.start]:02x} is not UTF-8 text; convert the file (iconv -t "
                "utf-8) or leave the line out."
            ) from None
        if text.strip():
            prompts.append(text)
    return prompts


def as_text(argument: str, flag: str) -> str:
    """Return what was typed, read as UTF-8 whatever encoding the terminal claims; else UsageError.

    flag: where it was typed"""
    # Python keeps bytes that it could not decode as surrogates.
    typed = argument.encode("utf-8", "surrogateescape")
    try:
        return typed.decode()
    except UnicodeDecodeError as error:
        shown = argument[:40].encode("ascii", "backslashreplace").decode()
        raise UsageError(
            f"{flag} {shown}: byte 0x{typed[error.start]:02x} is not UTF-8 text; give the text "
            "in UTF-8, in a --prompts-file if the terminal cannot."
        ) from None


def encode(cfg: GenerateConfig, text: str, tokenizer, template) -> list[int]:
    """Return the ids that the model shall continue."""
    if template:
        return template.encode_prompt([*system_turn(cfg), {"role": "user", "content": text}])
    tokens = tokenizer.encode(text)
    if tokenizer.adds.bos:  # every document began with this token in training
        tokens = [tokenizer.bos_id, *tokens]
    if not tokens:
        raise UsageError(
            "--prompt is empty, and the tokenizer has no token for the beginning of a text; give some text."
        )
    return tokens


def chat_template(tokenizer):
    from dtensor_llama.chat.template import ChatTemplate

    return ChatTemplate(tokenizer)


def find_stop_ids(cfg: GenerateConfig, config: LlamaConfig, template, launch: Launch) -> tuple[int, ...]:
    """Return the tokens that end a text: the EOS tokens of config.json and generation_config.json, and the
    token that ends a turn in a chat, if the template has one."""
    ids = {*config.ends, *ends_of(read_generation_config(cfg.model).get("eos_token_id"))}
    if template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            ids.add([i for i, trained in zip(*template.encode(turns, "--chat"), strict=True) if trained][-1])
        except BadRecord as error:
            if launch.is_main:
                print(f"note: answers end at the model's EOS token only. {error}", file=sys.stderr)
    return tuple(ids)


if __name__ == "__main__":
    run_recipe(main, GenerateConfig, stdout_is_result=True)
