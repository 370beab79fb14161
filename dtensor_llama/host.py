"""The memory of this machine, or of the container around this process if that has less."""

import re
from pathlib import Path

import psutil

CONTROL_GROUPS = Path("/sys/fs/cgroup")
FILES = (  # where a container finds its limit, what it uses, and how much of that caches files
    ("memory.max", "memory.current", "memory.stat"),  # version 2 of Linux's control groups
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),  # version 1
)


def host_memory() -> int:
    """Return how many bytes of memory there are in all. Every rank on one host gets the same number."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _containers())])


def free_host_memory() -> int:
    """Return how many bytes can still be allocated now."""
    return max(0, min([psutil.virtual_memory().available, *(limit - used for limit, used in _containers())]))


def _containers() -> list[tuple[int, int]]:
    """Return the limit and the use of memory in bytes, for each container with a limit. Cached files do not
    count as used: they make room when memory is wanted."""
    found = []
    for names in FILES:
        try:
            limit, used, uses = ((CONTROL_GROUPS / name).read_text() for name in names)
            cached = re.findall(r"^(?:in)?active_file (\d+)$", uses, flags=re.MULTILINE)
            found.append((int(limit), int(used) - sum(map(int, cached))))
        except (OSError, ValueError):
            continue  # there are no control groups of this version, or the limit is "max"
    return found
