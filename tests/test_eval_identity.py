"""A result is found again by what it was of, and by nothing else: data, functions, harness, type, template."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
pytest.importorskip("lm_eval")

from k2jax.data.epochs import Epoch  # noqa: E402
from k2jax.errors import ConfigError  # noqa: E402
from k2jax.evals import tasks  # noqa: E402
from k2jax.evals.identity import stores_digest  # noqa: E402
from k2jax.evals.results import Identity, Outcome, Results  # noqa: E402
from k2jax.evals.session import Session, Wanted  # noqa: E402
from k2jax.run.saved import open_step  # noqa: E402

TASK = """
task: local_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl, train: {folder}/shots.jsonl}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["a", "b"]
doc_to_target: "{{{{answer}}}}"
process_docs: !function helpers.keep
process_results: !function measures.right
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""
GROUP = """
group: local_group
task: [local_one]
aggregate_metric_list: [{metric: right, weight_by_size: true}]
metadata: {version: 1}
"""
HELPERS = "import inner\n\ndef keep(docs):\n    return docs.filter(lambda doc: inner.wanted(doc))\n"
MEASURES = "def right(doc, results):\n    return {'right': float(results[0][0] > results[1][0])}\n"
INNER = "def wanted(doc):\n    return doc['answer'] < 2\n"


def write(folder: Path, name: str = "one", **changed: str) -> Path:
    """A folder of tasks; `changed` replaces the text of data, shots, helpers, measures, inner or group."""
    folder.mkdir(exist_ok=True)
    documents = [{"question": f"abc {i} d", "answer": i % 2, "note": i} for i in range(4)]
    data = "".join(json.dumps(d) + "\n" for d in documents)
    texts = {"data": data, "shots": data, "helpers": HELPERS, "measures": MEASURES, "inner": INNER, "group": GROUP}
    ends = {"data": "jsonl", "shots": "jsonl", "group": "yaml"}
    for key, text in {**texts, **changed}.items():
        (folder / f"{key}.{ends.get(key, 'py')}").write_text(text)
    (folder / "task.yaml").write_text(TASK.format(name=name, folder=folder))
    return folder


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("evals")))


@pytest.fixture(autouse=True)
def helpers_see_their_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(tmp_path / "tasks"))


def settings(folder: Path, run: Path, name: str = "local_one", **options: Any) -> dict[str, Any]:
    task = tasks.HarnessTask(tasks.open_manager([name], folder), name, **options)
    return task.settings(open_step(run))


def evaluate(run: Path, folder: Path, names: tuple[str, ...] = ("local_one",), **changes: Any) -> Session:
    base = Wanted(run, "newest", names, str(folder), None, None, 2, None, 8, False, 1024, 1234)
    lines: list[str] = []
    found = Session(base._replace(**changes), lines.append)
    found.lines = lines
    found.run()
    return found


def edited(text: str, key: str, **values: Any) -> str:
    """JSON lines with a value of the third document replaced."""
    documents = [json.loads(line) for line in text.splitlines()]
    documents[2] |= {key: values["to"]}
    return "".join(json.dumps(d) + "\n" for d in documents)


def test_each_part_of_what_a_task_is_has_its_own_result(run: Path, tmp_path: Path):
    """In the same place, under the same names, with the same version: what is stored is never taken for another."""
    folder = write(tmp_path / "tasks")
    data = (folder / "data.jsonl").read_text()
    first = settings(folder, run)
    assert first == settings(folder, run) == settings(write(folder), run), "written anew it is the same"
    changes: dict[str, Callable[[], dict[str, str]]] = {
        "a question": lambda: {"data": edited(data, "question", to="abd")},
        "what is right": lambda: {"data": edited(data, "answer", to=1)},
        "a field that only a measure reads": lambda: {"data": edited(data, "note", to="x")},
        "how documents are chosen": lambda: {"helpers": HELPERS.replace("docs.filter", "docs.select([0, 1]).filter")},
        "how answers are measured": lambda: {"measures": MEASURES.replace(">", "<")},
        "a module beside it": lambda: {"inner": INNER.replace("2", "3")},
    }
    seen = {json.dumps(first)}
    for what, change in changes.items():
        found = settings(write(folder, **change()), run)
        assert json.dumps(found) not in seen, what
        seen.add(json.dumps(found))
    write(folder)
    shots = settings(folder, run, num_fewshot=2)
    write(folder, shots=edited(data, "question", to="other"))
    assert settings(folder, run) == first and settings(folder, run, num_fewshot=2) != shots
    write(folder)
    group = settings(folder, run, "local_group")
    write(folder, group=GROUP.replace("true", "false"))
    assert settings(folder, run, "local_group") != group and settings(folder, run) == first
    assert settings(folder, run, limit=2)["requests_sha256"] != first["requests_sha256"]


def test_names_and_places_of_files_are_no_part_of_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = settings(write(tmp_path / "tasks"), run)
    assert settings(write(tmp_path / "elsewhere"), run) == first


def test_harness_and_type_are_part_of_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write(tmp_path / "tasks")
    first = evaluate(run, folder, ("local_one", "validation"))
    assert first.num_new == 2 and {r["settings"]["dtype"] for r in first.results} == {"float32"}
    assert evaluate(run, folder, ("local_one", "validation")).num_new == 0
    monkeypatch.setattr(tasks, "VERSION", "9.9.9")
    newer = evaluate(run, folder, ("local_one", "validation"))
    assert newer.num_new == 1 and newer.results[-1]["settings"]["harness"] == "9.9.9"
    monkeypatch.setattr("k2jax.evals.session.compute_dtype", lambda config: np.dtype("float16"))
    assert evaluate(run, folder, ("local_one", "validation")).num_new == 2
    assert "template_sha256" in first.results[0]["settings"] | first.results[1]["settings"]


def test_the_stores_content_is_part_of_it(run: Path):
    saved = open_step(run)
    [epoch] = saved.epochs
    assert isinstance(epoch, Epoch)
    manifest = json.loads(json.dumps(epoch.manifest))
    manifest["stores"]["code"]["path"] = "/moved"
    moved = saved._replace(epochs=[epoch._replace(manifest=manifest)])
    assert stores_digest(moved, ["code"]) == stores_digest(saved, ["code"]) != stores_digest(saved, ["web"])
    manifest["stores"]["code"]["root_digest"] = "0" * 64
    other = saved._replace(epochs=[epoch._replace(manifest=manifest)])
    assert stores_digest(other, ["code"]) != stores_digest(saved, ["code"])
    assert stores_digest(other) != stores_digest(saved)
    assert stores_digest(other, ["web"]) == stores_digest(saved, ["web"])
    assert stores_digest(saved._replace(epochs=[epoch._replace(manifest=None)])) is None


def ask_by_function(folder: Path) -> None:
    text = (folder / "task.yaml").read_text()
    (folder / "task.yaml").write_text(text.replace('"{{question}}"', "!function helpers.text"))
    assert "!function helpers.text" in (folder / "task.yaml").read_text()


def test_a_task_that_asks_something_else_each_time_is_refused(run: Path, tmp_path: Path):
    """Seen red without the comparison: its result was stored under what it had not asked."""
    draw = HELPERS + "\nimport itertools\nnumber = itertools.count()\ndef text(doc):\n    return f'a{next(number)}'\n"
    folder = write(tmp_path / "tasks", helpers=draw)
    ask_by_function(folder)
    with pytest.raises(ConfigError, match="task local_one asks something else each time that it is rendered"):
        evaluate(run, folder)
    assert Results(run).all() == []


def test_what_is_drawn_with_the_library_is_drawn_alike(run: Path, tmp_path: Path):
    """Few-shot examples, and Python's own generator, which the harness's command line seeds."""
    draw = HELPERS + "\nimport random\ndef text(doc):\n    return f'a{random.random()}'\n"
    folder = write(tmp_path / "tasks", helpers=draw)
    ask_by_function(folder)
    assert evaluate(run, folder, num_fewshot=2).num_new == 1 and evaluate(run, folder, num_fewshot=2).num_new == 0
    assert evaluate(run, folder, num_fewshot=2, seed=5).num_new == 1


# ---- again -----------------------------------------------------------------------------------------------------------


def test_again_puts_a_second_record_beside_the_first(run: Path, tmp_path: Path):
    folder = write(tmp_path / "tasks")
    names = ("local_one", "validation")
    evaluate(run, folder, names)
    before = {p: p.read_bytes() for p in run.glob("evals/*/*")}
    second = evaluate(run, folder, names, again=True)
    after = {p: p.read_bytes() for p in run.glob("evals/*/*")}
    assert second.num_new == 2 and before.items() < after.items() and len(after) == 2 * len(before)
    assert [r["settings"]["again"] for r in second.results] == [1, 1]
    third = evaluate(run, folder, names, again=True)
    assert [r["settings"]["again"] for r in third.results] == [2, 2] and len(Results(run).all()) == 6
    told = evaluate(run, folder, names)
    assert told.num_new == 0 and told.results == third.results, "the last one is told"


def test_two_that_are_made_again_at_once_both_stay(tmp_path: Path):
    store, a = Results(tmp_path), Identity("t", None, {"limit": None}, 0, "d")
    made = [store.add(1, a, Outcome("", {"n": n}, [], {}), {}, again=True) for n in range(3)]
    assert [r["metrics"]["n"] for r in made] == [0, 1, 2] and len(store.all()) == 3
    assert store.find(1, a)["metrics"]["n"] == 2
    late = store.add(1, a, Outcome("", {"n": 9}, [], {}), {})
    assert late["metrics"]["n"] == 2 and len(store.all()) == 3, "without --again what appeared meanwhile stands"


# ---- choices ---------------------------------------------------------------------------------------------------------


def test_a_suites_choices_are_the_tasks_own_where_they_say_so():
    """How code is drawn, as the results and the table say it, against the harness's own files."""
    from k2jax.evals import harness, suites

    manager = tasks.open_manager(["humaneval", "mbpp"], None)
    for m in suites.SUITE:
        assert m.choices["num_fewshot"] == {"value": m.num_fewshot, "source": m.fewshot_source}
        assert bool(m.sampling) == (" p@" in m.name)
        if not m.sampling:
            continue
        own = manager.task_index[m.task].cfg
        generation = own["generation_kwargs"]
        most = generation.get("max_gen_toks", harness.DEFAULT_NEW_TOKENS)
        assert m.choices["max_new_tokens"]["value"] == most and generation["do_sample"] is False
        assert all(suites.OURS in source or source == suites.AMBER for _, source in m.sampling.values())
        if m.pass_at:
            values = {name: choice["value"] for name, choice in m.choices.items()}
            assert {**m.pass_at}.items() - {("k", 10)} <= values.items()
        else:
            assert m.choices["samples"]["value"] == own.get("repeats", 1) == 1
            assert m.choices["temperature"] == {"value": 0.0, "source": suites.OURS}
    text = "\n".join(suites.as_text(suites.compare({"HumanEval p@1": {"pass@1,create_test": 0.25}})))
    assert "HumanEval p@1: samples 1 (our choice), temperature 0 (our choice), max new tokens 1024 (our choice" in text
    assert "MBPP p@10: " not in text
