"""UsageError, the exception for requests that cannot be met; checks that raise it, and texts for it."""

from collections.abc import Mapping, Sequence


class UsageError(ValueError):
    """Means wrong input. The message is one line: setting or file, the values, the rule, and what would work.

    It names a setting by its field, `tp=3`; recipes turn that into a flag (cli.in_flags), print the line and
    exit with status 2. Every other exception is a defect of ours and keeps its traceback.
    """


class BadRecord(UsageError):
    """Means that a record of a data file cannot be trained on; bad_records="skip" leaves it out and lists it.

    where: file and line, and the turn of a conversation
    what_is_wrong: a few words that are the same for all records with this fault, so that they can be counted
    more: the values, the rule and what would work; a ":" at its beginning joins it to what comes before
    """

    def __init__(self, where: str, what_is_wrong: str, more: str = ""):
        # The exception gets all three, so that it can be pickled and sent from one process to another.
        super().__init__(where, what_is_wrong, more)
        self.of_a_turn = ": turn " in where
        self.reason = f"a turn {what_is_wrong}" if self.of_a_turn else what_is_wrong

    def __str__(self) -> str:
        where, what_is_wrong, more = self.args
        if not more.startswith(":"):
            more = f"; {more}" if more else "."
        return f"{where}{' ' if self.of_a_turn else ': '}{what_is_wrong}{more}"


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise UsageError unless `holds`; `rule` says in words what the value of the setting `name` must be."""
    if not holds:
        raise UsageError(f"{name} is {value!r}; it must be {rule}.")


def number(name: str, value, low: float, high: float, rule: str) -> float:
    """Return `value` as a float if it is a number from `low` to `high`; `rule` states this in words."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    require(is_number and low <= value <= high, name, value, rule)
    return float(value)


def listed(problems: Sequence[str], most: int = 20) -> str:
    """Join problems for a message of one line; those beyond the first `most` are only counted."""
    more = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {more} more" if more > 0 else "")


def mismatches(found: Mapping[str, Sequence | None], wanted: Mapping[str, Sequence | None]) -> list[str]:
    """Compare tensors by name and shape; return a phrase for each difference. A shape of None fits any."""
    problems = [f"{name}: missing" for name in wanted if name not in found]
    for name, shape in found.items():
        if name not in wanted:
            problems.append(f"{name}: unexpected")
        elif None not in (shape, wanted[name]) and tuple(shape) != tuple(wanted[name]):
            problems.append(f"{name}: is {list(shape)}, must be {list(wanted[name])}")
    return problems
