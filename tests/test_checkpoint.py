"""Training state on disk: exact, resharded, written behind training's back, complete or not there."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pool import run_on
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dtensor_llama.checkpoint as checkpoint
from dtensor_llama import Llama, LlamaConfig, UsageError
from dtensor_llama.checkpoint import Checkpointer, restore_training_state, training_state

SHAPE = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)  # 50 rows over 4 ranks are 13, 13, 13, 11


def start(shard=True, seed=0, **changes):
    """A model (sharded over all ranks, if there are ranks) and an AdamW with LLaMA's two groups that never
    stepped."""
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(**{**SHAPE, **changes}))
    if seed:
        with torch.no_grad():
            for param in model.parameters():
                param.normal_()
    if dist.is_initialized() and shard:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-5)


def train(model, optimizer, steps, log):
    """Each step draws its tokens from the random state, which is thereby part of what a resume must
    restore."""
    for _ in range(steps):
        tokens = torch.randint(0, 50, (2, 9))
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log.append(loss.item())


def whole(model, optimizer) -> dict[str, torch.Tensor]:
    """All of the run, gathered and copied: weights, moments, step counts and the settings of each parameter's
    group."""
    state = training_state(model, optimizer)
    gathered = {
        f"{kind}.{name}": value.full_tensor() if isinstance(value, DTensor) else value
        for kind in ("model", "optimizer")
        for name, value in state[kind].items()
    }
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in gathered.items()
    }


def assert_same(one: dict, other: dict):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], (
            name
        )


def run_and_stop(folder, steps=3, more=2, shard=True):
    """Train, save, train on. Returns the losses after the save and everything at the save."""
    model, optimizer = start(shard)
    train(model, optimizer, steps, [])
    saver, later = Checkpointer(folder), []
    at_save = whole(model, optimizer)
    saver.save(steps, training_state(model, optimizer, steps, 77, {"rows": [1, 2.5, "x"]}))
    train(model, optimizer, more, later)  # while it is written
    saver.close()
    return later, at_save


def resume(folder, more=2, shard=True):
    model, optimizer = start(shard, seed=9)
    saver, later = Checkpointer(folder), []
    state = training_state(model, optimizer)
    saver.load(saver.latest(), state)
    progress = restore_training_state(state, model, optimizer)
    at_load = whole(model, optimizer)
    train(model, optimizer, more, later)
    saver.close()
    return later, at_load, progress


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(tmp_path, ranks):
    stopped = run_on(ranks, run_and_stop, tmp_path)
    resumed = run_on(ranks, resume, tmp_path)
    for (later, at_save), (later_again, at_load, progress) in zip(stopped, resumed, strict=True):
        assert later == later_again
        assert_same(at_save, at_load)
        assert progress == {"step": 3, "position": 77, "meta": {"rows": [1, 2.5, "x"]}}


def test_without_any_process_group_too(tmp_path):
    later, at_save = run_and_stop(tmp_path)
    later_again, at_load, _ = resume(tmp_path)
    assert later == later_again
    assert_same(at_save, at_load)


@pytest.mark.parametrize("saved_by,loaded_by", [(1, 2), (2, 1), (2, 4), (4, 2), (2, 0), (0, 2), (4, 3)])
def test_another_number_of_ranks_gets_identical_values(tmp_path, saved_by, loaded_by):
    at_save = run_on(saved_by, run_and_stop, tmp_path)[0][1] if saved_by else run_and_stop(tmp_path)[1]
    results = run_on(loaded_by, resume, tmp_path) if loaded_by else [resume(tmp_path)]
    for _, at_load, progress in results:
        assert_same(at_save, at_load)
        assert progress["position"] == 77


def test_a_replica_on_each_rank_is_written_once(tmp_path):
    stopped = run_on(2, run_and_stop, tmp_path, 3, 2, False)
    resumed = run_on(2, resume, tmp_path, 2, False)
    assert [later for later, _ in stopped] == [later for later, *_ in resumed]
    assert resumed[0][0] == resumed[1][0]  # the same seed on both, so the same random state
    assert [f.name for f in sorted((tmp_path / "step-00000003").iterdir())] == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
        "checksums.json",
    ]
    numbers = sum(f.stat().st_size for f in (tmp_path / "step-00000003").glob("*.distcp"))
    once = sum(value.nbytes for value in stopped[0][1].values() if isinstance(value, torch.Tensor))
    assert numbers < 2 * once + 1_000_000  # DCP's envelope is about 1 KB a value


def test_saving_before_the_first_step_changes_nothing(tmp_path):
    logs = []
    for save_first in (False, True):
        model, optimizer = start()
        saver = Checkpointer(tmp_path / str(save_first))
        if save_first:
            saver.save(0, training_state(model, optimizer))
        log = []
        train(model, optimizer, 3, log)
        saver.close()
        logs.append((log, whole(model, optimizer)))
    assert logs[0][0] == logs[1][0]
    assert_same(logs[0][1], logs[1][1])
    assert resume(tmp_path / "True", more=3)[0] == logs[0][0]


def test_a_tied_model_stays_tied(tmp_path):
    model, optimizer = start(tie_word_embeddings=True)
    train(model, optimizer, 2, [])
    saver = Checkpointer(tmp_path)
    saver.save(2, training_state(model, optimizer), wait=True)
    again, its_optimizer = start(seed=9, tie_word_embeddings=True)
    state = training_state(again, its_optimizer)
    saver.load(tmp_path / "step-00000002", state)
    restore_training_state(state, again, its_optimizer)
    saver.close()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_same(whole(model, optimizer), whole(again, its_optimizer))


# ---- in the background ----


def save_while_stepping(folder, steps):
    """Hold the writing thread back until training has gone on, so that a shared buffer could not hide."""
    model, optimizer = start()
    train(model, optimizer, 1, [])
    at_save, saver, gate, real_save = (
        whole(model, optimizer),
        Checkpointer(folder),
        threading.Event(),
        dcp.save,
    )

    def late_save(*args, **kwargs):
        assert gate.wait(30)
        return real_save(*args, **kwargs)

    dcp.save = late_save
    try:
        stall_s = saver.save(1, training_state(model, optimizer, 1))
        # collectives of training, while the checkpoint's wait in the thread
        train(model, optimizer, steps, [])
        assert not Path(folder, "step-00000001").exists()
        gate.set()
        saver.wait()
    finally:
        dcp.save = real_save
        saver.close()
    return at_save, stall_s


@pytest.mark.parametrize("ranks", [0, 2])
def test_steps_taken_while_it_writes_are_not_in_the_checkpoint(tmp_path, ranks):
    results = run_on(ranks, save_while_stepping, tmp_path, 3) if ranks else [save_while_stepping(tmp_path, 3)]
    loaded = run_on(ranks, resume, tmp_path) if ranks else [resume(tmp_path)]
    for (at_save, _), (_, at_load, _) in zip(results, loaded, strict=True):
        assert_same(at_save, at_load)


def test_the_caller_waits_for_the_copy_only(tmp_path, monkeypatch):
    real_save = dcp.save
    monkeypatch.setattr(dcp, "save", lambda *args, **kwargs: (time.sleep(0.5), real_save(*args, **kwargs))[1])
    saver, state = Checkpointer(tmp_path), {"x": torch.zeros(10)}
    assert saver.save(1, state) < 0.3
    assert saver.save(2, state) > 0.4  # the previous one first
    assert [path.name for path in tmp_path.glob("step-????????")] == ["step-00000001"]
    assert saver.save(3, state, wait=True) > 0.8
    saver.close()
    assert len([*tmp_path.iterdir()]) == 3


def fail_on_one_rank(folder):
    model, optimizer = start()
    saver, said = Checkpointer(folder), []
    saver.save(1, training_state(model, optimizer), wait=True)
    if dist.get_rank() == 1:  # writing more than 20 kB to a file is an error, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    saver.save(2, training_state(model, optimizer))
    try:
        saver.wait()
    except Exception as error:
        said.append((type(error).__name__, str(error)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    saver.save(3, training_state(model, optimizer), wait=True)  # the failure is over: saving works again
    saver.close()
    return said


def test_a_write_error_on_one_rank_is_raised_on_all_naming_the_folder(tmp_path):
    for ((kind, said),) in run_on(2, fail_on_one_rank, tmp_path):
        assert kind == "UsageError" and f"checkpoint {tmp_path}/step-00000002 was not written" in said, said
    assert not (tmp_path / "step-00000002").exists()


# ---- complete or not there ----


def save_and_die_everywhere(folder):
    """Save steps 1, 2, ..., killed -9 at the 1st, 2nd, ... file operation of step 2, until one save
    survives."""
    from test_weights import die_at_file_operation

    folder, rounds = Path(folder), 0
    while True:
        for old in [*folder.glob("step-*")]:
            checkpoint.shutil.rmtree(old)
        child = os.fork()
        if child == 0:
            saver = Checkpointer(folder, keep=1)
            saver.save(1, {"x": torch.full((100,), 1.0)}, wait=True)
            die_at_file_operation(rounds)
            saver.save(2, {"x": torch.full((100,), 2.0)}, wait=True)
            saver.close()
            os.kill(os.getpid(), signal.SIGTERM)
        status = os.waitpid(child, 0)[1]
        saver, state = Checkpointer(folder), {"x": torch.zeros(100)}
        assert saver.latest() is not None
        for path in folder.glob("step-????????"):  # the newest, and an older one that was about to be removed
            saver.load(path, state)
            assert state["x"].unique().tolist() == [float(path.name[-1])]
        assert not [*folder.glob("*.partial"), *folder.glob("*.deleting")]
        saver.close()
        if os.WTERMSIG(status) == signal.SIGTERM:
            assert [path.name for path in folder.iterdir()] == ["step-00000002"]
            print(f"survived after {rounds} kills")
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        rounds += 1


def test_kill_at_any_file_operation_leaves_the_last_complete_checkpoint_usable(tmp_path):
    script = "import sys, test_checkpoint as t; t.save_and_die_everywhere(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-2]) > 10


def save_steps(folder, keep, steps):
    saver = Checkpointer(folder, keep)
    for step in steps:
        saver.save(step, {"x": torch.full((10,), float(step))}, wait=True)
    newest = saver.latest()
    saver.close()
    return newest


def test_the_newest_n_are_kept(tmp_path):
    assert save_steps(tmp_path / "two", 2, [1, 2, 3, 20]).name == "step-00000020"
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["step-00000003", "step-00000020"]
    save_steps(tmp_path / "all", 0, range(1, 6))
    assert len([*(tmp_path / "all").iterdir()]) == 5
    assert save_steps(tmp_path / "large", 1, [99_999_999, 100_000_000]).name == "step-100000000"
    assert save_steps(tmp_path / "none", 1, []) is None


def test_checkpoints_of_an_abandoned_future_are_set_aside_not_resumed(tmp_path):
    save_steps(tmp_path, 0, [1, 2, 3])
    assert save_steps(tmp_path, 1, [2]).name == "step-00000002"  # a run that went back to step 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000002",
        "step-00000002.superseded",
        "step-00000003.superseded",
    ]


# ---- what is refused ----


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARM = {
    "bit flip": (
        lambda f: flip(f / "__0_0.distcp"),
        "__0_0.distcp does not have the bytes that were written",
    ),
    "bit flip in .metadata": (lambda f: flip(f / ".metadata"), ".metadata does not have the bytes"),
    "truncated": (
        lambda f: os.truncate(f / "__0_0.distcp", 1000),
        r"__0_0.distcp has 1000 bytes, \d+ were written",
    ),
    "file missing": (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "metadata missing": (lambda f: (f / ".metadata").unlink(), ".metadata is missing"),
    "checksums missing": (lambda f: (f / "checksums.json").unlink(), "checksums.json: .*No such file"),
    "checksums broken": (lambda f: (f / "checksums.json").write_text("{"), "checksums.json: "),
    "two": (
        lambda f: (flip(f / "__0_0.distcp"), (f / ".metadata").unlink()),
        "(?=.*__0_0.distcp does)(?=.*.metadata is)",
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_newest_checkpoint_is_refused_by_name(tmp_path, harm):
    save_steps(tmp_path, 0, [5, 10])
    damage, said = HARM[harm]
    damage(tmp_path / "step-00000010")
    saver, state = Checkpointer(tmp_path), {"x": torch.zeros(10)}
    with pytest.raises(UsageError, match=said) as refused:
        saver.load(saver.latest(), state)
    refused.match("step-00000010: damaged checkpoint.*An older one: .*step-00000005")
    assert "\n" not in str(refused.value) and not state["x"].any()
    saver.close()


def test_what_is_no_checkpoint_is_refused_as_such(tmp_path):
    save_steps(tmp_path / "run", 0, [5])
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "step-00000007.partial").mkdir()
    saver = Checkpointer(tmp_path / "other")
    for path, said in [
        ("nowhere", "no such folder; a checkpoint is a folder like step-00000100"),
        ("hf", "not a checkpoint; a checkpoint is a folder"),
        ("run", "not a checkpoint; name one inside it, like step-00000005"),
        ("hf/config.json", "not a checkpoint"),
        ("step-00000007.partial", "not a complete checkpoint"),
    ]:
        with pytest.raises(UsageError, match=said):
            saver.load(tmp_path / path, {"x": torch.zeros(10)})
    saver.close()


def test_a_file_that_the_system_cuts_short_is_the_disks_fault_and_one_line(tmp_path):
    """A quota does this too, and torch's writer then speaks only of positions in its file."""
    saver = Checkpointer(tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UsageError, match="did not take a whole file.*ulimit -f"):
            saver.save(1, {"x": torch.zeros(100_000)}, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    saver.close()


def test_a_run_folder_that_is_named_instead_of_a_checkpoint_names_its_newest(tmp_path):
    save_steps(tmp_path / "run" / "checkpoints", 0, [5])
    saver = Checkpointer(tmp_path / "other")
    with pytest.raises(UsageError, match="name one inside it, like checkpoints/step-00000005"):
        saver.load(tmp_path / "run", {"x": torch.zeros(10)})
    saver.close()


@pytest.mark.parametrize(
    "changes,said",
    [
        (
            {"hidden_size": 16, "head_dim": 8},
            r"model.lm_head.weight: is \[50, 32\], must be \[50, 16\]",
        ),
        ({"num_hidden_layers": 3}, "model.model.layers.2.*: missing.*and .* more"),
        ({"num_hidden_layers": 1}, "model.model.layers.1.*: unexpected"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_changed(tmp_path, changes, said):
    run_and_stop(tmp_path)
    model, optimizer = start(seed=9, **changes)
    before, saver = whole(model, optimizer), Checkpointer(tmp_path)
    with pytest.raises(UsageError, match=said):
        saver.load(saver.latest(), training_state(model, optimizer))
    saver.close()
    assert_same(before, whole(model, optimizer))


def damaged_for_two(folder):
    saver = Checkpointer(folder)
    try:
        saver.load(saver.latest(), {"x": torch.zeros(10)})
    except UsageError as refused:
        return str(refused)
    finally:
        saver.close()


def test_damage_that_one_rank_reads_is_refused_on_all(tmp_path):
    save_steps(tmp_path, 0, [5])
    flip(tmp_path / "step-00000005" / "__0_0.distcp")
    assert all(
        "__0_0.distcp does not have the bytes" in said for said in run_on(2, damaged_for_two, tmp_path)
    )


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_no_code_hidden_in_a_checkpoint_runs(tmp_path):
    saver, state, exploited = Checkpointer(tmp_path / "c"), {"value": "text"}, tmp_path / "exploited"
    saver.save(5, state, wait=True)
    folder = tmp_path / "c" / "step-00000005"
    metadata, data = folder / ".metadata", folder / "__0_0.distcp"
    records = pickle.loads(metadata.read_bytes())
    with open(data, "ab") as appended:  # one value, replaced by a pickle that runs a command
        (place,) = records.storage_data.values()
        place.offset = appended.tell()
        torch.save(Exploit(exploited), appended)
        place.length = appended.tell() - place.offset
    for content, said in [
        (pickle.dumps(Exploit(exploited)), r"names \w+.system, which DCP does not write; not opened"),
        (pickle.dumps(records), "step-00000005 was not loaded: Weights only load failed"),
    ]:
        metadata.write_bytes(content)
        # they can be forged too
        sums = {file.name: checkpoint._size_and_crc(file) for file in (metadata, data)}
        (folder / "checksums.json").write_text(json.dumps(sums))
        with pytest.raises((UsageError, RuntimeError), match=said):
            saver.load(folder, state)
    saver.close()
    assert not exploited.exists()


# ---- at exit ----

EXIT = """
import sys, torch, torch.distributed as dist
from dtensor_llama.checkpoint import Checkpointer
dist.init_process_group("gloo", init_method="file://" + sys.argv[1] + "/store", rank=int(sys.argv[2]), world_size=2)
saver = Checkpointer(sys.argv[1] + "/checkpoints")
saver.save(1, {"x": torch.zeros(1000)})
saver.close()
dist.destroy_process_group()
"""


def test_a_run_that_closes_its_checkpointer_exits_with_zero(tmp_path):
    for turn in range(1):
        (tmp_path / str(turn)).mkdir()
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", EXIT, tmp_path / str(turn), str(rank)], stderr=subprocess.PIPE
            )
            for rank in range(2)
        ]
        for rank in ranks:
            _, stderr = rank.communicate(timeout=60)
            assert rank.returncode == 0, stderr.decode()


def test_values_that_json_cannot_hold_are_refused_when_the_state_is_made():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="not JSON serializable"):
        training_state(model, torch.optim.AdamW(model.parameters()), meta={"x": object()})
