"""The Booster's few lines train like plain transformers in one process, under every axis, on our model and on
theirs."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pool import run_on
from recipe import ROOT
from torch.testing import assert_close

from dtensor_llama import Llama, LlamaConfig, UsageError
from memory import MemoryConfig
from parallel import ParallelConfig
from parallel.booster import Booster, _ranks_of_this_host, copy_weights

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2, "microbatches": 4}),
    "dp2": (2, {"microbatches": 2, "zero_stage": 2}),
    "cp2": (2, {"cp": 2}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2, "microbatches": 4, "zero_stage": 1}),
    "cp2-ring-dp2": (4, {"cp": 2, "cp_method": "ring"}),
}


def theirs(tied=False):
    """An untouched transformers model, the same in every process."""
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(3)
    return LlamaForCausalLM(TheirConfig(**SHAPE, tie_word_embeddings=tied))


def ours(tied=False):
    model = Llama(LlamaConfig(**SHAPE, rms_norm_eps=1e-6, tie_word_embeddings=tied))
    copy_weights(dict(theirs(tied).named_parameters()), model)
    return model


def adamw(model):
    """Decay for matrices only, as everyone does: two groups that the Booster must keep apart."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0, "lr": 3e-3},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, eps=1e-5)


def batches(n=5, sequences=8, tokens=16):
    """Global batches; scored labels lie unevenly over sequences and tokens, and some sequences have none."""
    made = []
    for step in range(n):
        draw = torch.Generator().manual_seed(step)
        input_ids = torch.randint(61, (sequences, tokens), generator=draw)
        labels = input_ids.clone()
        ignored = torch.rand(sequences, tokens, generator=draw) < torch.linspace(0, 0.9, sequences)[:, None]
        labels[ignored] = -100
        labels[2, :10] = labels[5] = -100
        made.append({"input_ids": input_ids, "labels": labels})
    return made


def label_smoothed(logits, labels):
    """A user's criterion: whole logits, labels not shifted, the mean over scored tokens."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)


@cache
def plain(tied=False, criterion=None, size=(5, 8, 16)):
    """transformers alone, in this process: the losses, gradient norms and final weights to be met."""
    model = theirs(tied)
    optimizer, losses, norms = adamw(model), [], []
    for batch in batches(*size):
        out = model(**batch)
        loss = out.loss if criterion is None else criterion(out.logits, batch["labels"])
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, dict(model.named_parameters())


def boosted(make, layout, folder, tied=False, criterion=None, size=(5, 8, 16), memory=None):
    booster = Booster(ParallelConfig(**layout), memory)
    model = make(tied)
    model, optimizer, dataloader, criterion = booster.boost(model, adamw(model), batches(*size), criterion)
    losses, norms = [], []
    for batch in dataloader:
        losses.append(booster.step(batch).item())
        norms.append(booster.clip_grad_norm(0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    booster.save_hf(model, folder)
    return losses, norms


def assert_same_training(ranks, expected, *args):
    losses, norms, weights = expected
    folder = args[2]
    for its_losses, its_norms in run_on(ranks, boosted, *args):
        assert max(abs(a - b) for a, b in zip(its_losses, losses, strict=True)) < 2e-5
        assert max(abs(a / b - 1) for a, b in zip(its_norms, norms, strict=True)) < 1e-4
    from transformers import LlamaForCausalLM

    for name, weight in LlamaForCausalLM.from_pretrained(folder).named_parameters():
        assert_close(weight, weights[name], rtol=0, atol=1e-5)  # five steps of 1e-3 (norms: 3e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_model_trains_as_in_one_process(tmp_path, layout):
    ranks, config = LAYOUTS[layout]
    assert_same_training(ranks, plain(), theirs, config, tmp_path / "hf")


@pytest.mark.parametrize("layout,tied", [("tp2", True), ("pp2", True), ("dp2", False), ("cp2", False)])
def test_our_model_trains_as_transformers_does(tmp_path, layout, tied):
    ranks, config = LAYOUTS[layout]
    assert_same_training(ranks, plain(tied), ours, config, tmp_path / "hf", tied)


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_with_a_memory_plan_it_trains_alike(tmp_path, layout):
    ranks, config = LAYOUTS[layout]
    memory = MemoryConfig("static", 0.4, 0.3, 0.3, kernel="blocks")
    assert_same_training(ranks, plain(True), theirs, config, tmp_path / "hf", True, None, (5, 8, 16), memory)


def test_ranks_that_share_a_hosts_memory_are_counted():
    assert run_on(2, _ranks_of_this_host) == [2, 2]


@pytest.mark.parametrize("layout", ["dp2", "tp2-pp2"])
def test_a_criterion_of_the_user_gets_whole_logits_and_unshifted_labels(tmp_path, layout):
    ranks, config = LAYOUTS[layout]
    assert_same_training(
        ranks, plain(False, label_smoothed), theirs, config, tmp_path / "hf", False, label_smoothed
    )


@pytest.mark.parametrize("layout", ["tp2-pp2", "cp2-ring-dp2"])
def test_batches_that_do_not_divide_are_filled_up_with_what_changes_nothing(tmp_path, layout):
    ranks, config = LAYOUTS[layout]
    size = (3, 7, 15)  # sequences over microbatches and dp, tokens over cp and tp
    assert_same_training(ranks, plain(size=size), theirs, config, tmp_path / "hf", False, None, size)


# ---- state ----


def run(booster, data, stop_after=None):
    losses = []
    for batch in data:
        losses.append(booster.step(batch).item())
        booster.optimizer.step()
        booster.optimizer.zero_grad()
        if len(losses) == stop_after:
            break
    return losses


def first_part(layout, folder):
    booster, model = Booster(ParallelConfig(**layout)), theirs()
    *_, data, _ = booster.boost(model, adamw(model), batches())
    losses = run(booster, data, stop_after=3)
    booster.save(folder)
    return losses + run(booster, list(data)[3:])


def second_part(layout, folder):
    booster, model = Booster(ParallelConfig(**layout)), ours()
    _, optimizer, data, _ = booster.boost(
        model, torch.optim.AdamW(adamw(model).param_groups, lr=0.5), batches()
    )
    assert booster.load(folder) == 3 and [group["lr"] for group in optimizer.param_groups] == [1e-3, 3e-3]
    return run(booster, data), len(run(booster, data))  # the next pass has all batches again


@pytest.mark.parametrize("first,second", [("tp2-pp2", "tp2-pp2"), ("pp2", "dp2")])
def test_saved_state_goes_on_where_it_stood(tmp_path, first, second):
    whole = run_on(LAYOUTS[first][0], first_part, LAYOUTS[first][1], tmp_path)[0]
    for rest, n_next in run_on(LAYOUTS[second][0], second_part, LAYOUTS[second][1], tmp_path):
        assert rest == whole[3:] if first == second else rest == pytest.approx(whole[3:], abs=2e-5)
        assert n_next == 5


# ---- what it refuses, and how it starts and ends ----


def train_from_meta():
    with torch.device("meta"):
        model = Llama(LlamaConfig(**SHAPE))
    booster = Booster(ParallelConfig(), seed=7, dtype=torch.bfloat16)
    model, optimizer, data, _ = booster.boost(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.utils.data.DataLoader(range(8), 4, collate_fn=collate),
    )
    assert len(data) == 2 and all(p.dtype == torch.float32 for p in model.parameters())
    return run(booster, data)


def collate(indices):
    return {key: value[: len(indices)] for key, value in batches()[indices[0] // 4].items()}


def test_a_model_on_meta_starts_from_the_seed():
    (losses,) = run_on(1, train_from_meta)
    assert len(losses) == 2 and all(3.5 < loss < 4.6 for loss in losses)  # ln 61 = 4.1


def refused(what):
    model, layout, data, criterion = theirs(), {}, batches(), None
    optimizer, memory = None, None
    if what == "memory":
        memory = object()
    elif what == "attention_bias":
        model.config.attention_bias = True
    elif what == "strange model":
        model = torch.nn.Linear(2, 2)
    elif what == "adapter":
        model.adapter = torch.nn.Linear(2, 2)
    elif what == "frozen":
        model.lm_head.weight.requires_grad_(False)
    elif what == "stepped":
        optimizer = adamw(model)
        model(**data[0]).loss.backward()
        optimizer.step()
    elif what == "part":
        optimizer = torch.optim.AdamW(model.model.parameters())
    elif what == "another's":
        optimizer = torch.optim.AdamW(theirs().parameters())
    elif what == "cp criterion":
        layout, criterion = {"cp": 2}, label_smoothed
    elif what == "layers":
        layout = {"pp": 2, "schedule": "interleaved-1f1b"}
    elif what == "heads":
        layout = {"tp": 2}
        model.config.num_attention_heads, model.config.num_key_value_heads = 1, 1
    elif what == "positions":
        data[0]["position_ids"] = data[0]["input_ids"]
    elif what == "left padding":
        data[0]["attention_mask"] = torch.ones(8, 16).index_fill(1, torch.tensor([0]), 0)
    elif what == "scored padding":
        data[0]["attention_mask"], data[0]["labels"] = torch.ones(8, 16).tril(8), data[0]["input_ids"]
    elif what == "unknown id":
        data[0]["input_ids"][1, 2] = 10**6
    elif what == "negative id":
        data[0]["input_ids"][1, 2] = -1
    elif what == "unknown label":
        data[0]["labels"] = data[0]["labels"].clone().fill_(10**6)
    elif what == "floats":
        data[0]["input_ids"] = data[0]["input_ids"].float()
    elif what == "lists":
        data[0]["labels"] = data[0]["labels"].tolist()
    elif what == "no sequences":
        data[0] = {name: column[:0] for name, column in data[0].items()}
    elif what == "budget without placement":
        memory = MemoryConfig(device_budget_gib=1.0)
    elif what == "drawing":
        memory = MemoryConfig(placement="auto", draw=True)
    elif what == "shuffled":
        data = data[torch.distributed.get_rank() :]
    try:
        booster = Booster(ParallelConfig(**layout), memory)
        if what == "not boosted":
            booster.step(data[0])
        *_, data, _ = booster.boost(model, optimizer or adamw(model), data, criterion)
        if what == "clip":
            booster.clip_grad_norm(-1.0)
        run(booster, data)
    except UsageError as error:
        return str(error)


@pytest.mark.parametrize(
    "what,said",
    {
        "memory": "pass memory.MemoryConfig",
        "attention_bias": "attention_bias=True",
        "strange model": "model is a Linear",
        "adapter": "adapter.weight: unexpected",
        "frozen": "lm_head.weight: requires_grad is False",
        "stepped": "already stepped",
        "part": "leaves out 1 parameters",
        "another's": "not the model's",
        "cp criterion": "cp=2",
        "layers": "4 stages",
        "heads": "tp=2 does not divide the 1 query heads",
        "positions": "position_ids",
        "left padding": "pad on the right",
        "scored padding": "set labels of padding to -100",
        "unknown id": "input_ids has ids from",
        "negative id": "input_ids has ids from -1",
        "unknown label": "labels has ids from 1000000",
        "floats": "torch.float32; they must be whole numbers",
        "lists": "a batch has labels as a list",
        "no sequences": "B and T at least 1",
        "budget without placement": "device_budget_gib",
        "drawing": "draw=True is for the recipes",
        "clip": "max_norm=-1.0 is not possible",
        "not boosted": "booster.step was called before booster.boost",
        "shuffled": "different batches",
    }.items(),
)
def test_what_cannot_be_done_is_refused_in_words(what, said):
    for message in run_on(2, refused, what):
        assert message is not None and said in message


def test_a_step_with_nothing_scored_changes_nothing():
    for loss, norm in run_on(2, nothing_scored):
        assert loss == 0 and norm == 0


def nothing_scored():
    booster, model = Booster(ParallelConfig()), theirs()
    *_, criterion = booster.boost(model, adamw(model), None, label_smoothed)
    batch = {key: value[:4] for key, value in batches()[0].items()}
    loss = booster.step({**batch, "labels": torch.full_like(batch["labels"], -100)})
    return loss.item(), booster.clip_grad_norm(1.0).item()


@pytest.mark.parametrize(
    "ranks,last_words",
    [
        pytest.param(1, "", id="python"),
        pytest.param(2, "", id="torchrun"),
        pytest.param(2, "raise KeyError('mine')", id="raises", marks=pytest.mark.slow),
        pytest.param(2, "sys.exit(3)", id="exits", marks=pytest.mark.slow),
        pytest.param(2, "time.sleep(25)", id="dawdles", marks=pytest.mark.slow),
    ],
)
def test_a_plain_script_starts_and_ends_its_own_process_group(tmp_path, ranks, last_words):
    fails = last_words and "sleep" not in last_words
    body = [
        "import sys, time",
        f"sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}",
        "from test_booster import *",
        "booster, model = Booster(ParallelConfig(tp=-1, dp_shard=1)), ours()",
        "*_, data, _ = booster.boost(model, adamw(model), batches())",
        # in one write: with PYTHONUNBUFFERED, print writes a number and the end of its line apart
        "sys.stdout.write(f'{run(booster, data)[0]}\\n'); sys.stdout.flush()",
    ]
    body += [f"if torch.distributed.get_rank() == 0: {last_words}"] if last_words else []
    body += ["run(booster, data)"] if fails else []
    Path(tmp_path, "train.py").write_text("\n".join(body))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    ended = subprocess.run(
        [sys.executable, *launcher, tmp_path / "train.py"], capture_output=True, text=True, timeout=180
    )
    assert bool(ended.returncode) == bool(fails), ended.stderr
    losses = [float(line) for line in ended.stdout.splitlines()]
    assert len(losses) == ranks and all(abs(loss - plain()[0][0]) < 2e-5 for loss in losses)


def test_the_program_of_the_readme_trains_on_two_processes_and_saves_what_transformers_opens(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(# train.py.*?)```", text, re.DOTALL)
    (tmp_path / "train.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 0, ended.stderr
    losses = [float(line.removeprefix("loss ")) for line in ended.stdout.splitlines()]
    assert len(losses) == 16 and losses[0] > 5 and losses[-1] < 4, losses  # ln 256 = 5.5
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM.from_pretrained(tmp_path / "trained").config.vocab_size == 256
