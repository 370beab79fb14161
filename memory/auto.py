"""The policy of placement auto: trace some steps with the device as empty as it can be, plan from what was
measured, and keep watching.

    steps 1 to 3   all states are on the host and a Tracer notes times and peaks, so whatever fits runs
    step 1         what no plan can hold is refused; with clipping that is before any weight has changed
    after step 3   ranks agree on the slowest times and highest peaks, make their plans and move their chunks
    later          a peak close to the budget or an update far from its prediction leads to a new plan
"""

from dataclasses import astuple, replace
from typing import TYPE_CHECKING

import torch

from dtensor_llama.errors import UsageError
from dtensor_llama.host import free_host_memory
from dtensor_llama.metrics import highest_of_all_ranks
from memory.chunk import chunk_size
from memory.config import MemoryConfig
from memory.home import ByAccount, Home, StateFormat
from memory.placement import ChunkSizes, Plan, auto_plan, reason_to_replan, static_plan, with_prediction
from memory.tracer import Counters, MachineRates, StepTrace, Tracer

if TYPE_CHECKING:
    from memory.manager import ChunkManager

WARM_UP_STEPS = (
    3  # the first compiles and creates communicators, the second is typical, the third confirms it
)
WATCH_EVERY = 10  # steps: to watch is a reduction over all ranks
MOST_PLANS = 4  # a machine whose rates keep changing does not get new plans for ever
HOST_SHARE = 0.9  # of the host's free memory: the page cache and the data reader want some


def foresee(
    n_parameters: int,
    asked: MemoryConfig | None,
    budgets: ByAccount,
    rates: dict,
    traced: dict,
    run: dict,
) -> Plan:
    """Return the plan that a manager would have for so many parameters of a rank, before anything is built.

    asked: its placement is static, or this policy plans. rates, traced: the fields of MachineRates and of
        StepTrace. run: `itemsize` of the weights, `accumulates` if gradients of a step are summed, and
        `clips`. UsageError: nothing fits.
    """
    largest = chunk_size(n_parameters)
    n_whole, left_over = divmod(n_parameters, largest)
    sizes = (largest,) * n_whole + (left_over,) * (left_over > 0)
    dtype = torch.float32 if run["itemsize"] == 4 else torch.bfloat16
    chunks = ChunkSizes(sizes, StateFormat(dtype, run["accumulates"]))
    of_machine, of_step = MachineRates(**rates), StepTrace(**traced)
    if asked is None or asked.placement != "static":
        return auto_plan(chunks, budgets, of_machine, of_step, run["clips"])
    plan = static_plan(chunks, asked.resident, asked.stream, asked.cpu)
    plan = replace(plan, other_host_bytes=of_step.host_bytes, clips=run["clips"])
    return with_prediction(plan, of_machine, of_step)


class AutoPolicy:
    """Makes the plans of a ChunkManager, which calls it where steps begin and end. rates: of the machine."""

    def __init__(self, manager: "ChunkManager", rates: MachineRates):
        self.manager, self.rates, self.n_steps, self.n_plans = manager, rates, 0, 0
        self.counters = Counters(manager.device)
        self.tracer: Tracer | None = Tracer(manager.owners, manager.device, self.counters)
        self.traced: StepTrace | None = None

    def take_plan(self, saved: str) -> None:
        """Go on with this rank's plan of a checkpoint (Plan.to_json, or "") without tracing again, if on
        every rank it fits the chunks and budgets of now. All ranks call it. The plan is not watched, because
        it is not known what it was made from."""
        plan = Plan.from_json(saved, self.manager.chunk_sizes) if saved else None
        if not self._all_ranks(plan is not None and self._keeps_budgets(plan)):
            return
        self.close()
        self.n_plans = MOST_PLANS
        self.manager.replan(plan)
        self.manager.say("memory    with the plan of the checkpoint\n" + self.manager.plan_in_words())

    def _keeps_budgets(self, plan: Plan) -> bool:
        """Return whether the plan was made for at most the budgets that were asked for now."""
        budgets = plan.device_budget_bytes, plan.host_budget_bytes
        pairs = zip(self.manager.budgets.values(), budgets, strict=True)
        return all(asked is None or made_for is not None and made_for <= asked for asked, made_for in pairs)

    def close(self) -> None:
        if self.tracer:
            self.tracer.close()
        self.tracer = None

    def _all_ranks(self, yes: bool) -> bool:
        refuses = torch.tensor([not yes], dtype=torch.uint8)
        highest_of_all_ranks(refuses)  # on the host, so that the device is not waited for
        return not refuses.item()

    @property
    def is_tracing(self) -> bool:
        return self.tracer is not None

    def forward_begins(self) -> None:
        if self.tracer and not self.tracer.tracing:
            self.manager.wait()  # so that no layer's forward is traced with a wait in it
            self.tracer.start_step()

    def backward_ended(self) -> None:
        """All ranks call it. The first step shows whether any plan can hold what the model needs."""
        if self.tracer and self.tracer.tracing:
            self.tracer.end_step()
            if len(self.tracer.steps) == 1:
                self._best_plan(self._trace())

    def step_ended(self) -> None:
        """All ranks call it between two steps."""
        self.n_steps += 1
        if self.n_plans >= MOST_PLANS:
            return
        if self.tracer:
            if len(self.tracer.steps) >= WARM_UP_STEPS:
                self.traced = self._trace()
                self.close()
                self._make_plan()
        elif self.n_steps % WATCH_EVERY == 0 and (reason := self._reason_to_replan()):
            self._make_plan(reason)

    def _held_while_traced(self) -> int:
        """Return the bytes on the device that plans count themselves. Without a GPU the tracer saw what was
        added since its first step began, of which plans count the gradients that wait."""
        manager, plan = self.manager, self.manager.plan
        if manager.is_cuda:
            return manager.bytes_needed(plan, traced=True)["device"]
        grad_bytes = plan.chunks.state.bytes_per_parameter(Home.STREAM)["device"]
        return grad_bytes * (plan.split.resident + plan.split.stream)

    def _trace(self) -> StepTrace:
        """Return the slowest times and the highest peaks of all ranks: the slowest rank holds the others up,
        and the one with the highest peak runs out of memory first."""
        own = self.tracer.result(self._held_while_traced(), self.manager.other_host_bytes)
        numbers = torch.tensor(astuple(own), dtype=torch.float64)
        highest_of_all_ranks(numbers)
        peak, forward, backward, host = numbers.tolist()
        return StepTrace(int(peak), forward, backward, int(host))

    def _best_plan(self, traced: StepTrace) -> Plan:
        """Return this rank's plan. If one rank has none, which can happen because chunks and free host memory
        may differ, UsageError on all ranks."""
        manager, plan = self.manager, None
        refusal = UsageError(
            "another rank cannot hold its parameters within its budgets; its message says more."
        )
        try:
            plan = auto_plan(manager.chunk_sizes, manager.room, self.rates, traced, manager.loop.clips)
        except UsageError as error:
            refusal = error
        if not self._all_ranks(plan is not None):
            raise refusal
        return plan

    def _make_plan(self, reason: str = "") -> None:
        """reason: why there is to be another plan; empty for the first."""
        plan, manager = self._best_plan(self.traced), self.manager
        moves = plan.homes != manager.plan.homes
        self.n_plans += 1
        if reason:
            outcome = "" if moves else "; the plan in use is still the best one"
            manager.say(f"memory    planned again, because {reason}{outcome}")
        if moves or not reason:
            manager.replan(plan)
            manager.say(manager.plan_in_words())
        manager.plan = plan
        self.counters.reset()  # peaks from before belong to another plan

    def _reason_to_replan(self) -> str | None:
        """Return the same answer on every rank: all make a new plan if one has to."""
        manager = self.manager
        # Without clipping the update also waits for gradients, during backward.
        update_s = manager.host_update_s if manager.loop.clips else None
        held = manager.bytes_needed(manager.plan, traced=True)["device"]
        other = self.traced.non_model_peak_bytes
        if manager.is_cuda:
            other = sum(self.counters.read()) - held
        expected_s = manager.plan.seconds.get("update", 0.0)
        reason = reason_to_replan(manager.plan, held + other, update_s or expected_s)
        if self._all_ranks(reason is None):
            return None
        if reason and other > self.traced.non_model_peak_bytes:
            self.traced = replace(self.traced, non_model_peak_bytes=other)
        elif reason and update_s:
            self.rates = self.rates.scaled(expected_s / update_s)
        return reason or "another rank asked for it"


def host_share(ranks_per_host: int, is_cuda: bool) -> int:
    """Return how many bytes one rank may take of what its host has free now. Without a GPU the two accounts
    share one RAM."""
    return int(HOST_SHARE * free_host_memory() / ranks_per_host) // (1 if is_cuda else 2)
