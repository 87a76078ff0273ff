"""Talking to a checkpoint: transformers' ids and answers turn by turn, from a cache that changes neither."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from chat_folders import KINDS, chat_folder, without_template
from conftest import Later

pytest.importorskip("jinja2")

from k2jax import generate  # noqa: E402
from k2jax.chat.worker import Renderer  # noqa: E402
from k2jax.conversation import lines, settings  # noqa: E402
from k2jax.conversation.answering import Answerer, Settings, stop_ids  # noqa: E402
from k2jax.data.tokenizer import load_tokenizer  # noqa: E402
from k2jax.errors import ConfigError  # noqa: E402
from k2jax.hf.importer import import_hf  # noqa: E402
from k2jax.model.sampling import Sampling  # noqa: E402
from k2jax.run.chat_template import template_of  # noqa: E402
from k2jax.run.saved import open_step  # noqa: E402
from k2jax.training.placement import mesh_for  # noqa: E402

transformers = Later("transformers")
QUESTIONS = ["What is 2 + 2?", "And naïve 日本?\nTwo lines.", "Four?"]
NEW = 20


class Talk(NamedTuple):
    """One family's folder, the run of it, and both sides' models."""

    name: str
    folder: Path
    run: Path
    answerer: Answerer
    special: set[str]
    tokenizer: Any
    model: Any


SOME = ("llama-3", "chatml")  # with and without BOS; the others take as long again
EACH = [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in KINDS]


@pytest.fixture(scope="module", params=EACH)
def talk(request: Any, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("talk")
    folder = chat_folder(path / "hf", request.param)
    import_hf(folder, path / "run", "imported", False)
    saved = open_step(path / "run")
    encoder = load_tokenizer(saved.tokenizer)
    control = sorted(map(encoder.id_to_token, encoder.control_ids))
    with Renderer(template_of(saved), control, most=1 << 20) as renderer:
        ends = stop_ids(saved, encoder, renderer.ends())
        generator = generate.open_generator(saved, mesh_for(saved.config, jax.devices()[:1]), stop_ids=ends)
        answerer = Answerer(saved, encoder, renderer, generator, Settings(NEW, Sampling(), 0))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        yield Talk(request.param, folder, path / "run", answerer, encoder.special_tokens, tokenizer, theirs)


def their_answer(talk: Talk, turns: list[dict[str, str]], **options: Any) -> tuple[list[int], list[int]]:
    """(prompt, new ids without the end) of transformers' generate."""
    encoded = talk.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    settings = {"do_sample": False, "max_new_tokens": NEW, "temperature": None, "top_p": None, "top_k": None}
    whole = talk.model.generate(**encoded, **settings | options)[0].tolist()
    prompt = encoded["input_ids"][0].tolist()
    new = whole[len(prompt) :]
    ends = talk.model.generation_config.eos_token_id
    return prompt, new[:-1] if new[-1] in ends else new


def test_turns_have_transformers_ids_and_answers_and_little_is_computed_twice(talk: Talk):
    turns, row, length = [], talk.answerer._row, 0
    for number, question in enumerate(QUESTIONS):
        turns.append({"role": "user", "content": question})
        prompt, before = talk.answerer.prompt(turns), row.num_computed
        cached = list(row.ids)
        answer = talk.answerer.answer(prompt)
        computed = row.num_computed - before
        ids, new = their_answer(talk, turns)
        assert (prompt.ids, answer.ids) == (ids, new), "transformers says something else"
        assert answer.content == talk.answerer.decode(new) or answer.content == talk.answerer.decode(new).strip()
        shared = next((i for i, (a, b) in enumerate(zip(cached, ids, strict=False)) if a != b), len(cached))
        assert computed == len(ids) - min(shared, len(ids) - 1) and answer.num_cached == len(ids) - computed
        if number and talk.name in ("llama-3", "chatml"):  # the others' prompts may end within a token
            assert shared >= length, "the earlier prompt stands in the cache"
        length = len(ids)
        turns.append({"role": "assistant", "content": answer.content})
        [whole] = talk.answerer.answer_all([prompt], 0)
        assert whole == answer._replace(num_cached=0), "without a cache it is another answer"


def test_it_ends_at_every_token_of_the_list_and_at_the_templates_own(talk: Talk):
    stops, ends = KINDS[talk.name][0], talk.answerer._generator.stop_ids
    assert set(talk.tokenizer.convert_tokens_to_ids(stops)) <= set(ends)
    assert len(set(ends)) == len(ends) == len(stops), "the template ends a turn by one of the list"
    saved, encoder = open_step(talk.run), talk.answerer.encoder
    other = next(token for token in sorted(talk.special) if encoder.token_to_id(token) not in ends)
    assert stop_ids(saved, encoder, [other, "<none>"]) == (*saved.stop_ids, encoder.token_to_id(other))


def test_lines_of_json_are_answered_as_alone_and_bad_ones_by_what_is_wrong(talk: Talk):
    def line(*turns: tuple[str, Any], **more: Any) -> bytes:
        return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns], **more}).encode()

    special = sorted(talk.special)[-1]
    given = [
        line(("user", QUESTIONS[0]), id="a"), b"", line(("robot", "x")), b"{", b"\xff",
        line(("user", "a"), ("user", " ")), line(("system", "a"), ("system", "b"), ("user", "c")),
        line(("user", [{"type": "image_url"}])), line(("user", "a"), ("assistant", "b")), line(("user", f"a{special}")),
        line(("user", "a"), temperature=2), line(("user", "four " * 700)), b'{"messages": []}', b"[" * 99_999,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}', line(("user", QUESTIONS[1])), line(("user", "a\0")),
    ]  # fmt: skip
    said = [
        None, "an unknown role: turn 1 is of 'robot'; known are system,", "no JSON", "not UTF-8 (byte 0",
        "an empty turn: turn 2, of role user", "two system turns: turns 1, 2", "content that is no text: turn 1, of",
        "nothing to answer: turn 2, the last, is of role assistant", "a control token in a turn: turn 1, of role user,",
        "an unknown key: 'temperature'", "the model's context is 512: there is no room", "no conversation", "no JSON",
        "half a surrogate pair: turn 1, of role user", None, "NUL in the text: turn 1, of role user",
    ]  # fmt: skip
    for at_once in (1, 4):
        found = list(lines.answered(given, talk.answerer, talk.special, None, at_once=at_once))
        assert [one["line"] for one in found] == [1, *range(3, len(given) + 1)]
        for one, wanted in zip(found, said, strict=True):
            assert ("error" in one) == (wanted is not None) and (not wanted or wanted in one["error"]), one
        fine = [one for one in found if "message" in one]
        for one, question in zip(fine, QUESTIONS, strict=False):
            ids, new = their_answer(talk, [{"role": "user", "content": question}])
            assert one["ids"] == new and one["message"]["role"] == "assistant"
            assert one["finish_reason"] == ("length" if len(new) == NEW else "stop")
            assert one["usage"]["prompt_tokens"] == len(ids) and one["usage"]["completion_tokens"] == len(new)
            assert at_once == 1 or not one["usage"]["cached_tokens"]
        assert [one.get("id") for one in fine] == ["a", None]


def test_an_answer_ends_with_the_context(talk: Talk):
    turns = [{"role": "user", "content": "a"}]
    room = 512 - len(talk.answerer.prompt(turns).ids)
    word = talk.answerer.encoder.encode(" Four.", continues=True)
    turns[0]["content"] += " Four." * ((room - 5) // len(word))
    prompt = talk.answerer.prompt(turns)
    assert 0 < prompt.most < NEW
    answer = talk.answerer.answer(prompt)
    assert answer.ids == their_answer(talk, turns, max_new_tokens=prompt.most)[1]
    assert answer.fills_context == (len(answer.ids) == prompt.most) and talk.answerer.answer_all([prompt], 0)


def test_a_system_text_is_put_first_or_refused_by_the_template(talk: Talk):
    turns = lines.with_system([{"role": "user", "content": "a"}], "Be brief.")
    assert lines.with_system(turns, "Other.") == turns
    if talk.name in ("mistral", "gemma"):
        with pytest.raises(ConfigError, match="the template refuses it .(only user and assistant|System role not)"):
            talk.answerer.prompt(turns)
    else:
        assert talk.answerer.prompt(turns).ids == their_answer(talk, turns)[0]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Any]:
    def run(*arguments: object, given: str | bytes = b"") -> Any:
        text = given if isinstance(given, bytes) else given.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        monkeypatch.setattr(sys, "argv", ["generate", "--chat", "--mesh=tensor=1", *map(str, arguments)])
        generate.main()
        return capsys.readouterr()

    return run


def test_the_command_with_json(talk: Talk, command: Callable, tmp_path: Path):
    line = json.dumps({"messages": [{"role": "user", "content": QUESTIONS[0]}]})
    options = f"--workdir={talk.run}", "--json", "--temperature=0", f"--max-new-tokens={NEW}"
    found = command(*options, given=f"{line}\n{line}")
    first, again = map(json.loads, found.out.splitlines())
    assert first["ids"] == their_answer(talk, [{"role": "user", "content": QUESTIONS[0]}])[1] == again["ids"]
    assert again["usage"]["cached_tokens"] == again["usage"]["prompt_tokens"] - 1
    saved = open_step(talk.run)
    assert first["checkpoint"] == saved.digest and first["template_sha256"] == saved.meta["chat"]["sha256"]
    assert "greedy: temperature 0 (the option)" in found.err and "context is 512 tokens" in found.err
    (tmp_path / "lines.jsonl").write_text(line + "\n")
    [told] = command(*options, f"--prompts={tmp_path / 'lines.jsonl'}").out.splitlines()
    assert json.loads(told)["ids"] == first["ids"]
    with pytest.raises(ConfigError, match="1 of 2 lines were not answered: line 1; "):
        command(*options, given=f"[]\n{line}")


def test_the_command_at_a_terminal_that_is_a_pipe(talk: Talk, command: Callable):
    turns = [{"role": "user", "content": "a"}]
    options = f"--workdir={talk.run}", "--temperature=0", f"--max-new-tokens={NEW}"
    found = command(*options, given=f"a\n\n/reset\na\n/what\nx{sorted(talk.special)[0]}\n")
    answer = talk.answerer.answer(talk.answerer.prompt(turns))
    text = talk.answerer.decode(answer.ids)
    assert found.out in (f"{text}\n{text}\n", f"{text.lstrip()}\n{text.lstrip()}\n", f" {text}\n {text}\n")
    assert "a new conversation" in found.err and "/what: no such command" in found.err
    assert "error: a control token in a turn: turn 3, of role user" in found.err


def test_a_run_without_a_template(command: Callable, tmp_path: Path):
    import_hf(without_template(chat_folder(tmp_path / "hf", "chatml")), tmp_path / "run", "imported", False)
    with pytest.raises(ConfigError, match="has no chat template: .* name a file that holds one, --chat-template=FILE"):
        command(f"--workdir={tmp_path / 'run'}")
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}<|im_start|>{{ eos_token }}<|none|>")
    options = f"--workdir={tmp_path / 'run'}", f"--chat-template={tmp_path / 't.jinja'}", "--json", "--max-new-tokens=2"
    found = command(*options, given='{"messages": [{"role": "user", "content": "a"}]}')
    assert json.loads(found.out)["usage"]["prompt_tokens"] > 8
    assert "'<|none|>' of the template is no token of its own" in found.err and "t.jinja" in found.err
    for text, said in (("{% for %}", "is no Jinja template"), (None, "no such file")):
        (tmp_path / "t.jinja").unlink()
        if text:
            (tmp_path / "t.jinja").write_text(text)
        with pytest.raises(ConfigError, match=said):
            command(*options)
        (tmp_path / "t.jinja").touch()


# ---- how answers are drawn -------------------------------------------------------------------------------------------

NONE = {"temperature": None, "top_k": None, "top_p": None}


@pytest.mark.parametrize(
    ("file", "options", "sampling", "told"),
    [
        (None, {}, (0.8, 0, 1.0), "temperature 0.8 (usual), top_k 0 (usual), top_p 1 (usual)"),
        ({}, {"top_k": 5}, (0.8, 5, 1.0), "top_k 5 (the option)"),
        ({"do_sample": True}, {}, (1.0, 0, 1.0), "temperature 1 (generation_config.json)"),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {}, (0.6, 0, 0.9), "top_p 0.9 (generation_config"),
        ({"temperature": 0.6, "top_k": 20}, {"temperature": 0.1}, (0.1, 20, 1.0), "temperature 0.1 (the option)"),
        ({"do_sample": False, "temperature": 0.6}, {}, (0.0, 0, 1.0), "greedy: temperature 0 (generation_config.json)"),
        ({"do_sample": False}, {"temperature": 0.5}, (0.5, 0, 1.0), "temperature 0.5 (the option)"),
        ({"temperature": "hot"}, {"temperature": 0.5}, (0.5, 0, 1.0), ""),
    ],
)
def test_sampling_is_the_imports_unless_an_option_says_otherwise(file, options, sampling, told, tmp_path):
    saved = _Saved(file)
    found = settings.chosen(saved, NONE | options, generate.USUAL)
    assert found.sampling == sampling and told in found.told and not found.warnings


def test_what_is_no_sampling_of_ours_is_said():
    found = settings.chosen(_Saved({"do_sample": True, "repetition_penalty": 1.1, "min_p": 0.0}), NONE, generate.USUAL)
    assert found.warnings == ["generation_config.json says repetition_penalty 1.1, which k2jax does not do"]
    for value in ("hot", True, [1], float("nan")):
        with pytest.raises(ConfigError, match=r"top_p is .*, expected a number: give --top-p"):
            settings.chosen(_Saved({"top_p": value}), NONE, generate.USUAL)
    with pytest.raises(ConfigError, match="top_p=7"):
        settings.chosen(_Saved({"top_p": 7}), NONE, generate.USUAL)


class _Saved:
    """A checkpoint, as far as its sampling is concerned."""

    def __init__(self, file: dict | None):
        self.imported = None if file is None else {"side_files": {"generation_config.json": json.dumps(file)}}
