"""What recipes/launch says passes the checks of the recipes, fits the memory of those GPUs, and parses as
shell and YAML."""

import os
import re
import signal
import string
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import yaml
from recipe import ROOT, metrics
from recipe import pretrain_flags as own_flags
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from parallel.apply import Computation
from parallel.cluster import NODES

LAUNCH = ROOT / "recipes/launch"
sys.path[:0] = [str(LAUNCH), str(ROOT / "recipes")]

import pretrain  # noqa: E402
from sizes import TABLE, T, account_of, flags  # noqa: E402

from dtensor_llama import Llama, LlamaConfig, UsageError  # noqa: E402
from dtensor_llama.chat.lora import apply_lora, n_adapter_parameters  # noqa: E402
from dtensor_llama.cli import check_numbers, parse_cli  # noqa: E402
from dtensor_llama.optim import build_adamw  # noqa: E402
from memory import ChunkManager, Machine, TrainingLoop  # noqa: E402
from memory.chunk import GIB  # noqa: E402
from memory.tracer import MachineRates  # noqa: E402
from parallel import build_mesh, parallelize  # noqa: E402
from parallel.config import Job, check_parallel  # noqa: E402
from parallel.cost import States, machine_rates  # noqa: E402
from parallel.planner import choose_open  # noqa: E402
from parallel.pretend import pretended_rank  # noqa: E402

RECIPES = {"pretrain": pretrain.PretrainConfig}
NUMBERS = {"pretrain": pretrain.NUMBERS}
if (ROOT / "recipes/sft.py").exists():
    import sft

    RECIPES["sft"] = sft.SftConfig
    NUMBERS["sft"] = sft.NUMBERS


def words(chosen: dict) -> list[str]:
    return [
        str(word) for flag, value in chosen.items() for word in ((flag,) if value is None else (flag, value))
    ]


def parsed(recipe: str, size: str, gpu: str, gpus: int):
    """(settings, layout, microbatches), past every check that the recipe makes before a process group
    starts."""
    cfg = parse_cli(
        RECIPES[recipe],
        ["--model", f"llama2-{size.partition('-')[0]}", *words(flags(recipe, size, gpu, gpus))],
    )
    layout, config = cfg.parallel.resolve(gpus), LlamaConfig.preset(cfg.model)
    check_numbers(cfg, NUMBERS[recipe])
    cfg.memory.check()
    job = Job(
        config,
        cfg.data.seq_len,
        cfg.train.global_batch_size,
        cfg.train.micro_batch_size,
        attention="flash",
        recompute=cfg.train.recompute,
        compile=cfg.train.compile,
        device_type="cuda",
    )
    if recipe == "sft":  # it refuses what it does not expect to fit
        n_adapter = n_adapter_parameters(config, cfg.lora) if cfg.lora.rank else 0
        states = States(itemsize=2, n_adapter=n_adapter, offloads=cfg.memory.is_on)
        choose_open(job, layout, replace(NODES[gpu], n_gpus=gpus), states, tries_tp=False)
    return cfg, layout, check_parallel(layout, job)


@pytest.mark.parametrize(
    "size,gpu,recipe",
    [(*key, recipe) for key in TABLE for recipe in RECIPES if recipe == "sft" or "-" not in key[0]],
)
def test_every_size_from_the_least_to_512_gpus_passes_the_checks_of_its_recipe(recipe, size, gpu):
    for gpus in (n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n >= TABLE[size, gpu].least):
        cfg, layout, n_micros = parsed(recipe, size, gpu, gpus)
        assert n_micros * layout.dp * cfg.train.micro_batch_size == cfg.train.global_batch_size
        # What talks in every layer is a node or two; 70b's states need more, and its tokens hide the traffic.
        assert layout.tp * layout.dp_shard <= 16 or size.startswith("70b")
        if recipe == "pretrain":
            assert cfg.train.global_batch_size * T == 2**22  # LLaMA-2's 4M tokens
        else:
            assert bool(cfg.lora.rank) == size.endswith("-lora") and cfg.memory.is_on == size.endswith(
                "-offload"
            )


@pytest.mark.parametrize(
    "arguments,said",
    [
        (("70b", "a100-40gb", 32), "at least 64 GPUs"),
        (("70b", "h100-80gb", 16), "or h200-141gb, or for sft the size 70b-lora"),
        (("7b", "h100-80gb", 4), "at least 8 GPUs"),
        (("7b", "h100-80gb", 24), "power of 2"),
        (("7b", "v100", 8), "not a GPU in the"),
        (("8b", "h100-80gb", 8), "8b is not in the table"),
        (("70b-lora", "h100-80gb", 8), "is for sft"),
        (("13b-offload", "a100-40gb", 1), "is for sft"),
        (("8b-lora", "h100-80gb", 8), "8b-lora is not in the table"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(arguments, said):
    with pytest.raises(UsageError, match=said):
        flags("pretrain", *arguments)


@pytest.mark.parametrize("gpus", [1, 3, 6, 12, 16, 20, 24, 48])
def test_what_is_proposed_instead_is_not_refused(gpus):
    for size, gpu in TABLE:
        try:
            flags("sft", size, gpu, gpus)
        except UsageError as refused:
            said = str(refused)
            for other in re.findall(r"Use (\d+) of them", said):
                flags("sft", size, gpu, int(other))
            for other in re.findall(r", or (\w+-\w+),", said):
                flags("sft", size, other, gpus)
            for kind in re.findall(r"for sft the size ([\w-]+)", said):
                flags("sft", kind, gpu, gpus)


CORNERS = [(size, gpu, gpus) for (size, gpu), plan in TABLE.items() for gpus in (plan.least, 512)]
QUICK = [
    ("70b", "h100-80gb", 512),
    ("70b-lora", "a100-40gb", 8),
    ("13b-offload", "a100-40gb", 2),
    ("70b-offload", "a100-40gb", 8),
]


@pytest.mark.parametrize(
    "size,gpu,gpus",
    [pytest.param(*corner, marks=() if corner in QUICK else pytest.mark.slow) for corner in CORNERS],
)
def test_model_mesh_and_optimizer_are_built_at_full_size_and_a_rank_fits_its_gpu(size, gpu, gpus):
    recipe = "sft" if "-" in size else "pretrain"
    cfg, layout, n_micros = parsed(recipe, size, gpu, gpus)
    config, lora = LlamaConfig.preset(cfg.model), size.endswith("-lora")
    with pretended_rank(gpus - 1, gpus):
        mesh = build_mesh(layout, "cpu")
        with torch.device("meta"):
            model = Llama(config)
        if lora:
            apply_lora(model, cfg.lora, frozen_dtype=torch.bfloat16)
        if cfg.memory.is_on:
            model.to(torch.bfloat16)
        parts = parallelize(
            model, mesh, layout, Computation(dtype=torch.bfloat16, recompute=cfg.train.recompute)
        )
        optimizer = build_adamw(model, cfg.train.lr, cfg.train.weight_decay)
        if cfg.memory.is_on:  # it refuses at once what its budgets cannot hold
            config_here = replace(cfg.memory, kernel="blocks")  # a compiled one would run, to be warm
            with FakeTensorMode(allow_non_fake_inputs=True):  # what it allocates has sizes, no memory
                loop, machine = (
                    TrainingLoop(parts, n_micros),
                    Machine(rates=MachineRates(**machine_rates(NODES[gpu]))),
                )
                manager = ChunkManager(model, optimizer, config_here, loop, machine)
            manager.lanes.thread.shutdown()
            optimizer = manager.optimizer
            assert (
                sum(chunk.n for chunk in manager.chunks) * layout.tp * layout.dp_shard
                > 0.99 * config.n_parameters
            )
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        assert len(held) == len([one for one in model.parameters() if one.requires_grad])
        # one process has nothing to spread
        assert all(isinstance(parameter, DTensor) for parameter in held) or gpus == 1
        n = n_adapter_parameters(config, cfg.lora) if lora else config.n_parameters
        assert sum(p.numel() for p in held) * layout.pp > 0.9 * n
    account = account_of(size, gpu, gpus, flags(recipe, size, gpu, gpus))
    if size.endswith("-offload"):
        assert account.peak_gib <= cfg.memory.device_budget_gib, account.bytes
        assert account.host_bytes <= NODES[gpu].host_memory_gib * GIB
    else:
        assert account.peak_gib < 0.93 * NODES[gpu].gpu.memory_gib, account.bytes


# ---- the launchers ----


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda script: script.name)
def test_shell_scripts_parse_and_can_be_run(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def torchrun_words(script: str, tmp_path, *arguments: str, **settings: str) -> list[str]:
    """What the script would start: `python` only writes down what it is asked to run, unless that is
    sizes.py."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\ncase $1 in *sizes.py) exec {sys.executable} "$@";; esac\nprintf "%s\\n" "$@"\n'
    )
    python.chmod(0o755)
    ended = subprocess.run(
        [LAUNCH / script, *arguments],
        env=os.environ | {"PYTHON": str(python), **settings},
        text=True,
        capture_output=True,
        check=True,
    )
    return ended.stdout.splitlines()


def test_the_launchers_start_torchrun_with_the_flags_of_the_table_and_ours_behind(tmp_path):
    chosen = words(flags("pretrain", "70b", "h100-80gb", 64))
    nodes = {"NNODES": "8", "HEAD": "node-0"}
    said = torchrun_words(
        "many_nodes.sh", tmp_path, "pretrain", "70b", "h100-80gb", "--model", "a b", **nodes
    )
    assert (
        said[said.index("--nnodes") + 1] == "8" and said[said.index("--rdzv-endpoint") + 1] == "node-0:29400"
    )
    at = next(i for i, word in enumerate(said) if word.endswith("/pretrain.py"))
    assert said[at + 1 :] == [*chosen, "--model", "a b"]
    said = torchrun_words("one_node.sh", tmp_path, "sft", "7b", "a100-80gb")
    assert (
        said[said.index("--nproc-per-node") + 1] == "8"
        and said[-1] == words(flags("sft", "7b", "a100-80gb", 8))[-1]
    )
    with pytest.raises(subprocess.CalledProcessError) as refused:
        torchrun_words("one_node.sh", tmp_path, "pretrain", "70b", "a100-40gb")
    assert "at least 64 GPUs; 8 were named" in refused.value.stderr and refused.value.stdout == ""


@pytest.mark.parametrize(
    "script,arguments,settings,said",
    [
        ("one_node.sh", ["pretrain"], {}, "give RECIPE SIZE GPU"),
        ("many_nodes.sh", [], {}, "give RECIPE SIZE GPU"),
        ("many_nodes.sh", ["pretrain", "7b", "h100-80gb"], {"HEAD": "a"}, "NNODES: is missing"),
        ("many_nodes.sh", ["pretrain", "7b", "h100-80gb"], {"NNODES": "2"}, "set one to the host name"),
    ],
)
def test_a_launcher_names_what_is_missing(tmp_path, monkeypatch, script, arguments, settings, said):
    for name in ("NNODES", "HEAD", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(subprocess.CalledProcessError) as refused:
        torchrun_words(script, tmp_path, *arguments, **settings)
    assert said in refused.value.stderr and refused.value.stderr.count("\n") == 1


def test_the_kubernetes_job_is_yaml_that_runs_many_nodes_in_every_pod():
    values = {
        "NAME": "job",
        "IMAGE": "image:1",
        "CLAIM": "disk",
        "RECIPE": "pretrain",
        "SIZE": "70b",
        "GPU": "h100-80gb",
        "NNODES": "8",
        "WORKERS": "7",
        "FLAGS": "--model llama2-70b --data.path /shared/*.parquet",
    }
    job = yaml.safe_load(string.Template((LAUNCH / "kubernetes.yaml").read_text()).substitute(values))
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert job["kind"] == "PyTorchJob" and [replicas[role]["replicas"] for role in ("Master", "Worker")] == [
        1,
        7,
    ]
    for role in replicas.values():
        pod = role["template"]["spec"]
        (container,) = pod["containers"]
        command = f"exec recipes/launch/many_nodes.sh pretrain 70b h100-80gb {values['FLAGS']}"
        assert container["command"] == ["bash", "-fc", command] and (ROOT / command.split()[1]).exists()
        assert {"name": "NNODES", "value": "8"} in container["env"] and pod[
            "terminationGracePeriodSeconds"
        ] > 300


@pytest.mark.slow
def test_a_slurm_job_whose_time_is_up_writes_a_checkpoint_is_requeued_and_goes_on(inputs, tmp_path):
    """Slurm's part is played by three small scripts: srun starts its command, scancel signals it, scontrol
    writes down."""
    for name, does in {
        "srun": f'shift; echo $$ > {tmp_path}/step; exec "$@"',
        "scancel": f"echo scancel $@ >> {tmp_path}/said; kill -TERM $(cat {tmp_path}/step)",
        "scontrol": f"[ $1 = show ] && echo localhost || echo scontrol $@ >> {tmp_path}/said",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    settings = {
        "SLURM_JOB_ID": "77",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "n",
        "GPUS_PER_NODE": "2",
        "PYTHON": sys.executable,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    run_dir = tmp_path / "run"

    def submit(steps: int) -> subprocess.Popen:
        command = [
            LAUNCH / "slurm.sh",
            "pretrain",
            "own",
            "cpu",
            *own_flags(inputs, run_dir, "--checkpoint.every", 50_000, "--train.warmup-steps", 1, steps=steps),
        ]
        return subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    job = submit(100_000)
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < 3:
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[0]
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 0, said
    assert (tmp_path / "said").read_text().splitlines() == [
        "scancel --quiet --signal=TERM 77",
        "scontrol requeue 77",
    ]
    done = len(metrics(run_dir))
    assert 3 <= done < 50_000 and (run_dir / f"checkpoints/step-{done:08}").is_dir()
    again = submit(done + 2)
    said = again.communicate(timeout=120)[0]
    assert again.returncode == 0 and "resuming from" in said, said
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, done + 3))
    assert len((tmp_path / "said").read_text().splitlines()) == 2


def test_make_finetune_takes_paths_with_spaces_and_several_files(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho 0\n")
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    for name in ("python", "torchrun"):
        (tmp_path / name).chmod(0o755)
    data = [tmp_path / "my chats.jsonl", tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in data:
        file.touch()
    for given, read in (
        (data[0], data[:1]),
        (f"{data[1]} {data[2]}", data[1:]),
        (f"{tmp_path}/?.jsonl", data[1:]),
    ):
        asked = [f"BIN={tmp_path}", "MODEL=my model", f"DATA={given}"]
        ended = subprocess.run(
            ["make", "--old-file", ".venv/ready", "--silent", "finetune", *asked],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        words = ended.stdout.splitlines()
        assert "my model" in words and words[words.index("--data.path") + 1 : -2] == list(map(str, read)), (
            words
        )
