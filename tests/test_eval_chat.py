"""Tasks put in a chat template have the requests and the numbers of the harness's own `hf` model on the same folder."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from chat_folders import chat_folder, without_template
from chat_templates import FAMILIES
from test_chat import folder_of

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
for needed in ("lm_eval", "torch", "accelerate"):
    pytest.importorskip(needed)

from k2jax import evaluate  # noqa: E402
from k2jax.chat.template import ChatTemplate  # noqa: E402
from k2jax.errors import ConfigError  # noqa: E402
from k2jax.evals import tasks  # noqa: E402
from k2jax.evals.chat import PLAIN, Chat, Rendering  # noqa: E402
from k2jax.evals.subject import Subject  # noqa: E402
from k2jax.hf.importer import import_hf  # noqa: E402
from k2jax.run.saved import open_step  # noqa: E402
from k2jax.training.placement import mesh_for  # noqa: E402

TASKS = {
    "choices": """
output_type: multiple_choice
description: "Choose. "
fewshot_split: train
doc_to_text: "{{question}}"
doc_to_choice: ["four", "Two lines", "a 2", "+"]
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "begun": """
output_type: multiple_choice
gen_prefix: "It is "
fewshot_split: train
doc_to_text: "{{question}}"
doc_to_choice: ["four", "Two lines"]
doc_to_target: "{{answer % 2}}"
metric_list: [{metric: acc}]
""",
    "answers": """
output_type: generate_until
fewshot_split: train
doc_to_text: "{{question}}"
doc_to_target: "four"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
FILE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl, train: {folder}/train.jsonl}}}}
test_split: test
metadata: {{version: 1.0}}
"""
QUESTIONS = ["What is 2 + 2?", " two  spaces ", "And naïve 日本?\nTwo lines.", "Four", "Be brief. user assistant", "x"]


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [json.dumps({"question": question, "answer": i % 4}) + "\n" for i, question in enumerate(QUESTIONS)]
    for name, part in (("test", rows), ("train", rows[::-1])):
        (folder / f"{name}.jsonl").write_text("".join(part))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(FILE.format(name=name, folder=folder) + text)
    return folder


GEMMA = pytest.param("gemma", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["llama-3", "chatml", GEMMA])
def both(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Subject, Any]:
    """(family, ours on the import, theirs on the folder)."""
    from lm_eval.models.huggingface import HFLM

    path = tmp_path_factory.mktemp("parity")
    folder = chat_folder(path / "hf", request.param)
    import_hf(folder, path / "run", "imported", False)
    saved = open_step(path / "run")
    subject = Subject(saved, mesh_for(saved.config, jax.devices()[:1]), batch_tokens=2048, seed=1234)
    options = {"device": "cpu", "dtype": "float32", "batch_size": 1, "logits_cache": False}
    return request.param, subject, HFLM(pretrained=str(folder), **options)


def ask(subject: Subject, hf: Any, task_dir: Path, name: str, chat: Chat, monkeypatch: Any, shots: int = 2):
    """(our samples, theirs, our outcome) of one task."""
    made = [tasks.HarnessTask(tasks.open_manager([name], task_dir), name, num_fewshot=shots, chat=chat) for _ in "12"]
    real, found = tasks.evaluate, []

    def capture(lm: Any, loaded: Any, **keywords: Any) -> dict[str, Any]:
        found.append(real(lm, loaded, **keywords))
        made[1]._begin()
        found.append(real(hf, made[1]._loaded, **keywords))
        return found[0]

    monkeypatch.setattr(tasks, "evaluate", capture)
    monkeypatch.setattr(tasks, "BOOTSTRAPS", 0)
    with jax.set_mesh(subject.mesh):
        outcome = made[0].evaluate(subject)
    return found[0]["samples"][name], found[1]["samples"][name], outcome


@pytest.mark.parametrize(
    ("name", "chat"),
    [
        ("choices", Chat(True, "Be brief.", True)),
        ("choices", Chat(True, None, False)),
        ("begun", Chat(True, None, True)),
        ("answers", Chat("default", "Be brief.", False)),
        ("answers", Chat(False, "Be brief.", False)),
    ],
)
def test_requests_and_numbers_are_the_harness_own(both: Any, task_dir: Path, monkeypatch: Any, name: str, chat: Chat):
    family, subject, hf = both
    ours, theirs, outcome = ask(subject, hf, task_dir, name, chat, monkeypatch)
    assert len(ours) == len(QUESTIONS)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["arguments"] == other["arguments"]
        for [a], [b] in zip(mine["resps"], other["resps"], strict=True):
            assert a == b if isinstance(a, str) else a == (pytest.approx(b[0], abs=1e-3), b[1])
    text = ours[0]["arguments"][0][0]
    said = (chat.system or "") + ("Choose." if name == "choices" else "")
    if chat.template and family == "gemma":
        assert outcome.details["chat"]["without_system"] == (len(QUESTIONS) if said else 0)
        assert "Be brief. user" in text or "Be brief.\n\n" not in text
    else:
        assert not chat.system or "Be brief." in text
    if chat.template:
        assert outcome.details["chat"]["template"] == subject.saved.meta["chat"]["template"]
        opens = {"gemma": "<start_of_turn>user\n", "chatml": "<|im_start|>user\n", "llama-3": "user<|end_header_id|>"}
        assert text.count(opens[family]) == (3 if chat.multiturn else 1)
        begun = {"gemma": "model\nIt is ", "chatml": "assistant\nIt is ", "llama-3": "It is "}
        assert name != "begun" or text.endswith((begun[family], begun[family].rstrip()))
    else:
        assert text.startswith("Be brief.") and "chat" not in outcome.details


def test_a_system_turn_that_the_template_refuses_is_left_out_and_counted(tmp_path: Path):
    """As the harness does with a line in its log."""
    family = FAMILIES["gemma"]
    folder, tokenizer = folder_of(tmp_path, family)
    template = ChatTemplate(family.template, "t", {"bos_token": "<bos>"}, "")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Four? "}]
    with Rendering(template, OnlyTokenizer(folder / "tokenizer.json")) as rendering:
        expected = tokenizer.apply_chat_template(turns[1:], tokenize=False, add_generation_prompt=True)
        assert rendering(turns) == expected and rendering.num_without_system == 1
        begun = [turns[1], {"role": "assistant", "content": " It is "}]
        options = {"tokenize": False, "continue_final_message": True}
        assert rendering(begun, False) == tokenizer.apply_chat_template(begun, **options)
        with pytest.raises(ConfigError, match="no user|the template fails on it|the template refuses it"):
            rendering([{"role": "system", "content": "Be brief."}])


class OnlyTokenizer(NamedTuple):
    """A checkpoint, as far as a template asks it."""

    tokenizer: Path


def test_a_result_is_of_its_template_system_text_and_options(both: Any, task_dir: Path):
    _, subject, _ = both
    saved = subject.saved

    def settings(chat: Chat) -> dict[str, Any]:
        task = tasks.HarnessTask(tasks.open_manager(["answers"], task_dir), "answers", num_fewshot=1, chat=chat)
        return task.settings(saved)

    plain, templated = settings(PLAIN), settings(Chat(True))
    assert plain["template_sha256"] is None and "system" not in plain and "fewshot_as_multiturn" not in plain
    assert templated["template_sha256"] == saved.meta["chat"]["sha256"]
    more = [settings(Chat(True, "Be brief.")), settings(Chat(True, None, True)), settings(Chat(False, "Be brief."))]
    assert (more[0]["system"], more[1]["fewshot_as_multiturn"]) == ("Be brief.", True)
    assert len({json.dumps(one, sort_keys=True) for one in (plain, templated, *more)}) == 5
    assert settings(Chat(True)) == templated
    chat = {**saved.meta["chat"], "template": "{{ messages[-1].content }}"}
    other = saved._replace(meta={**saved.meta, "chat": chat})
    task = tasks.HarnessTask(tasks.open_manager(["answers"], task_dir), "answers", chat=Chat(True))
    digests = [task.settings(one)["requests_sha256"] for one in (saved, other, saved)]
    assert digests[0] == digests[2] != digests[1], "a run's checkpoints may have different templates"


def test_a_conversation_is_one_document(both: Any):
    _, subject, _ = both
    assert subject.whole is subject
    config = subject.saved.config.copy_and_resolve_references()
    with config.unlocked():
        config.model.mask_documents = True
    masked = Subject(subject.saved._replace(config=config), subject.mesh, batch_tokens=64, seed=0)
    assert not masked.whole.generator.m.mask_documents and masked.whole.params is masked.params


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Any]:
    def run(*arguments: object) -> Any:
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
        evaluate.main()
        return capsys.readouterr()

    return run


def test_the_command_stores_a_result_of_its_own(both: Any, task_dir: Path, command: Callable):
    _, subject, _ = both
    options = f"--workdir={subject.saved.workdir}", "--tasks=choices", f"--task-dir={task_dir}", "--limit=2", "--json"
    first = json.loads(command(*options).out)
    chat = "--apply-chat-template", "--system=Be brief.", "--num-fewshot=1"
    second = json.loads(command(*options, *chat).out)
    assert (first["new"], second["new"], json.loads(command(*options, *chat).out)["new"]) == (1, 1, 0)
    assert second["results"][0]["settings"]["fewshot_as_multiturn"] is True
    third = json.loads(command(*options, *chat, "--fewshot-as-multiturn=false").out)
    assert third["new"] == 1 and third["results"][0]["settings"]["fewshot_as_multiturn"] is False


@pytest.mark.parametrize(
    "options",
    [["--fewshot-as-multiturn"], ["--chat-template=x"], ["--apply-chat-template", "--fewshot-as-multiturn=maybe"]],
)
def test_options_that_do_not_go_together(command: Callable, options: list[str], tmp_path: Path):
    with pytest.raises(SystemExit) as error:
        command(f"--workdir={tmp_path}", *options)
    assert error.value.code == 2


def test_what_cannot_be_asked_is_one_line(both: Any, task_dir: Path, command: Callable, tmp_path: Path):
    family, subject, _ = both
    options = f"--workdir={subject.saved.workdir}", f"--task-dir={task_dir}"
    with pytest.raises(ConfigError, match="are for tasks of the harness"):
        command(*options, "--apply-chat-template")
    with pytest.raises(ConfigError, match="has no chat template named 'rag'"):
        command(*options, "--tasks=choices", "--apply-chat-template=rag")
    (tmp_path / "t.jinja").write_text("{{ raise_exception('never\nthis') }}")
    with pytest.raises(ConfigError, match="task choices: chat template: the template refuses it"):
        command(*options, "--tasks=choices", "--apply-chat-template", f"--chat-template={tmp_path / 't.jinja'}")
    if family == "chatml":
        import_hf(without_template(chat_folder(tmp_path / "hf", "chatml")), tmp_path / "run", "imported", False)
        with pytest.raises(ConfigError, match="has no chat template: .*name a file"):
            command(f"--workdir={tmp_path / 'run'}", options[1], "--tasks=choices", "--apply-chat-template")
