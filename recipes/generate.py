"""Continue a prompt with a trained model, token by token.

    python recipes/generate.py --model runs/pretrain/hf --prompt 'Once upon a time' --max-new-tokens 100
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # a clone works without being installed

import torch

from dtensor_llama import Llama, LlamaConfig, UsageError, load_hf
from dtensor_llama.attention import choose_attention
from dtensor_llama.cli import run_recipe
from dtensor_llama.data.tokenizer import load_tokenizer
from dtensor_llama.generate import generate
from dtensor_llama.weights import check_hf


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt with the model in a Hugging Face folder."""

    model: str                    # Hugging Face folder with config.json, safetensors and tokenizer
    prompt: str                   # text to continue
    max_new_tokens: int = 128
    temperature: float = 0.0      # 0: always the likeliest token (greedy); 1: as the model believes
    top_p: float = 1.0            # draw only from the likeliest tokens that together have this probability
    seed: int = 0                 # of the draws, at a temperature above 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "flash", "sdpa", "math"] = "auto"


def main(cfg: GenerateConfig) -> None:
    # ---- 1. What is refused -----------------------------------------------------------------------------------------
    for flag, value, rule, fine in (
        ("--max-new-tokens", cfg.max_new_tokens, "at least 1", cfg.max_new_tokens >= 1),
        ("--temperature", cfg.temperature, "0 (greedy) or more", 0 <= cfg.temperature < float("inf")),
        ("--top-p", cfg.top_p, "above 0 and at most 1", 0 < cfg.top_p <= 1),
    ):
        if not fine:
            raise UsageError(f"{flag} {value} is not possible; it must be {rule}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, cfg.dtype)
    if not Path(cfg.model).is_dir():
        raise UsageError(f"--model {cfg.model} is not a folder; text comes from trained weights, e.g. runs/pretrain/hf.")
    config = LlamaConfig.from_hf(cfg.model)
    tokenizer = load_tokenizer(cfg.model)
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(f"--model {cfg.model}: its tokenizer has {tokenizer.vocab_size} tokens and its config.json a "
                         f"vocabulary of {config.vocab_size}; they do not belong together.")
    kernel, _ = choose_attention(cfg.attention, device, dtype)
    with torch.device("meta"):
        model = Llama(config)
    check_hf(model, cfg.model)

    # ---- 2. Model, prompt, text --------------------------------------------------------------------------------------
    model.to(dtype).to_empty(device=device)
    load_hf(model, cfg.model)
    model.set_attention(kernel)
    tokens = tokenizer.encode(cfg.prompt)
    if config.bos_token_id is not None:
        tokens = [config.bos_token_id, *tokens]
    if not tokens:
        raise UsageError("--prompt is empty, and the tokenizer has no token for the beginning of a text; give some text.")
    eos = config.eos_token_id
    stop_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    randomness = torch.Generator(device).manual_seed(cfg.seed)
    shown, ids = "", []
    for token in generate(model, tokens, cfg.max_new_tokens, cfg.temperature, cfg.top_p, stop_ids, randomness):
        if token in stop_ids:
            break
        ids.append(token)
        # The whole is decoded each time: one token may be half a character, or a space that depends on what comes before.
        text = tokenizer.decode(tokens + ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown):], end="", flush=True)
            shown = text
    print(tokenizer.decode(tokens + ids)[len(shown):])


if __name__ == "__main__":
    run_recipe(main, GenerateConfig)
