"""**Everything at once: one mesh with five axes, and one function that spreads LLaMA over it.** What lessons
1 to 8 built.

    torchrun --nproc-per-node 4 recipes/lessons/09_everything.py       (four processes: any two axes of size 2 at a time)

axis         pp: lesson 8   dp_replicate: lesson 2   dp_shard: lesson 3   cp: lessons 6 and 7   tp: lessons 4 and 5
parallelize  applies the lessons as passes, from outside; the model does not know how many ranks there are. They nest: pp
             first (which layers are here), then cp (which tokens), tp (which slices), ZeRO last (shards of what is left)

        a weight (4 runs of rows)   0 1 2 3        four rows of tokens under dp_shard 2 x cp 2
        under tp 2                  0 0 1 1        row 0   [ rank 0 | rank 1 ]
        under dp_shard 2 x tp 2     0 2 1 3        row 1   [ rank 2 | rank 3 ]     and so on; the loss is the sum over all

A loss is summed over the axes whose ranks saw other tokens, and over pp, as only the last stage has it; a
gradient over those whose ranks hold the same weight and saw other tokens. _S(0, 2) in the output: rows that
tp has already cut in 2."""

import logging
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from common import run_lesson, say
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dtensor_llama import Llama, LlamaConfig
from dtensor_llama.data.reader import Batch
from dtensor_llama.model import init_weights
from parallel import ParallelConfig, build_mesh, parallelize
from parallel.clip import clip_grad_norm
from parallel.config import AXES, check_parallel
from parallel.context import shard_sequence
from parallel.pipeline import make_step_runner

TINY = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
)
ROWS, T = 4, 16  # of the global batch
LAYOUTS = [
    ParallelConfig(tp=2),
    ParallelConfig(pp=2, tp=2),
    ParallelConfig(pp=2, cp=2, cp_method="ring"),
    ParallelConfig(cp=2, tp=2),
    ParallelConfig(dp_replicate=2),
]  # dp_shard: what is left over
KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "send",
    "recv",
    "ring-attention-backward",
    "ring-attention",
)
# of all meshes so far: DTensor may reuse the groups of an earlier, equal one
axis_of_group: dict[str, str] = {}


class CountMessages(TorchDispatchMode):
    """Every collective passes here, as an operator that is told its group: c10d's get the object, others its
    name."""

    counts = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kind = next(
            (kind for kind in KINDS if op.__name__.replace("_", "").startswith(kind.replace("-", ""))), None
        )
        boxed = [x for x in args if kind and isinstance(x, torch.ScriptObject)]
        groups = (
            [dist.ProcessGroup.unbox(boxed[0]).group_name]
            if boxed
            else [x for x in args if isinstance(x, str)]
        )
        self.counts.update(
            f"{kind} over {axis_of_group[group]}" for group in groups if kind and group in axis_of_group
        )
        return op(*args, **(kwargs or {}))


def train_step(
    layout: ParallelConfig, tokens: Tensor, labels: Tensor
) -> tuple[float, float, dict[str, Tensor]]:
    """Forward and backward of all rows (ROWS, T): the loss, the gradient norm, and the gradients this rank
    has, whole."""
    layout = layout.resolve(dist.get_world_size())
    n_micros = check_parallel(layout, TINY, T, ROWS, micro_batch_size=1)  # what cannot run is refused here
    mesh = build_mesh(layout, "cpu")
    with torch.device("meta"):
        model = Llama(TINY)  # names and shapes, no memory
    for part in (parts := parallelize(model, mesh, layout)):
        part.to_empty(device="cpu")  # this rank's shards, without values
    init_weights(model, seed=0)  # from the names: the same under any layout
    # (ROWS/dp, T): this dp rank's
    columns = [x[mesh["dp"].get_local_rank() :: layout.dp] for x in (tokens, labels)]
    if layout.cp > 1:
        # (ROWS/dp, T/cp): this cp rank's
        columns = [shard_sequence(x, mesh["cp"], layout.cp_method) for x in columns]
    micros = [Batch(*row, None) for row in zip(*(x.split(1) for x in columns), strict=True)]
    runner = make_step_runner(
        parts,
        mesh["pp"],
        layout.schedule,
        n_micros,
        torch.device("cpu"),
        torch.float32,
        layout.sequence_shards,
        layout.zero_stage,
    )
    axis_of_group.update(
        {mesh[axis].get_group().group_name: axis for axis in ("dp_replicate", "fsdp", "cp", "tp", "pp")}
    )
    with CountMessages() as trace:  # FSDP averages; grad_scale makes it a sum
        loss = runner.step(micros, (labels != -100).sum(), grad_scale=layout.grad_ranks)
    dist.all_reduce(loss, group=mesh["loss"].get_group())
    norm = clip_grad_norm(model.parameters(), max_norm=1e9)  # over every axis, once; clips nothing

    say(
        f"{' x '.join(f'{axis} {getattr(layout, axis)}' for axis in AXES if getattr(layout, axis) > 1)}: rank 0 has "
        f"{sum(p.to_local().numel() for p in model.parameters()):,} of {TINY.n_parameters:,} parameters and reads "
        f"{len(micros)} x {tuple(micros[0].tokens.shape)} tokens"
    )
    for name, p in model.named_parameters():
        if name.endswith(("layers.0.self_attn.q_proj.weight", "layers.0.mlp.down_proj.weight")):
            placed = [
                f"{how} over {axis}"
                for how, axis in zip(p.placements, p.device_mesh.mesh_dim_names, strict=True)
            ]
            say(f"  {name[15:-7]:17}{tuple(p.shape)}, here {tuple(p.to_local().shape)}: {', '.join(placed)}")
    say("  messages of rank 0: " + ", ".join(f"{n} {what}" for what, n in sorted(trace.counts.items())))
    trace.counts.clear()
    return loss.item(), norm.item(), {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def lesson() -> None:
    # its advice on speed is not for tiny models
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    tokens, labels = torch.randint(TINY.vocab_size, (2, ROWS, T), generator=torch.Generator().manual_seed(1))
    labels[2:, T // 2 :] = -100  # the last rows have fewer scored tokens
    plain = Llama(TINY)  # one process
    plain_loss = plain(tokens, labels) / (labels != -100).sum()
    plain_loss.backward()
    plain_norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()]).item()
    for layout in LAYOUTS:
        loss, norm, grads = train_step(layout, tokens, labels)
        say(
            f"  loss {loss:.6f}, one process {plain_loss.item():.6f}; gradient norm {norm:.6f}, one process {plain_norm:.6f}\n"
        )
        # the project's promise for fp32
        assert_close([loss, norm], [plain_loss.item(), plain_norm], rtol=0, atol=2e-5)
        for name, grad in grads.items():
            assert_close(grad, plain.get_parameter(name).grad, rtol=1e-4, atol=1e-6)

    say("To add an axis of your own, e.g. ep for experts:")
    for file, start, what in (
        ("parallel/config.py", "AXES =", "its name, beside the axes that shall be its neighbours; a field"),
        ("parallel/config.py", "DERIVED_AXES =", "do its ranks read other rows (dp)? share weights (fsdp)?"),
        ("parallel/rules.py", "TENSOR =", "a list like this one: what it cannot do, and what works instead"),
        ("parallel/apply.py", "def parallelize", "its pass, from a file of its own, after those it needs"),
        ("parallel/explain.py", "def tp_traffic", "a function like this one: what it sends"),
        ("parallel/mesh.py", "def build_mesh", "nothing: it makes the axes of config.py"),
        ("dtensor_llama/shards.py", "def copies", "nothing: it counts by the placements of DTensors"),
    ):
        lines = Path(__file__).parents[2].joinpath(file).read_text().splitlines()
        line = 1 + next(i for i, text in enumerate(lines) if text.startswith(start))
        say(f"  {f'{file}:{line}':26} {start:20} {what}")
    say(
        f"\nproven: {len(LAYOUTS)} layouts of 4 processes give one process's loss, gradient norm and gradients"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=4)
