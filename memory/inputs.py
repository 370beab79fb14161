"""The inputs of a ChunkManager besides the model, its optimizer and its configuration."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from dtensor_llama.terminal import Say
from memory.activations import ActivationOffload
from memory.lanes import Lanes
from memory.placement import Plan
from memory.tracer import MachineRates


@dataclass(frozen=True)
class TrainingLoop:
    """Describes how the training loop uses the model.

    parts: the modules that run, in forward order, if they are not the model itself: the stages of a pipeline.
    accumulation: how many gradients of a parameter arrive between two optimizer steps. It is 1 where FSDP or
        a pipeline sums them first. It is the number of microbatches where each gradient is reduced (ZeRO 2
        and 3 without pp) or where there is no FSDP.
    clips: False: the gradient norm has no bound, so each chunk is stepped during backward as soon as its last
        gradient has arrived, with the learning rate of that moment; `step` does the rest.
    tied: parameters whose gradient changes after backward or whose weight is read outside forward, such as a
        matrix that pipeline stages share. `step` returns when they are new.
    activations: offloads of block inputs. Their memory counts on the host, and their copies are drawn too.
    """

    parts: Sequence[nn.Module] | None = None
    accumulation: int = 1
    clips: bool = True
    tied: Collection[nn.Parameter] = ()
    activations: Sequence[ActivationOffload] = ()


@dataclass(frozen=True)
class Machine:
    """Holds what the manager knows of the machine that it runs on.

    ranks_per_host: ranks that share the host's memory. A plan uses this rank's part of what is free, unless
        there is a host budget.
    rates: measured here if placement auto needs them and they are not given.
    compute_seconds: an estimate of forward and backward of a step. If rates are known too, a static plan is
        printed with the step that it predicts.
    say: prints plans; give it on one rank only.
    """

    ranks_per_host: int = 1
    rates: MachineRates | None = None
    compute_seconds: tuple[float, float] | None = None
    say: Say = lambda text: None


@dataclass(frozen=True)
class Overrides:
    """Holds what the manager chooses itself unless it is given here, by a test or a lesson. plan: for as many
    chunks as there are."""

    plan: Plan | None = None
    chunk_elements: int | None = None
    lanes: Lanes | None = None
