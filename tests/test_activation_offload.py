"""With offloaded block inputs all numbers are the same bit for bit, and at most two inputs are on the
device."""

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from emulated_lanes import QueuedLanes
from pool import run_on
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from training import forward_backward, make_training
from versions import marks_for

from dtensor_llama import Llama, LlamaConfig
from dtensor_llama.data.reader import Batch
from dtensor_llama.model import init_weights
from memory.activations import ActivationOffload
from memory.lanes import DONE
from parallel import ParallelConfig
from parallel.apply import Computation
from parallel.recompute import MODES, apply_recompute

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SEQUENCES, T = 2, 16
INPUT_BYTES = SEQUENCES * T * CONFIG.hidden_size * 4
CPU = torch.device("cpu")


class WatchedOffload(ActivationOffload):
    """Counts the bytes of the block inputs that are on the device."""

    device_bytes = peak_device_bytes = 0

    def _leave(self, *args):
        input = super()._leave(*args)
        self._watch(input.flat)
        return input

    def _fetch(self, input) -> None:
        super()._fetch(input)
        self._watch(input.flat)

    def _watch(self, flat: torch.Tensor) -> None:
        self._count(flat.nbytes)
        weakref.finalize(flat, self._count, -flat.nbytes)

    def _count(self, n_bytes: int) -> None:
        self.device_bytes += n_bytes
        self.peak_device_bytes = max(self.peak_device_bytes, self.device_bytes)


def stop_offloading(model: Llama) -> None:
    """Give the blocks, which nothing else has wrapped, their own forward back."""
    for block in model.model.layers:
        del block.forward


def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    tokens = torch.randint(
        CONFIG.vocab_size, (n, 2, SEQUENCES, T), generator=torch.Generator().manual_seed(1)
    )
    return [tuple(pair) for pair in tokens]


def train(recompute: str, offload: bool, compiler: str | None = None, n_micros: int = 2, lanes=None):
    """Train two steps of `n_micros` microbatches each. Return losses, gradients by name, and the offload or
    None."""
    model = Llama(CONFIG)
    apply_recompute(list(model.model.layers), recompute)
    for block in model.model.layers if compiler else ():
        block.forward = torch.compile(block.forward, backend=compiler)  # as parallel/apply.py does
    offloading = WatchedOffload(model.model.layers, CPU, INPUT_BYTES, lanes=lanes) if offload else None
    losses = []
    for _ in range(2):
        model.zero_grad()
        for tokens, labels in batches(n_micros):
            loss = model(tokens, labels)
            loss.backward()
            losses.append(loss.item())
            del loss
    return losses, {name: p.grad for name, p in model.named_parameters()}, offloading


def assert_bitwise(ours, expected) -> None:
    assert ours[0] == expected[0]
    for name, grad in expected[1].items():
        assert torch.equal(ours[1][name], grad), name


@pytest.mark.parametrize("recompute", MODES)
def test_results_are_bitwise_those_without_and_two_inputs_are_on_the_device(recompute):
    ours = train(recompute, True)
    assert_bitwise(ours, train(recompute, False))
    assert ours[2].peak_device_bytes == 2 * INPUT_BYTES
    gc.collect()
    assert ours[2].device_bytes == 0 and len(ours[2].free) == ours[2].n_slots == 5
    assert ours[2].host_bytes == 5 * INPUT_BYTES


@pytest.mark.parametrize("recompute", MODES)
def test_copies_that_run_late_or_at_random_moments_change_no_bit(recompute):
    expected = train(recompute, False)
    for seed in (None, *range(5)):
        assert_bitwise(train(recompute, True, lanes=QueuedLanes(seed)), expected)


def test_where_backward_does_not_wait_for_a_copy_numbers_are_wrong():
    """The emulated queues notice a missing wait."""
    careless = lambda lane, after: [event if lane.own else DONE for event in after]
    ours, expected = train("full", True, lanes=QueuedLanes(waits=careless)), train("full", False)
    assert any(not torch.equal(ours[1][name], grad) for name, grad in expected[1].items())


def test_the_block_inputs_are_really_gone_from_the_device():
    """Weak references show it of the tensors themselves."""

    def alive_after_forward(offload: bool) -> int:
        model, inputs = Llama(CONFIG), []
        apply_recompute(list(model.model.layers), "full")
        for block in model.model.layers:
            block.register_forward_pre_hook(
                lambda _, args: inputs.append(weakref.ref(args[0].untyped_storage()))
            )
        if offload:
            WatchedOffload(model.model.layers, CPU, INPUT_BYTES)
        loss = model(*batches(1)[0])
        alive = sum(x() is not None for x in inputs)
        loss.backward()
        return alive

    assert alive_after_forward(False) == 6
    assert alive_after_forward(True) == 1  # the last block's


def test_nothing_waits_for_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        for recompute in MODES:
            offload = train(recompute, True)[2]
            assert (offload.device_bytes, len(offload.free)) == (0, 5), recompute
    finally:
        gc.enable()


def test_inputs_come_one_block_ahead_and_in_order():
    model = Llama(CONFIG)
    apply_recompute(list(model.model.layers), "full")
    offload, log = WatchedOffload(model.model.layers, CPU, INPUT_BYTES), []
    names = {}
    fetch, leave = offload._fetch, offload._leave

    def noted_leave(i, flat):
        input = leave(i, flat)
        names[id(input)] = len(names)
        log.append(f"out {names[id(input)]}" if input.slot is not None else f"keep {names[id(input)]}")
        return input

    offload._leave = noted_leave
    offload._fetch = lambda input: (log.append(f"in {names[id(input)]}"), fetch(input))
    for i, block in enumerate(model.model.layers):
        block.register_full_backward_pre_hook(partial(lambda i, *_: log.append(f"B{i}"), i))
    model(*batches(1)[0]).backward()
    assert log == [
        "out 0",
        "out 1",
        "out 2",
        "out 3",
        "out 4",
        "keep 5",
        "B5",
        "in 4",
        "B4",
        "in 3",
        "B3",
        "in 2",
        "B2",
        "in 1",
        "B1",
        "in 0",
        "B0",
    ]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_composes_with_compile_and_all_blocks_share_one_graph(compiler, recompute):
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    expected = train(recompute, False, compiler)
    torch.compiler.reset()
    counters.clear()
    ours = train(recompute, True, compiler)
    assert_bitwise(ours, expected)
    assert ours[2].peak_device_bytes == 2 * INPUT_BYTES
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


def test_forwards_without_gradient_leave_no_trace():
    model = Llama(CONFIG)
    offload = WatchedOffload(model.model.layers, CPU, 1)  # no slot would be large enough
    with torch.no_grad():
        logits = model(batches(1)[0][0])
    stop_offloading(model)
    with torch.no_grad():
        assert torch.equal(logits, model(batches(1)[0][0]))
    assert offload.peak_device_bytes == 0


def test_a_forward_that_fails_or_is_dropped_gives_its_slots_back():
    model = Llama(CONFIG)
    offload = WatchedOffload(model.model.layers, CPU, INPUT_BYTES)
    model(*batches(1)[0])
    assert (len(offload.free), offload.device_bytes) == (5, 0)
    original, model.model.layers[3].mlp = model.model.layers[3].mlp, None
    with pytest.raises(TypeError):
        model(*batches(1)[0])
    model.model.layers[3].mlp = original
    gc.collect()
    assert (len(offload.free), offload.device_bytes) == (5, 0)
    model(*batches(1)[0]).backward()


def test_too_many_or_too_large_inputs_are_named():
    model = Llama(CONFIG)
    WatchedOffload(model.model.layers, CPU, INPUT_BYTES)
    first = model(*batches(1)[0])
    with pytest.raises(RuntimeError, match="all 5 slots .* in_flight"):
        model(*batches(1)[0])
    first.backward()
    stop_offloading(model)
    WatchedOffload(model.model.layers, CPU, INPUT_BYTES // 2)
    with pytest.raises(RuntimeError, match=f"{INPUT_BYTES:,} bytes .* {INPUT_BYTES // 2:,}"):
        model(*batches(1)[0])


class Views(nn.Module):
    """Begins with a Linear, which saves a view of its input, and a product of slices; its output has other
    strides."""

    def __init__(self, strides: str):
        super().__init__()
        self.linear, self.strides = nn.Linear(8, 8), strides

    def forward(self, x):
        y = self.linear(x).tanh() + torch.cat([x[:1], x[1:] * x[:-1]])
        return {
            "contiguous": y,
            "transposed": y.transpose(0, 1),
            "strided": y.repeat_interleave(2, -1)[..., ::2],
        }[self.strides]


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "strided"])
def test_inputs_and_their_views_come_back_as_they_were(strides):
    def grads(offload: bool):
        torch.manual_seed(0)
        blocks = nn.Sequential(*[Views(strides) for _ in range(4)])
        offloading = WatchedOffload(blocks, CPU, 6 * 5 * 8 * 4) if offload else None
        x = torch.randn(6, 5, 8, requires_grad=True)
        blocks(x).square().sum().backward()
        if offload:
            assert offloading.peak_device_bytes == 2 * 6 * 5 * 8 * 4
        return [x.grad, *(p.grad for p in blocks.parameters())]

    for ours, expected in zip(grads(True), grads(False), strict=True):
        assert torch.equal(ours, expected)


# ---- under every layout: several processes -----------------------------------------------------------------

LAYOUTS = {
    "tp2-sp": (2, dict(tp=2), 1),
    "tp2": (2, dict(tp=2, sequence_parallel=False), 1),
    "zero3": (2, dict(), 1),
    "pp2-1f1b": (2, dict(pp=2, schedule="1f1b"), 2),
    "pp2-gpipe": (2, dict(pp=2, schedule="gpipe"), 4),
    "pp2-zero-bubble": (2, dict(pp=2, schedule="zero-bubble", virtual_stages=2), 4),
    "cp2-ring": (2, dict(cp=2, cp_method="ring"), 1),
}


def step_under(layout: dict, recompute: str, in_flight: int, offload: bool):
    """Make one step of 4 microbatches on a rank. Return the loss, local gradients by name, and for each stage
    the most inputs on the device at a time."""
    layout = ParallelConfig(**layout).resolve(torch.distributed.get_world_size())
    training = make_training(CONFIG, layout, 4, Computation(recompute=recompute))
    model = training.model
    init_weights(model, seed=0)
    n_here = T // layout.cp // (layout.tp if layout.sequence_parallel else 1)
    input_bytes = n_here * CONFIG.hidden_size * 4
    offloads = (
        [
            WatchedOffload([b for b in part.model.layers if b is not None], CPU, input_bytes, in_flight)
            for part in training.stages
        ]
        if offload
        else []
    )
    n_micros = 4
    tokens, labels = torch.randint(
        CONFIG.vocab_size,
        (2, n_micros, T // layout.cp),
        generator=torch.Generator().manual_seed(training.layout.dp_rank),
    )
    micros = [Batch(*each, None) for each in zip(tokens.split(1), labels.split(1), strict=True)]
    loss = forward_backward(training, micros, labels.numel())
    grads = {
        name: (p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad).clone()
        for name, p in model.named_parameters()
    }
    peaks = [o.peak_device_bytes // input_bytes for o in offloads]
    return loss.item(), grads, peaks


@pytest.mark.parametrize("recompute", ["full", "none"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[*marks_for(layout.get("schedule")), *([pytest.mark.slow] * (name == "tp2"))]
        )
        for name, (_, layout, _) in LAYOUTS.items()
    ],
)
def test_every_layout_gives_the_same_bits_with_block_inputs_offloaded(name, recompute):
    ranks, layout, in_flight = LAYOUTS[name]
    expected = run_on(ranks, step_under, layout, recompute, in_flight, False)
    ours = run_on(ranks, step_under, layout, recompute, in_flight, True)
    for (loss, grads, peaks), (expected_loss, expected_grads, _) in zip(ours, expected, strict=True):
        assert loss == expected_loss
        assert all(torch.equal(grads[key], grad) for key, grad in expected_grads.items())
        # one kept per forward in flight; one whose W is to come
        most = 1 + in_flight + ("zero-bubble" in name)
        assert peaks and all(2 <= peak <= most for peak in peaks), peaks


class OfDTensors(nn.Module):
    """A block that computes with its input as a DTensor, as other tensor-parallel plans do, so that autograd
    saves the DTensor."""

    def __init__(self, mesh):
        super().__init__()
        self.mesh, self.weight = mesh, nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x):
        spread = DTensor.from_local(x, self.mesh, [Shard(1)], run_check=False)
        weight = DTensor.from_local(self.weight, self.mesh, [Replicate()], run_check=False)
        return (spread * weight + spread.square()).to_local().tanh()


def of_dtensors(offload: bool):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    blocks = nn.ModuleList(OfDTensors(mesh) for _ in range(4))
    offloading = WatchedOffload(blocks, CPU, 2 * 3 * 8 * 4) if offload else None
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(dist.get_rank())).requires_grad_()
    y = x
    for block in blocks:
        y = block(y)
    y.sum().backward()
    return [x.grad, *(p.grad for p in blocks.parameters())], offloading and offloading.peak_device_bytes


def test_inputs_that_are_saved_as_dtensors_leave_and_come_back_as_such():
    for (ours, peak), (expected, _) in zip(
        run_on(2, of_dtensors, True), run_on(2, of_dtensors, False), strict=True
    ):
        assert all(map(torch.equal, ours, expected)) and peak == 2 * (2 * 3 * 8 * 4)
