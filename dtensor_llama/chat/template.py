"""Conversations to token ids and a mask of what is trained: the assistant's turns and the tokens that end
them.

The template is the tokenizer's own (Jinja, as transformers renders it), else LLaMA-2's. Three things are
ours:
control tokens     come from the template alone. "</s>" in what somebody wrote is characters, not the end. (LLaMA-2's [INST]
                   and <<SYS>> are no control tokens but characters themselves: they stay what they are.)
the mask           from {% generation %} markers where the template has them; else an assistant's turn is what rendering it
                   adds to rendering all before it with a generation prompt. A template in which that is not so is refused.
where ids are cut  the ids before an answer are those of the prompt it is asked with, as in generation. A space that the
                   template puts before the answer belongs to the answer, as in its first piece ("▁Hello").

LLaMA-2's format, as in Meta's llama/generation.py: each pair of turns is BOS, "[INST] question [/INST] answer
", EOS, the system prompt inside the first question. The trained part is "answer ", its last space too, and
EOS: without that space the model would never get to the EOS behind it.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dtensor_llama.chat.conversations import THOUGHTS, TOOL_ROLES, ChatOptions, Conversation
from dtensor_llama.data.tokenizer import Tokenizer
from dtensor_llama.errors import BadRecord, UsageError

LLAMA2_TEMPLATE = """\
{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}\
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}\
{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}\
{% for turn in turns %}{% set content = (system if loop.first else '') + turn['content'] %}\
{% if turn['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
# Noncharacters: Unicode keeps them free for use inside a program.
ESCAPE, BEGIN, END, PROBE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} puts BEGIN and END around what it encloses."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller):
        return BEGIN + caller() + END


@dataclass(frozen=True)
class _Chat:
    """What a template is given. where: the beginning of what is said against it."""

    turns: list[dict]
    variables: dict
    where: str

    def first(self, n_turns: int) -> "_Chat":
        return replace(self, turns=self.turns[:n_turns])

    def with_turn(self, at: int, turn: dict) -> "_Chat":
        """With another turn in the place of turn `at`, or behind the last one."""
        return replace(self, turns=[*self.turns[:at], turn, *self.turns[at + 1 :]])


@dataclass(frozen=True)
class Example:
    """A conversation as it is trained on. ids: of all of it. trained: which of them. ends: those that end an
    answer."""

    ids: list[int]
    trained: list[bool]
    ends: set[int]


class ChatTemplate:
    """How one tokenizer writes a conversation.

    name: for printing. source: the Jinja text, to be saved with the model. Raises UsageError for a template
        that cannot be read, and for a tokenizer without any token to end a turn with."""

    def __init__(self, tokenizer: Tokenizer):
        own = tokenizer.chat_template
        self.name = (
            "the tokenizer's own chat template"
            if own
            else "LLaMA-2's [INST] format (the tokenizer has no template)"
        )
        self.source, self.where = own or LLAMA2_TEMPLATE, f"--data.tokenizer {tokenizer.path}"
        if tokenizer.eos_id is None and not own:
            raise UsageError(
                f"{self.where}: it has no EOS token, which LLaMA-2's chat format ends an answer with, and no "
                "chat_template of its own; give a tokenizer with one of them."
            )
        self.writer = TextWriter(tokenizer)
        self.tokenizer, self.controls = tokenizer, self.writer.controls
        self.has_markers = re.search(r"\{%-?\s*generation\b", self.source) is not None
        names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self.special_tokens = {
            name: tokenizer.token_of(i) if i is not None else "" for name, i in names.items()
        }
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(
            value, ensure_ascii=False, **options
        )
        environment.globals |= {
            "raise_exception": self._refuse_as_the_template_says,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        try:
            self.template = environment.from_string(self.source)
            tree = environment.parse(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"{self.where}: its chat_template is not Jinja that can be read ({error})."
            ) from None
        self.variable_names = jinja2.meta.find_undeclared_variables(tree)
        self.words = set(re.findall(r"\w+", self.source))
        self.looked_for = _looked_for(tree)
        self.accepted_shapes = set()  # of conversations whose every turn is known to be written

    def encode(
        self, turns: list[dict], where: str, variables: dict | None = None
    ) -> tuple[list[int], list[bool]]:
        """(ids, which of them are the assistant's) of a conversation that ends with the assistant: every turn
        of the assistant with the control tokens that end it, and nothing else. `where` begins the message of
        a BadRecord.

        turns: messages as transformers' apply_chat_template takes them. variables: what the template is given
        besides."""
        chat = self._as_named_here(_Chat(turns, variables or {}, where))
        self._refuse_unknown_fields(chat)
        chat, unprotected = self._protected(chat)
        text = self._render(chat)
        if not self.has_markers:
            text = self._marked(text, chat)
        text = self._protected_in(text, chat, unprotected)
        runs = self.writer.trim(self.writer.runs(text))
        n_answers, opened = (
            sum(turn["role"] == "assistant" for turn in turns),
            [False, *(trained for _, trained in runs)],
        )
        n_spans = sum(now and not before for before, now in zip(opened, opened[1:], strict=False))
        unended = any(
            now and not after and isinstance(what, str)
            for (what, now), (_, after) in zip(runs, [*runs[1:], ("", False)], strict=True)
        )
        if n_spans != n_answers or unended:
            raise self._unclear(
                where,
                "it ends them with no control token, so that the model would never learn to stop"
                if unended
                else f"it marks {n_spans} of them and there are {n_answers}",
            )
        self._refuse_unwritten_turns(chat)
        return self.writer.encode_runs(runs)

    def encode_prompt(self, turns: list[dict], variables: dict | None = None) -> list[int]:
        """Ids of a conversation that ends with the user or a tool, up to where the assistant's answer
        begins."""
        chat = self._as_named_here(_Chat(turns, variables or {}, "the prompt"))
        chat, unprotected = self._protected(chat, add_generation_prompt=True)
        text = self._render(chat, add_generation_prompt=True).replace(BEGIN, "").replace(END, "")
        return self.writer.encode_runs(self.writer.runs(self._protected_in(text, chat, unprotected)))[0]

    def example(self, conversation: Conversation, where: str, train_on: str) -> Example:
        """A conversation as `train_on` (--data.train-on) and the flags of its turns have it trained."""
        ids, answers = self.encode(conversation.turns, where, conversation.variables)
        return choose_trained(ids, answers, conversation, where, train_on)

    def unread(self, conversation: Conversation) -> set[str]:
        """Fields of the turns that neither this template nor anything else here reads."""
        read_here = {"role", "content", "function_call", *THOUGHTS}
        return set().union(*conversation.turns) - read_here - self.words

    # ---- what a template can write ----

    def _as_named_here(self, chat: _Chat) -> _Chat:
        """OpenAI's older names, function_call and the role function, by their newer ones where the template
        has only those."""
        if "function_call" in self.words or "tool_calls" not in self.words:
            return chat
        turns, made = [], {"function": "tool"}
        for turn in chat.turns:
            turn = turn | {"role": made.get(turn["role"], turn["role"])}
            if turn.get("function_call"):
                call = turn.pop("function_call")
                turn["tool_calls"] = [{"type": "function", "function": call}]
            turns.append(turn)
        return replace(chat, turns=turns)

    def _refuse_unknown_fields(self, chat: _Chat) -> None:
        """BadRecord for a field with something to say that the template does not read."""
        for name in chat.variables:
            if name not in self.variable_names:
                raise BadRecord(
                    chat.where,
                    f"has {name!r}, which the chat template does not write",
                    f"the chat_template of {self.tokenizer.path} knows no such variable; give one that "
                    "does, or take the field out.",
                )
        for number, turn in enumerate(chat.turns, 1):
            for name in ("tool_calls", "function_call", "reasoning_content"):
                known = name in self.words or name == "reasoning_content" and "thinking" in self.words
                if turn.get(name) and not known:
                    instead = (
                        "into the content" if name == "reasoning_content" else "with a tokenizer for tools"
                    )
                    raise BadRecord(
                        f"{chat.where}: turn {number}",
                        f"has {name!r}, which the chat template does not write",
                        f"the chat_template of {self.tokenizer.path} knows no such field; give one that "
                        f"does, or put it {instead}.",
                    )

    def _refuse_unwritten_turns(self, chat: _Chat) -> None:
        """BadRecord for a turn that the template leaves out, or writes as if the assistant had said it."""
        shape = tuple(
            (turn["role"], *(bool(turn.get(name)) for name in ("content", "tool_calls", "reasoning_content")))
            for turn in chat.turns
        )
        shape = (shape, tuple(chat.variables))
        if shape in self.accepted_shapes:
            return
        probes = {at: f"{PROBE}{at}{PROBE}" for at, turn in enumerate(chat.turns) if turn.get("content")}
        probed = replace(
            chat,
            turns=[
                turn | {"content": probes[at]} if at in probes else turn for at, turn in enumerate(chat.turns)
            ],
        )
        text = self._render(probed).replace(BEGIN, "").replace(END, "")
        for at, probe in probes.items():
            marked = self.has_markers and chat.turns[at]["role"] == "assistant"  # and counted, in encode
            if probe not in text and not marked:
                raise BadRecord(
                    f"{chat.where}: turn {at + 1}",
                    f"is by the {chat.turns[at]['role']} and is not written",
                    f"the chat_template of {self.tokenizer.path} leaves out what it says, or a turn is "
                    "written otherwise when another one follows it.",
                )
        for at, turn in enumerate(chat.turns):
            if turn["role"] not in TOOL_ROLES:
                continue
            as_assistant = self._render(probed.with_turn(at, turn | {"role": "assistant"}))
            if as_assistant == self._render(probed.with_turn(at, turn)):
                raise BadRecord(
                    f"{chat.where}: turn {at + 1}",
                    f"is by {turn['role']!r}, which the chat template does not know",
                    f"the chat_template of {self.tokenizer.path} writes it as it does the assistant's; give "
                    "one that knows tools.",
                )
        self.accepted_shapes.add(shape)

    # ---- control text that somebody wrote ----

    def _protected(
        self, chat: _Chat, add_generation_prompt: bool = False
    ) -> tuple[_Chat, dict[int, set[str]]]:
        """The conversation with what looks like a control token broken by an ESCAPE, which encode_runs takes
        out again; and {turn: such texts left whole in it}, as the template looks for them in there and would
        write something else.

        What the assistant says is protected less: a token that is not special (<think>, <tool_call>), or that
        the template looks for, is vocabulary which the assistant uses, and is read as transformers reads
        it."""
        for text in _strings(chat.turns):
            if any(mark in text for mark in (ESCAPE, BEGIN, END, PROBE)):
                raise BadRecord(
                    chat.where, "holds one of U+FDD0 to U+FDD3", "which are no characters; take it out."
                )
        found = [self._controls_in(turn) for turn in chat.turns]
        variables = _map_strings(chat.variables, lambda text: self.writer.escaped(text, self.controls))
        if not any(found) and variables == chat.variables:
            return chat, {}
        raw = self._render(chat, add_generation_prompt)
        tried = replace(
            chat,
            variables=variables,
            turns=[self._escaped(turn, texts) for turn, texts in zip(chat.turns, found, strict=True)],
        )
        if self._renders(tried, raw, add_generation_prompt):
            return tried, {}
        settled, unprotected = replace(chat, variables=variables), {}
        if not self._renders(settled, raw, add_generation_prompt):
            raise BadRecord(
                chat.where,
                "has control text in its tools or documents, which the chat template looks for",
                f"it cannot be told from what the chat_template of {self.tokenizer.path} writes itself; take "
                "it out.",
            )
        for at, texts in enumerate(found):
            for text in sorted(texts, key=len, reverse=True):
                tried = settled.with_turn(at, self._escaped(settled.turns[at], {text}))
                if self._renders(tried, raw, add_generation_prompt):
                    settled = tried
                else:
                    unprotected.setdefault(at, set()).add(text)
        return settled, unprotected

    def _controls_in(self, turn: dict) -> set[str]:
        texts = self.writer.special if turn["role"] == "assistant" else set(self.controls)
        if turn["role"] == "assistant":
            texts = {text for text in texts if not any(text in wanted for wanted in self.looked_for)}
        said = [*_strings({name: value for name, value in turn.items() if name != "role"})]
        said = [text for text in said if any(first in text for first in self.writer.first_characters)]
        return {text for text in texts if any(text in one for one in said)}

    def _escaped(self, turn: dict, texts: set[str]) -> dict:
        if not texts:
            return turn
        return _map_strings(turn, lambda text: self.writer.escaped(text, texts)) | {"role": turn["role"]}

    def _renders(self, chat: _Chat, text: str, add_generation_prompt: bool) -> bool:
        try:
            return self._render(chat, add_generation_prompt).replace(ESCAPE, "") == text
        except UsageError:
            return False

    def _protected_in(self, text: str, chat: _Chat, unprotected: dict[int, set[str]]) -> str:
        """`text` with an ESCAPE in the control texts that stood unprotected in the turns of others than the
        assistant."""
        if not unprotected:
            return text
        at_char = 0
        for at, turn in enumerate(chat.turns):
            said = turn["content"].strip() if isinstance(turn.get("content"), str) else ""
            found = text.find(said, at_char)
            if at in unprotected and turn["role"] != "assistant":
                if found < 0:
                    raise BadRecord(
                        f"{chat.where}: turn {at + 1}",
                        "has control text that the chat template rewrites",
                        f"{', '.join(unprotected[at])} cannot be told from what the chat_template of "
                        f"{self.tokenizer.path} writes itself; take it out.",
                    )
                escaped = self.writer.escaped(said, unprotected[at])
                text = text[:found] + escaped + text[found + len(said) :]
                said = escaped
            at_char = found + len(said) if found >= 0 else at_char
        return text

    # ---- text ----

    def _render(self, chat: _Chat, add_generation_prompt: bool = False) -> str:
        self._rendering = chat.where
        given = {"tools": None, "documents": None, **self.special_tokens, **chat.variables}
        try:
            return self.template.render(
                messages=chat.turns, add_generation_prompt=add_generation_prompt, **given
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            if isinstance(error, UsageError):
                raise
            raise BadRecord(
                chat.where,
                "the chat template cannot write this conversation",
                f"that of {self.tokenizer.path} ends in {type(error).__name__}: {error}.",
            ) from None

    def _refuse_as_the_template_says(self, message: str):
        raise BadRecord(
            self._rendering,
            "the chat template refuses this conversation",
            f"that of {self.tokenizer.path} says: {message}",
        )

    def _marked(self, text: str, chat: _Chat) -> str:
        """`text` with BEGIN and END around each answer."""
        for at in reversed([i for i, turn in enumerate(chat.turns) if turn["role"] == "assistant"]):
            begin, end = self._begin_of_answer(text, chat, at), self._end_of_answer(text, chat, at)
            if not 0 <= begin <= end:
                raise self._unclear(chat.where, "an answer does not begin with its generation prompt")
            text = text[:begin] + BEGIN + text[begin:end] + END + text[end:]
        return text

    def _begin_of_answer(self, text: str, chat: _Chat, at: int) -> int:
        """Where turn `at` begins in `text`: where the generation prompt ends that it is asked with; -1: it
        has none.

        Some templates leave out the earlier thoughts once another question follows. Then what comes before
        the turn is not what it was asked with, but the same header stands before it: the one that a
        generation prompt adds."""
        asked = self._render(chat.first(at), add_generation_prompt=True)
        if text.startswith(asked):
            return len(asked)
        header = asked.removeprefix(self._render(chat.first(at)))
        probed = self._render(chat.with_turn(at, {"role": "assistant", "content": PROBE}))
        begin = probed.rfind(header, 0, max(0, probed.find(PROBE))) + len(header)
        is_header = header != asked and self.writer.control.search(header) and begin >= len(header)
        return begin if is_header and text.startswith(probed[:begin]) else -1

    def _end_of_answer(self, text: str, chat: _Chat, at: int) -> int:
        """Where turn `at` ends in `text`: where rendering it as the last one does. Some templates write more
        behind the last turn, such as the header of another answer; then it ends with the control token behind
        what it says."""
        through = self._render(chat.first(at + 1))
        followed = text
        if at + 1 == len(chat.turns):
            try:
                followed = self._render(chat.with_turn(at + 1, {"role": "user", "content": PROBE}))
            except UsageError:  # it takes no more turns
                followed = through
        if text.startswith(through) and followed.startswith(through):
            return len(through)
        probed = self._render(chat.with_turn(at, {"role": "assistant", "content": PROBE}))
        behind = probed[probed.rfind(PROBE) + 1 :]
        # the marks are those of the answers behind this one
        unmarked = text.replace(BEGIN, "").replace(END, "")
        if PROBE not in probed or not unmarked.endswith(behind):
            raise self._unclear(chat.where, "a turn is written otherwise when another one follows it")
        end = len(unmarked) - len(behind)
        control = self.writer.control_behind_blanks.match(text, end)
        return control.end() if control else end

    def _unclear(self, where: str, why: str) -> UsageError:
        markers = "has" if self.has_markers else "has no"
        return BadRecord(
            where,
            "which tokens are the assistant's cannot be told",
            f"the chat_template of {self.tokenizer.path} {markers} {{% generation %}} markers, and {why}. "
            "Put {% generation %} and {% endgeneration %} around what the assistant writes in it, its end "
            "token included.",
        )


def choose_trained(
    ids: list[int], answers: list[bool], conversation: Conversation, where: str, train_on: str
) -> Example:
    """Which tokens of a conversation are trained, as `train_on` (--data.train-on) and the flags of its turns
    say.

    answers: of each token, whether it is of a turn of the assistant."""
    begins = [at for at, is_answer in enumerate(answers) if is_answer and not (at and answers[at - 1])]
    ends = [
        at for at, is_answer in enumerate(answers) if is_answer and not answers[at + 1 : at + 2] == [True]
    ]
    spoken = [
        flag
        for turn, flag in zip(conversation.turns, conversation.flags, strict=True)
        if turn["role"] == "assistant"
    ]
    for number, (turn, flag) in enumerate(zip(conversation.turns, conversation.flags, strict=True), 1):
        if turn["role"] != "assistant" and flag is not None and flag != (train_on == "all"):
            said = "it is" if flag else "it is not"
            trains, other = ("it", "answers") if train_on == "all" else ("what the assistant says", "all")
            raise BadRecord(
                f"{where}: turn {number}",
                f"is by the {turn['role']} and its flag says that {said} trained",
                f"--data.train-on {train_on} trains {trains}; take the flag out, or use {other}.",
            )
    trained = [train_on == "all"] * len(ids)
    for number, (begin, end, flag) in enumerate(zip(begins, ends, spoken, strict=True), 1):
        chosen = flag is not False and (train_on != "last-answer" or number == len(begins))
        trained[begin : end + 1] = [chosen] * (end + 1 - begin)
    return Example(ids, trained, {ids[end] for end in ends})


def _looked_for(tree: nodes.Template) -> set[str]:
    """The texts that a template compares with, splits at, or replaces; with </think> also <think>."""
    looking = [
        one for kind in (nodes.Compare, nodes.Call, nodes.Filter, nodes.Test) for one in tree.find_all(kind)
    ]
    constants = [constant.value for one in looking for constant in one.find_all(nodes.Const)]
    texts = {value for value in constants if isinstance(value, str)}
    return texts | {text.replace("</", "<") for text in texts}


def _strings(value) -> Iterator[str]:
    """All texts in a record, however deep; not the names of fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def _map_strings(value, change: Callable[[str], str]):
    """A copy of `value` with all texts in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _map_strings(one, change) for name, one in value.items()}
    return [_map_strings(one, change) for one in value] if isinstance(value, list) else value


class RawTemplate:
    """--data.template none: BOS if the tokenizer adds one, the prompt as it is, the completion as it is and
    EOS, which are trained. As ChatTemplate where training asks it; source: the template that came with the
    tokenizer, which is kept."""

    name = "no template: prompt and completion as they are"

    def __init__(self, tokenizer: Tokenizer):
        if tokenizer.eos_id is None:
            raise UsageError(
                f"--data.tokenizer {tokenizer.path}: it has no EOS token, which ends a completion with "
                "--data.template none; give a tokenizer with one."
            )
        self.tokenizer, self.writer, self.source = tokenizer, TextWriter(tokenizer), tokenizer.chat_template

    def example(self, conversation: Conversation, where: str, train_on: str) -> Example:
        """As ChatTemplate.example. BadRecord for more than a prompt and a completion."""
        roles = [turn["role"] for turn in conversation.turns]
        extra = [name for turn in conversation.turns for name in turn if name not in ("role", "content")]
        extra += [*conversation.variables]
        if (
            conversation.format not in ("prompt/completion", "question/answer")
            or roles != ["user", "assistant"]
            or extra
        ):
            what = (
                ", ".join(map(repr, dict.fromkeys(extra))) or f"{len(roles)} turns of {conversation.format}"
            )
            raise BadRecord(
                where,
                "more than a prompt and a completion",
                f"--data.template none has no way to write {what}; "
                "use --data.template auto, or give the fields prompt and completion only.",
            )
        prompt, completion = (turn["content"] for turn in conversation.turns)
        begin = [(self.tokenizer.bos_id, False)] if self.tokenizer.adds.bos else []
        texts = [(text, trained) for text, trained in ((prompt, False), (completion, True)) if text]
        ids, answers = self.writer.encode_runs([*begin, *texts, (self.tokenizer.eos_id, True)])
        return choose_trained(ids, answers, conversation, where, train_on)

    def unread(self, conversation: Conversation) -> set[str]:
        """As ChatTemplate.unread."""
        return set()


def template_of(tokenizer: Tokenizer, options: ChatOptions) -> ChatTemplate | RawTemplate:
    """What writes the conversations."""
    return RawTemplate(tokenizer) if options.template == "none" else ChatTemplate(tokenizer)


class TextWriter:
    """Text with control tokens in it to ids.

    controls: {text: AddedToken} of what means one id where a template writes it. special: those that it alone
    may write."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.plain = tokenizer, tokenizer.plain
        self.controls = {text: token for text, token in tokenizer.control_tokens.items() if len(text) > 1}
        ends = [tokenizer.token_of(i) for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
        self.special = {text for text, token in self.controls.items() if token.special or text in ends}
        self.first_characters = {text[0] for text in self.controls}
        any_control = _any_of(self.controls)
        self.control_or_mark = re.compile(f"({BEGIN}|{END}|{any_control})")
        self.control = re.compile(any_control)
        self.control_behind_blanks = re.compile(rf"\s*(?:{any_control})")
        newline = self.plain.encode("\n")
        self.has_dummy_prefix = self.plain.encode("\na") != newline + self.plain.encode("a")
        self.prefixes_every_text = tokenizer.prefixes_every_text

    def escaped(self, text: str, controls: Iterable[str]) -> str:
        """`text` with each of `controls` in it broken by an ESCAPE behind its first character."""
        if not any(one in text for one in controls):
            return text
        return re.sub(f"(?=(?:{_any_of(controls)}))(.)", rf"\1{ESCAPE}", text, flags=re.DOTALL)

    def runs(self, text: str) -> list[tuple[str | int, bool]]:
        """(characters or the id of a control token, whether trained), in order."""
        runs, trained, swallow = [], False, False
        for part in self.control_or_mark.split(text):
            if part in (BEGIN, END):
                trained = part == BEGIN
            elif part in self.controls:
                token = self.controls[part]
                # some take the whitespace beside them along
                if token.lstrip and runs and isinstance(runs[-1][0], str):
                    runs[-1] = runs[-1][0].rstrip(), runs[-1][1]
                runs.append((self.tokenizer.id_of(part), trained))
                swallow = token.rstrip
            elif part:
                part, swallow = part.lstrip() if swallow else part, False
                runs.append((part, trained))
        return [run for run in runs if run[0] != ""]

    def trim(self, runs: list[tuple[str | int, bool]]) -> list[tuple[str | int, bool]]:
        """Trained turns end with a control token: one just behind a marker joins, whitespace behind one
        leaves."""
        runs = list(runs)
        for i, (what, trained) in enumerate(runs):
            ends = trained and (i + 1 == len(runs) or not runs[i + 1][1])
            if ends and isinstance(what, str) and not what.strip() and i and isinstance(runs[i - 1][0], int):
                runs[i] = what, False
            elif ends and isinstance(what, str) and i + 1 < len(runs) and isinstance(runs[i + 1][0], int):
                runs[i + 1] = runs[i + 1][0], True
        return runs

    def encode_runs(self, runs: list[tuple[str | int, bool]]) -> tuple[list[int], list[bool]]:
        """Text between two control tokens is encoded as one, as transformers does, but cut where training
        begins."""
        ids, mask, first = [], [], 0  # first: of the ids since the last control token
        done = ""  # the text of ids[first:]
        for what, trained in runs:
            if isinstance(what, int):
                ids, mask = [*ids, what], [*mask, trained]
                first, done = len(ids), ""
                continue
            text = what.replace(ESCAPE, "")
            whole, cut = self._encode_text(done + text, at_start=first == 0), len(ids) - first
            if done and whole[:cut] != ids[first:]:
                cut = len(self._encode_text(done.rstrip(" "), at_start=first == 0)) if trained else cut
                if whole[:cut] != ids[first : first + cut]:
                    whole, cut = ids[first:] + self._continuation(text), len(ids) - first
            ids, mask = ids[: first + cut] + whole[cut:], mask[: first + cut] + [trained] * (len(whole) - cut)
            done += text
        return ids, mask

    def _encode_text(self, text: str, at_start: bool) -> list[int]:
        if at_start or self.prefixes_every_text or not self.has_dummy_prefix:
            return self.plain.encode(text)
        return self._continuation(text)

    def _continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on where another ended: without dummy prefix. A newline joins no
        neighbour."""
        before = "\n" if self.has_dummy_prefix else ""
        return self.plain.encode(before + text)[len(self.plain.encode(before)) :]


def _any_of(texts: Iterable[str]) -> str:
    """A regular expression for any of `texts`, the longest first; for none of them one that never matches."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)"
