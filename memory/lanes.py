"""Lanes: what of a machine works at the same time, each in order. Nothing here knows what is moved or
stepped.

    lane          what runs on it                                                        on a GPU
    compute       forward, backward                                                      the caller's stream
    resident      Adam of RESIDENT, drawn as device adam                                 the same
    d2h           gradients and the clip factor to the host, stepped states of STREAM    a stream
    h2d           states of STREAM on their way to be stepped                            a stream
    weights       new weights of CPU, drawn as h2d. In one queue with the states they    a stream
                  would wait for a whole update of STREAM, and the next forward for them
    adam          Adam of STREAM                                                         a stream
    host          Adam of CPU                                                            a thread with cores of its own

event: the end of a piece of work; `synchronize()` waits for it, `query()` says whether it has happened.
    Without a GPU a lane is the calling thread, only the host's thread runs beside it, and every event is of
    the past.
"""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

HOST_ADAM, DEVICE_ADAM = "host adam", "device adam"
# public from 2.13 on
_empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None) or torch._C._host_emptyCache
LEFT_FOR_LAUNCHES = 3  # cores of a rank that launch, differentiate and communicate while the host steps


class _Done:
    """An event of the past."""

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


DONE = _Done()


class Lane:
    """Work in the calling thread, at once. own: on a GPU, a stream of its own, not the caller's; name: as it
    is drawn."""

    def __init__(self, lanes: "Lanes", name: str, own: bool = True):
        self.lanes, self.name, self.own = lanes, name, own

    def run(self, what: str, work: Callable[[], None], after: Iterable = ()):
        """Have `work` done once the events `after` have happened; returns the event of its end."""
        start_s = self.lanes.clock()
        work()
        self.lanes.note(what, self.name, start_s, self.lanes.clock())
        return DONE

    def now(self, timing: bool = False):
        """The event of all that was given to this lane so far."""
        return DONE

    def wait(self, event) -> None:
        """What is given to this lane from now on comes after the event; the caller goes on."""


class StreamLane(Lane):
    """Work on a CUDA stream."""

    def __init__(self, lanes: "Lanes", name: str, own: bool = True):
        super().__init__(lanes, name, own)
        self.stream = torch.cuda.Stream(lanes.device) if own else None

    def run(self, what: str, work: Callable[[], None], after: Iterable = ()) -> torch.cuda.Event:
        stream, timing = self._stream(), self.lanes.recording
        with torch.cuda.stream(stream):
            for event in after:
                self.wait(event)
            start = self.now(timing) if timing else None
            work()
            end = self.now(timing)
        if timing:  # it may have been switched on meanwhile, by another thread
            self.lanes.note(what, self.name, start, end)
        return end

    def now(self, timing: bool = False) -> torch.cuda.Event:
        return self._stream().record_event(torch.cuda.Event(enable_timing=timing))

    def wait(self, event) -> None:
        if event is not DONE:
            self._stream().wait_event(event)

    def _stream(self) -> torch.cuda.Stream:
        return self.stream or torch.cuda.current_stream(self.lanes.device)


class Lanes:
    """All of them for one device. While `recording`, what runs is noted with its times: `events()`.

    n_threads: cores for the host's Adam. make: a lane; tests give their own.
    """

    def __init__(self, device: torch.device, n_threads: int, make: type[Lane] | None = None):
        self.device, self.is_cuda, self.n_threads = device, device.type == "cuda", n_threads
        make = make or (StreamLane if self.is_cuda else Lane)
        self.compute, self.resident = make(self, "compute", own=False), make(self, DEVICE_ADAM, own=False)
        self.d2h, self.h2d, self.weights, self.adam = (
            make(self, name) for name in ("d2h", "h2d", "h2d", DEVICE_ADAM)
        )
        self.host = Lane(self, HOST_ADAM)  # in `thread`
        self.has_queues = make is not Lane  # work may still be under way when the caller goes on
        self.recording, self._noted = False, []
        self.thread = ThreadPoolExecutor(1, HOST_ADAM, initializer=self._start_thread)

    def _start_thread(self) -> None:
        torch.set_num_threads(self.n_threads)  # of this thread alone
        if self.is_cuda:
            torch.cuda.set_device(self.device)  # likewise: it would be the first GPU

    def clock(self) -> float:
        return time.perf_counter()

    def note(self, what: str, lane: str, start, end) -> None:
        if self.recording:
            self._noted.append((what, lane, start, end))

    def events(self) -> list[tuple[str, str, float, float]]:
        """(what, lane, start, end) in seconds of `clock`, of what ran while recording; all of it must be
        over."""
        if not self.is_cuda:
            return list(self._noted)
        zero = self.compute.now(timing=True)
        zero.synchronize()
        zero_s = self.clock()

        def seconds(when) -> float:
            return when if isinstance(when, float) else zero_s - when.elapsed_time(zero) / 1e3

        return [(what, lane, seconds(start), seconds(end)) for what, lane, start, end in self._noted]


def host_threads(device: torch.device, ranks_per_host: int) -> int:
    """Beside a GPU this rank's share of the cores, less those that launch: torchrun tells torch to use one,
    so torch's own number does not serve there."""
    if device.type != "cuda":
        return torch.get_num_threads()
    return max(1, len(os.sched_getaffinity(0)) // ranks_per_host - LEFT_FOR_LAUNCHES)


def empty_caches(device: torch.device) -> None:
    """Have torch give back device and pinned memory that it only keeps for later, once nothing uses it. State
    that is there to stay would be cut out of the blocks that activations come and go in, and pinned memory is
    no budget's any more."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        _empty_host_cache()


def hold_to_budget(device: torch.device, budget_bytes: int | None) -> None:
    """Have torch's allocator refuse what would pass it; None: only the device ends it. What is not torch's is
    not in it: CUDA's own half GiB or so, NCCL's buffers; placement auto traces that and plans with it."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(
            1.0 if budget_bytes is None else min(1.0, budget_bytes / total), device
        )
