"""Wherever a recipe runs - in whatever terminal, folder, account - it trains, or says in one line why not."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from recipe import ROOT, metrics, recipe
from recipe import pretrain_flags as flags

LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PRINTS = "from dtensor_llama.terminal import make_streams_last; make_streams_last({}); import sys; "


def python(code: str, *, shell: str = "", **environment) -> subprocess.CompletedProcess:
    """`python -c CODE SHELL` in bash: SHELL redirects."""
    line = f'"$PYTHON" -c "$CODE" {shell}'
    named = os.environ | {"PYTHON": sys.executable, "CODE": code} | environment
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        env=named,
        capture_output=True,
        text=True,
        errors="replace",
    )


def command(
    name: str, *arguments, shell: str = "", prefix: str = "", **environment
) -> subprocess.CompletedProcess:
    """`python recipes/NAME.py ARGUMENTS SHELL` in bash."""
    line = f'set -o pipefail; {prefix} "$PYTHON" "$RECIPE" "$@" {shell}'
    named = (
        os.environ | {"PYTHON": sys.executable, "RECIPE": str(ROOT / "recipes" / f"{name}.py")} | environment
    )
    words = ["bash", "-c", line, "bash", *map(str, arguments)]
    return subprocess.run(words, env=named, capture_output=True, text=True, timeout=180)


# ---- what is printed ---------------------------------------------------------------------------------------


SLOW = pytest.mark.slow


def mostly_slow(*values, fast: int) -> list:
    """Return values for a parametrization, of which only the first `fast` ones are part of `make test`."""
    slow = [value if isinstance(value, tuple) else (value,) for value in values[fast:]]
    return [*values[:fast], *(pytest.param(*value, marks=SLOW) for value in slow)]


@pytest.mark.parametrize("encoding", mostly_slow("ascii", "utf-8", "latin-1", "cp1252", fast=2))
def test_no_character_ends_a_run_whatever_the_encoding_of_stdout(encoding):
    said = python(
        PRINTS.format("") + "print('\\u4f60 \\ud83e \\u00e9'); print('\\u4f60', file=sys.stderr)",
        PYTHONIOENCODING=encoding,
    )
    assert said.returncode == 0, said
    assert said.stdout.startswith("\u4f60" if encoding == "utf-8" else "\\u4f60")


@pytest.mark.parametrize(
    "shell",
    mostly_slow(
        "| head -1", ">&- 2>&-", "> /dev/full", ">&-", "2>&-", "2> /dev/full", "2>&1 | head -1", fast=3
    ),
)
def test_a_stdout_that_cannot_be_written_ends_no_run(shell, tmp_path):
    code = "for i in range(30000): print(i, flush=i % 7 == 0); print(i, file=sys.stderr)\n"
    code += f"open({str(tmp_path / 'end')!r}, 'w')"
    ended = python(PRINTS.format("") + "\n" + code, shell=shell)
    assert ended.returncode == 0 and (tmp_path / "end").exists(), ended
    assert "Traceback" not in ended.stderr and "Exception" not in ended.stderr
    assert ended.stderr.count("note: stdout can no longer be written") == (
        shell in ("| head -1", "> /dev/full")
    )


def test_what_is_printed_never_lands_in_a_file_that_got_the_number_of_a_closed_stdout(tmp_path):
    code = (
        f"file = open({str(tmp_path / 'file')!r}, 'w'); print('printed', flush=True); file.write('written')"
    )
    assert python(PRINTS.format("") + code, shell=">&-").returncode == 0
    assert (tmp_path / "file").read_text() == "written"


def test_training_goes_on_when_nobody_reads_what_it_prints_and_with_empty_launch_variables(inputs, tmp_path):
    ended = command(
        "pretrain",
        *flags(inputs, tmp_path / "run", steps=4),
        shell="| head -1",
        PYTHONIOENCODING="ascii",
        **dict.fromkeys(LAUNCH_VARIABLES, ""),
    )
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended
    assert len(metrics(tmp_path / "run")) == 4 and (tmp_path / "run" / "hf" / "model.safetensors").exists()


@SLOW
def test_generate_ends_like_any_program_when_its_reader_goes_and_refuses_a_full_disk(inputs):
    arguments = ["--model", inputs / "model", "--max-new-tokens", 2, "--batch-size", 1]
    arguments += [word for i in range(40) for word in ("--prompt", f"{i} " * 20)]
    ended = command("generate", *arguments, shell="| head -1")
    assert ended.returncode == 141 and ended.stderr == "", ended
    ended = command("generate", *arguments, shell="> /dev/full")
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "No space left" in ended.stderr, ended


def test_an_answer_with_brackets_is_printed_above_the_bar_of_a_terminal_as_it_is(tmp_path):
    code = (
        "from dtensor_llama.metrics import RunLog; from pathlib import Path\n"
        f"log = RunLog(Path({str(tmp_path)!r}), 0, 2)\nlog.say('a [/INST] b [bold] c')\n"
        "log.step({'step': 1, 'loss': 1.0, 'tokens': 1, 'tokens_per_second': 1.0, 'step_seconds': "
        "1.0})\nlog.close()"
    )
    main, worker = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=worker, stderr=subprocess.PIPE)
    os.close(worker)
    shown = b""
    while part := _read(main):
        shown += part
    assert process.wait() == 0, process.stderr.read()
    assert b"a [/INST] b [bold] c" in shown


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 4096)
    except OSError:  # the other side of a terminal is closed
        return b""


# ---- what is typed -----------------------------------------------------------------------------------------


def test_a_line_of_a_prompts_file_ends_at_a_newline_only(inputs, tmp_path):
    prompts = ["a\u2028b", "form\x0cfeed", "next\x85line", "group\x1dseparator", "vertical\x0btab"]
    (tmp_path / "prompts").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(prompts).encode() + b"\n\n \n")
    ended = recipe(
        "generate",
        "--model",
        inputs / "model",
        "--prompts-file",
        tmp_path / "prompts",
        "--json",
        "--max-new-tokens",
        1,
    )
    assert ended.status == 0, ended
    assert [json.loads(line)["prompt"] for line in ended.out.split("\n") if line] == prompts


def test_bytes_that_are_no_text_are_refused_where_they_stand(inputs, tmp_path):
    (tmp_path / "prompts").write_bytes(b"good\nb\xffd\n")
    for more, said in (
        (["--prompts-file", tmp_path / "prompts"], ["--prompts-file", "line 2", "0xff"]),
        (["--prompt", "b\udcffd"], ["--prompt b\\udcffd", "0xff", "UTF-8"]),
        (["--prompt", "x", "--chat", "--system", "b\udcffd"], ["--system", "0xff"]),
    ):
        ended = recipe("generate", "--model", inputs / "model", "--max-new-tokens", 1, *more)
        assert ended.status == 2 and ended.err.count("\n") == 1, ended
        assert all(part in ended.err for part in said), ended


def test_a_question_that_is_no_text_is_not_asked_and_the_chat_goes_on(inputs):
    ended = recipe(
        "generate", "--model", inputs / "model", "--chat", "--max-new-tokens", 1, typed="b\udcffd\nhello\n"
    )
    assert ended.status == 0 and ended.err.count("not asked: the question b\\udcffd: byte 0xff") == 1, ended
    assert ended.out.count("\n") == 1


def test_a_prompt_in_utf8_is_read_in_a_terminal_that_claims_another_encoding(inputs):
    bytes_as_python_gives_them = "\u4f60".encode().decode("ascii", "surrogateescape")
    ended = recipe(
        "generate",
        "--model",
        inputs / "model",
        "--prompt",
        bytes_as_python_gives_them,
        "--json",
        "--max-new-tokens",
        1,
    )
    assert ended.status == 0 and json.loads(ended.out)["prompt"] == "\u4f60", ended


@pytest.mark.slow
def test_json_lines_stay_json_on_a_stdout_that_is_not_utf8(inputs):
    ended = command(
        "generate",
        "--model",
        inputs / "model",
        "--prompt",
        "\u4f60",
        "--json",
        "--max-new-tokens",
        1,
        PYTHONIOENCODING="ascii",
    )
    assert ended.returncode == 0 and json.loads(ended.stdout)["prompt"] == "\u4f60", ended


# ---- the environment ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment,said",
    [
        ({"WORLD_SIZE": "many"}, ["WORLD_SIZE='many'", "whole number"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE='0'"]),
        ({"RANK": "-1"}, ["RANK='-1'"]),
        ({"RANK": "1", "WORLD_SIZE": "1"}, ["RANK=1", "WORLD_SIZE=1"]),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ["WORLD_SIZE=2", "MASTER_ADDR is not set", "torchrun"]),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, ["MASTER_PORT is not set"]),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
            ["MASTER_PORT='x'"],
        ),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, ["RANK is not set"]),
        ({"LOCAL_WORLD_SIZE": "two"}, ["LOCAL_WORLD_SIZE='two'"]),
        ({"LOCAL_RANK": "1.0"}, ["LOCAL_RANK='1.0'"]),
    ],
)
def test_an_environment_that_means_no_launch_is_refused_by_name(monkeypatch, environment, said):
    from dtensor_llama import UsageError
    from dtensor_llama.cli import read_launch

    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as refused:
        read_launch()
    assert all(part in str(refused.value) for part in said) and "\n" not in str(refused.value), refused.value


def test_an_empty_variable_is_an_unset_one(monkeypatch):
    from dtensor_llama.cli import Launch, read_launch

    for name in LAUNCH_VARIABLES:
        monkeypatch.setenv(name, "")
    assert read_launch() == Launch(
        rank=0, local_rank=0, world_size=1, ranks_per_host=1, attempt=0, launcher_pid=None
    )


@pytest.mark.parametrize(
    "name", mostly_slow("pretrain", "generate", "sft", "export", "benchmark", "dryrun", fast=1)
)
def test_ctrl_c_while_importing_is_one_word_and_status_130(name, tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "recipes" / f"{name}.py", "--help"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # The background jobs of a shell ignore it, and their children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while "libtorch" not in open(f"/proc/{process.pid}/maps").read() and time.monotonic() < deadline:
        time.sleep(0.01)  # torch is being imported
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read() == "interrupted\n"


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_writes_a_checkpoint_and_ends(inputs, tmp_path):
    main, worker = pty.openpty()
    arguments = flags(inputs, tmp_path / "run", "--checkpoint.every", 0, steps=100_000)
    process = subprocess.Popen(
        [sys.executable, ROOT / "recipes/pretrain.py", *map(str, arguments), "--checkpoint.every", "50000"],
        stdout=worker,
        stderr=worker,
        stdin=worker,
        start_new_session=True,
    )
    os.close(worker)
    deadline = time.monotonic() + 60
    rows = tmp_path / "run" / "metrics.jsonl"
    while not (rows.exists() and rows.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.close(main)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0
    assert list((tmp_path / "run" / "checkpoints").glob("step-????????"))


# ---- no home, caches that cannot be written ----------------------------------------------------------------


NO_PASSWD = """import pwd
def _nobody(*_):
    raise KeyError("no passwd entry")
pwd.getpwuid = pwd.getpwnam = _nobody
"""


@pytest.fixture
def homeless(tmp_path) -> dict:
    """The environment of an account without HOME and without an entry in /etc/passwd, as in containers."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_PASSWD)
    python_path = os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]])
    return {"PYTHONPATH": python_path, "prefix": "unset HOME USER LOGNAME;"}


def without_cache_dir(arguments: list) -> list:
    at = arguments.index("--data.cache-dir")
    return arguments[:at] + arguments[at + 2 :]


@SLOW
def test_training_without_a_home_keeps_its_tokens_in_the_run_folder_and_says_so_once(
    inputs, tmp_path, homeless
):
    arguments = without_cache_dir(flags(inputs, tmp_path / "run", steps=2))
    ended = command("pretrain", *arguments, **homeless)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended
    assert ended.stderr.count("no home folder is known") == 1
    assert list((tmp_path / "run" / "cache").glob("*/tokens.bin"))
    ended = command(
        "generate", "--model", tmp_path / "run" / "hf", "--prompt", "a", "--max-new-tokens", 1, **homeless
    )
    assert ended.returncode == 0 and ended.stderr == "", ended


@pytest.mark.parametrize("unwritable", ["/proc/nowhere", "a-file", "~nobody-of-that-name/cache"])
def test_a_cache_that_cannot_be_written_is_said_once_and_the_run_goes_on(inputs, tmp_path, unwritable, capfd):
    from dtensor_llama.data.tokenize import prepare_corpus
    from dtensor_llama.data.tokenizer import load_tokenizer

    (tmp_path / "a-file").write_text("")
    first = (
        unwritable if unwritable.startswith("~") else tmp_path / unwritable
    )  # an absolute second part stands alone
    for _ in range(2):
        corpus = prepare_corpus(
            [inputs / "data.jsonl"], load_tokenizer(inputs / "model"), [first, tmp_path / "run" / "cache"]
        )
    assert corpus.folder.parent == tmp_path / "run" / "cache"
    said = capfd.readouterr().err
    assert (
        said.count(f"{first} cannot be written") == 1
        and said.count(f"the tokens go to {tmp_path}/run/cache") == 1
    ), said


def test_a_cache_that_is_read_only_is_read(inputs, reference, tmp_path, monkeypatch):
    """The fixture has made the tokens. Root may write everywhere, so the probe is kept from writing here."""
    from dtensor_llama.data.tokenize import prepare_corpus
    from dtensor_llama.data.tokenizer import load_tokenizer

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: pytest.fail("nothing is to be written"))
    tokenizer = load_tokenizer(inputs / "model")
    corpus = prepare_corpus([inputs / "data.jsonl"], tokenizer, [inputs / "cache", tmp_path / "other"])
    assert corpus.folder.parent == inputs / "cache" and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[1, 2]",
        b"\xff",
        "entry null",
        "entry {}",
        "rate 0",
        "rate NaN",
        "rate text",
        "no threads",
        "folder",
    ],
)
def test_rates_that_are_empty_or_broken_are_measured_anew_and_said(tmp_path, monkeypatch, content):
    import torch

    from memory.tracer import MachineRates, load_rates

    device, path, said = torch.device("cpu"), tmp_path / "rates.json", []
    good = MachineRates(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    monkeypatch.setattr("memory.tracer.measure_rates", lambda *_: good)
    assert load_rates(path, device, "blocks") == good
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.unlink()
        path.mkdir()
    else:
        ((key, entry),) = json.loads(path.read_text()).items()
        entry = {
            "entry null": None,
            "entry {}": {},
            "rate 0": entry | {"h2d": 0},
            "rate NaN": entry | {"dram_in_update": float("nan")},
            "rate text": entry | {"d2h": "fast"},
            "no threads": entry | {"host_adam": {}},
        }[content]
        path.write_text(json.dumps({key: entry}))
    assert load_rates(path, device, "blocks", say=said.append) == good
    assert sum("no rates that can be used" in line for line in said) == 1, said
    if content != "folder":
        said.clear()
        monkeypatch.setattr("memory.tracer.measure_rates", lambda *_: pytest.fail("measured again"))
        assert load_rates(path, device, "blocks", say=said.append) == good
        assert said == []


def test_rates_that_cannot_be_kept_are_measured_and_said(monkeypatch):
    from pathlib import Path

    import torch

    from memory.tracer import MachineRates, load_rates

    said, good = [], MachineRates(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    path = Path("/proc/nowhere/rates.json")
    monkeypatch.setattr("memory.tracer.measure_rates", lambda *_: good)
    assert load_rates(path, torch.device("cpu"), "blocks", say=said.append) == good
    assert sum("cannot be written" in line for line in said) == 1, said


# ---- links, `~`, names of the Hub --------------------------------------------------------------------------


def test_links_of_the_hugging_face_cache_are_what_their_names_say(inputs, tmp_path):
    """snapshots/REVISION/NAME -> ../../blobs/HASH, of data and of a model."""
    snapshot, blobs = tmp_path / "snapshots" / "0a1b", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate([inputs / "data.jsonl", *(inputs / "model").iterdir()]):
        (blobs / f"3b7a{number}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/3b7a{number}")
    arguments = flags(
        inputs, tmp_path / "run", "--model", snapshot, "--data.path", snapshot / "*.jsonl", steps=1
    )
    ended = recipe("pretrain", *arguments)
    assert ended.status == 0, ended
    line = recipe(
        "pretrain", *flags(inputs, tmp_path / "other", "--model", tmp_path, "--data.tokenizer", tmp_path)
    ).err
    assert "folder of the Hugging Face cache" in line and str(snapshot) in line, line


def test_a_file_counts_once_under_the_name_that_says_what_it_is(tmp_path):
    from dtensor_llama.data.sources import expand_paths

    (tmp_path / "real.jsonl").write_text("{}")
    (tmp_path / "a_link").symlink_to("real.jsonl")
    (tmp_path / "b.jsonl").symlink_to("a_link")
    assert expand_paths([str(tmp_path / "*")]) == [tmp_path / "b.jsonl"]
    (tmp_path / "b.jsonl").unlink()
    assert expand_paths([tmp_path / "a_link"]) == [tmp_path / "real.jsonl"]


@pytest.mark.parametrize(
    "name,said",
    [
        ("gone.jsonl", ["gone.jsonl: is a link to nowhere, which does not exist"]),
        ("*", ["gone.jsonl: is a link to nowhere"]),
        ("pipe", ["is a pipe or a device", "write it to a file"]),
        ("sub", ["is a folder"]),
        (
            "owner/data-set",
            ["no file matches", "hf download owner/data-set --repo-type dataset --local-dir data-set"],
        ),
        ("~nobody-of-that-name/x.txt", ["~nobody-of-that-name", "is not known"]),
    ],
)
def test_what_cannot_be_read_as_a_file_is_refused_and_not_passed_over(tmp_path, monkeypatch, name, said):
    from dtensor_llama import UsageError
    from dtensor_llama.data.sources import expand_paths

    monkeypatch.chdir(tmp_path)
    (tmp_path / "fine.jsonl").write_text("{}")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError) as refused:
        expand_paths([name])
    assert all(part in str(refused.value) for part in said), refused.value


def test_folders_with_brackets_spaces_and_any_script_are_found(tmp_path):
    from dtensor_llama.data.sources import expand_paths

    for folder in ("v[1] \u4f60", "it's", "a*"):
        (tmp_path / folder / "deep").mkdir(parents=True)
        file = tmp_path / folder / "deep" / "x [2].jsonl"
        file.write_text("{}")
        for pattern in (file, file.parent / "*.jsonl", tmp_path / folder / "**" / "*.jsonl"):
            assert expand_paths([pattern]) == [file], pattern


def test_a_tilde_is_the_home_folder_in_every_flag_that_names_a_place(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    from dtensor_llama.cli import parse_cli

    sys.path.insert(0, str(ROOT / "recipes"))
    import dryrun
    import export
    import generate
    import pretrain
    import sft
    import stdlib_corpus

    cases = {
        pretrain.PretrainConfig: ["model", "data.tokenizer", "run_dir", "checkpoint.resume"],
        sft.SftConfig: ["model", "data.tokenizer", "run_dir", "checkpoint.resume", "preview_json"],
        generate.GenerateConfig: ["model", "prompts_file"],
        export.ExportConfig: ["tokenizer", "base"],
        dryrun.DryrunConfig: ["model", "json"],
        stdlib_corpus.CorpusConfig: ["out"],
    }
    for config_class, names in cases.items():
        places = ["~/a", "~/b"] if config_class is export.ExportConfig else []
        config = parse_cli(config_class, [*places, *(f"--{name}=~/x" for name in names)])
        for name in names:
            value = config
            for part in name.split("."):
                value = getattr(value, part)
            assert value == str(tmp_path / "x"), (config_class, name)
        if places:
            assert (config.checkpoint, config.out) == (str(tmp_path / "a"), str(tmp_path / "b"))
    config = parse_cli(generate.GenerateConfig, ["--model=~/x", "--prompt", "~/x"])
    assert config.prompt == ("~/x",)  # a prompt is no place


@pytest.mark.parametrize(
    "name,arguments,said",
    [
        ("pretrain", ["--model=~nobody-of-that-name/x"], "--model ~nobody-of-that-name/x"),
        ("pretrain", ["--model", "tiny-1m", "--run-dir="], "--run-dir is empty"),
        (
            "pretrain",
            ["--data.path", "DATA", "--model", "meta-llama/Llama-2-7b-hf"],
            "hf download meta-llama/Llama-2-7b-hf",
        ),
        (
            "pretrain",
            ["--data.path", "DATA", "--model", "tiny-1m", "--data.tokenizer", "meta-llama/Llama-2-7b-hf"],
            "use --data.tokenizer Llama-2-7b-hf",
        ),
        (
            "sft",
            ["--data.path", "DATA", "--model", "meta-llama/Llama-2-7b-hf"],
            "hf download meta-llama/Llama-2-7b-hf",
        ),
        (
            "generate",
            ["--model", "meta-llama/Llama-2-7b-hf", "--prompt", "x"],
            "hf download meta-llama/Llama-2-7b-hf",
        ),
        ("benchmark", ["--model", "meta-llama/Llama-2-7b-hf"], "hf download meta-llama/Llama-2-7b-hf"),
        ("dryrun", ["--model", "meta-llama/Llama-2-7b-hf"], "hf download meta-llama/Llama-2-7b-hf"),
    ],
)
def test_a_name_that_is_no_folder_here_gets_the_line_that_says_what_would_work(inputs, name, arguments, said):
    ended = recipe(name, *[inputs / "data.jsonl" if word == "DATA" else word for word in arguments])
    assert ended.status == 2 and said in ended.err and ended.err.count("\n") == 1, ended


# ---- full disks --------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A function of a size, as in "600k": an empty disk of it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(size: str):
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True
        ).returncode:
            pytest.skip("mounting a small disk needs root")
        return folder

    yield make
    subprocess.run(["umount", "--lazy", folder], capture_output=True)


@pytest.mark.parametrize(
    "size,kept", mostly_slow(("8k", None), ("2600k", 1), ("60k", 0), ("1400k", 0), fast=1)
)
def test_a_disk_that_is_full_ends_training_with_one_line_and_the_last_good_checkpoint(
    inputs, small_disk, size, kept
):
    run_dir = small_disk(size) / "run"
    ended = recipe("pretrain", *flags(inputs, run_dir), ranks=1 if kept is None else 2)
    assert ended.status == 2 and ended.err.count("\n") == 1, ended
    assert (
        "no space is left on the disk of" in ended.err
        and str(run_dir) in ended.err
        and "MB are free" in ended.err
    )
    complete = sorted((run_dir / "checkpoints").glob("step-????????"))
    assert len(complete) == (kept or 0) and not list(run_dir.glob("checkpoints/*.partial"))
    if kept:
        assert "MB are needed" in ended.err and f"The newest complete one is {complete[-1]}" in ended.err, (
            ended
        )
        assert len(metrics(run_dir)) >= 6


def test_a_metrics_row_that_cannot_be_written_is_said_once_and_written_when_there_is_room(tmp_path, capsys):
    from dtensor_llama.metrics import RunLog, read_metrics

    def row(step):
        return {"step": step, "loss": 1.0, "tokens": 1, "tokens_per_second": 1.0, "step_seconds": 1.0}

    log = RunLog(tmp_path, 0, 9)
    log.step(row(1))
    whole, log.file = log.file, open("/dev/full", "ab", buffering=0)
    for step in (2, 3, 4):
        log.step(row(step))
    assert [one["step"] for one in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    log.file = whole
    log.step(row(5))
    log.close()
    assert [one["step"] for one in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    said = capsys.readouterr().out
    assert said.count("cannot be written (no space is left") == 1 and "training goes on" in said, said


def test_half_a_row_on_a_full_disk_is_taken_back(small_disk, capsys):
    from dtensor_llama import UsageError
    from dtensor_llama.metrics import RunLog, read_metrics

    folder = small_disk("64k")
    log = RunLog(folder, 0, 999)
    for step in range(1, 200):
        log.step({"step": step, "loss": 1.0, "tokens": 1, "tokens_per_second": 1.0, "step_seconds": 1.0})
        if step == 20:
            with open(folder / "filler", "ab", buffering=0) as filler:
                try:
                    while filler.write(b"x" * 512):
                        pass
                except OSError:
                    pass
    steps = [one["step"] for one in read_metrics(folder / "metrics.jsonl")]
    assert steps == list(range(1, steps[-1] + 1)) and 20 <= steps[-1] < 199
    assert (folder / "metrics.jsonl").read_bytes().endswith(b"\n")
    with pytest.raises(UsageError, match="rows of .* were not written: no space is left"):
        log.close()
    said = capsys.readouterr()
    assert (
        said.out.count("a row of") == 1 and said.out.count("TensorBoard") == 1 and "Traceback" not in said.err
    ), said


def test_exports_and_tokens_that_do_not_fit_are_one_line(inputs, reference, small_disk):
    disk = small_disk("300k")
    newest = sorted((reference / "checkpoints").glob("step-????????"))[-1]
    ended = recipe("export", newest, disk / "hf")
    assert ended.status == 2 and "MB are needed" in ended.err and ended.err.count("\n") == 1, ended
    ended = recipe("pretrain", *flags(inputs, disk / "run", "--data.cache-dir", disk / "cache"))
    assert ended.status in (0, 2) and ended.err.count("\n") == (ended.status == 2), ended
    big = disk.parent / "big.jsonl"
    big.write_text((inputs / "data.jsonl").read_text() * 3)
    ended = recipe(
        "pretrain", *flags(inputs, disk / "run", "--data.cache-dir", disk / "cache", "--data.path", big)
    )
    assert (
        ended.status == 2 and "the tokens cannot be written to" in ended.err and "MB are free" in ended.err
    ), ended
    assert not list((disk / "cache").glob("*.partial"))


def test_a_disk_that_fills_up_in_the_middle_of_an_export_is_one_line_and_leaves_nothing(
    small_disk, monkeypatch
):
    from dtensor_llama import Llama, LlamaConfig, UsageError, save_hf, weights

    disk, config = small_disk("300k"), LlamaConfig.preset("tiny-1m")
    # The check before writing sees room, which another program then takes.
    monkeypatch.setattr(weights, "free_bytes", lambda folder: 2**40)
    with pytest.raises(UsageError) as refused:
        save_hf(Llama(config), disk / "hf")
    line = str(refused.value)
    assert f"{disk}/hf is not written: no space is left on the disk of {disk}/hf" in line and "\n" not in line
    assert f"about {config.n_parameters * 4 / 1e6:.1f} MB are needed and 0.0 MB are free" in line
    assert not list(disk.iterdir())


# ---- where a clone lies, and how a recipe is started -------------------------------------------------------


def test_the_folder_of_a_clone_may_be_called_like_a_marker(tmp_path):
    tests = tmp_path / "slow" / "gpu"
    tests.mkdir(parents=True)
    (tests / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "slow" / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n    slow: x\n")
    (tests / "test_one.py").write_text(
        "import pytest\ndef test_one(): pass\n@pytest.mark.slow\ndef test_slow(): pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(tests), "-p", "no:cacheprovider"],
        cwd=tmp_path / "slow",
        capture_output=True,
        text=True,
    )
    assert "1 passed, 1 skipped" in done.stdout, done


@pytest.mark.parametrize("name", mostly_slow("pretrain", "sft", "dryrun", "benchmark", "generate", fast=1))
def test_a_recipe_starts_as_a_module_too(name):
    done = subprocess.run(
        [sys.executable, "-m", f"recipes.{name}", "--no-such-flag"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no-such-flag" in done.stderr and done.stderr.count("\n") == 1, done


def test_the_closing_lines_can_be_typed_whatever_the_run_folder_is_called(tmp_path, monkeypatch, capsys):
    import shlex

    from dtensor_llama.run import say_where_things_are

    run_dir = tmp_path / "it's a \u4f60 $HOME (run)"
    (run_dir / "hf").mkdir(parents=True)
    monkeypatch.setattr("sys.argv", [str(ROOT / "recipes" / "pretrain.py")])
    monkeypatch.chdir(tmp_path)
    say_where_things_are(run_dir, [{"loss": 1.0}], 1, 1, stopped=False, chat=True)
    lines = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith(("tensorboard", "try", "serve")):
            lines[line.split()[0]] = shlex.split(line.split("   (")[0])
    assert lines["tensorboard"][-1] == str(run_dir / "tensorboard")
    assert lines["try"][1:5] == [
        "python",
        str(ROOT / "recipes" / "generate.py"),
        "--model",
        str(run_dir / "hf"),
    ]
    assert lines["serve"][-1] == str(run_dir / "hf")


def test_a_file_of_the_current_folder_is_no_module_of_the_tokenizing_process(inputs, tmp_path, monkeypatch):
    from dtensor_llama.data.tokenize import prepare_corpus
    from dtensor_llama.data.tokenizer import load_tokenizer

    (tmp_path / "queue.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    assert prepare_corpus([inputs / "data.jsonl"], load_tokenizer(inputs / "model"), "cache").n_tokens > 0
