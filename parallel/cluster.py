"""Describes the machines that a layout is planned for: GPUs, nodes, and a cluster of nodes.

    cluster = find_cluster("h100-80gb", n_gpus=512)      a known one
    cluster = read_cluster("ours.json", n_gpus=16)       one that a user wrote, or that `calibrate` measured

A rate is in bytes a second in one direction, or in FLOP/s. Data sheets state the most that a part can do. How
much of it software reaches is in parallel/cost.py, except for `matmul_flops`: how far large matrix products
stay below the peak depends on power and cooling, so it belongs to the GPU and is measured.
"""

import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F

from dtensor_llama.errors import UsageError
from dtensor_llama.flops import PEAK_FLOPS, matmul_flops
from dtensor_llama.host import host_memory
from dtensor_llama.metrics import GIB


@dataclass(frozen=True)
class GPU:
    """Holds what one GPU has and does."""

    name: str
    memory_gib: float  # what a program gets of it
    peak_flops: float  # dense bf16, from the data sheet; the 100 % of MFU
    matmul_flops: float  # what large bf16 products sustain
    memory_bytes_s: float
    host_link_bytes_s: float  # to the memory of the host, each way at once
    attention_flops: float | None = None  # of causal attention, forward, where that was measured
    float32_flops: float | None = None  # of float32 products, which torch keeps off TF32; None: unknown


@dataclass(frozen=True)
class Cluster:
    """Holds a number of equal nodes. What belongs to a node is given for each of its GPUs."""

    gpu: GPU
    n_gpus: int
    gpus_per_node: int
    node_bytes_s: float  # what a GPU sends to others of its node (NVLink)
    network_bytes_s: float  # what a GPU sends to other nodes
    host_memory_gib: float  # what a program may take of it
    host_dram_bytes_s: float
    host_adam_per_s: float = 1.2e9  # parameters that the cores of a GPU's share of the host step in a second

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def ranks_in_node(self, n_ranks: int, stride: int) -> int:
        """Return how many of an axis's ranks are in one node, if neighbours are `stride` GPUs apart."""
        return max(1, min(n_ranks, self.gpus_per_node // stride))


# ---- The known ones ----------------------------------------------------------------------------------------

# Memory, peak and bandwidths are those of NVIDIA's data sheets of the SXM cards. NVLink is stated there for
# both directions together. PCIe 4 and 5 carry about 25 and 50 GB/s.
#
# matmul_flops of A100 and H100 are the "maximum achievable matmul FLOPS" in bf16 that were measured for
# https://github.com/stas00/ml-engineering (compute/accelerator). H200 has the same chip as H100. B200 is the
# mean over the shapes of LLaMA-3-70B that SimuMax measured on the cluster of its published runs, 0.488 of the
# peak (configs/system/b200_bf16_ceperm.json). h100-96gb-500w is Meta's Grand Teton, with 500 W of 700 and 2.4
# TB/s (torchtitan, benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md); power grows with the square of the
# clock or faster, so its products lose the root of the power. float32_flops are the data sheets' FP32, not
# TF32: torch's default for matrix products is the whole precision. The sheet of HGX B200 has 75 a GPU. How
# much of them large products sustain was not measured, so that predicted times in float32 are a lower bound.
AT_500_W = (500 / 700) ** 0.5
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100-40gb", 39, 312e12, 271e12, 1.555e12, 25e9, float32_flops=19.5e12),
        GPU("a100-80gb", 79, 312e12, 271e12, 2.039e12, 25e9, float32_flops=19.5e12),
        GPU("h100-80gb", 79, 989e12, 794e12, 3.35e12, 50e9, float32_flops=67e12),
        GPU("h100-96gb-500w", 94, 989e12, 794e12 * AT_500_W, 2.4e12, 50e9, float32_flops=67e12 * AT_500_W),
        GPU("h200-141gb", 139, 989e12, 794e12, 4.8e12, 50e9, float32_flops=67e12),
        GPU("b200", 178, 2250e12, 1098e12, 7.7e12, 50e9, float32_flops=75e12),
    )
}
# The nodes of 8 that these GPUs are sold in. NVLink 3, 4 and 5 carry 300, 450 and 900 GB/s. The network is
# that of NVIDIA's DGX: a card of 200 Gbit/s for each A100, and of 400 Gbit/s for the later ones. Host memory
# is that of Amazon's p4d, p4de, p5 and p5en nodes, 1,152 and 2,048 GiB, with an eighth left free. DRAM is
# that of the processors' data sheets, less a third.
FREE_OF_HOST = 7 / 8  # what a program may take of the memory of a host
NODES = {
    "a100-40gb": Cluster(GPUS["a100-40gb"], 8, 8, 300e9, 25e9, 128, 40e9),
    "a100-80gb": Cluster(GPUS["a100-80gb"], 8, 8, 300e9, 25e9, 128, 40e9),
    "h100-80gb": Cluster(GPUS["h100-80gb"], 8, 8, 450e9, 50e9, 224, 75e9, 2.4e9),
    "h100-96gb-500w": Cluster(GPUS["h100-96gb-500w"], 8, 8, 450e9, 50e9, 224, 75e9, 2.4e9),
    "h200-141gb": Cluster(GPUS["h200-141gb"], 8, 8, 450e9, 50e9, 224, 75e9, 2.4e9),
    "b200": Cluster(GPUS["b200"], 8, 8, 900e9, 50e9, 224, 75e9, 2.4e9),
}


def find_cluster(name: str, n_gpus: int) -> Cluster:
    """Return nodes of a known GPU, or the cluster that a user's .json file describes; else UsageError."""
    if name.endswith(".json"):
        return read_cluster(name, n_gpus)
    if name not in NODES:
        raise UsageError(
            f"gpu={name} is not a GPU whose cluster is known; use {', '.join(NODES)}, or a .json file that "
            "describes yours."
        )
    return with_gpus(NODES[name], n_gpus)


def with_gpus(cluster: Cluster, n_gpus: int) -> Cluster:
    """Return the cluster with another number of GPUs. UsageError if they do not fill its nodes."""
    per_node = cluster.gpus_per_node
    if n_gpus < 1 or (n_gpus > per_node and n_gpus % per_node):
        lower = max(1, n_gpus // per_node) * per_node
        raise UsageError(
            f"gpus={n_gpus} do not fill nodes of {per_node}. Use 1 to {per_node}, or a multiple of "
            f"{per_node}: {lower} or {lower + per_node}."
        )
    return replace(cluster, n_gpus=n_gpus)


def cluster_of_device(device: torch.device, n_gpus: int, gpus_per_node: int) -> Cluster | None:
    """Return the known cluster that this GPU belongs to, or None if it is unknown."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    for name, node in NODES.items():
        kind = name.partition("-")[0].upper()
        if kind in properties.name and abs(properties.total_memory / GIB / node.gpu.memory_gib - 1) < 0.1:
            return replace(node, n_gpus=n_gpus, gpus_per_node=gpus_per_node)
    return None


def cluster_here(launch: Any, host_bytes: int) -> Cluster:
    """Return the GPUs of a launch (dtensor_llama.cli.Launch) as a cluster. A rank has a GPU, or without one
    its share of `host_bytes`.

    A GPU that is unknown, or the CPU, is taken at the rates of the known one whose memory is nearest; of one
    with the same chip if there is one. The name of the cluster's GPU then says so, for what is printed.
    """

    device, n_gpus, gpus_per_node = launch.take_device(), launch.world_size, launch.ranks_per_host
    device_bytes = host_bytes // gpus_per_node
    if device.type == "cuda":
        device_bytes = torch.cuda.get_device_properties(device).total_memory

    def distance(node: Cluster) -> float:
        return abs(node.gpu.memory_gib * GIB - device_bytes)

    node = cluster_of_device(device, n_gpus, gpus_per_node)
    if node is not None:
        name = node.gpu.name
    elif device.type == "cuda":
        found = torch.cuda.get_device_properties(device).name
        same_chip = [node for name, node in NODES.items() if name.partition("-")[0].upper() in found]
        node = min(same_chip or NODES.values(), key=distance)
        name = f"{found} (not known here: at the rates of {node.gpu.name}, the nearest in memory)"
    else:
        node = min(NODES.values(), key=distance)
        name = f"{device.type} (at the rates of {node.gpu.name}, which decide the order alone)"
    gpu = replace(node.gpu, name=name, memory_gib=device_bytes / GIB)
    # Whole GiB, so that hosts which differ by a few MiB come to one plan.
    host_gib = FREE_OF_HOST * host_memory() / gpus_per_node // GIB
    return replace(
        node, gpu=gpu, n_gpus=n_gpus, gpus_per_node=min(gpus_per_node, n_gpus), host_memory_gib=host_gib
    )


def read_cluster(path: str | Path, n_gpus: int | None = None) -> Cluster:
    """Return the cluster that a JSON file describes, with the fields of Cluster and GPU by their names.

    UsageError names what is missing, unknown, or no number that can be meant. n_gpus: used instead of the
    file's."""
    try:
        stored = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a JSON file that can be read ({error}).") from None
    _check_fields(path, "cluster", stored, Cluster)
    _check_fields(path, "gpu", stored["gpu"], GPU)
    cluster = Cluster(**{**stored, "gpu": GPU(**stored["gpu"])})
    gpu = cluster.gpu
    if gpu.matmul_flops > gpu.peak_flops:
        raise UsageError(
            f"{path}: matmul_flops is {gpu.matmul_flops:g}, more than peak_flops, which is "
            f"{gpu.peak_flops:g}; what a GPU sustains is at most its peak."
        )
    return cluster if n_gpus is None else with_gpus(cluster, n_gpus)


SMALLEST, LARGEST = 1e-3, 1e30  # of the numbers in a cluster file; whatever is outside of them is a mistake
LEAST_RATE = 1e6  # a second: a CPU of thirty years ago did more, and 989 was meant to be TFLOP/s


def _check_fields(path: str | Path, what: str, stored: object, kind: type) -> None:
    if not isinstance(stored, dict):
        raise UsageError(f"{path}: {what} must be an object with the fields of parallel/cluster.py.")
    known = {field.name: field for field in fields(kind)}
    required = {name for name, field in known.items() if field.default is MISSING}
    missing, unknown = required - set(stored), set(stored) - set(known)
    if missing or unknown:
        said = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        said += [f"has {', '.join(sorted(unknown))}, which is unknown"] if unknown else []
        raise UsageError(f"{path}: {what} {' and '.join(said)}; its fields are {', '.join(known)}.")
    for name, value in stored.items():
        kind_of_field, rule = known[name].type, None
        if value is None and known[name].default is None:
            continue
        is_number = type(value) in (int, float) and SMALLEST <= value < LARGEST
        if kind_of_field is str and not (isinstance(value, str) and value):
            rule = "a text"
        elif kind_of_field is int and not (is_number and isinstance(value, int)):
            rule = "a whole number above 0"
        elif kind_of_field in (float, float | None) and not is_number:
            rule = "a finite number above 0"
        elif name.endswith(("_flops", "_bytes_s")) and value < LEAST_RATE:
            rule = f"FLOP or bytes a second, without T or G, and so {LEAST_RATE:,.0f} at least"
        if rule:
            raise UsageError(f"{path}: {name} is {json.dumps(value)}; it must be {rule}.")


# ---- Calibration -------------------------------------------------------------------------------------------


def calibrate(device: torch.device, n_gpus: int = 1, seconds: float = 10.0) -> Cluster:
    """Measure this machine in about `seconds`, and return it as a cluster that `read_cluster` reads again.

    Measured are matrix products of several shapes, of which the fastest counts, because cost.py adds what a
    shape loses; attention; a copy in memory; the link to the host; and AdamW on the host. What joins GPUs and
    nodes takes several processes to measure. It is that of the known GPU where there is one; else GPUs are
    assumed to be joined by their link to the host. A CPU is measured as if it were a GPU, so that a plan for
    CPU processes has times too.
    """
    is_cuda = device.type == "cuda"
    known = cluster_of_device(device, n_gpus, min(n_gpus, 8))
    name, memory = "cpu", host_memory()
    if is_cuda:
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    dtype = torch.bfloat16 if is_cuda else torch.float32
    each = seconds / 6
    product = max(_product_flops(device, dtype, each / 3), matmul_flops(device, dtype, each))
    peaks = [peak for key, peak in PEAK_FLOPS.items() if key in name]
    copied = _bytes_a_second(device, device, each)
    link = _bytes_a_second(torch.device("cpu"), device, each) if is_cuda else copied
    attention = _attention_flops(device, dtype, each)
    in_float32 = matmul_flops(device, torch.float32, each / 3) if is_cuda else product
    gpu = GPU(name, memory / GIB, max([product, *peaks]), product, 2 * copied, link, attention, in_float32)
    host = FREE_OF_HOST * host_memory() / GIB / max(1, min(n_gpus, 8))
    return Cluster(
        gpu,
        n_gpus,
        known.gpus_per_node if known else min(n_gpus, 8),
        known.node_bytes_s if known else link,
        known.network_bytes_s if known else link,
        host,
        2 * _bytes_a_second(torch.device("cpu"), torch.device("cpu"), each / 2),
        _host_adam_per_second(each / 2),
    )


def _repeat(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the seconds of one call, the best of those that fit the time."""

    def once() -> float:
        start = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter() - start

    once()
    best, ends = once(), perf_counter() + seconds
    while perf_counter() < ends:
        best = min(best, once())
    return best


def _bytes_a_second(source: torch.device, target: torch.device, seconds: float) -> float:
    n_bytes = 64 * 2**20  # more than any cache holds
    pins = "cuda" in (source.type, target.type) and source.type == "cpu"
    data = torch.empty(n_bytes, dtype=torch.uint8, device=source, pin_memory=pins)
    copy = torch.empty(n_bytes, dtype=torch.uint8, device=target)
    return n_bytes / _repeat(lambda: copy.copy_(data, non_blocking=True), target, seconds)


def _host_adam_per_second(seconds: float) -> float:
    parameter = torch.zeros(2**22, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    step = torch.optim.AdamW([parameter], fused=True).step
    return parameter.numel() / _repeat(step, torch.device("cpu"), seconds)


def _product_flops(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Return the best FLOP/s of the products of a block: (tokens, D) by (D, D), (D, F) and (F, D)."""
    tokens, width, ffn = (8192, 4096, 11008) if device.type == "cuda" else (256, 512, 1376)
    best = 0.0
    for rows, columns in ((width, width), (width, ffn), (ffn, width)):
        x = torch.randn(tokens, rows, device=device).to(dtype)
        weight = torch.randn(rows, columns, device=device).to(dtype)
        taken = _repeat(partial(torch.mm, x, weight), device, seconds)
        best = max(best, 2 * tokens * rows * columns / taken)
    return best


def _attention_flops(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Return the FLOP/s of causal attention, forward, on a sequence of 4,096 tokens, or 256 on a CPU."""
    tokens, heads, width = (4096, 32, 128) if device.type == "cuda" else (256, 4, 64)
    q, k, v = (torch.randn(1, heads, tokens, width, device=device).to(dtype) for _ in range(3))
    attend = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
    return 2 * tokens * tokens * heads * width / _repeat(attend, device, seconds)
