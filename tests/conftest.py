"""Shared by all tests: the repository root is importable, and `-m gpu` and `-m slow` are asked for, never met by chance."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")          # several processes share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(config, items):
    asked = config.getoption("-m")
    for item in items:
        for mark in ("gpu", "slow"):
            if mark in item.keywords and mark not in asked:
                item.add_marker(pytest.mark.skip(reason=f"asked for with -m {mark}"))
