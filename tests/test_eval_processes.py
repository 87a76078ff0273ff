"""Evaluation by two processes gives what one gives, and one record of it."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from faults.runs import QUICKLY_COMPILED

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.processes

TASK = """
task: local_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{file}}}}}
test_split: test
tag: local_tag
metadata: {{version: 1}}
"""
TASKS = {
    "letters": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["a", "b", "cd"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "drawn": """
output_type: generate_until
doc_to_text: "a{{question}}"
doc_to_target: "{{question}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6, do_sample: true, temperature: 1.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
DOCUMENTS = [{"question": "abcdefgh"[: i % 7 + 1], "answer": i % 3} for i in range(12)]


def write_tasks(folder: Path, documents: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder, file="test.jsonl") + text)


def evaluate(workdir: Path, task_dirs: list[Path], *more: str) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of `python -m k2jax.evaluate` in as many processes as there are folders of tasks."""
    count = len(task_dirs)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": str(count)}
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count} {QUICKLY_COMPILED}",
        "PYTHONPATH": str(REPOSITORY),
        "HF_DATASETS_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "k2jax.evaluate", f"--workdir={workdir}", *more]
    started = [
        subprocess.Popen(
            [*command, f"--task-dir={folder}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment, "PYTHONHASHSEED": str(i), **({**told, "JAX_PROCESS_ID": str(i)} if count > 1 else {})},
        )
        for i, folder in enumerate(task_dirs)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, told, strict=True)]


def stored(workdir: Path) -> dict[str, tuple[dict, list]]:
    """{file: (settings and metrics, samples)}."""
    found = {}
    for path in sorted(workdir.glob("evals/*/*.json")):
        result = json.loads(path.read_text())
        samples = [json.loads(line) for line in (path.parent / result["samples"]["file"]).open()]
        found[path.name] = {"settings": result["settings"], "metrics": result["metrics"]}, samples
    return found


def close(a: Any, b: Any) -> bool:
    """The same but for the last bits of sums: the devices are the same, and the order of their sums is not."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-5) if isinstance(a, float) else a == b


def test_two_processes_give_what_one_gives(tiny_run: Path, tmp_path: Path):
    """The same files; sampled texts, a tag's tasks in one order although hashes differ; a second call does nothing."""
    write_tasks(tmp_path / "tasks", DOCUMENTS)
    arguments = ("--steps=25", "--tasks=validation,memorization,local_tag", "--windows=6", "--memorization-rows=8")
    runs = []
    for count in (1, 2):
        workdir = Path(shutil.copytree(tiny_run, tmp_path / f"run{count}", ignore=shutil.ignore_patterns("evals")))
        ended = evaluate(workdir, [tmp_path / "tasks"] * count, *arguments)
        assert [code for code, *_ in ended] == [0] * count, ended
        assert ended[0][1].count("\n") == 4 and all(out == "" for _, out, _ in ended[1:]), ended
        runs.append(stored(workdir))
    one, two = runs
    assert len(one) == 3 and one.keys() == two.keys()
    for name, (about, samples) in one.items():
        assert close(about, two[name][0]) and close(samples, two[name][1]), name
    texts = [s["resps"][0][0] for name in one for s in one[name][1] if s.get("task") == "local_drawn"]
    assert len(texts) == 12 and len(set(texts)) > 6
    made = json.loads(next((tmp_path / "run2/evals/25").glob("validation*.json")).read_text())
    assert made["processes"] == 2 and made["devices"]["count"] == 8
    again = evaluate(tmp_path / "run2", [tmp_path / "tasks"] * 2, *arguments)
    assert [code for code, *_ in again] == [0, 0] and again[0][1].count("already evaluated") == 3
    assert stored(tmp_path / "run2") == two


def test_processes_with_other_data_are_refused_by_name(tiny_run: Path, tmp_path: Path):
    """They would ask the model different questions in one batch, or wait for one another for ever."""
    for i, documents in enumerate((DOCUMENTS, DOCUMENTS[:-1] + DOCUMENTS[:1])):
        write_tasks(tmp_path / f"tasks{i}", documents)
    workdir = Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("evals")))
    ended = evaluate(workdir, [tmp_path / "tasks0", tmp_path / "tasks1"], "--tasks=local_letters")
    assert [code for code, *_ in ended] == [78, 78], ended
    assert "process 1" in ended[0][2] and "another evaluation of local_letters" in ended[0][2], ended
    assert "requests_sha256" in ended[0][2] or "documents_sha256" in ended[0][2]
    assert stored(workdir) == {}
