"""Reads records of the common fine-tuning formats as conversations: a system prompt, then turns.

OpenAI     {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
ShareGPT   {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
Alpaca     {"instruction": "Say hello", "input": "in French", "output": "Bonjour.", "history": [["A", "B"]]}
one turn   {"prompt": "Hi", "completion": "Hello."}    {"question": "Hi", "answer": "Hello."}

The fields of a record tell its format, so one file may mix formats. Every defect raises a BadRecord that
names the file and the line. Whatever the format, the turns become messages as transformers'
apply_chat_template takes them: {"role", "content"} and all other fields of the turn, such as tool_calls. As
in transformers, fields that are null are left out. Three kinds of fields do not become part of a message:

turn flags   `weight`, `train`, `trainable`, `training` and `loss` (true: the turn counts in the loss), `mask`
             and `masked` (true: it does not). On a record, a flag applies to all its answers. A flag is true
             or false, 1 or 0.
variables    `tools` (or `functions`), `documents` and `chat_template_kwargs` of a record. The template gets
             them besides the turns.
history      earlier [question, answer] pairs, in the one-turn formats
"""

import contextlib
import json
from dataclasses import dataclass, field
from typing import Literal

from dtensor_llama.data.records import in_json
from dtensor_llama.data.sources import checked_text
from dtensor_llama.errors import BadRecord

LISTS = {"OpenAI messages": "messages", "ShareGPT": "conversations"}  # {format: the field with the turns}
PAIRS = {  # {format: (field of the question, field of a text to put below it, field of the answer)}
    "Alpaca": ("instruction", "input", "output"),
    "prompt/completion": ("prompt", None, "completion"),
    "question/answer": ("question", None, "answer"),
}
TURN_FIELDS = (("role", "content"), ("from", "value"))
ROLES = {role: role for role in ("system", "user", "assistant", "tool", "ipython", "function")}
ROLES |= {"developer": "system", "human": "user", "observation": "tool", "function_response": "tool"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "model", "bot"), "assistant")
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT: the assistant's turn is its calls, written as JSON
TOOL_ROLES = ("tool", "ipython", "function")  # a turn that holds what a tool returned
# {role of a turn: the roles that the next turn may have}
FOLLOWS = {"start": ("user",), "user": ("assistant",), "assistant": ("user", *TOOL_ROLES)}
FOLLOWS |= {role: (*TOOL_ROLES, "assistant", "user") for role in TOOL_ROLES}
# {flag: the value that means that the turn counts in the loss}
TRAINED_IF = dict.fromkeys(("weight", "train", "trainable", "training", "loss"), True)
TRAINED_IF |= {"mask": False, "masked": False}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # three names of one thing, as in transformers
VARIABLES = ("tools", "functions", "documents", "chat_template_kwargs")
# Special cases are counted under these names.
EMPTY_ANSWER = "with an empty answer"
NOTHING_TRAINED = "in which no answer is to be trained"
UNANSWERED = "end with a turn without an answer, which is cut off"


@dataclass(frozen=True)
class ChatOptions:
    """Decides how records become examples.

    bad_records: "refuse" ends the run at a record that cannot be trained on; "skip" leaves it out, listed
    train_on: what counts in the loss: the assistant's answers, only the last answer, or every token
    template: "auto" uses the tokenizer's own template or LLaMA-2's; "none" writes prompt and completion as
        they are"""

    bad_records: Literal["refuse", "skip"] = "refuse"
    train_on: Literal["answers", "last-answer", "all"] = "answers"
    template: Literal["auto", "none"] = "auto"


@dataclass(frozen=True)
class Conversation:
    """Holds a record that was read. The last turn is always one of the assistant.

    format: the name of its format, a key of LISTS or PAIRS
    turns: messages for a template
    flags: for each turn, whether the record says that it counts in the loss; None: the record does not say
    variables: what the template gets besides the turns
    unread: the fields of the record that nothing here reads
    n_unanswered: the number of turns after the last answer, which were cut off
    """

    format: str
    turns: list[dict]
    flags: list[bool | None]
    variables: dict = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    n_unanswered: int = 0


Turns = list[tuple[dict, bool | None]]  # messages, each with its flag


def conversation_of(record: dict, where: str) -> Conversation:
    """Return the conversation that a record holds.

    where: the file and line. Raises BadRecord, whose message begins with `where`, for an unknown format and
    for turns that cannot be trained on."""
    name = next((name for name, of_list in LISTS.items() if record.get(of_list) is not None), None)
    if name is not None:
        used = [LISTS[name]]
        flagged = _turns_of_list(record[LISTS[name]], where, LISTS[name])
        if record.get("history"):
            raise BadRecord(
                where, f"'history' beside {LISTS[name]!r}", "put the earlier turns into the list."
            )
    else:
        name = _pair_format(record, where)
        used = [*PAIRS[name], "history", *THOUGHTS]
        flagged = _turns_of_pair(record, name, where)
    if record.get("system") and flagged[0][0]["role"] != "system":
        flagged = [_plain_turn("system", checked_text(record["system"], where, "system")), *flagged]
    own, turns, flags = flag_of(record, where), [], []
    for turn, flag in flagged:
        turns.append(turn)
        flags.append(own if flag is None and turn["role"] == "assistant" else flag)
    _check_order(turns, where)
    n_turns = max(at for at, turn in enumerate(turns, 1) if turn["role"] == "assistant")
    used += ["system", *VARIABLES, *TRAINED_IF]
    unread = tuple(one for one, value in record.items() if one not in used and value is not None)
    n_unanswered = len(turns) - n_turns
    return Conversation(
        name, turns[:n_turns], flags[:n_turns], _variables(record, where), unread, n_unanswered
    )


def flag_of(fields: dict, at: str) -> bool | None:
    """Return whether the flags among `fields` say that a turn counts in the loss; None if there is no flag.

    at: the place of the turn, for the message of the BadRecord that a wrong flag raises"""
    said = {}
    for name, meaning in TRAINED_IF.items():
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRecord(
                at,
                f"{name!r} is {value!r:.40}",
                "a turn is trained or it is not: use true or false, 1 or 0; or give the field another "
                "name, if it means something else.",
            )
        said[name] = bool(value) == meaning
    if len(set(said.values())) > 1:
        raise BadRecord(at, f"{' and '.join(map(repr, said))} contradict each other", "leave one of them.")
    return next(iter(said.values()), None)


# ---- the one-turn formats ----


def _pair_format(record: dict, where: str) -> str:
    """Return the format of a record that has no list of turns."""
    fields = ", ".join(list(record)[:20]) or "none"
    name = max(PAIRS, key=lambda name: sum(record.get(one) is not None for one in PAIRS[name]))
    question, _, answer = PAIRS[name]
    missing = [one for one in (question, answer) if record.get(one) is None]
    if len(missing) == 2:
        known = list(LISTS.values()) + [f"{asks} + {answers}" for asks, _, answers in PAIRS.values()]
        raise BadRecord(
            where, "unknown format", f"its fields are {fields}, and a conversation has {', or '.join(known)}."
        )
    if missing:
        raise BadRecord(where, f"no field {missing[0]!r}, which {name} needs", f"its fields are {fields}.")
    return name


def _turns_of_pair(record: dict, name: str, where: str) -> Turns:
    asks, below, answers = PAIRS[name]
    if isinstance(record[asks], list) and isinstance(record[answers], list):  # both are lists of turns
        turns = _turns_of_list(record[asks], where, asks) + _turns_of_list(record[answers], where, answers)
    else:
        question = checked_text(record[asks], where, asks)
        if below and record.get(below):
            question += "\n\n" + checked_text(record[below], where, below)
        answer = checked_text(record[answers], where, answers)
        turns = [_plain_turn("user", question), _plain_turn("assistant", answer)]
    thought = _thought(record, where)
    if thought:
        last, flag = turns[-1]
        turns[-1] = last | {"reasoning_content": thought}, flag
    return _history(record.get("history"), where) + turns


def _plain_turn(role: str, text: str) -> tuple[dict, None]:
    return {"role": role, "content": text}, None


def _history(history, where: str) -> Turns:
    """Return the turns of a history [[question, answer], ...]."""
    turns, pairs = [], history or []
    for number, pair in enumerate(pairs if isinstance(pairs, list) else [pairs], 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRecord(
                where,
                "'history' is no list of [question, answer] pairs",
                f"its entry {number} is {pair!r:.60}.",
            )
        for role, said in zip(("user", "assistant"), pair, strict=True):
            turns.append(_plain_turn(role, checked_text(said, where, f"history, entry {number}")))
    return turns


# ---- lists of turns ----


def _turns_of_list(turns, where: str, of_list: str) -> Turns:
    if isinstance(turns, str):  # a cell of a table may hold the list as JSON
        with contextlib.suppress(ValueError):
            turns = json.loads(turns)
    if not isinstance(turns, list):
        raise BadRecord(where, f"{of_list!r} holds {in_json(turns)}", "expected a list of turns.")
    flagged = []
    for number, turn in enumerate(turns, 1):
        at = f"{where}: turn {number} of {of_list!r}"
        message = _message_of(turn, at)
        if message is not None:
            flagged.append((message, flag_of(turn, at)))
    if not flagged:
        raise BadRecord(where, f"{of_list!r} holds no turn", "expected a list of turns.")
    return flagged


def _message_of(turn, at: str) -> dict | None:
    """Return a turn as the message that a template takes; None for a system prompt that is null."""
    if not isinstance(turn, dict):
        raise BadRecord(at, f"is {in_json(turn)}", "expected an object.")
    role_field, text_field = next(
        (pair for pair in TURN_FIELDS if turn.get(pair[0]) is not None), TURN_FIELDS[0]
    )
    has_content = text_field in turn or turn.get("tool_calls") or turn.get("function_call")
    if turn.get(role_field) is None or not has_content:
        missing = role_field if turn.get(role_field) is None else text_field
        raise BadRecord(at, f"has no {missing!r}", f"its fields are {', '.join(turn) or 'none'}.")
    said_by = str(turn[role_field]).lower()
    role = "assistant" if said_by in CALL_ROLES else ROLES.get(said_by)
    if role is None:
        raise BadRecord(
            at, f"is by {turn[role_field]!r:.40}", f"the roles that can be used are {', '.join(ROLES)}."
        )
    content = _content_of(turn.get(text_field), at, text_field)
    if content is None and role == "system":
        return None
    if content is None and role == "user":
        raise BadRecord(at, f"has null as its {text_field!r}", "a question needs text, which may be empty.")
    taken = (role_field, text_field, *TURN_FIELDS[0], *TRAINED_IF)
    others = {name: value for name, value in turn.items() if name not in taken and value is not None}
    if said_by in CALL_ROLES:
        calls = _parsed(content or "", at, text_field)
        calls = [_as_function(call) for call in (calls if isinstance(calls, list) else [calls])]
        return {"role": role, **others, "tool_calls": calls}
    if others.get("tool_calls") == []:
        del others["tool_calls"]  # like a null: some templates ask only whether the field is there
    calls_or_thinks = any(others.get(name) for name in ("tool_calls", "function_call", *THOUGHTS))
    if content is None and not calls_or_thinks:
        content = ""  # a tool returned nothing, or an answer is empty
    message = {"role": role, **others} if content is None else {"role": role, "content": content, **others}
    thought = _thought(message, at)
    if thought:  # under both names, since some templates read one and some the other
        message = {"thinking": thought, **message, "reasoning_content": thought}
    return message


def _content_of(content, at: str, text_field: str) -> str | None:
    if content is None:
        return None
    if isinstance(content, list):  # in OpenAI's format, content may be a list of parts
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise BadRecord(at, "has parts that are not text", "a LLaMA reads text only.")
        return "".join(checked_text(part.get("text"), at, "text") for part in content)
    return checked_text(content, at, text_field)


def _thought(fields: dict, at: str) -> str | None:
    name = next((name for name in THOUGHTS if fields.get(name) is not None), None)
    return None if name is None else checked_text(fields[name], at, name)


def _as_function(function: dict) -> dict:
    """Return a function, or a call of one, in the form {"type", "function"} that templates expect."""
    if isinstance(function, dict) and "function" in function:
        return function
    return {"type": "function", "function": function}


def _parsed(text: str, at: str, name: str):
    """Return the value of the JSON in `text`; raise BadRecord if it is none."""
    try:
        return json.loads(text)
    except ValueError:
        raise BadRecord(at, f"{name!r} is not JSON", f"it begins with {text[:40]!r}.") from None


def _variables(record: dict, where: str) -> dict:
    """Return {name: value} of the variables that a template gets besides the turns."""
    variables = {}
    for name in VARIABLES:
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            value = _parsed(value, where, name)
        if not value:
            continue
        if name == "chat_template_kwargs":
            if not isinstance(value, dict):
                raise BadRecord(
                    where, f"{name!r} holds {in_json(value)}", "expected an object of names and values."
                )
            variables |= {one: given for one, given in value.items() if given is not None}
            continue
        value = [_parsed(one, where, name) if isinstance(one, str) else one for one in value]
        if any(not isinstance(one, dict) for one in value):
            raise BadRecord(
                where, f"{name!r} is no list of objects", "expected a JSON schema for each of them."
            )
        if name == "functions":
            variables["tools"] = [_as_function(one) for one in value]
        else:
            variables[name] = value
    return variables


def _check_order(turns: list[dict], where: str) -> None:
    roles = [turn["role"] for turn in turns]
    first = 1 if roles[0] == "system" else 0
    before = "start"
    for number, role in enumerate(roles[first:], first):
        if role not in FOLLOWS[before]:
            follows = f"follows one by the {roles[number - 1]}" if number else "is the first"
            raise BadRecord(
                where,
                "turns out of order",
                f": turn {number + 1} is by the {role} and {follows}; after a system prompt, if any, user "
                "and assistant take turns, and the user begins. What tools return stands behind the turn "
                "of the assistant that called them.",
            )
        before = role
    if "assistant" not in roles:
        raise BadRecord(
            where, "no assistant turn, so nothing to train on", f"its roles are {', '.join(roles)}."
        )
