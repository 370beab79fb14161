"""A rank never counts on more memory than its container may have, and counts cached files as free."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dtensor_llama import host

VERSION_2 = ("memory.max", "memory.current", "memory.stat")
VERSION_1 = tuple(f"memory/memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat"))
USES = "anon 300\nfile 500\nshmem 100\ninactive_file 150\nactive_file 50\ntotal_active_file 9\n"


@pytest.fixture
def groups(monkeypatch, tmp_path) -> Path:
    memory = SimpleNamespace(total=1000, available=400)
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(host, "CONTROL_GROUPS", tmp_path)
    (tmp_path / "memory").mkdir()
    return tmp_path


def write(folder: Path, names: tuple, *contents: str) -> None:
    for name, content in zip(names, contents, strict=True):
        (folder / name).write_text(content)


def test_without_a_container_there_is_what_the_machine_has(groups):
    assert (host.host_memory(), host.free_host_memory()) == (1000, 400)


@pytest.mark.parametrize("names", [VERSION_2, VERSION_1])
@pytest.mark.parametrize(
    "limit, used, total, free",
    [
        (900, 800, 900, 300),  # 200 of those used only cache files
        (900, 1200, 900, 0),  # above its limit
        (2**63 - 4096, 800, 1000, 400),  # what version 1 says where there is no limit
    ],
)
def test_a_container_limits_what_there_is(names, limit, used, total, free, groups):
    write(groups, names, f"{limit}\n", f"{used}\n", USES)
    assert (host.host_memory(), host.free_host_memory()) == (total, free)


def test_a_container_without_a_limit_has_all(groups):
    write(groups, VERSION_2, "max\n", "800\n", USES)
    assert (host.host_memory(), host.free_host_memory()) == (1000, 400)
