"""**The mesh: processes in a grid, and tensors laid over it.** Every later lesson is one axis of such a grid.

    torchrun --nproc-per-node 4 recipes/lessons/01_mesh.py          (four processes: a grid of 2 x 2)

rank        a process, with a number; all ranks run this same file, each with its own memory
mesh        the ranks as a grid with named axes; a rank talks to those that differ from it in one axis only
placement   how a tensor lies over one axis:   Shard(d): each rank has a slice of dim d
                                               Replicate(): each rank has all of it
                                               Partial(): each rank has an addend; their sum is the tensor
DTensor     a tensor with its whole shape, of which a rank holds a local piece: one placement per mesh axis
collective  a message that all ranks of an axis exchange. Changing a placement is a collective, or free:

        mesh            tp 0   tp 1           Shard -> Replicate   all-gather       everyone gets every slice
                 dp 0  rank 0 rank 1          Partial -> Replicate all-reduce       everyone gets the sum
                 dp 1  rank 2 rank 3          Partial -> Shard     reduce-scatter   everyone gets a slice of the sum
                                              Replicate -> Shard   nothing          everyone forgets a part
"""

import torch
import torch.distributed as dist
from common import run_lesson, say, say_each
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing import assert_close


def collectives(trace: CommDebugMode) -> str:
    """What CommDebugMode saw, as words."""
    counts = {str(op).rpartition(".")[2]: n for op, n in trace.get_comm_counts().items()}
    return ", ".join(f"{n} {op}" for op, n in counts.items()) or "nothing"


def lesson() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    say("A mesh of 2 x 2, and with whom each rank talks over each axis:")
    talks_to = {axis: dist.get_process_group_ranks(mesh[axis].get_group()) for axis in ("dp", "tp")}
    say_each(
        f"at dp {mesh['dp'].get_local_rank()}, tp {mesh['tp'].get_local_rank()}; over dp with ranks "
        f"{talks_to['dp']}, over tp with {talks_to['tp']}"
    )

    # ---- one tensor, several placements ----
    whole = torch.arange(16.0).view(4, 4)  # (4, 4), the same on every rank
    for name, placements in {
        "rows over dp, columns over tp": [Shard(0), Shard(1)],
        "rows over dp, whole over tp": [Shard(0), Replicate()],
    }.items():
        spread = distribute_tensor(whole, mesh, placements)
        say(f"\n0 .. 15 as (4, 4), {name}: {spread.placements}")
        say_each(str(spread.to_local().int().tolist()))
        # all-gathers over both axes: nothing was lost
        assert_close(spread.full_tensor(), whole, rtol=0, atol=0)

    # ---- changing a placement is a collective ----
    say("\nFrom one placement to another over tp, and what that sends:")
    tp_mesh = mesh["tp"]
    slices = whole.chunk(2)[tp_mesh.get_local_rank()]  # (2, 4): rows 0 .. 1 or 2 .. 3
    # halves sum to the whole without rounding
    pieces = {Shard(0): slices, Replicate(): whole, Partial(): whole / 2}
    for before, after in [
        (Shard(0), Replicate()),
        (Partial(), Replicate()),
        (Partial(), Shard(0)),
        (Replicate(), Shard(0)),
    ]:
        x = DTensor.from_local(pieces[before], tp_mesh, [before])
        with CommDebugMode() as trace:
            y = x.redistribute(placements=[after])
        say(
            f"  {before} {tuple(x.to_local().shape)} -> {after} {tuple(y.to_local().shape)}:  {collectives(trace)}"
        )
        # the same numbers in another place, bit for bit
        assert_close(y.to_local(), pieces[after], rtol=0, atol=0)
    # Shard(0) -> Shard(1) is an all-to-all; DTensor on gloo would gather and forget instead. Lesson 6 sends
    # it by hand.

    # ---- a layer on the mesh: what comes out is placed by what went in ----
    torch.manual_seed(0)
    x, weight = torch.randn(8, 4), torch.randn(4, 6)  # rows of data; a layer from 4 to 6
    grad_y = torch.randn(8, 6)
    plain_weight = weight.clone().requires_grad_()
    plain_y = x @ plain_weight
    plain_y.backward(grad_y)

    # (4, 6/tp) on each rank
    spread_weight = distribute_tensor(weight, mesh, [Replicate(), Shard(1)]).requires_grad_()
    with CommDebugMode() as trace:
        # (8/dp, 6/tp)
        y = distribute_tensor(x, mesh, [Shard(0), Replicate()], src_data_rank=None) @ spread_weight
    say(
        f"\ny = x @ w: x Shard(0) over dp, w Shard(1) over tp. Then y is {y.placements}; forward sent {collectives(trace)}."
    )
    with CommDebugMode() as trace:
        y.backward(distribute_tensor(grad_y, mesh, [Shard(0), Shard(1)], src_data_rank=None))
    say(
        f"The gradient of w is {spread_weight.grad.placements}: each dp rank saw other rows, so it has an addend; backward "
        f"sent {collectives(trace)}."
    )
    assert_close(y.full_tensor(), plain_y)
    # default fp32 tolerance: dp sums in another order
    assert_close(spread_weight.grad.full_tensor(), plain_weight.grad)
    say("\nproven: a matrix product over a 2 x 2 mesh equals that of one process, forward and gradient")


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=4)
