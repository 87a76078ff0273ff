"""Turns to text, and which characters of it are answers.

A conversation is rendered once, by Jinja in the sandbox and with the extensions, filters and globals that
transformers gives a chat template. What the model learns of it are its answers: what stands behind the prompt that the
template writes for generation, up to and with the token that ends the turn, because a model that never learns it never
stops. White space behind that token is no longer the answer's.

Two ways tell where answers are. `{% generation %}` blocks say it. Without them, answer i is what the render of the
turns up to i has more than that of the turns before it with a generation prompt; both must be beginnings of the whole.
Where there are both, they must say the same of every character that is no white space. Nothing here is ever guessed:
`Refused` says what does not fit.
"""

import datetime
import json
import re
import secrets
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from k2jax.chat.template import ChatTemplate
from k2jax.errors import ConfigError

FAILURES = (MemoryError, RecursionError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same field of a turn


class Refused(Exception):
    """A conversation that gives no document: the reason it is counted under, and what was found."""

    def __init__(self, reason: str, what: str = ""):
        super().__init__(reason, what)
        self.reason, self.what = reason, what


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: its text, where marks are wanted between two that no text holds."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        environment.extend(marks=None, has_generation=False)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.environment.has_generation = True
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        begin, end = self.environment.marks or ("", "")
        return begin + caller() + end


class _Namespace(jinja2.utils.Namespace):
    """Of templates: nothing of Python's own can be set on it."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"the template sets {name} on a namespace")
        super().__setitem__(name, value)


class Program:
    """A template, compiled."""

    def __init__(self, template: ChatTemplate):
        self.environment = _environment(template.date)
        self._template = self.environment.from_string(template.text)
        self._tokens = template.tokens
        self.has_generation: bool = self.environment.has_generation

    def render(self, turns: list[dict], tools: list | None, *, prompt: bool = False) -> str:
        """The text of turns, with the prompt for the next answer if `prompt`. Raises Refused if the template does."""
        try:
            return self._template.render(
                messages=[_with_reasoning(turn) for turn in turns],
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self._tokens,
            )
        except jinja2.TemplateError as error:
            raise Refused("the template refuses it", str(error)) from error
        except FAILURES as error:
            raise Refused("the template fails on it", f"{type(error).__name__}: {error}") from error

    def blocks(self, turns: list[dict], tools: list | None, text: str) -> list[tuple[int, int]]:
        """Of each `{% generation %}` block the characters [start, stop) in `text`, the render of the same."""
        nonce = secrets.token_hex(16)
        begin, end = f"\ue000{nonce}(", f"){nonce}\ue000"
        self.environment.marks = begin, end
        try:
            marked = self.render(turns, tools)
        finally:
            self.environment.marks = None
        spans, parts, start, size = [], [], None, 0
        for part in re.split(f"({re.escape(begin)}|{re.escape(end)})", marked):
            if part == begin and start is None:
                start = size
            elif part == end and start is not None:
                spans, start = [*spans, (start, size)], None
            elif part in (begin, end):
                raise Refused("generation blocks inside each other", "take the inner one out of the template")
            else:
                parts.append(part)
                size += len(part)
        if "".join(parts) != text:
            raise Refused("a template that changes what its generation blocks gave", "let nothing edit their text")
        return spans


def compiled(template: ChatTemplate) -> Program:
    """The template's program. Raises Refused if it is none: it may name a filter that there is not."""
    try:
        return Program(template)
    except (jinja2.TemplateError, *FAILURES) as error:
        raise Refused("the template cannot be compiled", f"{type(error).__name__}: {error}") from error


def _environment(date: str) -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def strftime_now(format: str) -> str:
        return datetime.datetime.fromisoformat(date).strftime(format)

    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "namespace": _Namespace}
    return environment


def names_and_literals(template: ChatTemplate) -> tuple[set[str], str]:
    """The variables that a template looks up, and the text that it writes by itself. ConfigError if it is none.

    It is parsed and no more: Jinja works out constants when it compiles, and 10 ** 10 ** 10 is one.
    """
    environment = _environment(template.date)
    try:
        parsed = environment.parse(template.text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"{template.source}: is no Jinja template (line {error.lineno}: {error.message}): restore it"
        ) from error
    texts = [node.data for node in parsed.find_all(jinja2.nodes.TemplateData)]
    texts += [node.value for node in parsed.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
    names = [(node.name, node.ctx) for node in parsed.find_all(jinja2.nodes.Name)]
    return {name for name, _ in names} - {name for name, use in names if use == "store"}, "\n".join(texts)


def _with_reasoning(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn with its reasoning under each name that templates read it by, as transformers has it."""
    found = next((turn[name] for name in REASONING if name in turn), None)
    return turn if found is None else {"thinking": found, **turn, "reasoning_content": found}


def conversation(
    program: Program, turns: list[dict], tools: list | None, learned: list[int], control: list[str]
) -> tuple[str, list[tuple[int, int]], bool]:
    """The text, the characters [start, stop) of its answers, and whether both ways of finding them were compared.

    Args:
        program: the template.
        turns: dicts with role and content.
        tools: that the template is given, None for none.
        learned: the numbers of the turns that are to be learned, all of role assistant.
        control: the names of the tokenizer's control tokens; one of them ends an answer.

    Raises Refused.
    """
    text = program.render(turns, tools)
    _check_all_there(turns, text)
    _check_tools_there(turns, tools, text)
    if not program.has_generation:
        answers = [_answer(program, turns, tools, i, text, control) for i in learned]
        _check_learned(turns, learned, [text[start:stop] for start, stop in answers], control)
        return text, answers, False
    blocks = _learned_blocks(program.blocks(turns, tools, text), turns, learned)
    filled = [(start, stop) for start, stop in blocks if start < stop]
    try:
        answers = [_answer(program, turns, tools, i, text, control) for i in learned]
    except Refused:  # the template tells its prefixes apart from the whole: its blocks alone say it
        _check_learned(turns, learned, [text[start:stop] for start, stop in blocks], control)
        return text, filled, False
    _compare(text, filled, answers)
    _check_learned(turns, learned, [text[start:stop] for start, stop in answers], control)
    return text, filled, True


def prompt(program: Program, turns: list[dict], tools: list | None) -> str:
    """The text after which the model answers. Raises Refused."""
    text = program.render(turns, tools, prompt=True)
    _check_all_there(turns, text)
    _check_tools_there(turns, tools, text)
    return text


def begun(program: Program, turns: list[dict], tools: list | None) -> str:
    """The text of turns whose last has only begun, without what the template writes behind it. Raises Refused."""
    mark = f"\ue000{secrets.token_hex(16)}"
    *before, last = turns
    marked = program.render([*before, {**last, "content": f"{last['content']}{mark} "}], tools)
    text, found, behind = marked.rpartition(mark)
    if not found:
        raise Refused("a turn that the template leaves out", f"turn {len(turns)}, which was to go on")
    _check_all_there(turns, text)
    return text if behind.startswith(" ") else text.rstrip()  # of one that trims its turns


def _learned_blocks(blocks: list[tuple[int, int]], turns: list[dict], learned: list[int]) -> list[tuple[int, int]]:
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if len(learned) != len(answers):
        if len(blocks) != len(answers):
            raise Refused(
                "generation blocks that are not one an answer",
                f"{len(blocks)} blocks, {len(answers)} answers of which some are not learned",
            )
        return [blocks[answers.index(i)] for i in learned]
    return blocks


def _answer(
    program: Program, turns: list[dict], tools: list | None, i: int, text: str, control: list[str]
) -> tuple[int, int]:
    """The characters of turn i, by what the template writes of the turns before it and up to it."""
    before = program.render(turns[:i], tools, prompt=True)
    after = text if i + 1 == len(turns) else program.render(turns[: i + 1], tools)
    if not text.startswith(after):
        raise Refused(
            "a template that writes earlier turns otherwise once others follow",
            f"turn {i + 1}: put the answers into generation blocks, learn the last answer alone (answers='last'), or "
            "name another template",
        )
    if not after.startswith(before):
        raise Refused(
            "an answer that does not go on from its prompt",
            f"turn {i + 1}: the template's generation prompt is not how it writes the answer; put the answers into "
            "generation blocks, or name another template",
        )
    start, stop = len(before), len(after.rstrip())
    if not any(after[:stop].endswith(token) for token in control):
        stop = len(after)
    if before == program.render(turns[:i], tools):
        _check_no_header(after[start:stop], turns[i], i)
    return start, stop


def _check_no_header(answer: str, turn: dict, i: int) -> None:
    """A template that knows no generation prompt must write nothing before an answer, or that would be learned."""
    content = turn.get("content")
    content = content.strip() if isinstance(content, str) else ""
    place = answer.find(content) if content else -1
    if place < 0 or answer[:place].strip():
        raise Refused(
            "a template without a generation prompt",
            f"turn {i + 1}: {answer[: max(place, 20)].strip()[:40]!r} would be learned with the answer; let the "
            "template write it for add_generation_prompt, or put the answers into generation blocks",
        )


def _check_all_there(turns: list[dict], text: str) -> None:
    """Each turn's text is in the whole, less the reasoning that a template may leave out."""
    for i, turn in enumerate(turns):
        if turn["role"] in ("system", "user", "assistant"):
            _check_turn(turn, i, text)


def _check_turn(turn: dict, i: int, text: str) -> None:
    content = turn.get("content")
    if isinstance(content, str) and content.rpartition("</think>")[2].strip() not in text:
        raise Refused("a turn that the template leaves out", f"turn {i + 1}, of role {turn['role']}")


def _check_tools_there(turns: list[dict], tools: list | None, text: str) -> None:
    """Tools and calls are in it by their names."""
    _check_names("tools", tools, text)
    for i, turn in enumerate(turns):
        _check_names(f"turn {i + 1}", turn.get("tool_calls"), text)


def _check_names(where: str, tools_or_calls: list | None, text: str) -> None:
    for one in tools_or_calls or ():
        function = one.get("function", one) if isinstance(one, dict) else {}
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name or name not in text:
            raise Refused("a tool or a call that the template leaves out", f"{where}: {str(name)[:60]!r}")


def _check_learned(turns: list[dict], learned: list[int], answers: list[str], control: list[str]) -> None:
    """Each answer says what its turn does, which another turn may say, too: else it would teach to say nothing."""
    if len(answers) != len(learned):  # blocks that are not one an answer: it is known of all together alone
        answers = ["".join(answers)] * len(learned)
    for i, answer in zip(learned, answers, strict=True):
        _check_turn(turns[i], i, answer)
        _check_names(f"turn {i + 1}", turns[i].get("tool_calls"), answer)
        for token in control:
            answer = answer.replace(token, "")
        if not answer.strip():
            raise Refused("a turn that the template leaves out", f"turn {i + 1}, of role {turns[i]['role']}")


def _compare(text: str, blocks: list[tuple[int, int]], answers: list[tuple[int, int]]) -> None:
    ours, theirs = bytearray(len(text)), bytearray(len(text))
    for learned, spans in ((ours, blocks), (theirs, answers)):
        for start, stop in spans:
            learned[start:stop] = b"\1" * (stop - start)
    if ours == theirs:
        return
    for i, (block, answer) in enumerate(zip(ours, theirs, strict=True)):
        if block != answer and not text[i].isspace():
            have, lack = ("have", "prefixes do not") if block else ("lack", "prefixes show to be the answer's")
            raise Refused(
                "generation blocks that are not the answers",
                f"they {have} {text[i : i + 20]!r} at character {i}, which {lack}; an answer goes from behind the "
                "generation prompt up to and with the token that ends the turn: correct the template",
            )
