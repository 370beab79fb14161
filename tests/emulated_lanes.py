"""A GPU's queues without a GPU: the chunk manager's lanes with the freedom of CUDA streams, or with a clock
of their own.

    QueuedLanes   what a lane or the host's thread is given runs as late as the waits allow, or at random
                  moments, but in the order and after the events that CUDA guarantees. If a wait is missing, a
                  number is wrong.
    ClockLanes    everything runs at once and takes a given time, so that it can be asserted who works when.

What the caller computes runs at once in both, as autograd does on a CPU. So it is not seen whether a lane
waits long enough for the computation, nor whether a tensor lives until its last reader: these queues keep
what they were given.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable

import torch

from memory.lanes import DONE, HOST_ADAM, Lane, Lanes

CPU = torch.device("cpu")


class _Job:
    """A piece of work in a queue. It is its own event, and on the host's thread its own future."""

    def __init__(self, queue: "_Queue", work: Callable, after: Iterable = ()):
        self.queue, self.work, self.after = queue, work, tuple(after)
        self.is_over, self.value, self.error = False, None, None

    def synchronize(self) -> None:
        while not self.is_over:
            self.queue.run_first()

    def query(self) -> bool:
        return self.is_over

    done = query

    def result(self):
        self.synchronize()
        if self.error:
            raise self.error
        return self.value


class _Queue:
    def __init__(self):
        self.jobs: deque[_Job] = deque()

    def give(self, work: Callable, after: Iterable = ()) -> _Job:
        self.jobs.append(_Job(self, work, after))
        return self.jobs[-1]

    def run_first(self) -> None:
        job = self.jobs[0]
        for event in job.after:
            event.synchronize()
        if job.is_over:  # an event it waited for was this very queue's
            return
        self.jobs.popleft()
        try:
            job.value = job.work()
        except BaseException as error:  # as a future does
            job.error = error
        job.is_over = True


class _QueuedLane(Lane):
    def __init__(self, lanes: "QueuedLanes", name: str, own: bool = True):
        super().__init__(lanes, name, own)
        self.queue = _Queue()
        lanes.queues += [self.queue] * own

    def run(self, what: str, work: Callable[[], None], after: Iterable = ()):
        after = self.lanes.waits(self, after)
        if not self.own:
            for event in after:
                event.synchronize()
            work()
            return DONE
        job = self.queue.give(work, after)
        self.lanes.stir()
        return job

    def now(self, timing: bool = False):
        return self.queue.jobs[-1] if self.queue.jobs else DONE

    def wait(self, event) -> None:
        assert not self.own
        for one in self.lanes.waits(self, [event]):
            one.synchronize()


class QueuedLanes(Lanes):
    """seed: of the random moments at which work runs; None: it runs as late as possible. waits: which events
    of a lane's `after` are respected."""

    def __init__(self, seed: int | None = None, waits: Callable = lambda lane, after: tuple(after)):
        self.queues: list[_Queue] = []
        self.draw, self.waits = None if seed is None else random.Random(seed), waits
        super().__init__(CPU, 1, _QueuedLane)
        self.thread = _QueuedThread(self)

    def stir(self) -> None:
        while self.draw and self.draw.random() < 0.5:
            queue = self.draw.choice(self.queues)
            is_free = queue is not self.thread.queue or not self.thread.is_busy
            if is_free and queue.jobs and all(event.query() for event in queue.jobs[0].after):
                queue.run_first()


class _QueuedThread:
    def __init__(self, lanes: QueuedLanes):
        self.lanes, self.queue, self.is_busy = lanes, _Queue(), False
        lanes.queues.append(self.queue)

    def submit(self, work: Callable, *args) -> _Job:
        def alone():
            self.is_busy = True
            try:
                return work(*args)
            finally:
                self.is_busy = False

        job = self.queue.give(alone)
        self.lanes.stir()
        return job

    def shutdown(self) -> None:
        while self.queue.jobs:
            self.queue.run_first()


class _Moment:
    """An event of a ClockLanes, and a future of its thread; it happens at `end_s`."""

    def __init__(self, lanes: "ClockLanes", end_s: float):
        self.lanes, self.end_s = lanes, end_s

    def synchronize(self) -> None:
        self.lanes.at[self.lanes.who] = max(self.lanes.clock(), self.end_s)

    result = synchronize

    def query(self) -> bool:
        return self.end_s <= self.lanes.clock()

    done = query


class _ClockLane(Lane):
    free_s = 0.0

    def run(self, what: str, work: Callable[[], None], after: Iterable = ()):
        seconds = self.lanes.seconds(self.name, what)
        start_s = max([self.lanes.clock(), *(event.end_s for event in after if event is not DONE)])
        if self.own:
            start_s = max(start_s, self.free_s)
            self.free_s = start_s + seconds
        else:
            self.lanes.at[self.lanes.who] = start_s + seconds
        work()
        self.lanes.note(what, self.name, start_s, start_s + seconds)
        return _Moment(self.lanes, start_s + seconds)

    def now(self, timing: bool = False):
        return _Moment(self.lanes, max(self.free_s, self.lanes.clock()) if self.own else self.lanes.clock())

    def wait(self, event) -> None:
        assert not self.own
        event.synchronize()  # the caller computes: what it does from now on is later


class ClockLanes(Lanes):
    """seconds: how long a piece of work takes, by the name of the lane and of the work. The caller's own
    computation takes time by `spend`."""

    def __init__(self, seconds: Callable[[str, str], float]):
        self.seconds, self.who, self.at = seconds, "caller", {"caller": 0.0, HOST_ADAM: 0.0}
        super().__init__(CPU, 1, _ClockLane)
        self.host, self.thread = _ClockLane(self, HOST_ADAM, own=False), self
        self.recording = True

    def clock(self) -> float:
        return self.at[self.who]

    def spend(self, seconds: float) -> None:
        self.at[self.who] += seconds

    def submit(self, work: Callable, *args) -> _Moment:
        before, self.who = self.who, HOST_ADAM
        self.at[HOST_ADAM] = max(self.at.values())
        work(*args)
        self.who = before
        return _Moment(self, self.at[HOST_ADAM])

    def shutdown(self) -> None:
        pass
