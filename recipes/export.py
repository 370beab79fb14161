"""Export a checkpoint of any layout to a Hugging Face folder: in one process, without a GPU, and without the
ranks that wrote it.

    python recipes/export.py runs/pretrain/checkpoints/step-00001000 exported
    python recipes/export.py runs/pretrain/checkpoints/step-00001000 exported --dtype float32

The shape of the model is in the checkpoint. Tokenizer and dtype come from the run folder that it lies in, or
from flags. The weights pass through memory one file at a time. Only LoRA adapters need the whole model in
memory, into which they are merged.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

if __name__ == "__main__":
    from dtensor_llama.terminal import end_quietly_on_ctrl_c

    end_quietly_on_ctrl_c()  # the imports below take seconds

import torch
from tyro.conf import Positional

from dtensor_llama import Llama, LlamaConfig, UsageError, load_hf, save_hf
from dtensor_llama.checkpoint import CHECKSUMS, SavedWeights
from dtensor_llama.cli import FROZEN, AtLeast, FilePath, check_numbers, run_recipe
from dtensor_llama.data.tokenizer import Tokenizer, load_tokenizer
from dtensor_llama.hf_folder import Base
from dtensor_llama.places import refuse_hub_name
from dtensor_llama.run import GENERATION, SETTINGS
from dtensor_llama.weights import check_hf, hf_parameters, save_generation_config, save_hf_in_parts

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ExportConfig:
    """Write the weights of a checkpoint as a Hugging Face folder."""

    checkpoint: Positional[FilePath]  # folder like runs/pretrain/checkpoints/step-00001000
    out: Positional[FilePath]  # folder to write; what another export left there is replaced
    # of the weights in it; None: the run's --train.dtype
    dtype: Dtype | None = None
    tokenizer: FilePath | None = None  # Hugging Face folder, tokenizer.json or .model; None: the run's
    base: FilePath | None = None  # LoRA: Hugging Face folder of the frozen weights; None: the run's --model
    max_shard_gb: float = 5.0  # of one safetensors file, and about what this process needs of memory


def main(cfg: ExportConfig) -> None:
    check_numbers(cfg, [AtLeast("max_shard_gb", 0, exclusive=True)])
    checkpoint, out = Path(cfg.checkpoint), Path(cfg.out)
    if out.resolve() in (checkpoint.resolve(), *checkpoint.resolve().parents):
        raise UsageError(f"{out} holds the checkpoint itself; export into a folder of its own.")
    for place in (out.resolve(), *out.resolve().parents):
        if (place / CHECKSUMS).exists():
            raise UsageError(
                f"{out}: {place} is a checkpoint, which its run may delete; export into another folder."
            )
    saved = SavedWeights(checkpoint)
    run_dir = checkpoint.resolve().parent.parent  # RUN/checkpoints/step-00001000, from wherever it is named
    run = read_run(run_dir)
    dtype_name = cfg.dtype or run.get("train", {}).get("dtype")
    if dtype_name is None:
        raise UsageError(
            f"--dtype is missing, and there is no {run_dir / 'config.json'} that records what the run "
            "computed in; use --dtype bfloat16 or --dtype float32."
        )
    if dtype_name not in get_args(Dtype):
        raise UsageError(f"{run_dir / 'config.json'}: train.dtype is {dtype_name!r}; name one with --dtype.")
    dtype = getattr(torch, dtype_name)
    tokenizer = find_tokenizer(cfg, run_dir, run)
    if "--model" not in saved.meta:
        raise UsageError(
            f"{checkpoint} does not record its model; only checkpoints of the recipes can be exported."
        )
    config = LlamaConfig(**saved.meta["--model"])
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens and the model of {checkpoint} a "
            f"vocabulary of {config.vocab_size}; give the tokenizer of the run with --tokenizer."
        )
    has_adapters = bool(saved.meta.get("--lora", {}).get("rank"))
    if cfg.base and not has_adapters:
        raise UsageError(
            f"--base {cfg.base} is for LoRA adapters, and {checkpoint} holds a whole model; leave it out."
        )
    template = None  # the tokenizer's own, if it has one
    settings = saved.meta.get(SETTINGS, {})
    if "--lora" in saved.meta and settings.get("--data.template") != "none":
        # sft.py made this checkpoint, and uses LLaMA-2's template where a tokenizer has none.
        from dtensor_llama.chat.template import ChatTemplate

        template = ChatTemplate(tokenizer).source
    max_shard_bytes = int(cfg.max_shard_gb * 1e9)
    if has_adapters:
        base = Path(cfg.base or run.get("model", "(unknown)"))
        model = merged_model(saved, config, base, run.get("train", {}).get("dtype") or dtype_name)
        save_hf(model, out, dtype, max_shard_bytes)
    else:
        save(saved, config, dtype, out, max_shard_bytes)
    if GENERATION in saved.meta:  # else it stays as save_hf made it, from the ids of the model
        save_generation_config(out, saved.meta[GENERATION])
    tokenizer.save(out, template)
    print(
        f"step {saved.step} of {run_dir if run else checkpoint}: {config.n_parameters / 1e6:,.1f}M "
        f"parameters in {dtype_name}, tokenizer {tokenizer.path}\nmodel         {out}   (Hugging Face format)"
    )


def save(
    saved: SavedWeights, config: LlamaConfig, dtype: torch.dtype, out: Path, max_shard_bytes: int
) -> None:
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in hf_parameters(Llama(config)).items()}
    saved.check(shapes, derived=("lm_head.weight",) if config.tie_word_embeddings else ())

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        return saved.read({name: torch.empty(shapes[name], dtype=dtype) for name in names})

    save_hf_in_parts(out, config, shapes, dtype, read, max_shard_bytes)


def merged_model(saved: SavedWeights, config: LlamaConfig, base: Path, frozen_dtype: str) -> Llama:
    """Return the base model with the adapters of a LoRA checkpoint merged into its weights.

    frozen_dtype: of the weights beside which the adapters were trained
    """
    from dtensor_llama.chat.lora import LoraConfig, adapter_parameters, apply_lora, merge_lora

    refuse_hub_name(str(base), "base")
    if not base.is_dir():
        raise UsageError(
            f"{saved.path} holds LoRA adapters, and the model they belong to is not at {base}; name its "
            "folder with --base."
        )
    with torch.device("meta"):
        model = Llama(config)
    check_hf(model, base)
    if saved.meta.get(FROZEN) not in (None, Base(str(base)).fingerprint):
        raise UsageError(
            f"{base} does not hold the weights beside which the adapters of {saved.path} were trained; name "
            "their folder with --base."
        )
    apply_lora(model, LoraConfig(**saved.meta["--lora"]), getattr(torch, frozen_dtype))
    shapes = {name: tuple(parameter.shape) for name, parameter in adapter_parameters(model).items()}
    saved.check(shapes, derived=("lm_head.weight",))  # older checkpoints have it where embeddings are tied
    model.to_empty(device="cpu")
    load_hf(model, base)
    saved.read({name: parameter.detach() for name, parameter in adapter_parameters(model).items()})
    merge_lora(model)
    return model


def read_run(run_dir: Path) -> dict:
    """Return the settings of the run in this folder; empty if there is none."""
    try:
        run = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise UsageError(f"{run_dir / 'config.json'}: not readable JSON ({error}).") from None
    if not isinstance(run, dict):
        raise UsageError(
            f"{run_dir / 'config.json'}: holds a {type(run).__name__}, not the settings of a run."
        )
    for group in ("train", "data"):
        if not isinstance(run.get(group, {}), dict):
            raise UsageError(f"{run_dir / 'config.json'}: {group} is {run[group]!r}, not settings of a run.")
    return run


def find_tokenizer(cfg: ExportConfig, run_dir: Path, run: dict) -> Tokenizer:
    """Return the tokenizer that --tokenizer names, else the one of the run: kept in its folder, or where its
    own flags found it."""
    if cfg.tokenizer:
        return load_tokenizer(cfg.tokenizer)
    places = [run_dir / "tokenizer", run_dir / "hf"]
    asked = run.get("data", {}).get("tokenizer") or run.get("model")
    if asked:
        places.append(asked)
    found = [place for place in places if Path(place).exists()]
    if not found:
        raise UsageError(
            f"no tokenizer: there is no {' and no '.join(map(str, places))}; name it with --tokenizer."
        )
    return load_tokenizer(found[0])


if __name__ == "__main__":
    run_recipe(main, ExportConfig)
