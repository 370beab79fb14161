"""Export a checkpoint of any layout to a Hugging Face folder: in one process, without a GPU, never the whole model in memory.

    python recipes/export.py runs/pretrain/checkpoints/step-00001000 exported
    python recipes/export.py runs/pretrain/checkpoints/step-00001000 exported --dtype float32

The shape of the model is in the checkpoint; tokenizer and dtype come from the run folder that it lies in, or from flags.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # a clone works without being installed

import torch
from tyro.conf import Positional

from dtensor_llama import Llama, LlamaConfig, UsageError
from dtensor_llama.checkpoint import SavedWeights
from dtensor_llama.cli import run_recipe
from dtensor_llama.data.tokenizer import Tokenizer, load_tokenizer
from dtensor_llama.weights import hf_parameters, save_hf_in_parts


@dataclass(frozen=True)
class ExportConfig:
    """Write the weights of a checkpoint as a Hugging Face folder."""

    checkpoint: Positional[str]   # folder like runs/pretrain/checkpoints/step-00001000
    out: Positional[str]          # folder to write; what another export left there is replaced
    dtype: Literal["float32", "bfloat16", "float16"] | None = None    # of the weights in it; None: the run's --train.dtype
    tokenizer: str | None = None  # Hugging Face folder, tokenizer.json or .model; None: the run's
    max_shard_gb: float = 5.0     # of one safetensors file, and about what this process needs of memory


def main(cfg: ExportConfig) -> None:
    if not 0 < cfg.max_shard_gb < float("inf"):
        raise UsageError(f"--max-shard-gb {cfg.max_shard_gb} is not possible; use a number above 0.")
    checkpoint, out = Path(cfg.checkpoint), Path(cfg.out)
    if out.resolve() in (checkpoint.resolve(), *checkpoint.resolve().parents):
        raise UsageError(f"{out} holds the checkpoint itself; export into a folder of its own.")
    saved = SavedWeights(checkpoint)
    run_dir = checkpoint.resolve().parents[1]             # RUN/checkpoints/step-00001000
    run = read_run(run_dir)
    dtype_name = cfg.dtype or run.get("train", {}).get("dtype")
    if dtype_name is None:
        raise UsageError(f"--dtype is missing, and there is no {run_dir / 'config.json'} that says what the run computed in; "
                         "use --dtype bfloat16 or --dtype float32.")
    dtype = getattr(torch, dtype_name)
    tokenizer = find_tokenizer(cfg, run_dir, run)
    if "--model" not in saved.meta:
        raise UsageError(f"{checkpoint} does not say what model it is of; only checkpoints of the recipes can be exported.")
    config = LlamaConfig(**saved.meta["--model"])
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in hf_parameters(Llama(config)).items()}
    saved.check(shapes, derived=("lm_head.weight",) if config.tie_word_embeddings else ())

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        return saved.read({name: torch.empty(shapes[name], dtype=dtype) for name in names})

    save_hf_in_parts(out, config, shapes, dtype, read, int(cfg.max_shard_gb * 1e9))
    tokenizer.save(out)
    print(f"step {saved.step} of {checkpoint.parents[1]}: {config.n_parameters / 1e6:,.1f}M parameters in {dtype_name}, "
          f"tokenizer {tokenizer.path}\nmodel         {out}   (Hugging Face format)")


def read_run(run_dir: Path) -> dict:
    """The settings of the run whose folder it is; empty if there is none."""
    try:
        return json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise UsageError(f"{run_dir / 'config.json'}: not readable JSON ({error}).") from None


def find_tokenizer(cfg: ExportConfig, run_dir: Path, run: dict) -> Tokenizer:
    """What --tokenizer says, else what the run trained with: kept in its folder, or where its flags found it."""
    asked = run.get("data", {}).get("tokenizer") or run.get("model")
    places = [cfg.tokenizer] if cfg.tokenizer else [run_dir / "tokenizer", run_dir / "hf", *([asked] if asked else [])]
    there = [place for place in places if Path(place).exists()]
    if not there:
        raise UsageError(f"no tokenizer: there is no {' and no '.join(map(str, places))}; name it with --tokenizer.")
    return load_tokenizer(there[0])


if __name__ == "__main__":
    run_recipe(main, ExportConfig)
