"""Computes what each pipeline rank does when, without running it: the order of a schedule, its times and
bubbles, drawn as text."""

import re

from dtensor_llama.gantt import text_row
from parallel.pipeline import SCHEDULES

Action = tuple[str, int, int]  # F, B, I or W (see pipeline.py); stage; microbatch
DURATION = {"F": 1, "B": 2, "I": 1, "W": 1}  # of forwards: backward is twice the work


def schedule_order(schedule: str, pp: int, virtual_stages: int, n_microbatches: int) -> list[list[Action]]:
    """Return the actions of each pp rank, in order."""
    return [order_of_rank(schedule, pp, virtual_stages, n_microbatches, rank) for rank in range(pp)]


def order_of_rank(
    schedule: str, pp: int, virtual_stages: int, n_microbatches: int, rank: int
) -> list[Action]:
    """Return the actions of one pp rank, in order. No process group is needed."""
    if schedule in ("gpipe", "1f1b"):
        # forwards before the first backward
        ahead = n_microbatches if schedule == "gpipe" else min(n_microbatches, pp - rank)
        pairs = [[("B", rank, i), ("F", rank, i + ahead)] for i in range(n_microbatches)]
        return [("F", rank, i) for i in range(ahead)] + [
            one for pair in pairs for one in pair if one[2] < n_microbatches
        ]
    # A schedule of torch is made with stages that have a process group. Its order is computed from these few
    # numbers alone, by a private method of torch 2.11 to 2.13.
    made = object.__new__(SCHEDULES[schedule].torch_class)
    made.pp_group_size, made.n_local_stages, made.num_stages = pp, virtual_stages, pp * virtual_stages
    made._n_microbatches = n_microbatches
    made.number_of_rounds = max(1, n_microbatches // pp)
    made.microbatches_per_round = n_microbatches // made.number_of_rounds
    planned = made._calculate_single_rank_operations(rank)
    # torch writes an action as 3F0: stage, kind, microbatch
    single = [repr(one) for both in planned if both for one in getattr(both, "sub_actions", None) or (both,)]
    found = filter(None, (re.fullmatch(r"(\d+)([FBIW])(\d+)", one) for one in single))
    return [(one[2], int(one[1]), int(one[3])) for one in found]


def clock(orders: list[list[Action]]) -> tuple[list[list[tuple[int, str, int, int]]], float]:
    """Return (start, *action) of each rank's actions, in units of DURATION, and the share of bubbles.

    Transfers are taken to cost no time."""
    waiting, free, ended = [list(order) for order in orders], [0] * len(orders), {}
    work, last = [[] for _ in orders], max(stage for order in orders for _, stage, _ in order)
    while any(waiting):
        before_round = sum(map(len, waiting))
        for rank, todo in enumerate(waiting):
            while todo:
                kind, stage, micro = todo[0]
                needs = {"F": ("F", stage - 1, micro), "W": ("B", stage, micro)}.get(
                    kind, ("B", stage + 1, micro)
                )
                if 0 <= needs[1] <= last and needs not in ended:
                    break
                start = max(free[rank], ended.get(needs, 0))
                free[rank] = ended["B" if kind == "I" else kind, stage, micro] = start + DURATION[kind]
                work[rank].append((start, *todo.pop(0)))
        assert sum(map(len, waiting)) < before_round, (
            f"the ranks wait for each other: {[todo[:1] for todo in waiting]}"
        )
    busy = sum(DURATION[kind] for rank_work in work for _, kind, _, _ in rank_work)
    return work, 1 - busy / (len(orders) * max(free))


def idle_units(schedule: str, pp: int, virtual_stages: int) -> float:
    """Return how long a rank is idle in a step; the unit is its forward of one microbatch, all its stages.

    This is the clock in closed form, for any number of microbatches that the schedule can run without other
    bubbles: the pipeline fills and drains for pp - 1 microbatches, through one of the rank's stages each.
    Where backward is split, the weights' gradients fill most of it.
    """
    forward_and_backward = DURATION["F"] + DURATION["B"]
    each = DURATION["F"] if SCHEDULES[schedule].splits_backward else forward_and_backward
    return (pp - 1) * each / virtual_stages


def draw(work: list[tuple[int, str, int, int]], width: int) -> str:
    """Return the first `width` units of one rank's time as text, three letters each. Lower case is a later
    stage of the rank; dots are bubbles."""
    first_stage, spans = min(stage for _, _, stage, _ in work), []
    for start, kind, stage, microbatch in work:
        mark = f"{kind if stage == first_stage else kind.lower()}{microbatch:<2}"
        spans.append((mark, start, start + DURATION[kind]))
    return text_row(spans, 0, width, width, idle="...").rstrip()
