"""Evaluation reads held-out windows that no step reads, does nothing twice, and keeps what it has found."""

import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from faults.runs import Trainer, trainers
from ml_collections import ConfigDict

from k2jax import evaluate, files
from k2jax.data.epochs import read_epochs
from k2jax.data.launches import read_launches, write_launches
from k2jax.data.loader import BatchSource, row_length, validation_starts
from k2jax.data.manifest import sha256_json
from k2jax.data.provenance import open_run
from k2jax.data.store_writer import StoreWriter
from k2jax.data.tokenizer import load_tokenizer, tokenizer_sha256
from k2jax.errors import ConfigError, StorageError, run_main
from k2jax.evals import held_out, memorization, suites
from k2jax.evals.identity import stores_digest
from k2jax.evals.results import Identity, Outcome, Results, read_result
from k2jax.evals.session import Session, Wanted, select_steps
from k2jax.evals.subject import Subject
from k2jax.files import write_json
from k2jax.model.decoder import Decoder
from k2jax.parallel.sharding import MESH_AXES
from k2jax.run.saved import open_step, restore_params
from k2jax.train import train
from k2jax.training.placement import mesh_for
from k2jax.training.validation import validate


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Path:
    """A whole run: checkpoints 10, 20 (rows of 32 tokens) and 25 (rows of 64)."""
    return tiny_run


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """To be evaluated into."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evals"))
    return tmp_path / "run"


def session(workdir: Path, say: Callable[[str], None] = print, **changes: Any) -> Session:
    base = Wanted(workdir, "newest", ("validation",), None, None, None, None, None, 8, False, 4096, 1234)
    return Session(base._replace(**changes), say)


def stored(workdir: Path) -> dict[str, bytes]:
    return {str(p.relative_to(workdir)): p.read_bytes() for p in workdir.glob("evals/*/*")}


# ---- held-out windows ------------------------------------------------------------------------------------------------


def test_no_step_reads_a_held_out_token(run: Path):
    """Over every row of every step: by the tokens' places in their store, not by their values."""
    data = open_run(run)
    order, shift = data.order, data.manifest["label_shift"]
    trained = {name: np.zeros(store.num_tokens, bool) for name, store in data.stores.items()}
    for step in range(1, order.num_steps + 1):
        length = order.stage_of_step(step).sequence_length
        rows = order.rows(order.positions(step))
        for subset, window in zip(rows.subset, rows.window, strict=True):
            start = int(window) * length
            trained[data.subset_names[subset]][start : start + row_length(length, shift)] = True
    for name, store in data.stores.items():
        for length in (32, 64, memorization.PROMPT + memorization.NEW):
            starts = validation_starts(store, length, shift)
            places = (starts[:, None] + np.arange(row_length(length, shift))).ravel()
            assert len(starts) and places.max() < store.num_tokens
            assert not trained[name][places].any()
        assert trained[name].any()


def test_validation_is_the_loss_of_all_held_out_windows(copy: Path):
    """Beside a plain forward pass on one device, window by window."""
    s = session(copy, steps="10")
    s.run()
    [result] = s.results
    data, saved = open_run(copy), open_step(copy, 10)
    params = restore_params(saved, jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1, 1), MESH_AXES))
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)
    decoder, tokenizer = Decoder(saved.config.model, params), load_tokenizer(copy / "tokenizer.json")
    nats, count, by_window = 0.0, 0, {}
    for name in ("books", "code", "web"):
        starts = validation_starts(data.stores[name], 32, "next")
        rows = data.stores[name].read(starts, 33).astype(np.int32)
        logits = decoder.logits(decoder(jnp.asarray(rows[:, :-1]), 10000.0))
        picked = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), rows[:, 1:, None], axis=2)[..., 0]
        by_window.update({(name, int(start)): -row.mean() for start, row in zip(starts, picked, strict=True)})
        found = result["metrics"]["subsets"][name]
        assert found["loss"] == pytest.approx(-picked.mean(), rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(-picked.mean()), rel=1e-5)
        assert found["windows"] == len(starts) and found["tokens"] == rows[:, 1:].size
        text = "".join(tokenizer.decode(row[1:].tolist(), skip_control=True) for row in rows)
        assert found["bytes"] == len(text.encode())
        nats, count = nats - picked.sum(), count + rows[:, 1:].size
    total = result["metrics"]["total"]
    assert total["loss"] == pytest.approx(nats / count, rel=1e-5) and total["tokens"] == count
    assert total["bits_per_byte"] == pytest.approx(nats / math.log(2) / total["bytes"], rel=1e-5)
    samples = [json.loads(line) for line in (copy / "evals/10" / result["samples"]["file"]).open()]
    assert {(w["subset"], w["start"]): w["loss"] for w in samples} == pytest.approx(by_window, rel=1e-4)


def test_a_cap_takes_windows_evenly_and_agrees_with_the_end_of_the_run(copy: Path):
    s = session(copy, windows=8)
    s.run()
    at_the_end = json.loads((copy / "validation.json").read_text())["subsets"]
    found = s.results[0]["metrics"]["subsets"]
    assert found.keys() == at_the_end.keys() == {"code", "web"}
    for name in found:
        assert found[name]["windows"] == 8
        assert found[name]["loss"] == pytest.approx(at_the_end[name]["loss"], rel=1e-6)
        assert found[name]["unigram_loss"] == pytest.approx(at_the_end[name]["unigram_loss"], rel=1e-6)


def test_a_budget_is_the_default_and_is_stated(copy: Path):
    parse = evaluate.parser().parse_args
    assert parse(["--workdir=x"]).windows == held_out.WINDOWS == 512
    assert parse(["--workdir=x", "--windows=all"]).windows is None
    every, some = session(copy, steps="10"), session(copy, steps="10,20", windows=3)
    every.run()
    some.run()
    [a], [b, later] = every.results, some.results
    there = {name: part["windows"] for name, part in a["metrics"]["subsets"].items()}
    assert min(there.values()) > 3 and len(set(there.values())) > 1
    assert {name: part["held_out_windows"] for name, part in b["metrics"]["subsets"].items()} == there
    assert b["settings"]["windows"] == 3 and b["metrics"]["total"]["windows"] == 9
    total = sum(there.values())
    assert f"on 9 of {total} held-out windows" in b["headline"] and " +/- 0.0" in b["headline"]
    assert f"on {total} of {total} held-out windows" in a["headline"] and a["settings"]["windows"] == "all"
    starts = [[(s["subset"], s["start"]) for s in samples_of(copy, r)] for r in (b, later)]
    assert starts[0] == starts[1], "every checkpoint is read the same windows"
    losses = b["metrics"]["subsets"]
    expected = sum(losses[name]["loss"] * count for name, count in there.items()) / total
    assert b["metrics"]["total"]["loss"] == pytest.approx(expected, rel=1e-6)


def samples_of(workdir: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "evals" / str(result["step"]) / result["samples"]["file"]).open()]


def test_a_budgets_total_estimates_that_of_all_windows_within_its_error():
    """A small subset weighs what it holds out, not what was read of it."""
    draw = np.random.default_rng(0)
    losses = {"small": draw.normal(5, 0.5, 100), "large": draw.normal(2, 0.3, 5000)}
    there = {name: len(values) for name, values in losses.items()}

    def windows(budget: int) -> dict[str, list[dict[str, Any]]]:
        chosen = {name: np.arange(min(budget, n)) * n // min(budget, n) for name, n in there.items()}
        of = {name: losses[name][places] for name, places in chosen.items()}
        return {name: [{"loss": x, "tokens": 64, "bytes": 200} for x in values] for name, values in of.items()}

    whole = held_out.summary(windows(10_000), there)
    assert whole["loss"] == pytest.approx(np.mean([*losses["small"], *losses["large"]]))
    errors = []
    for budget in (20, 50, 90, 500):
        some = held_out.summary(windows(budget), there)
        weights = [n / 5100 for n in there.values()]
        variances = [v.var(ddof=1) / min(budget, len(v)) for v in losses.values()]
        expected = sum(w * w * v for w, v in zip(weights, variances, strict=True)) ** 0.5
        assert some["loss_stderr"] == pytest.approx(expected, rel=0.35)
        errors.append(abs(some["loss"] - whole["loss"]) / some["loss_stderr"])
        assert some["bits_per_byte"] == pytest.approx(some["loss"] * 64 / 200 / math.log(2))
        assert some["held_out_windows"] == 5100
    assert max(errors) < 3
    assert held_out.summary({"small": windows(1)["small"]}, there)["loss_stderr"] is None


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 8), (2, 1, 2, 1, 2)])
def test_another_mesh_gives_the_same_loss(run: Path, sizes: tuple[int, ...], tiny_config: Callable):
    saved, data = open_step(run), open_run(run)

    def losses(mesh: jax.sharding.Mesh) -> list[float]:
        with jax.set_mesh(mesh):
            parts = (restore_params(saved, mesh), mesh, data.stores, jnp.float32, saved.meta["eos_id"])
            return [v.loss for v in validate(saved.config, saved.stage, *parts, max_windows=5).values()]

    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(sizes), MESH_AXES)
    assert losses(mesh) == pytest.approx(losses(mesh_for(saved.config)), rel=1e-5)


# ---- the record ------------------------------------------------------------------------------------------------------


def test_a_second_call_evaluates_only_what_is_missing(copy: Path, monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    session(copy, lines.append, steps="10,20").run()
    before = stored(copy)
    assert len(before) == 4 and not any("already" in line for line in lines)
    second = session(copy, lines.append, steps="all")
    second.run()
    assert second.num_new == 1 and [r["step"] for r in second.results] == [10, 20, 25]
    assert [line.split(":")[0] for line in lines if "already evaluated" in line] == [
        "step 10 validation",
        "step 20 validation",
    ]
    assert before.items() < stored(copy).items()
    # Everything is there: no parameter is read again.
    monkeypatch.setattr("k2jax.evals.subject.restore_params", None)
    third = session(copy, steps="all")
    third.run()
    assert third.num_new == 0 and third.results == second.results
    assert Results(copy).all() == second.results
    printed = json.loads(third.as_json())
    assert printed["results"] == second.results and printed["new"] == 0


def test_results_say_of_what_and_with_what(copy: Path):
    s = session(copy)
    s.run()
    [r] = s.results
    assert r["checkpoint"] == open_step(copy).digest and r["step"] == 25 and r["seed"] == 1234
    of = {"windows": "all", "stage": "stage2", "sequence_length": 64, "dtype": "float32"}
    assert r["settings"] == {**of, "data_sha256": stores_digest(open_step(copy), ["code", "web"])}
    assert r["devices"] == {"kind": "cpu", "count": 8, "mesh": {**dict.fromkeys(MESH_AXES, 1), "fsdp": 8}}
    assert r["versions"]["jax"] == jax.__version__ and r["compute"] == "float32" and r["seconds"] >= 0
    assert r["processes"] == 1


def test_a_kill_between_samples_and_result_leaves_nothing_that_counts(copy: Path, monkeypatch: pytest.MonkeyPatch):
    write, written = files.write_bytes, []

    def dies(path: Path, data: bytes) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, data)

    monkeypatch.setattr(files, "write_bytes", dies)
    with pytest.raises(KeyboardInterrupt):
        session(copy).run()
    assert written[0].exists() and Results(copy).all() == []
    monkeypatch.setattr(files, "write_bytes", write)
    again = session(copy)
    again.run()
    assert again.num_new == 1 and Results(copy).all() == again.results


def test_a_result_is_never_overwritten_and_another_checkpoint_has_its_own(tmp_path: Path):
    store, a = Results(tmp_path), Identity("t/x", 1, {"limit": None}, 0, "digest-a")
    first = store.add(5, a, Outcome("", {"acc": 0.25}, [{"n": 1}], {}), {})
    before = stored(tmp_path)
    assert store.add(5, a, Outcome("", {"acc": 0.75}, [{"n": 2}], {}), {}) == first
    assert stored(tmp_path) == before
    others = [a._replace(checkpoint="digest-b"), a._replace(seed=1), a._replace(version=2)]
    for other in [*others, a._replace(settings={"limit": 3})]:
        assert store.find(5, other) is None
        store.add(5, other, Outcome("", {"acc": 0.75}, [], {}), {})
    assert before.items() < stored(tmp_path).items() and len(store.all()) == 5
    assert store.find(5, a)["metrics"] == {"acc": 0.25}


def test_what_json_cannot_hold_is_stored_as_data(tmp_path: Path):
    store, a = Results(tmp_path), Identity("t", None, {}, 0, "d")
    metrics = {"inf": math.inf, "n": np.float32(0.5), "i": np.int64(3), "b": np.bool_(True), "a": np.arange(2)}
    found = store.add(1, a, Outcome("", metrics, [{"f": math.nan, "p": Path("x")}], {}), {})
    assert found["metrics"] == {"inf": None, "n": 0.5, "i": 3, "b": True, "a": [0, 1]} == store.all()[0]["metrics"]
    assert '{"f": null, "p": "x"}\n' in (tmp_path / "evals/1" / found["samples"]["file"]).read_text()


def test_a_damaged_result_is_an_error_and_not_evaluated_over(tmp_path: Path):
    store, a = Results(tmp_path), Identity("t", None, {}, 0, "d")
    store.add(1, a, Outcome("", {}, [], {}), {})
    [path] = tmp_path.glob("evals/1/*.json")
    for text in ("{", path.read_text().replace('"seed": 0', '"seed": 1'), '{"format": 1}'):
        path.write_text(text)
        with pytest.raises(StorageError, match=r"t-[0-9a-f]{12}.json is damaged"):
            store.find(1, a)
        with pytest.raises(StorageError):
            read_result(path)


# ---- steps -----------------------------------------------------------------------------------------------------------


def test_steps_are_the_newest_all_every_third_or_named(run: Path):
    pick = partial(select_steps, run)
    assert pick("newest") == [25] and pick("all") == [10, 20, 25] and pick("25,10") == [10, 25]
    assert pick("every:1") == [10, 20, 25] and pick("every:2") == [20] and pick("every:3") == [25]
    for text, words in (
        ("15", "no checkpoint of step 15: it has steps 10, 20, 25"),
        ("every:4", "that is none of this run"),
        ("every:0", "expected newest, all, every:N"),
        ("last", "expected newest, all, every:N"),
        ("10,", "expected newest"),
    ):
        with pytest.raises(ConfigError, match=words):
            pick(text)


def test_every_counts_the_chunks_and_not_what_is_there(copy: Path):
    """Checkpoints between chunks do not shift it, and neither does one that is missing."""
    shutil.rmtree(copy / "checkpoints" / "10")
    assert select_steps(copy, "every:2") == [20]
    with pytest.raises(ConfigError, match="checkpoints of steps 20, 25"):
        shutil.copytree(copy / "checkpoints" / "20", copy / "kept")
        shutil.move(copy / "checkpoints" / "25", copy / "gone")
        shutil.copytree(copy / "gone", copy / "checkpoints" / "25")
        select_steps(copy, "every:4")


def test_a_folder_that_is_no_run_says_so(tmp_path: Path):
    with pytest.raises(ConfigError, match="no run, there is no checkpoints folder"):
        session(tmp_path).run()


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.fault("C7")
def test_another_tokenizer_is_refused(copy: Path):
    """Seen red without the reader's comparison."""
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + "\n")
    with pytest.raises(ConfigError, match=r"tokenizer.json has SHA-256 \w+, checkpoint 25 was trained with"):
        session(copy).run()
    assert stored(copy) == {}


@pytest.mark.fault("B3")
def test_a_damaged_checkpoint_is_refused_and_nothing_is_stored(copy: Path):
    meta = copy / "checkpoints" / "25" / "meta" / "meta.json"
    values = json.loads(meta.read_text())
    values.pop("meta_sha256")
    values["digests"]["params/embed_VD"] ^= 1
    write_json(meta, {**values, "meta_sha256": sha256_json(values)})
    with pytest.raises(StorageError, match="damaged array"):
        session(copy).run()
    assert stored(copy) == {}


def test_without_lm_eval_only_harness_tasks_are_refused(copy: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for names in (("hellaswag",), ("validation", "k2")):
        with pytest.raises(ConfigError, match=r"needs lm_eval, which is not installed: pip install 'k2jax\[eval\]'"):
            session(copy, tasks=names)
    session(copy, tasks=("validation", "memorization"))


def test_a_run_without_data_is_told_what_can_be_evaluated(copy: Path):
    saved = open_step(copy)
    del saved.meta["manifest_digest"]
    with pytest.raises(ConfigError, match="an imported model that has not trained: .* name harness tasks"):
        _ = Subject(saved, None, batch_tokens=64, seed=0).run


def test_stores_that_have_moved_are_named(copy: Path, tiny_data: Path, tmp_path: Path):
    launches = read_launches(copy)
    for name, store in read_epochs(copy)[0].manifest["stores"].items():
        shutil.copytree(tiny_data / name, tmp_path / "moved" / name)
        launches[-1]["stores"][store["root_digest"]] = str(tmp_path / "gone" / name)
    write_launches(copy, launches)
    with pytest.raises((ConfigError, StorageError), match="gone"):
        session(copy, windows=2).run()
    moved = session(copy, windows=2, stores=str(tmp_path / "moved"))
    moved.run()
    assert moved.num_new == 1


def test_a_checkpoint_deleted_meanwhile_is_skipped_with_a_line(copy: Path):
    lines: list[str] = []
    s = session(copy, lines.append)
    shutil.rmtree(copy / "checkpoints" / "20")
    s.evaluate_step(20)
    assert lines == ["step 20: skipped, its checkpoint has been deleted"] and s.results == []


# ---- meshes ----------------------------------------------------------------------------------------------------------


def test_the_mesh_is_the_experiments_where_it_fits(tiny_config: Callable[..., ConfigDict]):
    def shape(**overrides: Any) -> tuple[int, ...]:
        mesh = mesh_for(tiny_config(**overrides))
        assert mesh.shape["stage"] == mesh.shape["context"] == 1
        return tuple(mesh.shape[axis] for axis in ("replica", "fsdp", "tensor"))

    assert shape(**{"mesh.fsdp": 2, "mesh.tensor": 4}) == (1, 2, 4)
    assert shape(**{"mesh.fsdp": 32, "mesh.tensor": 4}) == (1, 8, 1)
    assert shape(**{"mesh.fsdp": 32, "model.dim": 36}) == (2, 4, 1)
    assert shape(**{"mesh.fsdp": 8, "model.dim": 35}) == (8, 1, 1)
    assert shape(**{"mesh.fsdp": 2, "mesh.context": 2, "mesh.tensor": 2}) == (1, 4, 2)
    assert shape(**{"mesh.fsdp": 2, "mesh.stage": -1, "mesh.replica": 2}) == (2, 4, 1)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_json_and_exits_with_the_codes(
    copy: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate", f"--workdir={copy}", *arguments])
        with pytest.raises(SystemExit) as end:
            run_main(evaluate.main)
            raise SystemExit(0)
        return end.value.code or 0, *capsys.readouterr()

    code, out, err = call("--steps=10", "--json")
    assert code == 0 and [r["step"] for r in json.loads(out)["results"]] == [10]
    assert "step 10 validation: loss" in err
    code, out, err = call("--steps=11")
    assert code == 78 and err.startswith("error: ") and err.count("\n") == 1
    for tasks in ("", ","):
        code, out, err = call(f"--tasks={tasks}")
        assert (code, out) == (78, "") and f"--tasks={tasks}: names no task" in err
    assert call("--steps=newest", "--watch")[0] == 2
    assert call("--memorization-steps=x")[0] == 2
    assert call("--limit=0")[0] == call("--windows=some")[0] == call("--windows=0")[0] == 2


def test_help_is_quick_as_it_imports_nothing_heavy():
    code = (
        "import sys; sys.argv[1:] = ['--help']\nfrom k2jax import evaluate\ntry: evaluate.main()\n"
        "except SystemExit: print([m for m in ('jax', 'numpy', 'lm_eval', 'orbax') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert told.stdout.startswith("usage: python -m k2jax.evaluate") and told.stdout.endswith("\n[]\n")


def test_watch_follows_a_training_to_its_end(tiny_data: Path, tmp_path: Path):
    """Beside a real trainer, whose lock stays its own."""
    lines: list[str] = []
    with trainers(tiny_data) as start:
        trainer: Trainer = start(tmp_path / "run")
        trainer.wait_for("compiling")
        s = session(tmp_path / "run", lines.append, steps="all", windows=2)
        s.watch(poll_s=0.05)
        trainer.wait(0)
    assert [r["step"] for r in s.results] == [10, 20, 25]
    assert [r["checkpoint"] for r in s.results] == [open_step(tmp_path / "run", n).digest for n in (10, 20, 25)]
    every = session(tmp_path / "run", steps="every:2", windows=2)
    every.watch(poll_s=60)
    assert [r["step"] for r in every.results] == [20] and every.num_new == 0


def test_watch_ends_on_sigterm_and_validation_imports_no_harness(copy: Path):
    shutil.rmtree(copy / "checkpoints" / "25")
    code = (
        "import atexit, sys\nfrom k2jax import evaluate\nfrom k2jax.errors import run_main\n"
        "atexit.register(lambda: print('lm_eval' in sys.modules, 'torch' in sys.modules, flush=True))\n"
        "run_main(evaluate.main)\n"
    )
    arguments = [f"--workdir={copy}", "--watch", "--windows=2", "--poll-s=0.05", "--batch-tokens=512"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=REPOSITORY,
    )  # fmt: skip
    try:
        told = [process.stdout.readline() for _ in (10, 20)]
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert [line.split(":")[0] for line in told] == ["step 10 validation", "step 20 validation"]
    assert out == "False False\n" and "Traceback" not in err
    assert len(Results(copy).all()) == 2


# ---- K2's suite ------------------------------------------------------------------------------------------------------


def test_the_suite_has_k2s_22_metrics_and_its_published_averages():
    assert len(suites.SUITE) == 22 and len({m.name for m in suites.SUITE}) == 22
    assert round(sum(m.k2 for m in suites.SUITE) / 22, 1) == 58.1
    assert round(sum(m.k2_stage1 for m in suites.SUITE) / 22, 1) == pytest.approx(56.6, abs=0.11)


def test_the_table_sets_what_was_measured_beside_k2():
    found = {"MMLU": {"acc,none": 0.5, "acc_stderr,none": 0.1}, "GSM8K": {"exact_match,strict-match": 0.25}}
    lines = {line.name: line for line in suites.compare(found)}
    assert lines["MMLU"].ours == 50.0 and lines["GSM8K"].ours == 25.0 and lines["BBH"].ours is None
    assert lines["average of 2"][1:4] == (37.5, (62.6 + 58.3) / 2, (64.8 + 50.2) / 2)
    text = suites.as_text(suites.compare(found))
    assert text[1].split()[:4] == ["MMLU", "50.0", "62.6", "64.8"] and "published for Amber" in text[1]


# ---- memorization ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recited(tiny_data: Path, tiny_config: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one window of random tokens, again and again: checkpoint 1 after one tiny step, 61 knows it by heart."""
    root, random = tmp_path_factory.mktemp("recited"), np.random.default_rng(0)
    saved = {"vocab_size": 512, "shard_tokens": 4096, "chunk_tokens": 512, "eos_id": 2}
    sha = tokenizer_sha256(tiny_data / "tokenizer.json")
    with StoreWriter(root / "books", tokenizer_sha256=sha, **saved) as writer:
        for i in range(2):
            tokens = random.integers(3, 512, 100, dtype=np.uint32).tolist()
            writer.add(tokens, id=f"{i:064x}", source=str(i))
        writer.finish(validation_fraction=0.5)
    shutil.copy(tiny_data / "tokenizer.json", root)
    c = tiny_config()
    with c.unlocked():
        c.data.root, c.data.tokenizer = str(root), str(root / "tokenizer.json")
        for stage, steps, lr in zip(c.stages, (1, 60), (1e-9, 2e-2), strict=True):
            with stage.unlocked():
                stage.update(steps_per_chunk=steps, chunks=1, warmup_steps=0, sequence_length=64, rope_base=10000.0)
                stage.update(lr_peak=lr, lr_final=lr / 10)
                stage.mix = ConfigDict({"books": 1.0})
    workdir = root / "run"
    train(c.lock(), workdir)
    return workdir


def test_what_was_learned_by_heart_scores_one_and_what_was_not_about_zero(recited: Path):
    s = session(recited, tasks=("memorization",), steps="1,61", memorization_rows=4)
    s.run()
    first, last = (r["metrics"] for r in s.results)
    assert last["chunks"]["2"]["score"] == 1.0 and last["chunks"]["2"]["full_match_rate"] == 1.0
    assert last["read"] == {"score": 1.0, "score_stderr": 0.0, "full_match_rate": 1.0, "rows": 8}
    assert first["read"]["score"] < 0.2 and first["read"]["full_match_rate"] == 0.0
    assert first["chunks"].keys() == {"1"} and last["chunks"].keys() == {"1", "2"}
    assert last["held_out"]["score"] < 0.5 and last["held_out"]["rows"] >= 1
    samples = [json.loads(line) for line in (recited / "evals/61" / s.results[1]["samples"]["file"]).open()]
    data = open_run(recited)
    for sample in samples:
        [tokens] = data.stores["books"].read([sample["start"]], 64)
        assert sample["tokens"] == tokens.tolist() and len(sample["recited"]) == 32
        if sample["step"] is not None:
            assert sample["recited"] == sample["tokens"][32:]


def test_steps_may_be_named_and_later_ones_are_told_apart(recited: Path):
    s = session(recited, tasks=("memorization",), steps="1", memorization_steps=(1, 30), memorization_rows=2)
    s.run()
    metrics = s.results[0]["metrics"]
    assert metrics["read"]["rows"] == 2 and metrics["later"]["rows"] == 2
    assert s.results[0]["settings"]["steps"] == [1, 30]


def test_rows_are_those_that_the_run_read(run: Path):
    data = open_run(run)
    windows = memorization.read_windows(data, [21, 25], 6)
    assert [(w.step, w.row) for w in windows] == [(21, 0), (21, 2), (21, 5), (25, 0), (25, 2), (25, 5)]
    assert {w.chunk for w in windows} == {3}
    for step in (21, 25):
        batch = BatchSource(data.order, data.stores, label_shift="next", first_step=step, last_step=step)[0]
        for w in windows:
            if w.step == step:
                assert batch["tokens"][w.row, :64].tolist() == w.tokens.tolist()


def test_rows_too_short_for_prompt_and_answer_are_refused_by_name(run: Path):
    subject = Subject(open_step(run, 20), mesh_for(open_step(run).config), batch_tokens=512, seed=0)
    with pytest.raises(ConfigError, match="steps 1 to 20 read no row of 64 tokens"):
        memorization.Memorization().evaluate(subject)
    with pytest.raises(ConfigError, match="rows of step 3 have 32 tokens, 64 are needed"):
        memorization.Memorization(steps=(3,)).evaluate(subject)


def test_chunks_up_to_the_checkpoint_are_asked_for_and_no_later_one(run: Path):
    order = open_run(run).order
    assert memorization.Memorization()._steps(order, 25) == [[21, 22, 24, 25]]
    assert memorization.Memorization()._steps(order, 23) == [[21, 22, 23]]
    assert memorization.Memorization()._steps(order, 20) == []


