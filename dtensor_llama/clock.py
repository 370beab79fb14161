"""Times measured on the device's own clock, without waiting for the device."""

import time

import torch


def moment(device: torch.device) -> "float | torch.cuda.Event":
    """Return the moment at which the device will have done all that it has been given so far. On a GPU that
    is an event in the current stream; a CPU has done it already."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    """Return the seconds between two moments of one device. Waits until the later one has come."""
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3
