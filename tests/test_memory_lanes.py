"""On queues that run late, as those of a GPU do, the chunk manager misses no wait; on a clock of its own each
lane works when it should."""

from collections import deque
from dataclasses import replace

import pytest
import torch
from emulated_lanes import ClockLanes, QueuedLanes
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory_parity import ON, PLANS, N, managed, train, weights

from memory import ChunkManager, Home, Overrides, TrainingLoop
from memory.home import StateFormat
from memory.lanes import DONE, HOST_ADAM
from memory.placement import ChunkSizes, Split, lay_out, predict, static_plan
from memory.tracer import MachineRates, StepTrace

RESIDENT, STREAM, CPU = Home
BF16 = torch.bfloat16


# ---- no wait is missing ----


def trained(homes, lanes=None, steps=4, micros=1, clips=True, dtype=torch.float32) -> torch.Tensor:
    """Return the weights after some steps. Between them layers run without training, and a checkpoint is
    read."""
    model, manager = managed(homes, dtype=dtype, accumulation=micros, clips=clips, lanes=lanes)
    for i in range(steps):
        train(model, manager.optimizer, 1, max_norm=0.5 if clips else None, micros=micros)
        if i == 1:
            with torch.no_grad():
                model(torch.ones(1, 7, dtype=dtype))
        if i == 2:
            manager.optimizer.state_dict()
    manager.close()
    return weights(model)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("micros,clips", [(1, True), (1, False), (3, True), (3, False)])
@pytest.mark.parametrize("plan", PLANS)
def test_queues_that_run_as_late_as_can_be_change_no_bit(plan, micros, clips, dtype, monkeypatch):
    how = dict(micros=micros, clips=clips, dtype=dtype)
    expected = trained(PLANS[plan], **how)
    assert torch.equal(trained(PLANS[plan], QueuedLanes(), **how), expected)
    monkeypatch.setattr("memory.manager.IN_FLIGHT_BYTES", 100)  # backward waits for the link
    assert torch.equal(trained(PLANS[plan], QueuedLanes(), **how), expected)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(list(Home)), min_size=N, max_size=N),
    st.integers(0, 2**32),
    st.integers(1, 2),
    st.booleans(),
    st.sampled_from([torch.float32, BF16]),
)
def test_queues_that_run_at_random_moments_change_no_bit(homes, seed, micros, clips, dtype):
    how = dict(micros=micros, clips=clips, dtype=dtype)
    assert torch.equal(trained(homes, QueuedLanes(seed), **how), trained(homes, **how))


SEEDS = (None, *range(8))


@pytest.mark.parametrize("lane,nth", [("h2d", 0), ("device adam", 0), ("d2h", 0)])
def test_without_one_of_the_waits_of_stream_numbers_are_wrong(lane, nth):
    """The emulation notices a missing wait. nth: which of the events that a lane waits for is left out."""

    def careless(asking, after):
        return tuple(
            DONE if i == nth and asking.name == lane and asking.own else event
            for i, event in enumerate(after)
        )

    several = (trained(PLANS["stream"], QueuedLanes(seed, careless), dtype=BF16) for seed in SEEDS)
    assert any(not torch.equal(one, trained(PLANS["stream"], dtype=BF16)) for one in several)


@pytest.mark.parametrize("event", ["gradient", "clip", "outbox", "weights"])
def test_without_one_of_the_waits_around_the_hosts_step_numbers_are_wrong(event):
    clips = event == "clip"
    expected, wrong = trained(PLANS["cpu"], clips=clips), 0
    for seed in SEEDS:
        model, manager = managed(PLANS["cpu"], lanes=QueuedLanes(seed), clips=clips)
        step = manager._step_host

        def hasty(chunk, pieces, clip_copied, manager=manager, step=step):
            chunk.grads_copied = DONE if event == "gradient" else chunk.grads_copied
            if event == "outbox":
                manager.weight_buffers = deque((buffer, DONE) for buffer, _ in manager.weight_buffers)
            step(chunk, pieces, DONE if event == "clip" else clip_copied)

        manager._step_host = hasty
        if event == "weights":  # the gate lets a layer in when the host is done, before they have come
            manager._before_forward = lambda module, owners=manager.owners: (
                [piece.chunk.job.result() for param in owners[module] for piece in param.pieces] and None
            )
        try:
            for _ in range(4):
                train(model, manager.optimizer, 1, max_norm=0.5 if clips else None)
            manager.close()
            wrong += not torch.equal(weights(model), expected)
        except RuntimeError as error:  # autograd sees a weight change between forward and backward
            assert "modified by an inplace operation" in str(error)
            wrong += 1
    assert wrong


# ---- who works when ----


class Layers(torch.nn.Module):
    """Layers of one chunk each; on the clock a layer takes forward_s and backward_s seconds."""

    def __init__(self, n_layers: int, lanes: ClockLanes, forward_s: float, backward_s: float):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8, bias=False) for _ in range(n_layers))
        self.lanes, self.forward_s, self.backward_s, self.began_s = lanes, forward_s, backward_s, []

    def forward(self, x):
        self.began_s = []
        for layer in self.layers:
            x = layer(x)  # its gate waits before it computes
            self.began_s.append(self.lanes.clock())
            self.lanes.spend(self.forward_s)
            x.register_hook(lambda _: self.lanes.spend(self.backward_s))
        return x.sum()


def clocked(homes, seconds: dict, forward_s=1.0, backward_s=2.0, steps=3, clips=True):
    """Return the model, the events from the last call of `step` on, and the moment of that call."""
    lanes = ClockLanes(
        lambda lane, what: next((s for key, s in seconds.items() if f"{lane} {what}".startswith(key)), 0.0)
    )
    model = Layers(len(homes), lanes, forward_s, backward_s)
    plan = replace(static_plan(ChunkSizes((64,) * len(homes)), 1, 0, 0), homes=tuple(homes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    overrides = Overrides(plan, 64, lanes)
    manager = ChunkManager(model, optimizer, ON, TrainingLoop(clips=clips), overrides=overrides)
    for _ in range(steps):
        model(torch.ones(1, 8)).backward()
        if clips:
            manager.clip_grad_norm(1.0)
        stepped_s = lanes.clock()
        manager.optimizer.step()
    model(torch.ones(1, 8))
    events = [(what, lane, start, end) for what, lane, start, end in manager.events if start >= stepped_s]
    manager.close()
    return model, events, stepped_s


def of_chunk(events, lane: str, what: str = "chunk") -> dict[int, tuple[float, float]]:
    """Return start and end of each chunk's work on a lane."""
    return {
        int(said.split()[-1]): (start, end)
        for said, its_lane, start, end in events
        if its_lane == lane and said.startswith(what) and said.split()[-1].isdigit()
    }


def test_the_host_steps_in_forward_order_and_each_layer_begins_when_its_own_weights_have_come():
    model, events, stepped_s = clocked([CPU] * 5, {HOST_ADAM: 1.5, "h2d weights": 0.25, "d2h clip": 0.1})
    host, began_s = stepped_s + 0.1, stepped_s  # the clip factor is on its way before the first
    for i, (start, end) in of_chunk(events, HOST_ADAM).items():
        assert (start, end) == pytest.approx((host, host + 1.5))
        host = end
        began_s = max(began_s + (i > 0) * 1.0, end + 0.25)
        assert model.began_s[i] == pytest.approx(began_s)
    assert len(of_chunk(events, HOST_ADAM)) == 5


def test_residents_are_ready_at_once_and_hide_the_updates_of_later_layers():
    homes = [RESIDENT] * 3 + [CPU] * 3
    model, events, stepped_s = clocked(homes, {HOST_ADAM: 1.0, "device adam": 0.1})
    assert of_chunk(events, "device adam")[2][1] == pytest.approx(stepped_s + 0.3)
    # the forward is never held up
    assert model.began_s == pytest.approx([stepped_s + 0.3 + i for i in range(6)])


def test_both_engines_work_at_once_and_the_ring_overlaps_its_copies_with_its_steps(monkeypatch):
    """6 of 12 chunks pass through the ring, at 1 s a copy and 0.5 s a step, while the host steps the others
    at 1 s each."""
    # gradients in use are not those on their way: nobody waits
    monkeypatch.setattr("memory.manager.IN_FLIGHT_BYTES", 0)
    seconds = {"h2d chunk": 1.0, "d2h chunk": 1.0, "device adam": 0.5, HOST_ADAM: 1.0, "h2d weights": 0.2}
    model, events, stepped_s = clocked([CPU, STREAM] * 6, seconds, forward_s=0.01)
    loads, steps, stores = (of_chunk(events, lane) for lane in ("h2d", "device adam", "d2h"))
    assert sorted(loads) == sorted(steps) == sorted(stores) == [1, 3, 5, 7, 9, 11]
    for n, i in enumerate(sorted(loads)):
        after_ring = stores[sorted(loads)[n - 4]][1] if n >= 4 else 0  # its slot is free again
        assert loads[i][0] == pytest.approx(max(stepped_s + n, after_ring))
        assert loads[i][1] <= steps[i][0] and steps[i][1] <= stores[i][0]
    host, sent = of_chunk(events, HOST_ADAM), of_chunk(events, "h2d", "weights")
    assert [host[i][0] for i in (0, 2, 4, 6, 8, 10)] == pytest.approx([stepped_s + n for n in range(6)])
    assert sent[0][1] < loads[11][0]  # new weights do not queue behind the states
    assert max(model.began_s) < stepped_s + 8  # 6 s of each engine, not 12, and the ends of the pipe


def test_without_clipping_the_update_begins_in_backward():
    model, events, stepped_s = clocked([CPU] * 6, {HOST_ADAM: 1.0}, clips=False)
    # all others were over when backward was
    assert of_chunk(events, HOST_ADAM) == {0: (stepped_s, stepped_s + 1.0)}
    assert model.began_s[0] == pytest.approx(stepped_s + 1.0)


@pytest.mark.parametrize("n_resident,n_stream", [(0, 0), (8, 0), (0, 20), (10, 10), (40, 0), (5, 35)])
def test_a_step_takes_as_long_as_the_plan_predicts(n_resident, n_stream, n=40):
    """The plan is given the rates of the clock. It leaves out how the pipes fill and drain: a few chunks'
    time."""
    state = StateFormat(torch.float32)
    rates = MachineRates(
        h2d=64 * 16,
        d2h=64 * 16,
        duplex=1e9,
        dram_in_update=1e9,
        host_adam=64,
        device_adam=64 / 0.02,
    )
    traced = StepTrace(0, forward_seconds=n * 0.5, backward_seconds=n * 1.0)
    copy_s = 64 * state.state_bytes / rates.h2d
    seconds = {
        "h2d chunk": copy_s,
        "d2h chunk": copy_s,
        "h2d weights": 64 * 4 / rates.h2d,
        HOST_ADAM: 1.0,
        "device adam": 0.02,
    }
    homes = lay_out(n, n_resident, n_stream)
    model, events, stepped_s = clocked(homes, seconds, forward_s=0.5, backward_s=1.0)
    took = n * 1.0 + model.began_s[-1] + 0.5 - stepped_s
    x_r, x_s = 64 * n_resident, 64 * n_stream
    predicted = predict(Split(x_r, x_s, 64 * n - x_r - x_s), state, rates, traced)["step"]
    assert predicted * 0.95 <= took <= predicted * 1.10


@pytest.mark.parametrize("plan", ["stream", "cpu", "all three"])
def test_plain_weights_are_awaited_by_the_lane_that_computes_and_not_by_the_caller(plan):
    """On a GPU the caller goes on to launch the forward while the device waits for weights that are on their
    way."""
    model, manager = managed(PLANS[plan], lanes=QueuedLanes())
    train(model, manager.optimizer, 2)
    awaited = []

    class OnlyForLanes:
        def synchronize(self):
            raise AssertionError("the caller waits for the device")

        def query(self):
            return True

    for chunk in manager.chunks:
        chunk.wait()  # the host's part; what the device still does is a lane's affair
        chunk.weights_done = OnlyForLanes()
    manager.lanes.compute.wait = awaited.append
    model(torch.ones(1, 7))
    assert {id(event) for event in awaited} == {id(chunk.weights_done) for chunk in manager.chunks}
    for chunk in manager.chunks:
        chunk.weights_done = DONE
    manager.close()
