"""The rules of a layout refuse what cannot run, in one line, and what they propose instead they accept."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from versions import needs_split_backward

from dtensor_llama import LlamaConfig, UsageError
from parallel import ParallelConfig, rules
from parallel.config import AXES, RULES, WORLD_RULES, Job, check_parallel
from parallel.pipeline import SCHEDULES
from parallel.rules import Case

SMALL = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
EIGHT_HEADS = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
)
TWELVE_HEADS = replace(SMALL, hidden_size=96, num_attention_heads=12, num_key_value_heads=6, head_dim=8)
FIVE_LAYERS = replace(SMALL, num_hidden_layers=5)  # no number of stages below divides them
LLAMA_70B = LlamaConfig.preset("llama2-70b")


def refusal(layout: dict, **job) -> str:
    with pytest.raises(UsageError) as error:
        check_parallel(ParallelConfig(**{"dp_shard": 1, **layout}), Job(**job))
    assert "\n" not in str(error.value) and "--" not in str(error.value)
    return str(error.value)


# ---- what is refused, in which words, and with which ways out ----


@pytest.mark.parametrize(
    "model,tp,seq_len,said",
    [
        (SMALL, 3, 33, "tp=3 does not divide the 4 query heads; .* Use tp=1[.]"),
        (TWELVE_HEADS, 4, 32, "6 key/value heads.* Use tp=1 or 2[.]"),
        (replace(SMALL, intermediate_size=50), 4, 32, "feed-forward width 50. Use tp=1 or 2[.]"),
        (SMALL, 4, 30, "seq_len=30.* Use tp=1 or 2, or use sequence_parallel=False[.]"),
        (replace(SMALL, vocab_size=5), 4, 32, "last rank without a row of the 5 .* Use tp=1 or 2[.]"),
        (LLAMA_70B, 128, 4096, "64 query heads.* Use tp=1 or 2 or 4 or 8 or 16 or 32 or 64[.]"),
        (SMALL, 0, 32, "tp=0 is not possible; .* Use tp=1[.]"),
    ],
)
def test_tensor_parallelism(model, tp, seq_len, said):
    assert re.search(said, refusal({"tp": tp}, model=model, seq_len=seq_len))


def test_a_vocabulary_whose_slices_cannot_be_shared_alike():
    said = "slices of 25 and 22 rows, which 8 ranks .* Use tp=1, or use zero_stage=0[.]"
    assert re.search(said, refusal({"tp": 4, "dp_shard": 8}, model=SMALL, seq_len=32, global_batch_size=8))


def test_a_compiled_block_that_recomputes_under_tp_on_a_cpu():
    message = refusal({"tp": 2}, model=SMALL, seq_len=32, recompute="full", compile=True)
    assert message.startswith("compile=True with recompute=full and tp=2 fails inside torch on a CPU. ")
    assert message.endswith(" Use recompute=selective, or use attention=math.")


@pytest.mark.parametrize(
    "layout,job,said",
    [
        (
            {},
            {"seq_len": 4100},
            "seq_len=4100 is not a multiple of 2 x cp=4 = 8, .* Use seq_len=4096 or 4104",
        ),
        ({"tp": 2}, {"seq_len": 4104}, r"x tp=2 \(sequence parallel\) = 16, .* Use seq_len=4096 or 4112"),
        ({}, {"seq_len": 6}, "Use seq_len=8"),
        ({"cp_method": "ulysses"}, {"seq_len": 4098}, "multiple of cp=4 = 4, .* Use seq_len=4096 or 4100"),
        (
            {"cp": 16, "cp_method": "ulysses"},
            {},
            "cp=16 .* 8 query heads .*8 heads / tp=1.* Use cp=1 or 2 or 4 or 8, or use cp_method=ring",
        ),
        (
            {"cp": 2, "tp": 8, "cp_method": "ulysses"},
            {},
            "does not divide the 1 query heads.* Use cp=1, or use cp_method=ring",
        ),
        ({}, {"attention": "flash"}, "attention=flash .* cp_method=ring.* Use attention=sdpa, or .*ulysses"),
        (
            {},
            {"attention": "varlen"},
            "attention=varlen .* cp_method=ring.* Use attention=sdpa, or .*ulysses",
        ),
        ({"cp_method": "star"}, {}, "cp_method=star is not one of ulysses, ring"),
        ({"cp": 0}, {}, "cp=0 is not possible"),
    ],
)
def test_context_parallelism(layout, job, said):
    layout, job = {"cp": 4, "cp_method": "ring", **layout}, {"seq_len": 4096, **job}
    assert re.search(said, refusal(layout, model=EIGHT_HEADS, **job))


@pytest.mark.parametrize(
    "pp,schedule,virtual_stages,n_microbatches,said",
    [
        (2, "1f1b2", 1, 4, "1f1b2 is not one of gpipe, 1f1b"),
        (8, "1f1b", 1, 8, "pp=8 x 1 .* = 8 stages, .* 5 layers.* Use pp=1 to 5[.]"),
        (2, "interleaved-1f1b", 3, 4, "= 6 stages, .* 5 layers.* Use virtual_stages=2[.]"),
        (4, "zbv", 2, 8, "= 8 stages, .* 5 layers.* Use pp=2[.]"),
        (4, "zbv", None, 8, "= 8 stages, .* 5 layers.* Use pp=1 or 2, or use schedule=gpipe or 1f1b"),
        (
            2,
            "gpipe",
            2,
            4,
            "virtual_stages=2 .* one stage per rank. Use virtual_stages=1, or .*interleaved-1f1b",
        ),
        (2, "dualpipev", 1, 4, "virtual_stages=1 .* exactly two stages per rank. Use virtual_stages=2"),
        (2, "interleaved-1f1b", 1, 4, "virtual_stages=1 .* at least two stages .* Use virtual_stages=2"),
        (2, "zero-bubble", 0, 4, "virtual_stages=0 .* at least one stage"),
        (4, "1f1b", 1, 3, "each of its 4 stages, and .*global_batch_size.* 3 microbatches.*schedule=gpipe"),
        (
            2,
            "dualpipev",
            2,
            3,
            "each of its 4 stages, and .* 3 microbatches.* Use global_batch_size=8, .*zbv",
        ),
        (2, "interleaved-1f1b", 2, 5, "5 microbatches, which 2 rounds .* Use global_batch_size=8 or 12,"),
        (2, "zero-bubble", 2, 7, "7 microbatches, which 3 rounds .* Use global_batch_size=12 or 16,"),
    ],
)
def test_a_pipeline(monkeypatch, pp, schedule, virtual_stages, n_microbatches, said):
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    layout = {"pp": pp, "schedule": schedule, "virtual_stages": virtual_stages}
    job = {"global_batch_size": 2 * n_microbatches, "micro_batch_size": 2}
    assert re.search(said, refusal(layout, model=FIVE_LAYERS, seq_len=32, **job))


def test_the_booster_is_refused_with_its_microbatches():
    job = {"model": SMALL, "seq_len": 32, "global_batch_size": 2, "micro_batch_size": 2}
    said = (
        "schedule=1f1b needs .* 2 stages, and there are microbatches=1. Use microbatches=2, or use schedule="
    )
    assert re.search(said, refusal({"pp": 2, "microbatches": 1}, **job))


@needs_split_backward
@pytest.mark.parametrize(
    "schedule,job,said",
    [
        ("zbv", {"recompute": "selective"}, "recompute=selective cannot do.* or use recompute=full[.]"),
        ("zero-bubble", {"compile": True}, "compile=True cannot do.* or leave `compile` out[.]"),
    ],
)
def test_a_backward_in_two_halves(schedule, job, said):
    message = refusal(
        {"pp": 2, "schedule": schedule}, model=FIVE_LAYERS, seq_len=32, global_batch_size=4, **job
    )
    assert re.search(f"schedule={schedule} runs backward in two halves, which {said}", message)


@pytest.mark.parametrize("schedule", ["zero-bubble", "zbv", "dualpipev"])
def test_a_split_backward_is_refused_where_torch_cannot_do_it(monkeypatch, schedule):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    layout, job = (
        {"pp": 2, "virtual_stages": 2},
        {"model": FIVE_LAYERS, "seq_len": 32, "global_batch_size": 4},
    )
    check_parallel(ParallelConfig(dp_shard=1, schedule="interleaved-1f1b", **layout), Job(**job))
    said = f"schedule={schedule} .* inside torch 2.11.0.* newer ones. Use schedule=interleaved-1f1b[.]"
    assert re.search(said, refusal({"schedule": schedule, **layout}, **job))


@pytest.mark.parametrize(
    "layout,said",
    [
        (
            {"dp_shard": 2},
            "global_batch_size=5 .* micro_batch_size=2 x 2 data-.* Use global_batch_size=4 or 8[.]",
        ),
        (
            {"draw_schedule": True},
            "draw_schedule=True .* with pp=1 .* Leave `draw_schedule` out, or use pp=2[.]",
        ),
        ({"virtual_stages": 2}, "virtual_stages=2 .* with pp=1 .* Leave `virtual_stages` out[.]"),
    ],
)
def test_batches_and_what_only_a_pipeline_has(layout, said):
    batch = 5 if "dp_shard" in layout else 4
    message = refusal(layout, model=SMALL, seq_len=32, global_batch_size=batch, micro_batch_size=2)
    assert re.search(said, message)


def test_microbatches_that_disagree_with_the_batch():
    message = refusal({"microbatches": 2}, model=SMALL, seq_len=32, global_batch_size=4)
    assert re.search("microbatches=2 is not .* = 4 make. Leave `microbatches` out[.]", message)


@pytest.mark.parametrize(
    "world_size,layout,said",
    [
        (
            4,
            {"tp": 3},
            "4 processes .* tp=3, which needs a multiple of 3. Use tp=1 or 2 or 4, or .*torchrun .* 3",
        ),
        (
            1,
            {"dp_shard": 3},
            "one process .* dp_shard=3, which needs exactly 3. Use dp_shard=-1 or 1, or .* 3[.]",
        ),
        (1, {"dp_shard": 0}, "dp_shard=0 is not possible; .* Use dp_shard=1 or -1[.]"),
        (
            8,
            {"pp": -1},
            "pp=-1 .* several axes are -1: pp, dp_shard. Use pp=1 or 2 or 4 or 8[.]",
        ),
        (
            8,
            {"pp": 2, "tp": 2, "dp_shard": 1},
            "pp=2 x tp=2, which needs exactly 4. .* or use dp_shard=-1 or 2",
        ),
        (
            4,
            {"dp_shard": 1},
            "4 processes .* size 1, .* Use dp_shard=-1 or 4, or launch with plain python[.]",
        ),
    ],
)
def test_a_number_of_processes(world_size, layout, said):
    with pytest.raises(UsageError) as error:
        ParallelConfig(**layout).resolve(world_size)
    assert re.search(said, str(error.value))


def test_what_can_run_is_accepted():
    def accept(model, seq_len, attention="sdpa", **layout):
        check_parallel(ParallelConfig(**{"dp_shard": 1, **layout}), Job(model, seq_len, attention=attention))

    for tp in (1, 2, 4, 8, 16, 64):
        accept(LLAMA_70B, 4096, tp=tp)
    accept(SMALL, 30, tp=4, sequence_parallel=False)  # every rank has all tokens: any length will do
    accept(EIGHT_HEADS, 4096, cp=4, tp=2, cp_method="ulysses", attention="flash")
    accept(EIGHT_HEADS, 4096, cp=16, tp=8, cp_method="ring")
    accept(EIGHT_HEADS, 4104, cp=4, tp=2, cp_method="ring", sequence_parallel=False)
    accept(EIGHT_HEADS, 17, cp=1, cp_method="ring", attention="flash")


# ---- what is proposed is accepted ----

SIZES = st.sampled_from([1, 1, 1, 2, 3, 4, 6, 8])


@st.composite
def any_case(draw):
    """A model, a layout and a batch that often do not go together."""
    n_kv_heads = draw(SIZES)
    n_heads = n_kv_heads * draw(SIZES)
    model = LlamaConfig(
        vocab_size=draw(st.integers(3, 100)),
        hidden_size=8 * n_heads,
        intermediate_size=draw(st.integers(1, 60)),
        num_hidden_layers=draw(st.integers(1, 20)),
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
    )
    layout = ParallelConfig(
        pp=draw(SIZES),
        dp_replicate=draw(st.integers(0, 2)),
        dp_shard=draw(SIZES),
        cp=draw(SIZES),
        tp=draw(SIZES),
        zero_stage=draw(st.integers(0, 3)),
        sequence_parallel=draw(st.booleans()),
        cp_method=draw(st.sampled_from(["ulysses", "ring", "star"])),
        schedule=draw(st.sampled_from([*SCHEDULES, "2f2b"])),
        virtual_stages=draw(st.sampled_from([None, None, 0, 1, 2, 3])),
        draw_schedule=draw(st.booleans()),
        microbatches=draw(st.sampled_from([None, None, 1, 2, 3])),
    )
    job = Job(
        model,
        seq_len=draw(st.integers(1, 200)),
        global_batch_size=draw(st.integers(1, 64)),
        micro_batch_size=draw(st.integers(1, 4)),
        attention=draw(st.sampled_from(["sdpa", "math", "flash", "varlen"])),
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
        compile=draw(st.booleans()),
    )
    return Case(layout, job)


@st.composite
def any_world(draw):
    axis = st.sampled_from([1, 1, 1, 2, 3, 4, -1, 0])
    layout = ParallelConfig(**{name: draw(axis) for name in AXES})
    return Case(layout, world_size=draw(st.integers(1, 24)))


def assert_proposals_are_accepted(all_rules: list, case: Case) -> None:
    """Read the proposals from the message, as a user would, and try each of them."""
    try:
        rules.check(all_rules, case)
    except UsageError as error:
        message = str(error)
        words = message.rpartition(". ")[2].rstrip(".").lower()
        together = words.split(" and ")
        proposals = [list(read_proposals(one)) for one in together]
        assert all(proposals) and "\n" not in message, message
        broken = next(rule for rule in all_rules if not rule.holds(case))
        if len(together) == 1:
            for field, value in proposals[0]:
                assert broken.holds(case.changed(field, value)), (message, field, value)
        else:
            for [(field, value)] in proposals:
                case = case.changed(field, value)
            assert broken.holds(case), message


def read_proposals(words: str):
    for clause in re.split(r", or |(?<=torchrun) or ", words):
        if match := re.fullmatch(r"leave `(\w+)` out", clause):
            yield match[1], None if match[1] in ("microbatches", "virtual_stages") else False
        elif clause.startswith("launch with"):
            yield "world_size", int(clause.rpartition(" ")[2].replace("python", "1"))
        else:
            field, values = re.fullmatch(r"use (\w+)=(.*)", clause).groups()
            for span in values.split(" or "):
                if match := re.fullmatch(r"(\d+) to (\d+)", span):
                    yield from ((field, value) for value in range(int(match[1]), int(match[2]) + 1))
                else:
                    yield (
                        field,
                        {"false": False}.get(span, int(span) if re.fullmatch(r"-?\d+", span) else span),
                    )


def test_a_rule_reads_any_setting_by_its_bare_name_and_no_two_have_the_same():
    case = Case(ParallelConfig(tp=2, dp_shard=3), Job(SMALL, seq_len=32))
    assert (case.tp, case.dp, case.seq_len, case.vocab_size) == (2, 3, 32, 97)
    settings = [set(dir(owner)) for owner in (case.layout, case.job, case.job.model)]
    own = {name for name in dir(Case) if not name.startswith("_")}
    for names in settings:
        others = set().union(own, *(other for other in settings if other is not names))
        assert {name for name in names & others if not name.startswith("_")} == set()
    with pytest.raises(AttributeError, match="seq_len"):
        _ = Case(ParallelConfig(), world_size=2).seq_len  # without a job there is none


# What no single change makes a run: fewer layers than stages, where other rules forbid pp=1 with these; and a
# schedule beside two settings that it does not go with, where other schedules need other numbers.
TOO_FEW_LAYERS = Case(
    ParallelConfig(pp=2, dp_shard=1, schedule="interleaved-1f1b", virtual_stages=2, draw_schedule=True),
    Job(replace(SMALL, num_hidden_layers=1), seq_len=1),
)
COMPILED_HALVES = Case(
    ParallelConfig(pp=2, dp_shard=2, tp=1, cp=1, zero_stage=0, schedule="zbv", virtual_stages=2),
    Job(
        replace(SMALL, num_hidden_layers=4),
        seq_len=1,
        global_batch_size=10,
        recompute="selective",
        compile=True,
    ),
)


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(any_case())
@example(TOO_FEW_LAYERS)
@example(COMPILED_HALVES)
def test_whatever_a_refusal_proposes_satisfies_its_rule(case):
    assert_proposals_are_accepted(RULES, case)


@pytest.mark.parametrize(
    "case,said",
    [
        (TOO_FEW_LAYERS, "Use pp=1."),
        (COMPILED_HALVES, "Use schedule=gpipe and use virtual_stages=1."),
    ],
)
@needs_split_backward
def test_a_refusal_proposes_something_where_no_single_change_makes_a_run(case, said):
    with pytest.raises(UsageError) as error:
        rules.check(RULES, case)
    assert str(error.value).endswith(said)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(any_world())
def test_whatever_is_proposed_for_a_number_of_processes_satisfies_its_rule(case):
    assert_proposals_are_accepted(WORLD_RULES, case)
