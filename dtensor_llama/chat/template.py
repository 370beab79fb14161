"""Turns conversations into token ids and a loss mask of the assistant's turns and their end tokens.

The template is the tokenizer's own (Jinja, rendered as in transformers), or else LLaMA-2's. Three things are
different from transformers:

control tokens     come from the template alone. If a person wrote "</s>", it is encoded as characters, not as
                   the end. (LLaMA-2's [INST] and <<SYS>> are not control tokens. They are always characters.)
the mask           comes from {% generation %} markers if the template has them. If it has none, the text
                   before an assistant's turn is rendered with a generation prompt, and then again with the
                   turn; the turn is what was added. A template for which the second text does not begin with
                   the first is refused. If the prompt opens a thought (<think>) and the template writes the
                   turn without one, the turn begins where that opening would be.
where ids are cut  The ids before an answer are those of the prompt that asks for it, as in generation. A
                   space that the template puts before the answer becomes part of the answer's first piece.

LLaMA-2's format is that of Meta's llama/generation.py: each pair of turns is BOS, "[INST] question [/INST]
answer ", EOS, with the system prompt inside the first question. The trained part is "answer ", including its
last space, and EOS. Without that space the model would never reach the EOS after it.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from operator import itemgetter

import jinja2
import jinja2.meta
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dtensor_llama.chat.conversations import THOUGHTS, TOOL_ROLES, ChatOptions, Conversation
from dtensor_llama.chat.writer import BEGIN, END, ESCAPE, Run, TextWriter
from dtensor_llama.data.tokenizer import Tokenizer
from dtensor_llama.errors import BadRecord, UsageError

LLAMA2_TEMPLATE = """\
{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}\
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}\
{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}\
{% for turn in turns %}{% set content = (system if loop.first else '') + turn['content'] %}\
{% if turn['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
PROBE = "\ufdd3"  # takes the place of a turn's content, to find out where a template writes it
# The end of a generation prompt that opens a thought or writes an empty one, in the form of <think>,
# <|begin_of_thought|> or [THINK].
OPENED_THOUGHT = re.compile(
    r"(?i)(?:<[^<>/]*(?:think|thought)[^<>/]*>|\[think\])\s*(?:(?:</think(?:ing)?>|\[/think\])\s*)?\Z"
)


@dataclass(frozen=True)
class Example:
    """Holds a conversation as it is trained on."""

    ids: list[int]
    trained: list[bool]  # for each id, whether it counts in the loss
    ends: set[int]  # the ids that end an answer


@dataclass(frozen=True)
class _Chat:
    """Holds what a template gets. Error messages about the conversation begin with `where`."""

    turns: list[dict]
    variables: dict
    where: str

    def first(self, n_turns: int) -> "_Chat":
        """Return the conversation with its first n_turns turns only."""
        return replace(self, turns=self.turns[:n_turns])

    def with_turn(self, at: int, turn: dict) -> "_Chat":
        """Return the conversation with turn `at` replaced, or with a turn added after the last one."""
        return replace(self, turns=[*self.turns[:at], turn, *self.turns[at + 1 :]])

    def with_answer_probed(self, at: int) -> "_Chat":
        """Return the conversation in which turn `at` is an answer that says PROBE."""
        return self.with_turn(at, {"role": "assistant", "content": PROBE})


class ChatTemplate:
    """Writes conversations with the chat template of one tokenizer.

    name: a description for the log
    source: the Jinja text, which is saved with the model
    identity: everything about the template that decides the ids, for the fingerprint of a corpus
    Raises UsageError for a template that cannot be read, for several templates of which none is called
    default, and for a tokenizer that has neither a template nor an EOS token.
    """

    def __init__(self, tokenizer: Tokenizer, own: str | None = None):
        """Compile the template.

        own: the Jinja source of one of the tokenizer's templates; None: the one that transformers would use.
            Then conversations with tools use the template called tool_use if there is one, as there."""
        self.tokenizer, self.where, self.with_tools = tokenizer, f"tokenizer={tokenizer.path}", None
        if own is None:
            templates, own = tokenizer.chat_templates, tokenizer.chat_template
            if templates and own is None:
                raise UsageError(
                    f"{self.where}: it has the chat templates {', '.join(templates)}, and none of them is "
                    "called default, so it is not clear which one to use; call one of them default."
                )
            if "tool_use" in templates:
                self.with_tools = ChatTemplate(tokenizer, templates["tool_use"])
        if own is None and tokenizer.eos_id is None:
            raise UsageError(
                f"{self.where}: it has no EOS token, which LLaMA-2's chat format ends an answer with, and no "
                "chat_template of its own; give a tokenizer with one of them."
            )
        self.name, self.source = "the tokenizer's own chat template", own
        if own is None:
            self.name = "LLaMA-2's [INST] format (the tokenizer has no template)"
            self.source = LLAMA2_TEMPLATE
        self.identity = (self.source, self.with_tools.source) if self.with_tools else self.source
        self.writer = TextWriter(tokenizer)
        self.has_markers = re.search(r"\{%-?\s*generation\b", self.source) is not None
        self.special_tokens = {"bos_token": "", "eos_token": ""} | tokenizer.ends
        environment = _environment(self._refuse_as_the_template_says)
        try:
            self.template, tree = environment.from_string(self.source), environment.parse(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"{self.where}: its chat_template is not Jinja that can be read ({error})."
            ) from None
        self.variable_names = jinja2.meta.find_undeclared_variables(tree)
        self.words = set(re.findall(r"\w+", self.source))
        self.looked_for = _looked_for(tree)
        self.accepted_shapes = set()  # shapes of conversations of which the template writes every turn

    def encode(
        self, turns: list[dict], where: str, variables: dict | None = None
    ) -> tuple[list[int], list[bool]]:
        """Return (ids, which of them are the assistant's) for a conversation that ends with the assistant.

        The ids of the assistant are those of all its turns and of the control tokens that end them.
        turns: messages as transformers' apply_chat_template takes them
        where: file and line, with which the message of a BadRecord begins
        variables: what the template gets besides the turns
        Raises BadRecord if the template does not write everything, or if it does not show what the
        assistant's tokens are.
        """
        chosen = self._for(variables)
        if chosen is not self:
            return chosen.encode(turns, where, variables)
        chat = self._as_named_here(_Chat(turns, variables or {}, where))
        self._refuse_unknown_fields(chat)
        chat, unprotected = self._protected(chat)
        text = self._render(chat)
        if not self.has_markers:
            text = self._marked(text, chat)
        text = self._protected_in(text, chat, unprotected)
        runs = self.writer.trimmed(self.writer.runs(text))
        self._check_spans(runs, chat)
        self._refuse_unwritten_turns(chat)
        self._refuse_unwritten_thought(text, turns[-1], chat)
        return self.writer.encode_runs(runs)

    def encode_prompt(self, turns: list[dict], variables: dict | None = None) -> list[int]:
        """Return the ids of a conversation that ends with the user or a tool, up to the start of the answer.

        turns and variables are as in encode. Raises BadRecord if the template cannot write them."""
        chosen = self._for(variables)
        if chosen is not self:
            return chosen.encode_prompt(turns, variables)
        chat = self._as_named_here(_Chat(turns, variables or {}, "the prompt"))
        chat, unprotected = self._protected(chat, add_generation_prompt=True)
        text = _without_marks(self._render(chat, add_generation_prompt=True))
        return self.writer.encode_runs(self.writer.runs(self._protected_in(text, chat, unprotected)))[0]

    def example(self, conversation: Conversation, where: str, train_on: str) -> Example:
        """Return a conversation as an Example whose mask follows `train_on` and the flags of its turns.

        train_on: a value of ChatOptions.train_on. where: file and line, for the BadRecord that encode may
            raise."""
        ids, answers = self.encode(conversation.turns, where, conversation.variables)
        return choose_trained(ids, answers, conversation, where, train_on)

    def unread(self, conversation: Conversation) -> set[str]:
        """Return the fields of the turns that neither this template nor anything else here reads."""
        read_here = {"role", "content", "function_call", *THOUGHTS}
        return set().union(*conversation.turns) - read_here - self._for(conversation.variables).words

    def _for(self, variables: dict | None) -> "ChatTemplate":
        """Return the template for a conversation with these variables."""
        return self.with_tools if self.with_tools and variables and "tools" in variables else self

    # ---- what a template can write ----

    def _as_named_here(self, chat: _Chat) -> _Chat:
        """Return the conversation with the names that the template knows.

        OpenAI's older names are function_call and the role function, the newer ones tool_calls and tool."""
        if "function_call" in self.words or "tool_calls" not in self.words:
            return chat
        turns = []
        for turn in chat.turns:
            turn = turn | {"role": "tool" if turn["role"] == "function" else turn["role"]}
            if turn.get("function_call"):
                call = turn.pop("function_call")
                turn["tool_calls"] = [{"type": "function", "function": call}]
            turns.append(turn)
        return replace(chat, turns=turns)

    def _refuse_unknown_fields(self, chat: _Chat) -> None:
        """Raise BadRecord for a field with content that the template does not read."""
        for name in chat.variables:
            if name not in self.variable_names:
                raise self._bad(
                    chat.where,
                    f"has {name!r}, which the chat template does not write",
                    "knows no such variable; give one that does, or take the field out.",
                )
        instead = {"tool_calls": "with a tokenizer for tools", "reasoning_content": "into the content"}
        instead["function_call"] = instead["tool_calls"]
        known = self.words | ({"reasoning_content"} if "thinking" in self.words else set())
        for number, turn in enumerate(chat.turns, 1):
            for name in instead:
                if turn.get(name) and name not in known:
                    raise self._bad(
                        f"{chat.where}: turn {number}",
                        f"has {name!r}, which the chat template does not write",
                        f"knows no such field; give one that does, or put it {instead[name]}.",
                    )

    def _refuse_unwritten_turns(self, chat: _Chat) -> None:
        """Raise BadRecord for a turn that the template leaves out, or writes as one of the assistant's."""
        fields = ("content", "tool_calls", "reasoning_content")
        present = [tuple(name for name in fields if turn.get(name)) for turn in chat.turns]
        shape = tuple(turn["role"] for turn in chat.turns), tuple(present), tuple(chat.variables)
        if shape in self.accepted_shapes:
            return
        probes = {at: f"{PROBE}{at}{PROBE}" for at, turn in enumerate(chat.turns) if turn.get("content")}
        probed = chat
        for at, probe in probes.items():
            probed = probed.with_turn(at, chat.turns[at] | {"content": probe})
        text = self._render(probed)
        for at, probe in probes.items():
            role = chat.turns[at]["role"]
            is_counted = self.has_markers and role == "assistant"  # _check_spans counts these turns
            if probe not in _without_marks(text) and not is_counted:
                raise self._bad(
                    f"{chat.where}: turn {at + 1}",
                    f"is by the {role} and is not written",
                    "leaves out what it says, or a turn is written otherwise when another one follows it.",
                )
        for at, turn in enumerate(probed.turns):
            if turn["role"] not in TOOL_ROLES:
                continue
            as_assistant = probed.with_turn(at, turn | {"role": "assistant"})
            if self._render(as_assistant) == text:
                raise self._bad(
                    f"{chat.where}: turn {at + 1}",
                    f"is by {turn['role']!r}, which the chat template does not know",
                    "writes it as it does the assistant's; give one that knows tools.",
                )
        self.accepted_shapes.add(shape)

    def _refuse_unwritten_thought(self, text: str, turn: dict, chat: _Chat) -> None:
        """Raise BadRecord if the template leaves out the thought in the last answer.

        Earlier thoughts may be left out, as they are in generation."""
        before, ended, _ = (turn.get("content") or "").partition("</think>")
        thought = turn.get("reasoning_content") or (before.split("<think>")[-1] if ended else "")
        if thought.strip() not in _without_marks(text).replace(ESCAPE, ""):
            raise self._bad(
                chat.where,
                "has a thought that the chat template does not write",
                "takes it out of the last answer, so that it would not be trained; give one that keeps it, "
                "or take the thought out.",
            )

    # ---- control text that a person wrote ----

    def _protected(
        self, chat: _Chat, add_generation_prompt: bool = False
    ) -> tuple[_Chat, dict[int, set[str]]]:
        """Return the conversation with an ESCAPE in every text that looks like a control token.

        encode_runs takes the ESCAPEs out again. The second result is {turn: texts that were left without
        one}, because the template looks for them in that turn and would write something else. The assistant's
        turns are
        protected less: a token that is not special (<think>, <tool_call>), or that the template looks for,
        belongs to the assistant's vocabulary, and is read as in transformers.
        """
        for text in _strings(chat.turns):
            if any(mark in text for mark in (ESCAPE, BEGIN, END, PROBE)):
                raise BadRecord(
                    chat.where, "holds one of U+FDD0 to U+FDD3", "these are not characters; take it out."
                )
        found = [self._controls_in(turn) for turn in chat.turns]
        all_controls = self.writer.controls
        settled = replace(
            chat, variables=_map_strings(chat.variables, lambda text: self.writer.escaped(text, all_controls))
        )
        if not any(found) and settled == chat:
            return chat, {}
        raw = self._render(chat, add_generation_prompt)

        def writes_the_same(tried: _Chat) -> bool:
            try:
                return self._render(tried, add_generation_prompt).replace(ESCAPE, "") == raw
            except UsageError:
                return False

        turns = [self._escaped(turn, texts) for turn, texts in zip(chat.turns, found, strict=True)]
        if writes_the_same(replace(settled, turns=turns)):
            return replace(settled, turns=turns), {}
        if not writes_the_same(settled):
            raise self._bad(
                chat.where,
                "has control text in its tools or documents, which the chat template looks for",
                "writes the same text itself, and the two cannot be told apart; take it out.",
            )
        unprotected = {}
        for at, texts in enumerate(found):
            for text in sorted(texts, key=len, reverse=True):
                tried = settled.with_turn(at, self._escaped(settled.turns[at], {text}))
                if writes_the_same(tried):
                    settled = tried
                else:
                    unprotected.setdefault(at, set()).add(text)
        return settled, unprotected

    def _controls_in(self, turn: dict) -> set[str]:
        texts = set(self.writer.controls)
        if turn["role"] == "assistant":
            wanted = self.looked_for
            texts = {text for text in self.writer.special if not any(text in one for one in wanted)}
        said = list(_strings({name: value for name, value in turn.items() if name != "role"}))
        said = [text for text in said if any(first in text for first in self.writer.first_characters)]
        return {text for text in texts if any(text in one for one in said)}

    def _escaped(self, turn: dict, texts: set[str]) -> dict:
        if not texts:
            return turn
        return _map_strings(turn, lambda text: self.writer.escaped(text, texts)) | {"role": turn["role"]}

    def _protected_in(self, text: str, chat: _Chat, unprotected: dict[int, set[str]]) -> str:
        """Return `text` with an ESCAPE in the texts of `unprotected`, except in the assistant's turns."""
        at_char = 0
        for at, turn in enumerate(chat.turns if unprotected else []):
            said = turn["content"].strip() if isinstance(turn.get("content"), str) else ""
            found = text.find(said, at_char)
            if at in unprotected and turn["role"] != "assistant":
                if found < 0:
                    raise self._bad(
                        f"{chat.where}: turn {at + 1}",
                        "has control text that the chat template rewrites",
                        f"writes {', '.join(unprotected[at])} itself, and the two cannot be told apart; "
                        "take it out.",
                    )
                escaped = self.writer.escaped(said, unprotected[at])
                text = text[:found] + escaped + text[found + len(said) :]
                said = escaped
            at_char = found + len(said) if found >= 0 else at_char
        return text

    # ---- text, and where the answers are in it ----

    def _render(self, chat: _Chat, add_generation_prompt: bool = False) -> str:
        self._rendering = chat.where
        given = {"tools": None, "documents": None, **self.special_tokens, **chat.variables}
        try:
            return self.template.render(
                messages=chat.turns, add_generation_prompt=add_generation_prompt, **given
            )
        except UsageError:
            raise
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise self._bad(
                chat.where,
                "the chat template cannot write this conversation",
                f"raises {type(error).__name__}: {error}.",
            ) from None

    def _refuse_as_the_template_says(self, message: str):
        raise self._bad(self._rendering, "the chat template refuses this conversation", f"says: {message}")

    def _marked(self, text: str, chat: _Chat) -> str:
        """Return `text` with BEGIN and END around each answer."""
        answers = [at for at, turn in enumerate(chat.turns) if turn["role"] == "assistant"]
        for at in reversed(answers):
            begin, end = self._begin_of_answer(text, chat, at), self._end_of_answer(text, chat, at)
            if not 0 <= begin <= end:
                raise self._unclear(chat, "an answer does not begin with its generation prompt")
            text = text[:begin] + BEGIN + text[begin:end] + END + text[end:]
        return text

    def _begin_of_answer(self, text: str, chat: _Chat, at: int) -> int:
        """Return the offset in `text` at which turn `at` begins, or -1 if it cannot be found.

        A turn begins where the prompt that asks for it ends. But some templates leave out earlier thoughts
        once another question follows. Then the text before the turn is not that prompt, but it ends with the
        same header, the one that a generation prompt adds. If the header opens a thought and the turn has
        none, the turn begins after the rest of the header.
        """
        asked = self._render(chat.first(at), add_generation_prompt=True)
        if text.startswith(asked):
            return len(asked)
        header = asked.removeprefix(self._render(chat.first(at)))
        probed = self._render(chat.with_answer_probed(at))
        before = probed[: max(0, probed.find(PROBE))]
        for tried in (header, OPENED_THOUGHT.sub("", header)):
            found = before.rfind(tried)
            begin = found + len(tried)
            is_header = tried != asked and self.writer.control.search(tried) and found >= 0
            if is_header and text.startswith(probed[:begin]):
                return begin
        return -1

    def _end_of_answer(self, text: str, chat: _Chat, at: int) -> int:
        """Return the offset in `text` at which turn `at` ends.

        It is the length of the conversation rendered up to this turn. But some templates write more after the
        last turn, such as the header of another answer. Then the turn ends with the control token that
        follows its content."""
        through = self._render(chat.first(at + 1))
        followed = text
        if at + 1 == len(chat.turns):
            try:
                followed = self._render(chat.with_turn(at + 1, {"role": "user", "content": PROBE}))
            except UsageError:  # it takes no more turns
                followed = through
        if text.startswith(through) and followed.startswith(through):
            return len(through)
        probed = self._render(chat.with_answer_probed(at))
        behind = probed[probed.rfind(PROBE) + 1 :]
        unmarked = _without_marks(text)  # `text` already has the marks of later answers
        if PROBE not in probed or not unmarked.endswith(behind):
            raise self._unclear(chat, "a turn is written otherwise when another one follows it")
        end = len(unmarked) - len(behind)
        control = self.writer.control_behind_blanks.match(text, end)
        return control.end() if control else end

    def _check_spans(self, runs: list[Run], chat: _Chat) -> None:
        """Raise BadRecord unless each answer is one trained span that ends with a control token."""
        n_answers = sum(turn["role"] == "assistant" for turn in chat.turns)
        spans = [list(span) for trained, span in groupby(runs, key=itemgetter(1)) if trained]
        if any(isinstance(span[-1][0], str) for span in spans):
            raise self._unclear(
                chat, "it ends them with no control token, so that the model would never learn to stop"
            )
        if len(spans) != n_answers:
            raise self._unclear(chat, f"it marks {len(spans)} of them and there are {n_answers}")

    def _unclear(self, chat: _Chat, why: str) -> BadRecord:
        return self._bad(
            chat.where,
            "it is not clear which tokens are the assistant's",
            f"{'has' if self.has_markers else 'has no'} {{% generation %}} markers, and {why}. Put {{% "
            "generation %} and {% endgeneration %} around what the assistant writes in it, its end "
            "token included.",
        )

    def _bad(self, where: str, what_is_wrong: str, of_the_template: str) -> BadRecord:
        return BadRecord(
            where, what_is_wrong, f"the chat_template of {self.tokenizer.path} {of_the_template}"
        )


class RawTemplate:
    """Writes BOS (if the tokenizer adds one), prompt and completion as they are, and EOS.

    The completion and EOS are trained. It has the methods of ChatTemplate that training needs.
    source: the template that came with the tokenizer, which an export keeps
    Raises UsageError for a tokenizer without an EOS token."""

    name = "no template: prompt and completion as they are"

    def __init__(self, tokenizer: Tokenizer):
        if tokenizer.eos_id is None:
            raise UsageError(
                f"tokenizer={tokenizer.path}: it has no EOS token, which ends a completion with "
                "template=none; give a tokenizer with one."
            )
        self.tokenizer, self.writer = tokenizer, TextWriter(tokenizer)
        self.source = self.identity = tokenizer.chat_template

    def example(self, conversation: Conversation, where: str, train_on: str) -> Example:
        """Return a conversation as an Example; raise BadRecord unless it is one prompt and one completion."""
        turns = conversation.turns
        extra = set().union(*turns) - {"role", "content"} | set(conversation.variables)
        is_pair = conversation.format in ("prompt/completion", "question/answer") and len(turns) == 2
        if extra or not is_pair:
            what = ", ".join(map(repr, sorted(extra))) or f"{len(turns)} turns of {conversation.format}"
            raise BadRecord(
                where,
                "more than a prompt and a completion",
                f"template=none has no way to write {what}; use template=auto, or give the fields prompt "
                "and completion only.",
            )
        prompt, completion = (turn["content"] for turn in turns)
        begin = [(self.tokenizer.bos_id, False)] if self.tokenizer.adds.bos else []
        texts = [(text, trained) for text, trained in ((prompt, False), (completion, True)) if text]
        ids, answers = self.writer.encode_runs([*begin, *texts, (self.tokenizer.eos_id, True)])
        return choose_trained(ids, answers, conversation, where, train_on)

    def unread(self, conversation: Conversation) -> set[str]:
        """Return no fields, because `example` refuses whatever cannot be written."""
        return set()


def template_of(tokenizer: Tokenizer, options: ChatOptions) -> ChatTemplate | RawTemplate:
    """Return the template that the options ask for. Raises the UsageErrors of the two classes."""
    return RawTemplate(tokenizer) if options.template == "none" else ChatTemplate(tokenizer)


def choose_trained(
    ids: list[int], answers: list[bool], conversation: Conversation, where: str, train_on: str
) -> Example:
    """Choose which tokens of a conversation count in the loss, as `train_on` and the flags of its turns say.

    answers: for each id, whether it belongs to a turn of the assistant
    Raises BadRecord, beginning with `where`, for a flag on another turn that contradicts `train_on`."""
    spoken = []  # the flags of the assistant's turns
    for number, (turn, flag) in enumerate(zip(conversation.turns, conversation.flags, strict=True), 1):
        if turn["role"] == "assistant":
            spoken.append(flag)
        elif flag is not None and flag != (train_on == "all"):
            trains, other = ("it", "answers") if train_on == "all" else ("what the assistant says", "all")
            raise BadRecord(
                f"{where}: turn {number}",
                f"is by the {turn['role']} and its flag says that it is {'' if flag else 'not '}trained",
                f"train_on={train_on} trains {trains}; take the flag out, or use train_on={other}.",
            )
    # Where an answer begins, where it ends, where the next one begins, and so on.
    edges = np.flatnonzero(np.diff(answers, prepend=False, append=False)).tolist()
    begins, ends = edges[::2], edges[1::2]
    trained = [train_on == "all"] * len(ids)
    for number, (begin, end, flag) in enumerate(zip(begins, ends, spoken, strict=True), 1):
        chosen = flag is not False and (train_on != "last-answer" or number == len(begins))
        trained[begin:end] = [chosen] * (end - begin)
    return Example(ids, trained, {ids[end - 1] for end in ends})


# ---- Jinja ----


class _Generation(Extension):
    """Makes {% generation %} ... {% endgeneration %} put BEGIN and END around the text between them."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller):
        return BEGIN + caller() + END


def _environment(raise_exception: Callable[[str], None]) -> jinja2.Environment:
    """Return a Jinja environment with the functions that transformers gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form)
    )
    return environment


def _looked_for(tree: nodes.Template) -> set[str]:
    """Return the texts that a template compares with, splits at or replaces.

    If </think> is one of them, <think> is returned too."""
    texts = set()
    for kind in (nodes.Compare, nodes.Call, nodes.Filter, nodes.Test):
        for node in tree.find_all(kind):
            texts |= {one.value for one in node.find_all(nodes.Const) if isinstance(one.value, str)}
    return texts | {text.replace("</", "<") for text in texts}


def _without_marks(text: str) -> str:
    return text.replace(BEGIN, "").replace(END, "")


def _strings(value) -> Iterator[str]:
    """Yield all texts in a record, at any depth, but not the names of fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def _map_strings(value, change: Callable[[str], str]):
    """Return a copy of `value` in which change() was applied to every text."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _map_strings(one, change) for name, one in value.items()}
    return [_map_strings(one, change) for one in value] if isinstance(value, list) else value
