"""The policy `auto`: trace some steps with the device as empty as can be, plan from what was measured, and
keep watch.

    steps 1 to 3   all states on the host; a Tracer notes times and peaks              nothing can run out of memory that fits
    in step 1      what no plan can hold is refused; where gradients are clipped, before any weight has changed
    after step 3   ranks agree on the slowest times and highest peaks; every rank makes its plan of them, and moves its chunks
    later          a peak close to the budget, or an update far from its prediction: planned again, between two steps
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
import torch.distributed as dist

from dtensor_llama.errors import UsageError
from memory.chunk import GIB
from memory.placement import Placement, Plan, auto_plan, replan
from memory.tracer import Counters, Rates, Traced, Tracer

if TYPE_CHECKING:
    from memory.manager import ChunkManager

WARM_UP_STEPS = 3  # the first compiles and makes communicators, the second is typical, the third confirms it
WATCH_EVERY = 10  # steps; a watch is a reduction over all ranks
MOST_PLANS = 4  # a machine whose rates keep changing is not planned for ever
HOST_SHARE = 0.9  # of the host memory that is free: the page cache and the data reader want some


class AutoPolicy:
    """Told by a ChunkManager where its steps begin and end. rates: of the machine; say: called with each plan
    in words on one rank; counters: how memory is read (tests give their own)."""

    def __init__(
        self,
        manager: "ChunkManager",
        rates: Rates,
        say: Callable[[str], None],
        counters: Counters | None = None,
    ):
        self.manager, self.rates, self.say, self.n_steps, self.n_plans = manager, rates, say, 0, 0
        self.counters = counters or Counters.of(manager.device)
        self.tracer: Tracer | None = Tracer(manager.gated_modules(), manager.device, self.counters)
        self.traced: Traced | None = None
        config, on_gpu = manager.config, manager.is_cuda
        device = config.device_budget_gib and int(config.device_budget_gib * GIB)
        host = config.host_budget_gib and int(config.host_budget_gib * GIB)
        total = (
            torch.cuda.get_device_properties(manager.device).total_memory if on_gpu else manager.host_share
        )
        self.device_budget, self.host_budget = (
            device or total,
            host or manager.host_share + manager.slab_bytes,
        )

    def take_plan(self, plan: Plan | None) -> None:
        """Go on with a plan from before this process was started, if all ranks can. It is not watched: what
        it was made from is not known."""
        asked = self.manager.config.device_budget_gib, self.manager.config.host_budget_gib
        usable = (
            plan is not None
            and list(plan.n_elements) == [chunk.n for chunk in self.manager.chunks]
            and all(
                gib is None or then is not None and then <= now
                for gib, then, now in zip(
                    asked,
                    (plan.device_budget_bytes, plan.host_budget_bytes),
                    (self.device_budget, self.host_budget),
                    strict=True,
                )
            )
        )
        if not self._all_ranks(usable):
            return
        self.close()
        self.n_plans = MOST_PLANS
        self.manager.replan(plan)
        self.say("memory    with the plan of the checkpoint\n" + self.manager.in_words())

    def close(self) -> None:
        if self.tracer:
            self.tracer.close()
        self.tracer = None

    def _all_ranks(self, yes: bool) -> bool:
        answer = torch.tensor([yes], dtype=torch.uint8)  # on the host: nobody waits for the device
        if dist.is_initialized():
            dist.all_reduce(answer, dist.ReduceOp.MIN)
        return bool(answer.item())

    @property
    def is_tracing(self) -> bool:
        return self.tracer is not None

    def forward_begins(self) -> None:
        if self.tracer and not self.tracer.tracing:
            # for all of the update, so that no layer's forward is traced with a wait in it
            self.manager.wait()
            self.tracer.start_step()

    def backward_ended(self) -> None:
        """All ranks enter. The first step shows whether any plan can hold what the model needs."""
        if self.tracer and self.tracer.tracing:
            self.tracer.end_step()
            if len(self.tracer.steps) == 1:
                self._best_plan(self._trace())

    def step_ended(self) -> None:
        """Between two steps; all ranks enter."""
        self.n_steps += 1
        if self.n_plans >= MOST_PLANS:
            return
        if self.tracer:
            if len(self.tracer.steps) >= WARM_UP_STEPS:
                self.traced = self._trace()
                self.close()
                self._plan()
            return
        why = self._why_again() if self.n_steps % WATCH_EVERY == 0 else None
        if why:
            self._plan(why)

    def _held_while_traced(self) -> int:
        """Bytes on the device that plans count themselves. Without a GPU the tracer saw what came since its
        first step began: of these, only gradients that wait."""
        manager = self.manager
        if manager.is_cuda:
            return manager.needed(manager.plan, traced=True)["device"]
        on_device = (manager.plan.n_parameters(where) for where in (Placement.RESIDENT, Placement.STREAM))
        return manager.plan.widths.grad * sum(on_device)

    def _trace(self) -> Traced:
        return _agreed(self.tracer.result(self._held_while_traced(), self.manager.other_host_bytes))

    def _best_plan(self, traced: Traced) -> Plan:
        """Of this rank. UsageError on all ranks if one of them has none: chunks and free memory of hosts may
        differ."""
        manager, plan = self.manager, None
        refusal = UsageError("another rank's budgets cannot hold its parameters, as it says.")
        try:
            plan = auto_plan(
                [chunk.n for chunk in manager.chunks],
                device_budget_bytes=self.device_budget,
                host_budget_bytes=self.host_budget,
                rates=self.rates,
                traced=traced,
                widths=manager.widths,
                layers=[chunk.covers for chunk in manager.chunks],
                clips=manager.clips,
            )
        except UsageError as error:
            refusal = error
        if not self._all_ranks(plan is not None):
            raise refusal
        return plan

    def _plan(self, again: str = "") -> None:
        plan, manager = self._best_plan(self.traced), self.manager
        moves = plan.placements != manager.plan.placements
        self.n_plans += 1
        if again:
            self.say(
                f"memory    planned again: {again}" + ("" if moves else "; the best plan is the one there is")
            )
        if moves or not again:
            manager.replan(plan)
        manager.plan = plan
        if moves or not again:
            self.say(manager.in_words())
        self.counters.reset()  # a peak from before is not of this plan

    def _why_again(self) -> str | None:
        """The same answer on every rank: the plan changes when it has to on any."""
        manager, why = self.manager, None
        # in backward it waits for gradients too
        update_s = manager.host_update_seconds() if manager.clips else None
        usage, held = self.counters.read(), manager.needed(manager.plan, traced=True)["device"]
        peak = usage.peak + usage.non_torch if manager.is_cuda else held + self.traced.non_model_peak_bytes
        expected = manager.plan.seconds.get("update", 0.0)
        why = replan(manager.plan, peak_device_bytes=peak, update_seconds=update_s or expected)
        if self._all_ranks(why is None):
            return None
        if why and peak > self.traced.non_model_peak_bytes + held:
            self.traced = replace(self.traced, non_model_peak_bytes=peak - held)
        elif why and update_s:
            self.rates = self.rates.scaled(manager.plan.seconds["update"] / update_s)
        return why or "another rank asked for it"


def _agreed(traced: Traced) -> Traced:
    """The slowest times and the highest peaks of all ranks: those that hold others up, or run out first."""
    numbers = torch.tensor(
        [traced.forward_seconds, traced.backward_seconds, traced.non_model_peak_bytes, traced.host_bytes],
        dtype=torch.float64,
    )
    if dist.is_initialized():
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    forward, backward, peak, host = numbers.tolist()
    return replace(
        traced,
        forward_seconds=forward,
        backward_seconds=backward,
        non_model_peak_bytes=int(peak),
        host_bytes=int(host),
    )


def host_share(ranks_per_host: int, is_cuda: bool) -> int:
    """Bytes that one rank may take of what its host has free now; without a GPU the two accounts are of one
    RAM."""
    return int(HOST_SHARE * free_host_bytes() / ranks_per_host) // (1 if is_cuda else 2)


def free_host_bytes() -> int:
    """Memory that this machine, or the container around this process, has left."""
    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        if limit != "max":
            free = min(free, max(0, int(limit) - used))
    except (OSError, ValueError):
        pass  # no control group of the second version: nothing limits us
    return free
