"""The one exception that means: what the user asked for cannot be done."""


class UsageError(ValueError):
    """Wrong input. The message is one line: the flag or file, the values, the rule, and what would work.

    Recipes print it and exit with status 2; every other exception is a defect of ours and keeps its
    traceback.
    """


class BadRecord(UsageError):
    """A record of a data file that cannot be trained on; with --data.bad-records skip it is left out, counted
    and listed.

    where: file and line, of a conversation also the turn. what_is_wrong: in few words that are the same for
    all records with this fault, so that they can be counted. more: the values, the rule and what would work;
    a ":" at its beginning joins it to what comes before."""

    def __init__(self, where: str, what_is_wrong: str, more: str = ""):
        # all three, so that it survives the way between processes
        super().__init__(where, what_is_wrong, more)
        self.of_a_turn = ": turn " in where
        self.reason = f"a turn {what_is_wrong}" if self.of_a_turn else what_is_wrong

    def __str__(self) -> str:
        where, what_is_wrong, more = self.args
        if not more.startswith(":"):
            more = f"; {more}" if more else "."
        return f"{where}{' ' if self.of_a_turn else ': '}{what_is_wrong}{more}"
