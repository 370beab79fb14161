"""Tensor parallelism of LoRA's adapters (dtensor_llama/chat/lora.py).

They stand beside the layers that tensor.py splits.

The thin matrices of y = B A x beside W x, A (r, inputs) and B (outputs, r), are split as W is, so that what
they add to y has the placement of y, with no traffic in forward. A matrix that is whole is used by each rank
for its share of y, or for its partial sum.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from dtensor_llama.config import LlamaConfig
from dtensor_llama.model import Llama
from parallel.tensor import AR, Local, Row, TensorPlan, apply_plan, summed_over_tp, tensor_plan


class LocalProjection(nn.Linear):
    """Computes x W^T of this rank's parts of x and W."""

    # the placement of the result, which makes it a DTensor as W x is one; None: it stays local
    output: Placement | None

    def forward(self, x: DTensor | Tensor) -> DTensor | Tensor:
        if isinstance(x, DTensor):  # of a whole x each rank has a partial sum of the gradient
            x = x.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in x.placements])
        is_whole = self.weight.placements[0].is_replicate()
        y = F.linear(x, summed_over_tp(self.weight) if is_whole else self.weight.to_local())
        return (
            y if self.output is None else DTensor.from_local(y, self.tp_mesh, [self.output], run_check=False)
        )


WHOLE_A, SPLIT_A = (Local(layout, LocalProjection, output=None) for layout in (Replicate(), Shard(1)))
WHOLE_B = Local(Replicate(), LocalProjection, output=Partial())
SPLIT_B = Local(Shard(0), LocalProjection, output=Shard(-1))
# fmt: off
# The adapter of a layer, by the placement of the layer's weight; r: the adapter's rank. Its all-reduces are
# of weight gradients.
LORA = {
    "S(0)": {"lora_A": Row(WHOLE_A, "R",    "(B, T, D) -> (B, T, r)",            {}, AR),
             "lora_B": Row(SPLIT_B, "S(0)", "(B, T, r) -> (B, T, F/tp)",         {}, {})},
    "S(1)": {"lora_A": Row(SPLIT_A, "S(1)", "(B, T, F/tp) -> (B, T, r) Partial", {}, {}),
             "lora_B": Row(WHOLE_B, "R",    "(B, T, r) -> (B, T, D) Partial",    {}, AR)},
}
# fmt: on


def lora_plan(config: LlamaConfig, tp: int) -> TensorPlan:
    """Return the rows of the adapters that the layers of a model may have."""
    adapters = {}
    for name, row in tensor_plan(config, tp).items():
        if name.endswith("_proj"):
            # Where tp ranks share a head, the layer is whole on each of them, and so are both matrices.
            of_one_head = {"lora_A": LORA["S(0)"]["lora_A"], "lora_B": row._replace(backward=AR)}
            for matrix, its_row in LORA.get(row.weight, of_one_head).items():
                adapters[f"{name}_lora.{matrix}"] = its_row
    return adapters


def apply_lora_parallel(model: Llama, tp_mesh: DeviceMesh) -> None:
    """Split the adapters of `model`, if it has any, in place. Call it before apply_tensor_parallel, which
    checks that nothing is left."""
    apply_plan(model, tp_mesh, lora_plan(model.config, tp_mesh.size()))
