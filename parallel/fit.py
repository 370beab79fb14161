"""An estimate of what fits a rank, to choose what the user left open; the choice is printed with its reasons.

A parameter takes 16 bytes if it is trained in fp32 (weight, gradient, two moments), shared by the ranks of
fsdp; 2 bytes if it is frozen or has all its states on the host; and 2 more while it is gathered, as two
blocks, the embedding and the head are at a time. Activations take what recompute.py says. The estimate is
rough on purpose: it leaves a tenth of the memory free, and a user who knows better sets the fields.
"""

from dataclasses import dataclass, replace
from math import ceil, prod

from dtensor_llama.config import LlamaConfig
from dtensor_llama.errors import UsageError
from dtensor_llama.metrics import GIB
from parallel.config import ParallelConfig
from parallel.rules import Job

MAX_MICRO_TOKENS = 16384  # a forward of more tokens is no faster on any device
MAX_TP = 8  # beyond the fast wires of a node tensor parallelism waits for traffic


@dataclass(frozen=True)
class States:
    """Holds what decides how many bytes a parameter takes."""

    itemsize: int  # bytes of the numbers that compute
    n_adapter: int = 0  # trained parameters if all others are frozen, else 0
    offloads: bool = False  # optimizer states may all live on the host


def bytes_needed(job: Job, layout: ParallelConfig, states: States) -> int:
    """Return about how many bytes of device memory a rank needs."""
    model, itemsize, n_adapter = job.model, states.itemsize, states.n_adapter
    D, F, L, V = model.hidden_size, model.intermediate_size, model.num_hidden_layers, model.vocab_size
    slices, shards = layout.tp * layout.pp, layout.fsdp if layout.zero_stage else 1
    n_block = sum(map(prod, model.block_weights().values()))
    if n_adapter or states.offloads:  # the weights as they compute, and little besides
        kept = itemsize * model.n_parameters + 16 * n_adapter
    else:
        kept = 16 * model.n_parameters
    gathered = 0
    if shards > 1:
        gathered = itemsize * (2 * n_block + 2 * V * D) + (0 if n_adapter else 4 * V * D)
    at_work = 2 * (10 * D + 4 * F)  # bytes per token that one block computes with
    per_layer = {"none": at_work, "selective": 2 * (6 * D + 3 * F), "full": 2 * D}[job.recompute]
    per_token = per_layer * L / layout.pp + at_work
    micro_tokens = job.micro_batch_size * job.seq_len
    activations = per_token * (itemsize / 2) * micro_tokens / layout.cp / layout.tp + 2 * 256 * 2**20
    return int(kept / slices / shards + gathered / layout.tp + activations)


def choose_open(
    job: Job, layout: ParallelConfig, device_bytes: int, states: States, tries_tp: bool
) -> tuple[Job, ParallelConfig, str]:
    """Return job and layout with what was open chosen, and why; UsageError if nothing fits.

    job: its recompute and its micro_batch_size are None where they are open. layout: resolved. tries_tp:
        whether data-parallel ranks of the layout may become tp ranks. What a memory placement keeps on the
        device beyond the weights is not known here. Preferred are, in this order, less tensor parallelism, no
        recomputation, and large microbatches.
    """
    first, needed = "", 0
    for tried, tried_layout in _candidates(job, layout, tries_tp):
        needed = bytes_needed(tried, tried_layout, states)
        what = (
            f"tp {tried_layout.tp} x dp {tried_layout.dp}, recompute {tried.recompute}, "
            f"microbatches of {tried.micro_batch_size}"
        )
        if needed <= 0.9 * device_bytes:
            why = f"{what}: about {needed / GIB:.1f} of {device_bytes / GIB:.1f} GiB a rank{first}"
            return tried, tried_layout, why
        first = first or f" ({what} would need {needed / GIB:.1f})"
    ways = ["more processes", "a smaller `seq_len`"]
    if not states.n_adapter and not states.offloads:
        ways.append("placement=auto")
    if not states.n_adapter:
        ways.append("lora.rank=16")
    raise UsageError(
        f"the model and rows of seq_len={job.seq_len} tokens do not fit {device_bytes / GIB:.1f} GiB a rank: "
        f"at least {needed / GIB:.1f} are needed. Use {', or '.join(ways)}."
    )


def _candidates(job: Job, layout: ParallelConfig, tries_tp: bool):
    """Yield (job, layout) for each choice of what is open, the preferred ones first."""
    ranks, model = layout.dp_shard * layout.tp, job.model
    for tp in (1, 2, 4, MAX_TP) if tries_tp else (layout.tp,):
        if ranks % tp or model.num_key_value_heads % tp or model.intermediate_size % tp:
            continue
        tried = replace(layout, tp=tp, dp_shard=ranks // tp)
        rows = max(1, job.global_batch_size // layout.pp // tried.dp)
        for recompute in [job.recompute] if job.recompute else ["none", "full"]:
            for micro_batch_size in [job.micro_batch_size] if job.micro_batch_size else (8, 4, 2, 1):
                fits_batch = (
                    rows % micro_batch_size == 0 and micro_batch_size * job.seq_len <= MAX_MICRO_TOKENS
                )
                if job.micro_batch_size or micro_batch_size == 1 or fits_batch:
                    yield replace(job, recompute=recompute, micro_batch_size=micro_batch_size), tried


def check_states(
    config: LlamaConfig, layout: ParallelConfig, device_bytes: int, bytes_per_parameter: float
) -> None:
    """Raise UsageError if weights, gradients and AdamW's states alone are more than the device of a rank has.

    layout: resolved. bytes_per_parameter: 16 if all of them are in float32 on the device (4 of the 16 are
        gradients), fewer if a chunk manager keeps states on the host. Activations come on top, and are not
        known here.
    """
    here = config.n_parameters / (layout.tp * layout.pp)
    if layout.zero_stage == 0:
        needed = bytes_per_parameter * here
    elif layout.zero_stage == 1:
        needed = 4 * here + (bytes_per_parameter - 4) * here / layout.fsdp
    else:
        needed = bytes_per_parameter * here / layout.fsdp
    if needed > device_bytes:
        n_gpus = ceil(bytes_per_parameter * config.n_parameters / device_bytes)
        raise UsageError(
            f"weights, gradients and AdamW's states of {config.n_parameters / 1e9:.1f}G parameters take "
            f"{needed / GIB:.1f} GiB of each device ({bytes_per_parameter:g} bytes a parameter), which has "
            f"{device_bytes / GIB:.1f} GiB; use placement=auto, which keeps on the host what the device "
            f"cannot hold, or share them over more ranks: at least {n_gpus} with zero_stage=3."
        )
