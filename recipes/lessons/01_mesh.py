"""Lesson 1: the mesh arranges processes in a grid, and a tensor is laid out over that grid.

Each later lesson is about one axis of such a grid.

    torchrun --nproc-per-node 4 recipes/lessons/01_mesh.py          (four processes: a grid of 2 x 2)

rank        a process with a number; all ranks run this same file, each with its own memory
mesh        the ranks, arranged in a grid with named axes; over an axis, a rank talks to its own line of the
grid placement   says how a tensor is laid out over one axis:
                Shard(d): each rank has a slice of dim d
                Replicate(): each rank has the whole tensor
                Partial(): each rank has a partial sum of the tensor
DTensor     a tensor that knows its whole shape and has a placement for each mesh axis; a rank stores only its
            local part
collective  an operation in which all ranks of an axis exchange messages. Most changes of a placement cost
one:

    mesh         tp 0   tp 1      Shard -> Replicate   all-gather       each rank gets every slice
          dp 0  rank 0 rank 1     Partial -> Replicate all-reduce       each rank gets the total
          dp 1  rank 2 rank 3     Partial -> Shard     reduce-scatter   each rank gets a slice of the total
                                  Replicate -> Shard   nothing          each rank drops the other slices
"""

import torch
import torch.distributed as dist
from common import print_each, print_once, run_lesson
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing import assert_close


def collectives(trace: CommDebugMode) -> str:
    """Return the collectives that CommDebugMode counted, in words."""
    counts = {str(op).rpartition(".")[2]: n for op, n in trace.get_comm_counts().items()}
    return ", ".join(f"{n} {op}" for op, n in counts.items()) or "nothing"


def lay_out_one_tensor(mesh: DeviceMesh, whole: torch.Tensor) -> None:
    """Distribute the same (4, 4) tensor in two ways and print what each rank stores."""
    for name, placements in {
        "rows over dp, columns over tp": [Shard(0), Shard(1)],
        "rows over dp, whole over tp": [Shard(0), Replicate()],
    }.items():
        distributed = distribute_tensor(whole, mesh, placements)
        print_once(f"\n0 .. 15 as (4, 4), {name}: {distributed.placements}")
        print_each(str(distributed.to_local().int().tolist()))
        # full_tensor() all-gathers over both axes; it returns exactly what was distributed.
        assert_close(distributed.full_tensor(), whole, rtol=0, atol=0)


def change_placements(tp_mesh: DeviceMesh, whole: torch.Tensor) -> None:
    """Change the placement of one tensor over tp in four ways, and print what each change sends."""
    print_once("\nFrom one placement to another over tp, and what that sends:")
    slices = whole.chunk(2)[tp_mesh.get_local_rank()]  # (2, 4): rows 0 .. 1 or 2 .. 3
    # Two halves add up to the whole without rounding error, so they can serve as partial sums.
    local = {Shard(0): slices, Replicate(): whole, Partial(): whole / 2}
    changes = [
        (Shard(0), Replicate()),
        (Partial(), Replicate()),
        (Partial(), Shard(0)),
        (Replicate(), Shard(0)),
    ]
    for before, after in changes:
        x = DTensor.from_local(local[before], tp_mesh, [before])
        with CommDebugMode() as trace:
            y = x.redistribute(placements=[after])
        shapes = f"{before} {tuple(x.to_local().shape)} -> {after} {tuple(y.to_local().shape)}"
        print_once(f"  {shapes}:  {collectives(trace)}")
        # The numbers are the same, bit for bit, only in another place.
        assert_close(y.to_local(), local[after], rtol=0, atol=0)
    # Shard(0) -> Shard(1) is an all-to-all. With gloo, DTensor would do an all-gather instead and drop what
    # it does not need; lesson 6 does the all-to-all by hand.


def multiply_on_the_mesh(mesh: DeviceMesh) -> None:
    """Run one linear layer on DTensors: the placements of its inputs decide the placement of its output."""
    torch.manual_seed(0)
    x, weight = torch.randn(8, 4), torch.randn(4, 6)  # 8 samples; a layer from 4 to 6 features
    grad_y = torch.randn(8, 6)
    plain_weight = weight.clone().requires_grad_()
    plain_y = x @ plain_weight
    plain_y.backward(grad_y)

    # Each rank stores (4, 6/tp) of the weight.
    dtensor_weight = distribute_tensor(weight, mesh, [Replicate(), Shard(1)]).requires_grad_()
    with CommDebugMode() as trace:
        dtensor_x = distribute_tensor(x, mesh, [Shard(0), Replicate()], src_data_rank=None)
        y = dtensor_x @ dtensor_weight  # (8/dp, 6/tp)
    print_once("\ny = x @ w: x is Shard(0) over dp, w is Shard(1) over tp.")
    print_once(f"Then y is {y.placements}; forward sent {collectives(trace)}.")
    with CommDebugMode() as trace:
        y.backward(distribute_tensor(grad_y, mesh, [Shard(0), Shard(1)], src_data_rank=None))
    print_once(
        f"The gradient of w is {dtensor_weight.grad.placements}: each dp rank saw other samples, so it has a "
        f"partial sum; backward sent {collectives(trace)}."
    )
    assert_close(y.full_tensor(), plain_y)
    # The tolerance is assert_close's default for fp32: dp adds the same numbers in another order.
    assert_close(dtensor_weight.grad.full_tensor(), plain_weight.grad)


def lesson() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dp_mesh, tp_mesh = mesh["dp"], mesh["tp"]
    print_once("A mesh of 2 x 2, and with whom each rank talks over each axis:")
    print_each(
        f"at dp {dp_mesh.get_local_rank()}, tp {tp_mesh.get_local_rank()}; "
        f"over dp with ranks {dist.get_process_group_ranks(dp_mesh.get_group())}, "
        f"over tp with {dist.get_process_group_ranks(tp_mesh.get_group())}"
    )
    whole = torch.arange(16.0).view(4, 4)  # the same on every rank
    lay_out_one_tensor(mesh, whole)
    change_placements(tp_mesh, whole)
    multiply_on_the_mesh(mesh)
    print_once(
        "\nproven: a matrix product over a 2 x 2 mesh equals that of one process, forward and gradient"
    )


if __name__ == "__main__":
    run_lesson(lesson, n_ranks=4)
