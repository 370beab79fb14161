"""Conversations to token ids and a mask of what is trained: the assistant's turns and the tokens that end them.

The template is the tokenizer's own (Jinja, as transformers renders it), else LLaMA-2's. Three things are ours:
control tokens     come from the template alone. "</s>" in what somebody wrote is characters, not the end. (LLaMA-2's [INST]
                   and <<SYS>> are no control tokens but characters themselves: they stay what they are.)
the mask           from {% generation %} markers where the template has them; else an assistant's turn is what rendering it
                   adds to rendering all before it with a generation prompt. A template in which that is not so is refused.
where ids are cut  the ids before an answer are those of the prompt it is asked with, as in generation. A space that the
                   template puts before the answer belongs to the answer, as in its first piece ("▁Hello").

LLaMA-2's format, as in Meta's llama/generation.py: each pair of turns is BOS, "[INST] question [/INST] answer ", EOS, the
system prompt inside the first question. The trained part is "answer ", its last space too, and EOS: without that space the
model would never get to the EOS behind it.
"""

import json
import re
from datetime import datetime

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dtensor_llama.data.tokenizer import Tokenizer
from dtensor_llama.errors import UsageError

LLAMA2_TEMPLATE = """\
{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}\
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}\
{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}\
{% for turn in turns %}{% set content = (system if loop.first else '') + turn['content'] %}\
{% if turn['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
ESCAPE, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2"       # noncharacters: Unicode keeps them free for use inside a program


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} puts BEGIN and END around what it encloses."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller):
        return BEGIN + caller() + END


class ChatTemplate:
    """How one tokenizer writes a conversation.

    name: for printing. source: the Jinja text, to be saved with the model. Raises UsageError for a template that cannot be
    read, and for a tokenizer without any token to end a turn with."""

    def __init__(self, tokenizer: Tokenizer):
        own = tokenizer.chat_template
        self.name = "the tokenizer's own chat template" if own else "LLaMA-2's [INST] format (the tokenizer has no template)"
        self.source, self.where = own or LLAMA2_TEMPLATE, f"--data.tokenizer {tokenizer.path}"
        if tokenizer.eos_id is None and not own:
            raise UsageError(f"{self.where}: it has no EOS token, which LLaMA-2's chat format ends an answer with, and no "
                             "chat_template of its own; give a tokenizer with one of them.")
        self.tokenizer, self.plain = tokenizer, tokenizer.plain
        self.controls = {text: token for text, token in tokenizer.control_tokens.items() if len(text) > 1}
        longest_first = "|".join(re.escape(text) for text in sorted(self.controls, key=len, reverse=True)) or "(?!)"
        self.control_or_mark = re.compile(f"({BEGIN}|{END}|{longest_first})")
        self.looks_like_control = re.compile(f"(?=(?:{longest_first}))(.)", re.DOTALL)
        self.has_markers = re.search(r"\{%-?\s*generation\b", self.source) is not None
        newline = self.plain.encode("\n")
        self.has_dummy_prefix = self.plain.encode("\na") != newline + self.plain.encode("a")
        self.prefixes_every_text = tokenizer.prefixes_every_text
        names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self.variables = {name: tokenizer.token_of(i) if i is not None else "" for name, i in names.items()}
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=[_Generation, "jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals |= {"raise_exception": self._refuse_as_the_template_says,
                                "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self.template = environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(f"{self.where}: its chat_template is not Jinja that can be read ({error}).") from None

    def encode(self, turns: list[dict[str, str]], where: str) -> tuple[list[int], list[bool]]:
        """(ids, which of them are trained) of a conversation that ends with the assistant. Every turn of the assistant is
        trained, with the control tokens that end it, and nothing else. `where` begins the message of a UsageError."""
        turns = [turn | {"content": self._escaped(turn["content"], where)} for turn in turns]
        text = self._render(turns, where)
        if not self.has_markers:
            text = self._marked(text, turns, where)
        runs = self._trim(self._runs(text))
        n_answers, opened = sum(turn["role"] == "assistant" for turn in turns), [False, *(trained for _, trained in runs)]
        n_spans = sum(now and not before for before, now in zip(opened, opened[1:], strict=False))
        unended = any(now and not after and isinstance(what, str)
                      for (what, now), (_, after) in zip(runs, [*runs[1:], ("", False)], strict=True))
        if n_spans != n_answers or unended:
            raise self._unclear(where, "it ends them with no control token, so that the model would never learn to stop"
                                if unended else f"it marks {n_spans} of them and there are {n_answers}")
        return self._encode_runs(runs)

    def encode_prompt(self, turns: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation that ends with the user, up to where the assistant's answer begins."""
        turns = [turn | {"content": self._escaped(turn["content"], "the prompt")} for turn in turns]
        text = self._render(turns, "the prompt", add_generation_prompt=True)
        return self._encode_runs(self._runs(text.replace(BEGIN, "").replace(END, "")))[0]

    # ---- text ----

    def _escaped(self, content: str, where: str) -> str:
        """`content` with what looks like a control token broken by an ESCAPE, which _encode_runs takes out again."""
        if any(mark in content for mark in (ESCAPE, BEGIN, END)):
            raise UsageError(f"{where}: holds one of U+FDD0 to U+FDD2, which are no characters; take it out.")
        return self.looks_like_control.sub(rf"\1{ESCAPE}", content)

    def _render(self, turns: list[dict[str, str]], where: str, add_generation_prompt: bool = False) -> str:
        self._rendering = where
        try:
            return self.template.render(messages=turns, add_generation_prompt=add_generation_prompt, tools=None,
                                        documents=None, **self.variables)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{where}: the chat_template of {self.tokenizer.path} cannot write this conversation "
                             f"({type(error).__name__}: {error}).") from None

    def _refuse_as_the_template_says(self, message: str):
        raise UsageError(f"{self._rendering}: the chat_template of {self.tokenizer.path} refuses this conversation: {message}")

    def _marked(self, text: str, turns: list[dict[str, str]], where: str) -> str:
        """`text` with BEGIN and END around each answer, found by rendering what comes before it and what comes with it."""
        for at in reversed([i for i, turn in enumerate(turns) if turn["role"] == "assistant"]):
            before = self._render(turns[:at], where, add_generation_prompt=True)
            through = self._render(turns[: at + 1], where)
            answer = turns[at]["content"].strip()
            if not (through.startswith(before) and text.startswith(through) and answer in through[len(before):]):
                why = ("an answer does not begin with its generation prompt" if text.startswith(through) else
                       "a turn is written otherwise when another one follows it")
                raise self._unclear(where, why)
            text = before + BEGIN + through[len(before):] + END + text[len(through):]
        return text

    def _unclear(self, where: str, why: str) -> UsageError:
        markers = "has" if self.has_markers else "has no"
        return UsageError(f"{where}: the chat_template of {self.tokenizer.path} {markers} {{% generation %}} markers, and "
                          f"which tokens are the assistant's cannot be told: {why}. Put {{% generation %}} and "
                          "{% endgeneration %} around what the assistant writes in it, its end token included.")

    # ---- text to ids ----

    def _runs(self, text: str) -> list[tuple[str | int, bool]]:
        """(characters or the id of a control token, whether trained), in order."""
        runs, trained, swallow = [], False, False
        for part in self.control_or_mark.split(text):
            if part in (BEGIN, END):
                trained = part == BEGIN
            elif part in self.controls:
                token = self.controls[part]
                if token.lstrip and runs and isinstance(runs[-1][0], str):      # some take the whitespace beside them along
                    runs[-1] = runs[-1][0].rstrip(), runs[-1][1]
                runs.append((self.tokenizer.id_of(part), trained))
                swallow = token.rstrip
            elif part:
                part, swallow = part.lstrip() if swallow else part, False
                runs.append((part, trained))
        return [run for run in runs if run[0] != ""]

    def _trim(self, runs: list[tuple[str | int, bool]]) -> list[tuple[str | int, bool]]:
        """Trained turns end with a control token: one just behind a marker joins, whitespace behind one leaves."""
        runs = list(runs)
        for i, (what, trained) in enumerate(runs):
            ends = trained and (i + 1 == len(runs) or not runs[i + 1][1])
            if ends and isinstance(what, str) and not what.strip() and i and isinstance(runs[i - 1][0], int):
                runs[i] = what, False
            elif ends and isinstance(what, str) and i + 1 < len(runs) and isinstance(runs[i + 1][0], int):
                runs[i + 1] = runs[i + 1][0], True
        return runs

    def _encode_runs(self, runs: list[tuple[str | int, bool]]) -> tuple[list[int], list[bool]]:
        """Text between two control tokens is encoded as one, as transformers does, but cut where training begins."""
        ids, mask, first = [], [], 0          # first: of the ids since the last control token
        done = ""                             # the text of ids[first:]
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
        """Ids of a text that goes on where another ended: without dummy prefix. A newline joins no neighbour."""
        before = "\n" if self.has_dummy_prefix else ""
        return self.plain.encode(before + text)[len(self.plain.encode(before)):]
