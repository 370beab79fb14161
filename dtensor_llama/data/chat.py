"""Records of the common fine-tuning formats to conversations: a system prompt, then user and assistant in turns.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}      OpenAI
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}          ShareGPT
    {"instruction": "Say hello", "input": "in French", "output": "Bonjour."}                           Alpaca
    {"prompt": "Hi", "completion": "Hello."}    {"question": "Hi", "answer": "Hello."}                 one turn each

Which one it is shows in a record's fields, one by one: files may be mixed. Every defect is a UsageError that names the
file and the line. Whatever the format, a conversation is a list of {"role", "content"} from then on.
"""

from dtensor_llama.data.sources import checked_text
from dtensor_llama.errors import UsageError

LISTS = {"OpenAI messages": "messages", "ShareGPT": "conversations"}                   # format: its field, a list of turns
PAIRS = {                   # format: (what the user asks, what is put under it if there is any, what the assistant answers)
    "Alpaca": ("instruction", "input", "output"),
    "prompt/completion": ("prompt", None, "completion"),
    "question/answer": ("question", None, "answer"),
}
TURN_FIELDS = (("role", "content"), ("from", "value"))
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}


def conversation_of(record: dict, where: str) -> tuple[str, list[dict[str, str]]]:
    """(format, turns) of a record. UsageError, beginning with `where`, if it is of no known format or its turns are wrong.

    A last turn of the user, which nobody answered, is left out. System prompts of the one-turn formats: field `system`."""
    name = next((name for name, field in LISTS.items() if record.get(field) is not None), None)
    fields = ", ".join(list(record)[:20]) or "none"
    if name is not None:
        turns = _turns_of_list(record[LISTS[name]], where, LISTS[name])
    else:
        name = max(PAIRS, key=lambda name: sum(record.get(field) is not None for field in PAIRS[name] if field))
        asks, below, answers = PAIRS[name]
        if record.get(asks) is None and record.get(answers) is None:
            known = [*LISTS.values(), *(f"{pair[0]} + {pair[2]}" for pair in PAIRS.values())]
            raise UsageError(f"{where}: unknown format; its fields are {fields}, and a conversation has "
                             f"{', or '.join(known)}.")
        for field in (asks, answers):
            if record.get(field) is None:
                raise UsageError(f"{where}: no field {field!r}, which {name} needs; its fields are {fields}.")
        if isinstance(record[asks], list) and isinstance(record[answers], list):       # both are lists of turns
            turns = [*_turns_of_list(record[asks], where, asks), *_turns_of_list(record[answers], where, answers)]
        else:
            question, answer = (checked_text(record[field], where, field) for field in (asks, answers))
            if below and record.get(below):
                question += "\n\n" + checked_text(record[below], where, below)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if record.get("system") and not (turns and turns[0]["role"] == "system"):
        turns = [{"role": "system", "content": checked_text(record["system"], where, "system")}, *turns]
    _check_order(turns, where)
    return name, turns[:-1] if turns[-1]["role"] == "user" else turns


def _turns_of_list(turns, where: str, field: str) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not turns:
        raise UsageError(f"{where}: {field!r} holds {'no turn' if turns == [] else type(turns).__name__}, expected a list of "
                         f"turns.")
    read = []
    for number, turn in enumerate(turns, 1):
        at = f"{where}: turn {number} of {field!r}"
        if not isinstance(turn, dict):
            raise UsageError(f"{at} is {type(turn).__name__}, expected an object.")
        role_field, text_field = next((pair for pair in TURN_FIELDS if turn.get(pair[0]) is not None), TURN_FIELDS[0])
        for one in (role_field, text_field):
            if turn.get(one) is None:
                raise UsageError(f"{at} has no {one!r}; its fields are {', '.join(turn) or 'none'}.")
        role = ROLES.get(str(turn[role_field]).lower())
        if role is None:
            raise UsageError(f"{at} is by {turn[role_field]!r}; trained on are conversations of {', '.join(ROLES)}.")
        content = turn[text_field]
        if isinstance(content, list):                      # OpenAI's parts
            if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
                raise UsageError(f"{at} has parts that are not text; a LLaMA reads text only.")
            content = "".join(checked_text(part.get("text"), at, "text") for part in content)
        read.append({"role": role, "content": checked_text(content, at, text_field)})
    return read


def _check_order(turns: list[dict[str, str]], where: str) -> None:
    roles = [turn["role"] for turn in turns]
    first = 1 if roles[0] == "system" else 0
    for number, role in enumerate(roles[first:]):
        if role != ("user", "assistant")[number % 2]:
            before = f"follows one by the {roles[first + number - 1]}" if first + number else "is the first"
            raise UsageError(f"{where}: turns out of order: turn {first + number + 1} is by the {role} and {before}; after a "
                             "system prompt, if any, user and assistant take turns, and the user begins.")
    if "assistant" not in roles:
        raise UsageError(f"{where}: no assistant turn, so nothing to train on; its roles are {', '.join(roles)}.")
