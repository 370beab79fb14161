"""What of a fine-tuning fits a rank: an estimate to choose by where the user left the choice open, printed
with its reasons.

Per parameter: 16 bytes trained in fp32 (weight, gradient, two moments), shared by the ranks of fsdp; 2
frozen, or with all else of it on the host; and 2 more of what is gathered at a time: two blocks, the
embedding and the head. Activations as recompute.py says. Rough on purpose: it leaves a tenth of the memory
free, and whoever knows better sets the flags.
"""

from dataclasses import replace
from math import ceil

from dtensor_llama.config import LlamaConfig
from dtensor_llama.errors import UsageError
from dtensor_llama.metrics import GIB
from parallel.config import ParallelConfig

MAX_MICRO_TOKENS = 16384  # a forward of more gains nothing on any device
MAX_TP = 8  # beyond a node's fast wires tensor parallelism waits for traffic


def bytes_needed(
    config: LlamaConfig,
    layout: ParallelConfig,
    micro_tokens: int,
    recompute: str,
    n_adapter: int,
    itemsize: int,
    offloads: bool = False,
) -> int:
    """Of device memory on one rank, about. n_adapter: trained parameters if all others are frozen, else 0.
    itemsize: of the numbers that compute. micro_tokens: of one forward. offloads: states may all live on the
    host (--memory.placement)."""
    D, F, L, V = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
    slices, shards = layout.tp * layout.pp, layout.dp_shard * layout.cp if layout.zero_stage else 1
    n_block = (config.n_parameters - 2 * V * D) // L
    light = n_adapter or offloads  # the weights as they compute, and little besides
    states = (
        (itemsize * config.n_parameters + 16 * n_adapter if light else 16 * config.n_parameters)
        / slices
        / shards
    )
    gathered = (
        (itemsize * (2 * n_block + 2 * V * D) + (0 if n_adapter else 4 * V * D)) / layout.tp
        if shards > 1
        else 0
    )
    per_token = (
        {"none": 2 * (10 * D + 4 * F), "selective": 2 * (6 * D + 3 * F), "full": 2 * D}[recompute]
        * L
        / layout.pp
    )
    per_token += 2 * (10 * D + 4 * F)  # the block at work
    activations = per_token * (itemsize / 2) * micro_tokens / layout.cp / layout.tp + 2 * 256 * 2**20
    return int(states + gathered + activations)


def fit(
    config: LlamaConfig,
    layout: ParallelConfig,
    device_bytes: int,
    seq_len: int,
    rows_per_step: int,
    *,
    tries_tp: bool,
    recompute: str | None,
    micro_batch_size: int | None,
    n_adapter: int,
    itemsize: int,
    offloads: bool = False,
) -> tuple[ParallelConfig, str, int, str]:
    """(layout, recompute, micro-batch size, why) for what was left open; UsageError if nothing fits.

    layout: resolved. recompute, micro_batch_size: None where open. offloads: as in bytes_needed; what the
        placement keeps on the device beyond that is its own affair. tries_tp: whether the layout's
        data-parallel ranks may become tp ones. Preferred in this order: less tensor parallelism, no
        recomputation, large micro-batches."""
    first, needed = "", 0
    for tp in (1, 2, 4, MAX_TP) if tries_tp else (layout.tp,):
        if (
            layout.dp_shard * layout.tp % tp
            or config.num_key_value_heads % tp
            or config.intermediate_size % tp
        ):
            continue
        tried = replace(layout, tp=tp, dp_shard=layout.dp_shard * layout.tp // tp)
        rows = max(1, rows_per_step // tried.dp)
        micros = [n for n in (8, 4, 2, 1) if n == 1 or rows % n == 0 and n * seq_len <= MAX_MICRO_TOKENS]
        for how in [recompute] if recompute else ["none", "full"]:
            for micro in [micro_batch_size] if micro_batch_size else micros:
                needed = bytes_needed(config, tried, micro * seq_len, how, n_adapter, itemsize, offloads)
                what = f"tp {tp} x dp {tried.dp}, recompute {how}, micro-batches of {micro}"
                if needed <= 0.9 * device_bytes:
                    return (
                        tried,
                        how,
                        micro,
                        f"{what}: about {needed / GIB:.1f} of {device_bytes / GIB:.1f} GiB a rank{first}",
                    )
                first = first or f" ({what} would need {needed / GIB:.1f})"
    ways = [
        "more processes",
        "a smaller --data.seq-len",
        *["--memory.placement auto"] * (not (n_adapter or offloads)),
        *["--lora.rank 16"] * (not n_adapter),
    ]
    raise UsageError(
        f"the model and rows of --data.seq-len {seq_len} do not fit {device_bytes / GIB:.1f} GiB a rank: at least "
        f"{needed / GIB:.1f} are needed. Use {', or '.join(ways)}."
    )


def check_states(
    config: LlamaConfig, layout: ParallelConfig, device_bytes: int, bytes_per_parameter: float
) -> None:
    """UsageError if weights, gradients and AdamW's states alone are more than a rank's device has.

    layout: resolved. bytes_per_parameter: 16 with all in float32 on the device (4 of them gradients), fewer
        where a chunk manager keeps states on the host. What activations need comes on top and is not known
        here.
    """
    slices = layout.tp * layout.pp
    shards = layout.dp_shard * layout.cp
    here = config.n_parameters / slices
    if layout.zero_stage == 0:
        needed = bytes_per_parameter * here
    elif layout.zero_stage == 1:
        needed = 4 * here + (bytes_per_parameter - 4) * here / shards
    else:
        needed = bytes_per_parameter * here / shards
    if needed > device_bytes:
        n_gpus = ceil(bytes_per_parameter * config.n_parameters / device_bytes)
        raise UsageError(
            f"weights, gradients and AdamW's states of {config.n_parameters / 1e9:.1f}G parameters take "
            f"{needed / GIB:.1f} GiB of each device ({bytes_per_parameter:g} bytes a parameter), which has "
            f"{device_bytes / GIB:.1f} GiB; use --memory.placement auto, which keeps on the host what the device "
            f"cannot hold, or share them over more ranks: at least {n_gpus} with --parallel.zero-stage 3."
        )
