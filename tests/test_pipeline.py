"""A pipeline gives the losses, gradients and weights of one process, under every schedule, and refuses what
cannot run."""

import functools
import time
import weakref
from collections import Counter
from functools import partial

import matplotlib.image
import pytest
import torch
import torch.distributed as dist
from pool import RankFailed, run_on
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from training import forward_backward, make_training
from versions import marks_for, needs_split_backward

from dtensor_llama import Llama, LlamaConfig
from dtensor_llama.data.reader import Batch
from dtensor_llama.model import init_weights
from dtensor_llama.optim import build_adamw
from parallel import ParallelConfig
from parallel import stage as stage_module
from parallel.apply import Computation
from parallel.pipeline import SCHEDULES, split_layers, stage_indices
from parallel.schedule_picture import Event, Recorder, bubble_share, draw_schedule

CPU = torch.device("cpu")
SHAPE = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2
)
LLAMA = LlamaConfig(**SHAPE, num_hidden_layers=5)  # 5 layers: no number of stages below divides them
TIED = LlamaConfig(**SHAPE, num_hidden_layers=5, tie_word_embeddings=True)


# ---- What goes where ----


def test_layers_are_split_by_cost_with_any_remainder():
    def sizes(config, n_stages):
        split = split_layers(config, n_stages)
        assert [layer for stage in split for layer in stage] == list(range(config.num_hidden_layers))
        return [len(stage) for stage in split]

    preset = LlamaConfig.preset
    assert sizes(preset("llama2-7b"), 4) == [8, 8, 8, 8]  # the head costs 0.65 of a block: not a whole one
    assert sizes(preset("llama2-13b"), 16) == [2] * 7 + [3] * 8 + [2]
    assert sizes(preset("llama2-70b"), 8) == [10] * 8
    assert sizes(LLAMA, 2) == [3, 2]
    assert sizes(LLAMA, 4) == [1, 1, 2, 1]  # the one left over goes late, but not to the head
    assert sizes(LLAMA, 5) == [1] * 5
    # the head costs more than all blocks
    wide = LlamaConfig(**{**SHAPE, "vocab_size": 32000}, num_hidden_layers=8)
    assert sizes(wide, 3) == [3, 4, 1]


@pytest.mark.parametrize(
    "schedule,pp,virtual_stages,placement",
    [
        ("gpipe", 3, 1, [[0], [1], [2]]),
        ("1f1b", 2, 1, [[0], [1]]),
        ("interleaved-1f1b", 2, 3, [[0, 2, 4], [1, 3, 5]]),
        ("zero-bubble", 4, 2, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("zbv", 3, 2, [[0, 5], [1, 4], [2, 3]]),
        ("dualpipev", 2, 2, [[0, 3], [1, 2]]),
    ],
)
def test_stages_lie_in_a_loop_or_a_v(schedule, pp, virtual_stages, placement):
    assert stage_indices(schedule, pp, virtual_stages) == placement


# ---- One answer ----


def make_micros(n, step=0, dp_rank=0, documents=False):
    """n microbatches of 2 sequences of 32 tokens, each with another share of scored labels; the second has
    none at all."""
    micros = []
    for i in range(n):
        draw = torch.Generator().manual_seed(1000 * step + 100 * dp_rank + i)
        tokens, labels = torch.randint(SHAPE["vocab_size"], (2, 2, 32), generator=draw)
        labels[torch.rand(labels.shape, generator=draw) < 0.2 * (i % 5)] = -100
        if i == 1:
            labels[:] = -100
        cut = 5 + 3 * i
        positions = (
            torch.cat([torch.arange(cut), torch.arange(32 - cut)]).expand(2, -1) if documents else None
        )
        micros.append(Batch(tokens, labels, positions))
    return micros


def count_scored(micros):
    return sum(int((micro.labels != -100).sum()) for micro in micros)


def build(config, n_micros, recompute="none", **layout):
    """A Training on this rank, of the world's size, with the initial weights of seed 0."""
    training = make_training(config, ParallelConfig(**layout), n_micros, Computation(recompute=recompute))
    init_weights(training.model, seed=0)
    return training


def gradients_of(model):
    return {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in model.named_parameters()
    }


def evaluate_and_step(training, n_micros, documents):
    """Nats of 3 microbatches, the loss of n_micros, and its gradients."""
    micros = make_micros(n_micros, documents=documents)
    nats = training.sum_of_losses(micros[:3]).item()
    loss = forward_backward(training, micros, count_scored(micros)).item()
    return nats, loss, gradients_of(training.model)


def losses_of(model, micros, n_targets):
    """What the model says alone: the share of each microbatch in the loss, ready for backward."""
    return [model(tokens, labels=labels, positions=at) / n_targets for tokens, labels, at in micros]


def on_a_pipeline(cases):
    answers = []
    for config, schedule, virtual_stages, n_micros, documents, recompute in cases:
        training = build(
            config,
            n_micros,
            recompute,
            pp=dist.get_world_size(),
            schedule=schedule,
            virtual_stages=virtual_stages,
        )
        answers.append(evaluate_and_step(training, n_micros, documents))
    return answers


@functools.cache
def on_one_process(config, n_micros, documents):
    model = Llama(config)
    micros = make_micros(n_micros, documents=documents)
    with torch.no_grad():
        nats = sum(losses_of(model, micros[:3], 1)).item()
    loss = sum(losses_of(model, micros, count_scored(micros)))
    loss.backward()
    return nats, loss.item(), gradients_of(model)


def assert_one_answer(cases, ranks):
    for case, *parts in zip(cases, *run_on(ranks, on_a_pipeline, cases), strict=True):
        nats, loss, gradients = on_one_process(case[0], case[3], case[4])
        assert abs(sum(nats for nats, _, _ in parts) / nats - 1) < 2e-6, case
        assert abs(sum(loss for _, loss, _ in parts) - loss) < 2e-5, case
        names = [name for _, _, held in parts for name in held]
        assert sorted(names) == sorted(gradients), case  # each parameter on one rank; a tied one too
        for name, gradient in ((name, gradient) for _, _, held in parts for name, gradient in held.items()):
            difference = (gradient - gradients[name]).norm() / gradients[name].norm()
            assert difference < 1e-4, f"{case}, {name}: {difference}"


@pytest.mark.parametrize("schedule", [pytest.param(name, marks=marks_for(name)) for name in SCHEDULES])
def test_every_schedule_gives_the_losses_and_gradients_of_one_process(schedule):
    virtual_stages = 2 if schedule == "zero-bubble" else SCHEDULES[schedule].default_virtual_stages
    assert_one_answer(
        [
            (config, schedule, virtual_stages, n_micros, documents, recompute)
            for config, n_micros, documents, recompute in [
                (LLAMA, 4, False, "none"),
                (TIED, 4, True, "none"),
                (TIED, 6, False, "full"),
                (LLAMA, 4, True, "full"),
            ]
        ],
        ranks=2,
    )


def test_four_ranks_with_uneven_layers_give_the_answer_of_one_process():
    assert_one_answer(
        [
            (LLAMA, "1f1b", 1, 4, False, "none"),
            (TIED, "1f1b", 1, 7, True, "selective"),
            (TIED, "gpipe", 1, 3, False, "none"),
        ],
        ranks=4,
    )


@needs_split_backward
def test_four_ranks_with_uneven_layers_and_halves_of_backward_give_the_answer_of_one_process():
    assert_one_answer([(TIED, "zero-bubble", 1, 6, True, "full")], ranks=4)


@pytest.mark.parametrize("schedule", ["interleaved-1f1b", pytest.param("zbv", marks=needs_split_backward)])
def test_few_microbatches_leave_bubbles_but_no_errors(schedule):
    assert_one_answer([(TIED, schedule, 2, 2, False, "none"), (LLAMA, schedule, 2, 3, True, "none")], ranks=2)


# ---- With ZeRO ----


def train(steps, n_micros, layout):
    """Losses of AdamW steps, and this rank's final weights, whole."""
    training = build(TIED, n_micros, **layout)
    layout, optimizer = training.layout, training.optimizer
    losses = []
    for step in range(steps):
        everyones = [
            make_micros(n_micros, step, dp_rank, documents=True) for dp_rank in range(layout.config.dp)
        ]
        n_scored = sum(map(count_scored, everyones))
        if step == 2:
            training.sum_of_losses(everyones[0][:2])  # between two steps it leaves nothing behind
        loss = forward_backward(training, everyones[layout.dp_rank], n_scored)
        dist.all_reduce(loss)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: p.detach().full_tensor() for name, p in training.model.named_parameters()}


@functools.cache
def trained_by_one_process(steps, n_micros):
    model = Llama(TIED)
    optimizer = build_adamw(model, lr=1e-3, weight_decay=0.1)
    losses = []
    for step in range(steps):
        micros = [
            micro for dp_rank in range(2) for micro in make_micros(n_micros, step, dp_rank, documents=True)
        ]
        loss = sum(losses_of(model, micros, count_scored(micros)))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=[*marks_for(layout["schedule"]), *([pytest.mark.slow] * is_slow)])
        for layout, is_slow in (
            (dict(schedule="1f1b"), False),
            (dict(schedule="zbv"), True),
            (dict(schedule="zero-bubble", virtual_stages=2, zero_stage=1), True),
            (dict(schedule="interleaved-1f1b", dp_replicate=2, dp_shard=1), False),
            (dict(schedule="dualpipev", zero_stage=0), False),
        )
    ],
    ids=lambda layout: "-".join(map(str, layout.values())),
)
def test_five_adamw_steps_with_zero_or_hsdp_equal_one_process(layout):
    losses, weights = trained_by_one_process(5, 4)
    ranks = run_on(4, train, 5, 4, {"pp": 2, **layout})
    for theirs, held in ranks:
        assert_close(theirs, losses, rtol=0, atol=2e-5)
        for name, weight in held.items():
            # fp32: only the order of summation differs
            assert_close(weight, weights[name], rtol=0, atol=1e-5)
    assert {name for _, held in ranks for name in held} == set(weights)


# ---- Memory of messages ----

# The most buffers that a rank of two has at once, of a step with 12 microbatches. A rank gets 12 messages, or
# 24 or 36 with two stages. 1f1b: the input of a microbatch, and the gradient of its output.
MOST_BUFFERS = {"gpipe": 12, "1f1b": 2, "interleaved-1f1b": 6, "zero-bubble": 3, "zbv": 4, "dualpipev": 4}


def buffers_of_messages(schedule):
    """The most buffers that are alive at once in a step, those alive after it, and how many there were."""
    born, most = [], 0
    allocate = stage_module._allocate

    def alive():
        return sum(buffer() is not None for buffer in born)

    def allocate_and_count(messages):
        nonlocal most
        allocate(messages)
        born.extend(weakref.ref(message.buffer) for message in messages)
        most = max(most, alive())

    training = build(LLAMA, 12, pp=2, schedule=schedule)
    micros = make_micros(12)
    stage_module._allocate = allocate_and_count
    try:
        forward_backward(training, micros, count_scored(micros))
    finally:
        stage_module._allocate = allocate
    return most, alive(), len(born)


@pytest.mark.parametrize("schedule", [pytest.param(name, marks=marks_for(name)) for name in SCHEDULES])
def test_a_message_has_a_buffer_only_until_its_microbatch_is_done(schedule):
    most, after, messages = zip(*run_on(2, buffers_of_messages, schedule), strict=True)
    assert max(most) == MOST_BUFFERS[schedule] and after == (0, 0)
    assert min(messages) >= 12


class CountCollectives(TorchDispatchMode):
    def __enter__(self):
        super().__enter__()
        self.counts = Counter()
        return self.counts

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[op.overloadpacket.__name__] += op.namespace == "c10d"
        return op(*args, **kwargs or {})


def collectives_of_a_step(layout, n_micros_each):
    counted = []
    for n_micros in n_micros_each:
        training = build(LlamaConfig(**SHAPE, num_hidden_layers=8), n_micros, **layout)
        micros = make_micros(n_micros)
        with CountCollectives() as counts:
            forward_backward(training, micros, 1)
        counted.append((counts["_allgather_base_"], counts["_reduce_scatter_base_"]))
    return counted


# groups: what is gathered at once, on the ranks of each stage. A block is one, and each rank has 4; so is the
# embedding, and the norm with the head. The first rank of a V has both ends.
@pytest.mark.parametrize(
    "layout,groups",
    [
        (dict(pp=2, schedule="1f1b"), (5, 5)),
        (dict(pp=2, schedule="interleaved-1f1b", virtual_stages=4), (5, 5)),
        pytest.param(dict(pp=2, schedule="dualpipev"), (6, 4), marks=needs_split_backward),
    ],
    ids=["1f1b", "interleaved-1f1b", "dualpipev"],
)
def test_zero_traffic_of_a_step_does_not_grow_with_microbatches(layout, groups):
    for rank, (few, many) in enumerate(run_on(4, collectives_of_a_step, layout, (4, 8))):
        each = groups[rank // 2]
        assert few == many == (each, each), rank


def blocks_computed(schedule, recompute):
    training = build(LLAMA, 4, recompute, pp=2, schedule=schedule)
    blocks, forwards = [block for block in training.model.model.layers if block is not None], []
    for block in blocks:
        block.mlp.register_forward_pre_hook(partial(lambda forwards, *_: forwards.append(1), forwards))
    training.pipeline.step(make_micros(4), 1)
    return len(forwards) / 4 / len(blocks)


@pytest.mark.parametrize(
    "schedule,recompute,first,last",
    [
        ("1f1b", "none", 1, 1),
        ("1f1b", "full", 2, 2),
        # The first stage has no input gradient, so its halves are one.
        pytest.param("zero-bubble", "full", 2, 3, marks=needs_split_backward),
    ],
)
def test_full_recompute_costs_one_forward_per_backward_or_half_of_one(schedule, recompute, first, last):
    assert run_on(2, blocks_computed, schedule, recompute) == [first, last]


# ---- The picture, and what goes wrong ----


def recorded_step(schedule):
    training = build(LLAMA, 4, pp=2, schedule=schedule)
    recorder = training.pipeline.recorder = Recorder(training.layout.mesh["pp"], CPU)
    for _ in range(2):  # the first sets things up
        training.pipeline.step(make_micros(4), 1)
    return recorder.gather()


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("zbv", marks=needs_split_backward)])
def test_a_recorded_step_has_each_action_once_in_order_and_can_be_drawn(schedule, tmp_path):
    events, nothing = run_on(2, recorded_step, schedule)
    assert nothing is None
    for rank, stages in enumerate(stage_indices(schedule, 2, SCHEDULES[schedule].default_virtual_stages)):
        own = [event for event in events if event.pp_rank == rank]
        one_at_a_time = [
            before.end_s <= after.start_s for before, after in zip(own[:-1], own[1:], strict=True)
        ]
        assert all(one_at_a_time)
        done = {(event.stage, event.microbatch, event.kind) for event in own}
        assert len(done) == len(own) and {(stage, i, "F") for stage in stages for i in range(4)} <= done
        for stage in stages:
            for i in range(4):
                assert ((stage, i, "B") in done) != ({(stage, i, "I"), (stage, i, "W")} <= done)
    draw_schedule(events, tmp_path / "schedule.png", schedule)
    assert matplotlib.image.imread(tmp_path / "schedule.png").shape[0] > 200


def test_the_bubble_share_is_what_the_ranks_did_not_work():
    events = [
        Event(0, 0, 0, "F", 1.0, 2.0),
        Event(1, 1, 0, "F", 2.0, 3.0),
        Event(1, 1, 0, "B", 3.0, 4.0),
        Event(0, 0, 0, "B", 4.0, 5.0),
    ]
    assert bubble_share(events) == 0.5


def step_with_a_failure(failing_rank):
    training = build(LLAMA, 4, pp=2)
    if dist.get_rank() == failing_rank:

        def fail(*_):
            raise ValueError("a block gave up")

        [block for block in training.model.model.layers if block is not None][-1].register_forward_pre_hook(
            fail
        )
    training.pipeline.step(make_micros(4), 1)


def test_a_failing_stage_ends_the_others_in_seconds():
    run_on(2, make_micros, 1)  # workers are there
    began = time.monotonic()
    with pytest.raises(RankFailed, match="(?s)rank 1: .*a block gave up"):
        run_on(2, step_with_a_failure, 1, timeout=40)
    assert time.monotonic() - began < 10
