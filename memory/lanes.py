"""Lanes: the parts of a machine that work at the same time, each on one piece of work after another. Nothing
here knows what is moved or stepped.

    lane          what runs on it                                                      on a GPU
    compute       forward and backward                                                 the caller's stream
    resident      Adam of RESIDENT chunks; drawn as device adam                        the caller's stream
    d2h           gradients and the clip factor to the host, stepped states of STREAM  a stream
    h2d           states of STREAM on their way to be stepped                          a stream
    weights       new weights of CPU chunks; drawn as h2d. On its own stream: behind   a stream
                  STREAM's state copies they would be delayed by that whole update,
                  and the next forward waits for them
    adam          Adam of STREAM chunks                                                a stream
    host          Adam of CPU chunks                                                   a thread of its own

event     marks the end of a piece of work: `synchronize()` waits for it, `query()` says whether it has ended.
          Without a GPU all lanes but the host's thread are the calling thread, and every event has happened.
"""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

Event = tuple[str, str, float, float]  # what was done, its lane, start and end in seconds
HOST_ADAM, DEVICE_ADAM = "host adam", "device adam"
# torch.accelerator.empty_host_cache is public from torch 2.13 on.
_empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None) or torch._C._host_emptyCache
CORES_FOR_LAUNCHES = 3  # cores kept for launches, autograd and communication while the host steps


class _Done:
    """An event that has happened, and a future whose work is over."""

    def synchronize(self) -> None:
        pass

    result = synchronize

    def query(self) -> bool:
        return True


DONE = _Done()


class Lane:
    """Runs work at once, in the calling thread. name: the lane it is drawn in. own: on a GPU the lane has a
    stream of its own instead of the caller's."""

    def __init__(self, lanes: "Lanes", name: str, own: bool = True):
        self.lanes, self.name, self.own = lanes, name, own

    def run(self, what: str, work: Callable[[], None], after: Iterable = ()):
        """Run `work` once the events `after` have happened, and return the event of its end."""
        start_s = self.lanes.clock()
        work()
        self.lanes.note(what, self.name, start_s, self.lanes.clock())
        return DONE

    def now(self, timing: bool = False):
        """Return the event of the end of all work that this lane has been given so far."""
        return DONE

    def wait(self, event) -> None:
        """Let all work that this lane is given from now on run after the event. The caller does not wait."""


class StreamLane(Lane):
    """Runs work on a CUDA stream."""

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
        if timing:  # `recording` may have been switched on meanwhile by another thread
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
    """All lanes of one device. While `recording` is true, all work is noted with its times: see `events`.

    n_threads: how many cores the host's Adam uses. make: the class of the lanes; tests pass their own.
    """

    def __init__(self, device: torch.device, n_threads: int, make: type[Lane] | None = None):
        self.device, self.is_cuda, self.n_threads = device, device.type == "cuda", n_threads
        make = make or (StreamLane if self.is_cuda else Lane)
        self.compute, self.resident = make(self, "compute", own=False), make(self, DEVICE_ADAM, own=False)
        self.d2h, self.h2d, self.weights = make(self, "d2h"), make(self, "h2d"), make(self, "h2d")
        self.adam = make(self, DEVICE_ADAM)
        self.host = Lane(self, HOST_ADAM)  # its work is given to `thread`
        self.has_queues = make is not Lane  # work may still be under way after `run` has returned
        self.recording, self._noted = False, []
        self.thread = ThreadPoolExecutor(1, HOST_ADAM, initializer=self._start_thread)

    def _start_thread(self) -> None:
        torch.set_num_threads(self.n_threads)  # of this thread alone
        if self.is_cuda:
            torch.cuda.set_device(self.device)  # a new thread starts with the first GPU

    def clock(self) -> float:
        return time.perf_counter()

    def note(self, what: str, lane: str, start, end) -> None:
        if self.recording:
            self._noted.append((what, lane, start, end))

    def events(self) -> list[Event]:
        """Return all work that ran while recording, in seconds of `clock`. All of it must have ended."""
        zero = self.compute.now(timing=True)
        zero.synchronize()
        zero_s = self.clock()

        def seconds(when) -> float:
            return when if isinstance(when, float) else zero_s - when.elapsed_time(zero) / 1e3

        return [(what, lane, seconds(start), seconds(end)) for what, lane, start, end in self._noted]


def host_threads(device: torch.device, ranks_per_host: int) -> int:
    """Return how many cores the host's Adam uses. Beside a GPU that is this rank's share of the cores, less
    those for launches; torch's own number does not serve there, because torchrun sets it to one."""
    if device.type != "cuda":
        return torch.get_num_threads()
    return max(1, len(os.sched_getaffinity(0)) // ranks_per_host - CORES_FOR_LAUNCHES)


def empty_caches(device: torch.device) -> None:
    """Let torch give back the device and pinned memory that it caches, once nothing uses it. Otherwise
    long-lived state would be cut out of the blocks that activations come and go in, and cached pinned memory
    would be counted in no budget."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        _empty_host_cache()


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of a GPU's memory; None without one."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def hold_to_budget(device: torch.device, budget_bytes: int | None) -> None:
    """Let torch's allocator refuse to pass the budget; None: the device's memory is the only limit. What
    torch does not allocate is not counted: CUDA's own half GiB or so, NCCL's buffers. Placement auto measures
    those and plans with them."""
    if total := device_memory(device):
        fraction = 1.0 if budget_bytes is None else min(1.0, budget_bytes / total)
        torch.cuda.set_per_process_memory_fraction(fraction, device)
