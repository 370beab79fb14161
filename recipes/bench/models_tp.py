"""Compare a training step of transformers' models under tp 2 with other libraries that split the same ones.

    python recipes/bench/models_tp.py                 # against transformers' own tp_plan="auto"
    python recipes/bench/models_tp.py --colossal-python ENVIRONMENT/bin/python     # and Colossal-AI
    python recipes/bench/models_tp.py --models llama --rounds 5

Every contestant is two gloo processes on the CPU with one thread each, and holds one model. All contestants
of a model start from the same saved weights and read the same sequences. They take turns: while one computes,
the others wait for a line on their standard input. A step is forward, loss, backward, clipping to a norm of
1, and a fused AdamW, in float32 and without dropout.

The first steps of each contestant are compared with plain transformers in one process: their losses say
whether all compute the same thing. Prints one JSON line for each contestant and model: milliseconds of a step
on rank 0 (median and least), processor milliseconds of both ranks (median), and the time of ours over that of
this contestant, which is the median of the ratios of all rounds. Below 1 ours is faster.

Colossal-AI pins versions that do not fit ours, so it lives in an environment of its own, whose Python
--colossal-python names. Version 0.5.0 runs with torch 2.13.0 and transformers 4.51.3 if it is installed with
--no-deps, and beside it what it imports: numpy tqdm psutil packaging rich click contexttimer ninja
safetensors einops pydantic peft==0.13.2 sentencepiece protobuf, and galore_torch and bitsandbytes with
--no-deps.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone works without being installed

import torch
import torch.distributed as dist
from torch import Tensor, nn

# This file also runs in the environment of Colossal-AI, which lacks what our packages require. So what is not
# torch is imported where it is used.

MAX_NORM = 1.0
ADAMW = {"lr": 3e-4, "weight_decay": 0.1, "fused": True}
N_COMPARED = 3  # steps at the beginning whose losses are held against plain transformers
N_BATCHES = 8  # different batches; they come again in the same order

# Takes tokens (B, T), and returns the loss and the norm of gradients.
Step = Callable[[Tensor], tuple[Tensor, Tensor | float]]


@dataclass(frozen=True)
class Config:
    """A step under tp 2: ours, transformers' own and Colossal-AI's, taking turns."""

    models: tuple[str, ...] = ("gpt2", "opt", "llama", "qwen2")
    colossal_python: str = ""  # the Python of an environment with Colossal-AI 0.5.0; empty: leave it out
    rounds: int = 20  # turns of each contestant
    steps: int = 2  # timed steps of a turn; one more comes before them and is not timed
    hidden: int = 512
    layers: int = 6
    heads: int = 8
    vocabulary: int = 8192
    rows: int = 4  # sequences of a step, the same on both ranks
    tokens: int = 256  # of a sequence


# ---- Contestants: each turns a saved model into a training step, in two processes --------------------------


def ours(folder: Path, attention: str = "sdpa", sequence_parallel: bool = True) -> Step:
    """Our Booster. LlamaForCausalLM becomes our own Llama; the others keep their classes."""
    from parallel import Booster, ParallelConfig

    model = load(folder, attn_implementation=attention)
    booster = Booster(ParallelConfig(tp=2, zero_stage=1, sequence_parallel=sequence_parallel))
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    model, optimizer, _, _ = booster.boost(model, optimizer)

    def step(tokens: Tensor) -> tuple[Tensor, Tensor]:
        loss = booster.step({"input_ids": tokens, "labels": tokens})
        norm = booster.clip_grad_norm(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss, norm

    return step


def ours_eager(folder: Path) -> Step:
    """Ours with transformers' eager attention, which is the only one that Colossal-AI computes on a CPU."""
    return ours(folder, attention="eager")


def ours_whole_sequences(folder: Path) -> Step:
    """Ours without sequence parallelism: each rank norms all tokens, as in transformers."""
    return ours(folder, sequence_parallel=False)


def of_transformers(folder: Path) -> Step:
    """Transformers' own: its plan makes DTensors of the matrices, and leaves the norms plain tensors.

    torch's clip_grad_norm_ and its fused AdamW refuse a list of both. So the norm is that of transformers'
    Trainer (Trainer._mixed_mesh_grad_norm), and each kind is a group of the optimizer.
    """
    from torch.distributed.tensor import DTensor
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    model = load(folder, tp_plan="auto")  # starts the process group
    kinds = defaultdict(list)
    for parameter in model.parameters():
        kinds[type(parameter.data)].append(parameter)
    optimizer = torch.optim.AdamW([{"params": parameters} for parameters in kinds.values()], **ADAMW)

    def step(tokens: Tensor) -> tuple[Tensor, Tensor]:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        norms = [get_total_norm([p.grad for p in parameters]) for parameters in kinds.values()]
        norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        for parameters in kinds.values():
            clip_grads_with_norm_(parameters, MAX_NORM, norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm

    return step


def of_colossal(folder: Path) -> Step:
    """Colossal-AI's HybridParallelPlugin, with four of its calls to the device replaced.

    Its CPU accelerator hands torch.get_rng_state an argument too many and refuses manual_seed, and the
    forward of GPT-2 calls torch.cuda.set_device. Attention is eager: its policy for OPT knows no sdpa, and
    with sdpa its GPT-2 is not causal, because it always passes a mask and sdpa is causal only without one.
    """
    import colossalai
    from colossalai.accelerator import get_accelerator
    from colossalai.booster import Booster
    from colossalai.booster.plugin import HybridParallelPlugin

    accelerator = get_accelerator()
    accelerator.get_rng_state = lambda device=None: torch.get_rng_state()
    accelerator.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    accelerator.manual_seed = torch.manual_seed
    torch.cuda.set_device = lambda device: None
    colossalai.launch_from_torch(verbose=False)
    model = load(folder, attn_implementation="eager")
    booster = Booster(plugin=HybridParallelPlugin(tp_size=2, pp_size=1, precision="fp32", max_norm=MAX_NORM))
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    model, optimizer, *_ = booster.boost(model, optimizer)
    mask = None

    def step(tokens: Tensor) -> tuple[Tensor, float]:
        nonlocal mask
        mask = torch.ones_like(tokens) if mask is None else mask  # its GPT-2 cannot do without
        loss = model(input_ids=tokens, attention_mask=mask, labels=tokens, use_cache=False).loss
        booster.backward(loss, optimizer)
        optimizer.step()  # clips
        optimizer.zero_grad()
        return loss.detach(), optimizer.get_grad_norm()

    return step


def plain(folder: Path) -> Step:
    """Plain transformers in one process: what all others are compared with."""
    model = load(folder)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def step(tokens: Tensor) -> tuple[Tensor, Tensor]:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm

    return step


def load(folder: Path, **settings) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **settings).train()


STEPS = {
    "ours": ours,
    "ours, eager attention": ours_eager,
    "ours, no sequence parallelism": ours_whole_sequences,
    "transformers": of_transformers,
    "Colossal-AI": of_colossal,
}
CONTESTANTS = {
    "gpt2": ("ours", "ours, eager attention", "Colossal-AI"),
    "opt": ("ours", "ours, eager attention", "Colossal-AI"),
    "llama": ("ours", "ours, no sequence parallelism", "transformers"),
    "qwen2": ("ours", "transformers"),
}


# ---- A contestant's process --------------------------------------------------------------------------------


def contend(name: str, folder: Path) -> None:
    """Do as many steps as each line of standard input says, and answer each line with one of JSON."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is not an answer
    torch.manual_seed(0)
    batches = torch.load(folder / "batches.pt")
    step = STEPS[name](folder)
    n_done = 0
    print(json.dumps(versions()), file=answers)
    for line in sys.stdin:
        records = []
        for _ in range(int(line)):
            dist.barrier()
            began, processor_began = time.perf_counter(), time.process_time()
            loss, norm = step(batches[n_done % N_BATCHES])
            record = {"loss": float(loss), "norm": float(norm)}
            record["ms"] = 1e3 * (time.perf_counter() - began)
            record["processor_ms"] = 1e3 * (time.process_time() - processor_began)
            records.append(record)
            n_done += 1
        print(json.dumps(records), file=answers)
    os._exit(0)  # nothing is left to be done, and a group that is left one rank at a time complains


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ["torch", "transformers"] + (["colossalai"] if "colossalai" in sys.modules else [])
    return {name: version(name) for name in names}


# ---- The process that lets them take turns -----------------------------------------------------------------


class Contestant:
    """Two processes that hold a model and compute only when they are asked to."""

    def __init__(self, name: str, python: str, folder: Path):
        self.name, self.log = name, folder / f"{name}.log"
        self.ms, self.processor_ms = [], []  # of all timed steps
        self.round_ms = []  # of a step, the mean of each round
        port = free_port()
        command = [python, str(Path(__file__).resolve()), CONTESTANT, name, str(folder)]
        with open(self.log, "w") as log:
            self.ranks = [
                subprocess.Popen(
                    command,
                    env=environment(rank, port),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
                for rank in range(2)
            ]
        self.versions = self._answers()[0]

    def do(self, n_steps: int) -> list[list[dict]]:
        """Return the records of so many steps, of rank 0 and of rank 1."""
        for rank in self.ranks:
            rank.stdin.write(f"{n_steps}\n")
            rank.stdin.flush()
        return self._answers()

    def take_turn(self, n_steps: int) -> None:
        """Do one step that is not timed, because the last turn was another contestant's, and then these."""
        of_rank0, of_rank1 = self.do(1 + n_steps)
        ms = [record["ms"] for record in of_rank0[1:]]
        self.ms += ms
        self.round_ms.append(statistics.mean(ms))
        for one, other in zip(of_rank0[1:], of_rank1[1:], strict=True):
            self.processor_ms.append(one["processor_ms"] + other["processor_ms"])

    def _answers(self) -> list:
        lines = [rank.stdout.readline() for rank in self.ranks]
        if not all(lines):
            complaints = [line for line in self.log.read_text().splitlines() if "Error" in line]
            refuse(f"{self.name} did not run: {complaints[-1] if complaints else 'it ended without a word'}")
        return [json.loads(line) for line in lines]

    def stop(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()


def environment(rank: int, port: int) -> dict[str, str]:
    """Return what torchrun would set. One thread for each process: that is what two cores have."""
    launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    launch = {name: str(value) for name, value in launch.items()}
    return {**os.environ, **launch, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def refuse(message: str) -> NoReturn:
    from dtensor_llama.errors import UsageError

    raise UsageError(message)


def main(cfg: Config) -> None:
    check(cfg)
    torch.set_num_threads(1)
    for model in cfg.models:
        with TemporaryDirectory() as folder:
            measure(model, cfg, Path(folder))


def check(cfg: Config) -> None:
    unknown = [model for model in cfg.models if model not in CONTESTANTS]
    if unknown or not cfg.models:
        refuse(
            f"models={' '.join(unknown) or 'nothing'} is not known; choose among {', '.join(CONTESTANTS)}."
        )
    sizes = ("rounds", "steps", "hidden", "layers", "heads", "vocabulary", "rows", "tokens")
    for name in sizes:
        if getattr(cfg, name) < 1:
            refuse(f"{name}={getattr(cfg, name)} is not possible; it must be at least 1.")
    if cfg.tokens < 2:
        refuse("tokens=1 leaves no token to predict; use at least 2.")
    if cfg.heads % 4 or cfg.hidden % (2 * cfg.heads):
        refuse(
            f"heads={cfg.heads} and hidden={cfg.hidden} do not fit; 4 must divide the heads (two ranks, and "
            "half as many key/value heads in qwen2), and twice the heads must divide `hidden`."
        )
    if cfg.vocabulary % 128:
        refuse(f"vocabulary={cfg.vocabulary} is padded by Colossal-AI; use a multiple of 128.")
    if cfg.colossal_python and not os.access(cfg.colossal_python, os.X_OK):
        refuse(f"colossal_python={cfg.colossal_python} is not a program; name the python of its environment.")


def measure(model: str, cfg: Config, folder: Path) -> None:
    """Print what each contestant takes for a step of one model."""
    save_model(model, cfg, folder)
    reference = plain(folder)
    batches = torch.load(folder / "batches.pt")
    expected = [[float(value) for value in reference(tokens)] for tokens in batches[:N_COMPARED]]
    del reference
    contestants = []
    try:
        for name in CONTESTANTS[model]:
            if name != "Colossal-AI" or cfg.colossal_python:
                python = cfg.colossal_python if name == "Colossal-AI" else sys.executable
                contestants.append(Contestant(name, python, folder))
            else:
                print(
                    f"{model}: Colossal-AI is left out; --colossal-python names its Python", file=sys.stderr
                )
        apart = {
            contestant.name: differences(contestant.do(N_COMPARED)[0], expected) for contestant in contestants
        }
        for i in range(cfg.rounds):
            for contestant in contestants[:: 1 if i % 2 else -1]:  # nobody always comes after the same one
                contestant.take_turn(cfg.steps)
    finally:
        for contestant in contestants:
            contestant.stop()
    for contestant in contestants:
        result = {
            "model": model,
            "contestant": contestant.name,
            "ms": round(statistics.median(contestant.ms), 1),
            "least_ms": round(min(contestant.ms), 1),
            "processor_ms": round(statistics.median(contestant.processor_ms), 1),
            **ratios(contestants, contestant),
            **apart[contestant.name],
            "rounds": cfg.rounds,
            "steps_a_round": cfg.steps,
            **contestant.versions,
        }
        print(json.dumps(result), flush=True)


def ratios(contestants: list[Contestant], theirs: Contestant) -> dict[str, float]:
    """Return the time of each variant of ours over that of one contestant: the median of all rounds."""
    found = {}
    for own in contestants:
        if own.name.startswith("ours") and own is not theirs:
            pairs = zip(own.round_ms, theirs.round_ms, strict=True)
            found[f"{own.name} / this"] = round(statistics.median(a / b for a, b in pairs), 3)
    return found


def differences(records: list[dict], expected: list[list[float]]) -> dict[str, list[float]]:
    """Return how far the losses, and relatively the norms, of the first steps are from plain transformers."""
    losses, norms = [], []
    for record, (loss, norm) in zip(records, expected, strict=True):
        losses.append(float(f"{abs(record['loss'] - loss):.1e}"))
        norms.append(float(f"{abs(record['norm'] / norm - 1):.1e}"))
    return {"loss_differences": losses, "norm_differences": norms}


def save_model(model: str, cfg: Config, folder: Path) -> None:
    """Write a random model and the batches that all contestants read."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sizes = {"vocab_size": cfg.vocabulary, "hidden_size": cfg.hidden, "num_hidden_layers": cfg.layers}
    sizes |= {"num_attention_heads": cfg.heads, "max_position_embeddings": cfg.tokens}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    gated = 128 * round(8 * cfg.hidden / 3 / 128)  # three matrices with as many weights as two of 4 x hidden
    more = {
        "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "opt": {"ffn_dim": 4 * cfg.hidden, "word_embed_proj_dim": cfg.hidden, "dropout": 0.0},
        "llama": {"intermediate_size": gated, "num_key_value_heads": cfg.heads},
        "qwen2": {"intermediate_size": gated, "num_key_value_heads": cfg.heads // 2},
    }
    config = transformers.AutoConfig.for_model(model, **sizes, **more[model])
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    torch.save(torch.randint(cfg.vocabulary, (N_BATCHES, cfg.rows, cfg.tokens)), folder / "batches.pt")


CONTESTANT = "contestant"  # the first argument of a process that a measurement starts

if __name__ == "__main__":
    if sys.argv[1:2] == [CONTESTANT]:
        contend(sys.argv[2], Path(sys.argv[3]))
    else:
        from dtensor_llama.cli import run_recipe

        run_recipe(main, Config)
