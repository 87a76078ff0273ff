"""The report: extremes stay, parts may be missing or damaged, no text of others is markup, one file holds it all."""

import gzip
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from report_runs import HOSTILE, full, long_metrics

from k2jax.errors import ConfigError
from k2jax.evals.results import Identity, Outcome, Results
from k2jax.evals.suites import SUITE
from k2jax.report import page
from k2jax.report.build import Report
from k2jax.report.changes import changes
from k2jax.report.page import as_json
from k2jax.report.rows import Rows
from k2jax.report.thin import Thinned

MOST_BYTES = 8_000_000


class Page(html.parser.HTMLParser):
    """Elements, attributes and texts of a page, as a browser would have them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        self._in = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in != "style":
            self.text += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])

    def chart(self, title: str) -> dict:
        [found] = [chart for chart in self.data["charts"] if chart["title"] == title]
        return found


@pytest.fixture(scope="module")
def shown(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Of a run with everything."""
    return Page(Report(full(tiny_run, tmp_path_factory.mktemp("full") / "run")).html())


# ---- thinning --------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-1e6, 1e6, width=32) | st.just(math.nan), min_size=1, max_size=300),
    st.sampled_from([2, 4, 16]),
    st.integers(1, 50),
    st.integers(1, 9),
)
def test_thinned_series_keep_mean_and_extremes_with_their_steps(values, most, block, first):
    thinned = Thinned(most)
    steps = np.arange(first, first + len(values))
    for start in range(0, len(values), block):
        thinned.add(steps[start : start + block], {"x": np.array(values[start : start + block])})
    assert thinned.buckets <= most and thinned.width * thinned.buckets >= len(values)
    found, array = thinned.as_json("x", 17), np.array(values)
    for i, (a, b) in enumerate(zip(thinned.first_steps, thinned.last_steps, strict=True)):
        inside = array[a - first : b - first + 1]
        known = inside[np.isfinite(inside)]
        if not len(known):
            assert found["mean"][i] is None
            continue
        assert found["mean"][i] == pytest.approx(known.mean(), rel=1e-9, abs=1e-6)
        if thinned.width > 1:
            assert (found["low"][i], found["high"][i]) == (known.min(), known.max())
            assert array[a + found["low_at"][i] - first] == known.min()
            assert array[a + found["high_at"][i] - first] == known.max()


def test_rows_are_read_once_and_what_was_cut_off_anew(tmp_path: Path):
    folder = tmp_path / "metrics"
    long_metrics(folder, {"loss": 1.0, "grad_norm": 0.5}, 30, spike=7, chunk=10)
    last = folder / "chunk-00003.jsonl"
    whole = last.read_bytes()
    last.write_bytes(whole[:-20])  # being written
    rows = Rows(folder).update()
    assert (rows.num_rows, rows.series.last, rows.damaged) == (29, 29, 0)
    last.write_bytes(whole)
    rows.update()
    assert (rows.num_rows, rows.series.last) == (30, 30) and rows.series.high("loss")[6] == 99.5
    last.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))  # rolled back
    lines = (folder / "chunk-00001.jsonl").read_text().splitlines(keepends=True)
    changed = [json.dumps({**json.loads(line), "loss": 1.0}) + "\n" for line in lines]
    (folder / "chunk-00001.jsonl").write_text("".join(changed))
    rows.update()
    assert (rows.num_rows, rows.series.last) == (22, 22) and np.nanmax(rows.series.high("loss")) < 99


def test_rows_that_are_none_are_counted_and_left_out(tmp_path: Path):
    lines = [
        '{"step": 1, "loss": 2.0, "stage": "a"}', "{", "[]", '{"step": "2"}', '{"step": -1}', "[" * 100_000,
        '{"step": 2, "loss": "text", "x": [1], "layers": {"q": "no", "k": [1, "a"]}, "hosts": {"host": 3}}',
        '{"step": 3, "loss": 1e999, "layers": {"q": [1.0, null]}, "applied": false, "stage": ["b"]}',
        '{"step": 4, "loss": 3.0, "stage": "b", "targets/w": 5, "applied": true, '
        '"hosts": {"process": [0, 1], "host": ["x", "y"], "own_s": [0.5, null]}}',
    ]  # fmt: skip
    (tmp_path / "chunk-00001.jsonl").write_text("\n".join(lines) + "\n")
    rows = Rows(tmp_path).update()
    assert (rows.num_rows, rows.damaged) == (4, 5)
    assert rows.series.as_json("loss")["mean"] == [2.0, None, None, 3.0]
    assert [(first, name) for first, name, _ in rows.stages] == [(1, "a"), (4, "b")]
    assert rows.processes.names == ["0 x"] and rows.layers.count("q\0000") == 1 and not rows.layers.count("k\0001")
    assert rows.no_update == [3] and rows.read["b"] == {"w": 5.0}


def test_a_long_run_fits_on_a_page():
    """340,000 steps of a hundred series: what a page would hold of them. The whole of it is `test_a_run_of_340000`."""
    thinned, draw = Thinned(1_600), np.random.default_rng(0)
    names = [f"series/{i}" for i in range(100)]
    started = time.monotonic()
    for first in range(1, 340_001, 4_000):
        values = draw.standard_normal((len(names), 4_000))
        if first <= 123_456 < first + 4_000:
            values[0, 123_456 - first] = 99.5
        thinned.add(np.arange(first, first + 4_000), dict(zip(names, values, strict=True)))
    text = json.dumps([thinned.as_json(name) for name in names])
    print(f"{len(text):,} bytes, {time.monotonic() - started:.1f} s")
    assert 800 <= thinned.buckets <= 1_600 and len(text) < MOST_BYTES - 2_500_000
    at = int(np.argmax(thinned.high("series/0")))
    found = thinned.as_json("series/0")
    assert found["high"][at] == 99.5 and thinned.first_steps[at] + found["high_at"][at] == 123_456


@pytest.mark.slow  # writes and reads a gigabyte
def test_a_run_of_340000_steps(tiny_run: Path, tmp_path: Path):
    run = full(tiny_run, tmp_path / "run")
    template = json.loads((tiny_run / "metrics" / "chunk-00001.jsonl").read_text().splitlines()[0])
    template |= {f"{what}/subset{i}": 2.5 for what in ("loss", "targets") for i in range(26)}
    shutil.rmtree(run / "metrics")
    long_metrics(run / "metrics", template, 340_000, spike=123_456)
    code = (
        "import runpy, sys; sys.argv = ['report.py', '--workdir', sys.argv[1]];"
        "runpy.run_path('tools/report.py')['main']();"
        "[peak] = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')];"
        "print(int(peak) // 1024, 'MiB')"  # ru_maxrss would be that of the process that started this one
    )
    done = subprocess.run([sys.executable, "-c", code, run], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    size = (run / "report.html").stat().st_size
    print(done.stdout, f"{size:,} bytes")
    assert size < MOST_BYTES and int(done.stdout.split()[-2]) < 500
    assert 99.5 in dict(Page((run / "report.html").read_text()).data["runs"]["0"]["series"])["loss"]["high"]


# ---- what is on it ---------------------------------------------------------------------------------------------------


def test_a_page_has_all_parts_of_a_run(shown: Page):
    titles = [chart["title"] for chart in shown.data["charts"]]
    for title in (
        "Training loss", "Training loss by subset", "Held-out loss by subset", "Gradient norm", "Learning rate",
        "Norms by layer group", "By layer", "Seconds a step", "Memory", "Tokens of each subset as read",
        "Validation loss", "own_task", "Memorization", "Memorization by chunk and checkpoint",
    ):  # fmt: skip
        assert title in titles, title
    for said in (
        "goodput", "steps that count", "epochs read", "versions (then what changed)", "predicted", "Change points",
        "the run went back to step 10", "has helped", "16 rows skipped", "which series left its range first",
    ):  # fmt: skip
        assert said in shown.text, said
    kinds = {mark["kind"] for mark in shown.data["marks"]}
    assert kinds == {"stage", "spike", "roll-back"}
    labels = [trace["label"] for trace in shown.chart("Training loss")["traces"]]
    assert labels[0] == "loss" and {"branch 1, left behind", "predicted before step 1"} < set(labels)


def test_k2s_metrics_are_small_multiples_with_k2s_values(shown: Page):
    """Also of tasks that are there twice, with one answer and with several."""
    for metric in SUITE:
        chart = shown.chart(metric.name)
        [trace] = chart["traces"]
        assert trace["y"][-1] == pytest.approx(metric.k2) and trace["x"] == [10, 20, 25]
        assert [level["y"] for level in chart["levels"]] == [metric.k2, metric.k2_stage1]


def test_settings_of_a_task_are_told_apart_by_what_differs(tiny_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    for step, stage in ((10, "stage1"), (25, "stage2")):
        identity = Identity("validation", 1, {"stage": stage, "windows": 8}, 1234, "0" * 64)
        Results(run).add(step, identity, Outcome("", {"total": {"loss": 5.0}}, [], {}), {})
    titles = {chart["title"] for chart in Page(Report(run).html()).data["charts"]}
    assert {"Validation loss (stage stage1)", "Validation loss (stage stage2)"} < titles


def test_losses_of_a_short_run_are_those_of_its_rows(shown: Page, tiny_run: Path):
    rows = [json.loads(line) for path in sorted(tiny_run.glob("metrics/*")) for line in path.read_text().splitlines()]
    series = dict(shown.data["runs"]["0"]["series"])
    assert series["loss"]["mean"] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    axes = shown.data["runs"]["0"]["axes"]
    tokens = dict(zip(axes["step"], axes["tokens"], strict=True))
    assert all(tokens[row["step"]] == row["tokens_seen"] for row in rows) and axes["flops"][-1] > tokens[25] * 1e4
    branch = dict(shown.data["runs"]["branch 1"]["series"])["loss"]["mean"]
    assert shown.data["runs"]["branch 1"]["base"] == 11 and branch[7] == pytest.approx(rows[17]["loss"] + 6, rel=1e-3)


def test_what_was_read_is_beside_what_was_asked(tiny_run: Path):
    rows = Rows(tiny_run / "metrics").update()
    lines = [json.loads(line) for path in tiny_run.glob("metrics/*") for line in path.read_text().splitlines()]
    for stage in ("stage1", "stage2"):
        for name in ("books", "code", "web"):
            total = sum(row.get(f"targets/{name}", 0) for row in lines if row["stage"] == stage)
            assert rows.read[stage].get(name, 0.0) == total


def test_samples_are_of_the_same_documents_at_each_checkpoint(shown: Page):
    task = next(task for task in shown.data["samples"] if task["task"] == "arc_easy")
    assert len(task["documents"]) == 8
    for document in task["documents"]:
        assert [answer["step"] for answer in document["answers"]] == [10, 20, 25]
        assert ["resps", "at step 20: B "] in document["answers"][1]["fields"]
    [memorized] = [task for task in shown.data["samples"] if task["task"] == "memorization"]
    fields = dict(memorized["documents"][0]["fields"])
    assert isinstance(fields["tokens"], str) and not fields["tokens"].startswith("[")  # text, not ids
    assert [prompt["prompt"] for prompt in shown.data["gallery"]] == ["Once 0 ", "Once 1 "]


def test_a_prediction_is_beside_its_outcome_and_one_that_was_changed_is_none(tiny_run: Path, tmp_path: Path):
    run = full(tiny_run, tmp_path / "run")
    rows = [json.loads(line) for path in sorted(run.glob("metrics/*")) for line in path.read_text().splitlines()]
    actual = np.mean([row["loss"] for row in rows[-20:]])
    predicted = json.loads((run / "prediction.json").read_text())
    shown = Page(Report(run).html())
    assert f"training loss at step 25{predicted['loss']['curve'][-1][1]:.5g}{actual:.5g}" in shown.text
    assert "device-hours0.1" in shown.text and "is not the experiment" not in shown.text
    assert "device-hours" in shown.text.partition("formula")[2], "costs have their table"
    predicted["loss"]["final"] = float(actual)
    (run / "prediction.json").write_text(json.dumps(predicted))
    shown = Page(Report(run).html())
    assert "None was made before the run." in shown.text and "its digest is not in the journal" in shown.text
    assert "predicted before step 1" not in json.dumps(shown.data)


def test_other_runs_are_set_beside_it(tiny_run: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(tiny_run, other)
    shown = Page(Report(tiny_run, [other]).html())
    traces = [chart for chart in shown.data["charts"] if chart["title"] == "Training loss"][0]["traces"]
    assert [trace["run"] for trace in traces] == [0, 1] and len({trace["label"] for trace in traces}) == 2
    assert set(shown.data["runs"]) == {"0", "1"} and "Beside other runs" in shown.text


def test_a_run_in_a_bucket_has_its_report_there(tiny_run: Path):
    import buckets

    from k2jax import bucket

    with buckets.serving("gs") as server:
        bucket.forget()
        workdir = bucket.at(f"{server.bucket()}/run #1")
        for path in tiny_run.rglob("*"):
            if path.is_file() and "checkpoints" not in path.parts:
                (workdir / path.relative_to(tiny_run)).put(path.read_bytes())
        report = Report(workdir)
        report.write(workdir / "report.html")
        shown = Page((workdir / "report.html").read_text())
        before = report.subject.rows.num_rows
        report.subject.update()
        assert report.subject.rows.num_rows == before == 25  # none counted twice
    bucket.forget()
    assert "25 of 25" in shown.text and "Not everything could be read" not in shown.text
    assert len(dict(shown.data["runs"]["0"]["series"])["loss"]["mean"]) == 25


# ---- what is missing or damaged --------------------------------------------------------------------------------------


def test_a_run_at_its_third_step_has_a_report(tiny_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("epochs", "metrics"):
        shutil.copytree(tiny_run / name, run / name)
    lines = (tiny_run / "metrics" / "chunk-00001.jsonl").read_bytes().splitlines(keepends=True)
    shutil.rmtree(run / "metrics")
    empty = Page(Report(run).html())
    assert "No step has been recorded yet." in empty.text
    (run / "metrics").mkdir()
    (run / "metrics" / "chunk-00001.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:50])
    shown = Page(Report(run).html())
    assert "3 of 25" in shown.text and not re.search("could be read(.{0,300})", shown.text)
    for said in ("No checkpoint has been evaluated", "No prompts have been kept", "None was made before the run"):
        assert said in shown.text


def test_damaged_parts_are_named_and_the_rest_is_shown(tiny_run: Path, tmp_path: Path):
    run = full(tiny_run, tmp_path / "run")
    [result, *_] = sorted((run / "evals" / "10").glob("mmlu-*[0-9a-f].json"))
    result.write_text(result.read_text().replace("0.25", "0.99").replace('"step": 10', '"step": 20') + "x")
    for name in ("gallery/20", "environment", "prediction", "plan"):
        (run / f"{name}.json").write_text('{"half')
    for name in ("goodput.jsonl", "journal.jsonl"):
        (run / name).write_text('{"half')
    (run / "spikes" / "1-2.json").write_text("{}")
    (run / "ledger" / "records.jsonl").write_text("[]\n")
    samples = next((run / "evals" / "25").glob("piqa*.samples.jsonl"))
    samples.write_text("{\n")
    shown = Page(Report(run).html())
    for name in (result.name, "20.json", "journal", "prediction.json", "1-2.json", "ledger", "piqa"):
        assert name in shown.text, name
    assert shown.chart("Training loss")["traces"][0]["series"] == "loss" and shown.chart("HellaSwag")


def test_a_folder_that_is_no_run_is_refused_and_nothing_is_written(tmp_path: Path):
    with pytest.raises(ConfigError, match="no run"):
        Report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_of_several_epochs_says_what_changed(tiny_run: Path, tmp_path: Path):
    from k2jax.data.epochs import new_epoch, read_epochs, write_epoch

    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    epochs = read_epochs(run)
    config = json.loads(json.dumps(epochs[0].config))
    config["loss"]["z_loss"] = 1e-4
    changed = {"changes": {"loss.z_loss": [0.0, 1e-4]}, "config": config, "manifest": epochs[0].manifest}
    write_epoch(run, new_epoch(epochs, after_step=20, **changed))
    shown = Page(Report(run).html())
    assert "loss.z_loss: 0.0 to 0.0001" in shown.text
    assert {"kind": "change", "step": 20, "text": "epoch 2: loss.z_loss"} in shown.data["marks"]


def test_a_branch_has_a_report_of_its_own(tiny_run: Path, tmp_path: Path):
    run = full(tiny_run, tmp_path / "run")
    shutil.copytree(run / "epochs", run / "branches" / "01" / "epochs")
    command = [sys.executable, "tools/report.py", "--workdir", run, "--branch", "1", "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    out = run / "branches" / "01" / "report.html"
    assert said == {**said, "out": str(out), "bytes": out.stat().st_size, "step": 18}


# ---- hostile text ----------------------------------------------------------------------------------------------------


def test_nothing_of_others_text_is_markup_or_code(tiny_run: Path, tmp_path: Path):
    """Seen red without `UNSAFE`, and without `escaped` in a cell."""
    run = full(tiny_run, tmp_path / "run", HOSTILE)
    for path in (run / "metrics").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        renamed = [{k.replace("web", f"web{HOSTILE}"): v for k, v in {**row, "stage": HOSTILE}.items()} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in renamed))
    launches = {"launches": [{"time": HOSTILE, "host": HOSTILE, "versions": {HOSTILE: HOSTILE}, "commit": HOSTILE}]}
    (run / "environment.json").write_text(json.dumps(launches))
    text = Report(run).html()
    shown = Page(text)
    assert len(shown.scripts) == 3 and text.count("</script") == 3
    plain = Page(Report(tiny_run).html())
    assert {tag for tag, _ in shown.tags} <= {tag for tag, _ in plain.tags} | {"ul", "li", "p", "details", "summary"}
    for tag, attributes in shown.tags:
        assert not {"src", "onerror", "onload", "srcset", "action"} & attributes.keys(), (tag, attributes)
        assert not attributes.get("href", "#").removeprefix("#").count(":"), attributes
    assert "\u2028" not in text and "\u202e" not in shown.text and "\x1b" not in text
    assert "geheim" not in shown.text and "s3cret" not in shown.text
    assert "window.hit=1" in shown.text  # it is there, as text


@given(st.text())
def test_json_in_a_script_is_what_it_was(text):
    found = as_json({"x": text})
    assert json.loads(found) == {"x": text} and not re.search("[<>&\u2028\u2029]", found)


def test_the_policy_lets_two_scripts_run_and_no_network(shown: Page):
    [policy] = [a["content"] for tag, a in shown.tags if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and "connect-src" not in rules and "http" not in policy
    plotly = gzip.decompress(__import__("base64").b64decode(shown.scripts[1]))
    assert rules["script-src"].split() == [f"'{page.digest(shown.scripts[2].encode())}'", f"'{page.digest(plotly)}'"]


# ---- change points ---------------------------------------------------------------------------------------------------


def test_change_points_are_found_where_the_course_changes_and_nowhere_else():
    """Seen red with a penalty of 1: noise has pieces."""
    draw = np.random.default_rng(1)
    steps = np.unique(np.geomspace(10, 300_000, 200).astype(int))
    clean = 8 - 0.5 * np.log(steps) + 0.02 * draw.standard_normal(len(steps))
    assert changes(steps, clean) == []
    assert not any(changes(range(1, 61), draw.standard_normal(60)) for _ in range(50))
    jumped = clean + 0.3 * (steps >= 20_000)
    [found] = changes(steps, jumped)
    first = int(steps[steps >= 20_000][0])
    assert found.step == first and found.jump == pytest.approx(0.3, abs=0.05)
    risen = np.where(steps < 5_000, 25.0, 25 + 8 * np.log(steps / 5_000)) + 0.3 * draw.standard_normal(len(steps))
    [found] = changes(steps, risen)
    assert found.step == pytest.approx(5_000, rel=0.25) and found.after == pytest.approx(8, abs=0.6)
    assert changes([1, 2, 3], [1.0, 2.0, 9.0]) == [] and changes([], []) == []
    assert changes(range(1, 41), [math.nan] * 20 + [1.0] * 20) == []


# ---- the command -----------------------------------------------------------------------------------------------------


def test_watch_writes_it_anew_until_the_run_has_ended(tiny_run: Path, tmp_path: Path):
    run, said = tmp_path / "run", []
    shutil.copytree(tiny_run, run)
    ended = (run / "validation.json").read_bytes()
    (run / "validation.json").unlink()
    last = run / "metrics" / "chunk-00003.jsonl"
    rows = last.read_bytes()
    last.unlink()

    def say(line: str) -> None:
        said.append(line)
        last.write_bytes(rows)  # the training goes on
        (run / "validation.json").write_bytes(ended)

    report = Report(run)
    report.watch(run / "report.html", 0.01, say)
    assert len(said) == 2 and "step 20" in said[0] and "step 25" in said[1]
    assert Page((run / "report.html").read_text()).data["reload_s"] is None  # there is nothing to wait for
    assert "25 of 25" in (run / "report.html").read_text() and not list(run.glob("*.new-*"))


def test_without_plotly_it_says_what_to_install(tiny_run: Path, monkeypatch: pytest.MonkeyPatch):
    page.plotly.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ConfigError, match=r"pip install 'k2jax\[report\]'"):
        Report(tiny_run)


def test_help_is_quick_as_it_imports_nothing_heavy():
    code = "import runpy, sys; sys.argv = ['r', '--help']"
    code += "\ntry: runpy.run_path('tools/report.py', run_name='__main__')\nexcept SystemExit: pass"
    code += "\nassert not {'jax', 'numpy', 'plotly'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True)
