"""Shared by all tests: the repository root is importable, and `-m gpu` and `-m slow` are asked for, never met
by chance."""

import json
import os
import shutil
import sys
import sysconfig
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
# An empty part would be the current folder.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")])
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(config, items):
    asked = config.getoption("-m")
    for item in items:
        for mark in ("gpu", "slow"):
            # Not `item.keywords`: these hold the names of folders too, and a clone may well be called gpu.
            if item.get_closest_marker(mark) and mark not in asked:
                item.add_marker(pytest.mark.skip(reason=f"asked for with -m {mark}"))


PARITY_ROWS: list[tuple] = []  # (layout, ranks, loss, norm, weight, seconds) of test_one_answer.py, in order
# family -> {"logits", "gradients": difference from transformers, "layouts": {name: (loss, norm, weight)}}
FAMILY_ROWS: dict[str, dict] = defaultdict(dict)  # of test_families.py
PLAN_ROWS: list[tuple] = []  # (model, layout, loss, norm, weight) of test_plans.py


def pytest_sessionfinish(session):
    """A pytest that is one of several (-n) hands its rows to the one that prints the tables."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["rows"] = (PLAN_ROWS, PARITY_ROWS, dict(FAMILY_ROWS))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node, error):
    plans, parity, families = getattr(node, "workeroutput", {}).get("rows", ([], [], {}))
    PLAN_ROWS.extend(plans)
    PARITY_ROWS.extend(parity)
    for family, row in families.items():
        layouts = FAMILY_ROWS[family].get("layouts", {}) | row.get("layouts", {})
        FAMILY_ROWS[family] |= row | {"layouts": layouts}


def pytest_terminal_summary(terminalreporter):
    if PLAN_ROWS:
        terminalreporter.section("plans: largest difference from plain transformers over five steps, fp32")
        terminalreporter.write_line("| model | layout | loss | gradient norm, relative | weights |")
        terminalreporter.write_line("| --- | --- | --- | --- | --- |")
    for name, layout, loss, norm, weight in PLAN_ROWS:
        terminalreporter.write_line(f"| {name} | {layout} | {loss:.1e} | {norm:.1e} | {weight:.1e} |")
    if FAMILY_ROWS:
        print_families(terminalreporter)
    if PARITY_ROWS:
        terminalreporter.section("one answer: largest difference from one process over five steps, fp32")
        terminalreporter.write_line("| layout | ranks | loss | gradient norm, relative | weights | seconds |")
        terminalreporter.write_line("| --- | --- | --- | --- | --- | --- |")
    for name, ranks, loss, norm, weight, seconds in PARITY_ROWS:
        terminalreporter.write_line(
            f"| {name} | {ranks} | {loss:.1e} | {norm:.1e} | {weight:.1e} | {seconds:.1f} |"
        )


def print_families(terminalreporter) -> None:
    """Print the table of docs/families.md; a row has the largest differences over the layouts that ran."""
    terminalreporter.section("families: differences from transformers, and of layouts from one process, fp32")
    columns = [
        "family",
        "logits",
        "gradients, relative",
        "layouts",
        "loss",
        "gradient norm, relative",
        "weights",
    ]
    terminalreporter.write_line(f"| {' | '.join(columns)} |")
    terminalreporter.write_line("| --- " * len(columns) + "|")
    for family, row in FAMILY_ROWS.items():
        layouts = row.get("layouts", {})
        cells = [f"{row[name]:.1e}" if name in row else "" for name in ("logits", "gradients")]
        largest = [f"{max(column):.1e}" for column in zip(*layouts.values(), strict=True)]
        cells = [family, *cells, str(len(layouts)), *(largest or ["", "", ""])]
        terminalreporter.write_line(f"| {' | '.join(cells)} |")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A folder with data.jsonl (short documents), tokenizer/ (400 pieces) and model/ (a tiny LLaMA, random
    weights)."""
    sys.path.insert(0, str(ROOT / "recipes"))
    from stdlib_corpus import train_tokenizer

    from dtensor_llama import Llama, LlamaConfig, save_hf

    folder = tmp_path_factory.mktemp("inputs")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((stdlib / name).read_text() for name in ("argparse.py", "ast.py", "textwrap.py"))
    documents = [part for part in text.split("\n\n") if part.strip()]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in documents))
    train_tokenizer(documents, 400, folder / "tokenizer")
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    save_hf(Llama(config), folder / "model")
    shutil.copytree(folder / "tokenizer", folder / "model", dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def reference(inputs, tmp_path_factory) -> Path:
    """One process, never stopped, packed documents masked: so micro-batches and ranks have uneven numbers of
    labels."""
    from recipe import pretrain_flags, recipe

    run_dir = tmp_path_factory.mktemp("runs") / "reference"
    ended = recipe("pretrain", *pretrain_flags(inputs, run_dir, "--data.document-mask"))
    assert ended.status == 0, ended
    return run_dir
