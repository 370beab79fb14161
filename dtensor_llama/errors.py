"""The one exception that means: what the user asked for cannot be done."""


class UsageError(ValueError):
    """Wrong input. The message is one line: the flag or file, the values, the rule, and what would work.

    Recipes print it and exit with status 2; every other exception is a defect of ours and keeps its traceback.
    """
