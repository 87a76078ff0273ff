"""The stage that reads and cleans: its files agree with each other, and are the same whatever happens in between."""

import gzip
import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="the extra `data`")

import pyarrow.parquet as pq  # noqa: E402
from dealt import deal  # noqa: E402

from k2jax.errors import ConfigError, StorageError  # noqa: E402
from k2jax.prepare import dealing, recipe  # noqa: E402
from k2jax.prepare.clean import check, stages  # noqa: E402
from k2jax.prepare.documents import document, read_documents  # noqa: E402

SENTENCE = "The keeper of the lighthouse number {} wrote to keeper{}@example.net about the oil and the weather. "
QUESTION = "which of these islands had a lighthouse before the year 1800 and still has one that turns today"


def write_corpus(folder: Path, num_files: int = 6, num_documents: int = 30, filler: int = 0) -> None:
    """`filler` bytes a document, random and the same each time, are there to be written."""
    folder.mkdir(parents=True)
    draw = random.Random(1)
    for i in range(num_files):
        lines = []
        for j in range(num_documents):
            text = SENTENCE.format(i, j) * (j % 7)
            text += QUESTION * (j == 13) + draw.randbytes(filler).hex()
            lines.append(json.dumps({"text": text, "id": f"{i}-{j}", "license": "CC0"}))
        (folder / f"{i}.jsonl").write_text("\n".join([*lines, "{bad"]) + "\n")


def make_config(folder: Path, tasks: int = 1, **options):
    config = recipe.base()
    config.subsets.web = recipe.subset(f"jsonl:{folder}/*.jsonl", tasks=tasks, nfc=True, pii=True, **options)
    recipe.validate(config)
    return config


def run(config, out: Path) -> dict[str, bytes]:
    """All stages; every file by its name."""
    check(config)
    for stage in stages(deal(config, out), out, again=None):
        for rank in range(stage.tasks):
            stage.function(rank)
    return files_of(out)


def files_of(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def half_written(out: Path) -> list[Path]:
    return list(out.glob("stages/clean/*/*.new-*"))


def complete(out: Path) -> list[str]:
    """Files of a task of cleaning that look complete."""
    return [name for name in files_of(out) if ".new-" not in name and not name.startswith("stages/files/")]


def test_a_tasks_files_agree(tmp_path):
    write_corpus(tmp_path / "in")
    config = make_config(tmp_path / "in", min_document_bytes=150)
    config.removed_samples = 3
    (tmp_path / "x.bin").touch()
    config.subsets.tokens = recipe.subset(f"megatron:{tmp_path}/x.bin")
    names = run(config, tmp_path / "out")
    kinds = [("documents", "jsonl.zst"), ("index", "parquet"), ("removed", "jsonl.zst"), ("tally", "json")]
    dealt = ("tokens.jsonl", "web.jsonl", "summary.json", "shares/tokens/00000.json", "shares/web/00000.json")
    dealt = [f"stages/files/{name}" for name in dealt]  # tokens are no task of this stage
    assert sorted(names) == sorted([*dealt, *(f"stages/clean/{a}/00000.{b}" for a, b in kinds)])
    clean = tmp_path / "out/stages/clean"
    found = list(read_documents(clean / "documents/00000.jsonl.zst"))
    index = pq.read_table(clean / "index/00000.parquet").to_pylist()
    assert [row["id"].hex() for row in index] == [document(one.text).id for one in found] == [one.id for one in found]
    assert [row["num_bytes"] for row in index] == [len(one.text.encode()) for one in found]
    assert all(row["subset"] == "web" and row["dump"] is None for row in index)
    assert [row["source"] for row in index] == [one.metadata["source"] for one in found]
    tally = json.loads((clean / "tally/00000.json").read_text())
    steps = tally["steps"]
    # Of the 30 documents of a file 5 are empty, and 5 of one sentence.
    assert steps["read"] == {"documents": 180, "bytes": steps["read"]["bytes"],
                             "removed": {"too short": steps["read"]["removed"]["too short"]}}  # fmt: skip
    assert steps["read"]["removed"]["too short"]["documents"] == 180 - len(found) == 10 * 6
    assert steps["size"]["documents"] == len(found) == sum(tally["lengths"].values()) == tally["licences"]["CC0"]
    assert tally["bad"] == {"bad JSON": 6}
    removed = list(read_documents(clean / "removed/00000.jsonl.zst"))
    assert [(one.metadata["step"], one.metadata["reason"]) for one in removed] == [("read", "too short")] * 3
    shown = [one.text for one in removed if one.text]  # as a store would have them, and not counted
    assert shown and all("email@example.com" in text and "@example.net" not in text for text in shown)
    assert tally["personal"] == {"email": sum(one.text.count("email@example.com") for one in found)}


def test_the_parts_of_a_source_are_the_whole(tmp_path):
    write_corpus(tmp_path / "in")
    texts = []
    for tasks in (1, 4):
        out = tmp_path / str(tasks)
        run(make_config(tmp_path / "in", tasks=tasks), out)
        paths = sorted((out / "stages/clean/documents").iterdir())
        assert len(paths) == tasks
        texts.append(sorted((one.id, one.metadata["source"]) for path in paths for one in read_documents(path)))
    assert texts[0] == texts[1] and len(texts[0]) > 100


@pytest.mark.parametrize("packed", [False, True])
def test_max_bytes_gives_the_same_documents_for_any_number_of_tasks(tmp_path, packed):
    """As much as was asked for, of one file or of many, whatever their sizes; nothing of the files behind."""
    write_corpus(tmp_path / "in", num_files=9)
    if packed:
        for path in (tmp_path / "in").iterdir():
            path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    pattern, found = "*.jsonl.gz" if packed else "*.jsonl", {}
    for limit in (1, 5_000, 60_000, 10**9):
        for tasks in (1, 4, 16):
            config = recipe.base()
            config.subsets.web = recipe.subset(f"jsonl:{tmp_path}/in/{pattern}", tasks=tasks, max_bytes=limit)
            out = tmp_path / f"{limit}-{tasks}"
            run(config, out)
            paths = sorted((out / "stages/clean/documents").iterdir())
            found[limit, tasks] = sorted(
                (one.metadata["source"], one.text) for path in paths for one in read_documents(path)
            )
        assert found[limit, 1] == found[limit, 4] == found[limit, 16]
        size = sum(len(text.encode()) for _, text in found[limit, 1])
        assert size <= limit and (size > limit - 700 or limit == 10**9)
    everything = found[10**9, 1]
    assert len(everything) == 9 * 25 and set(found[60_000, 1]) < set(everything)


def test_samples_of_what_was_removed_show_no_address(tmp_path):
    """One goes before the rule that replaces addresses comes to it, another is cut in the middle of one."""
    (tmp_path / "in").mkdir()
    texts = ["Write to me.", "x" * 1990 + " someone@somewhere.example.org", "a short one: me@home.example.org"]
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run(make_config(tmp_path / "in", filters=("gopher-quality",), min_document_bytes=40), tmp_path / "out")
    shown = [one.text for one in read_documents(tmp_path / "out/stages/clean/removed/00000.jsonl.zst")]
    assert len(shown) == 3 and not any("some" in text or "me@" in text for text in shown)


def test_contaminated_documents_go_and_the_report_names_them(tmp_path):
    write_corpus(tmp_path / "in")
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "quiz.jsonl").write_text(json.dumps({"q": QUESTION.title()}) + "\n")
    for remove in (False, True):
        config = make_config(tmp_path / "in")
        config.contamination.sources = (f"jsonl:{tmp_path}/evals/*.jsonl",)
        config.contamination.remove = remove
        out = tmp_path / f"out{remove}"
        run(config, out)
        report = json.loads((out / "stages/clean/contamination/00000.json").read_text())
        assert report["documents"]["contaminated"] == 6 == report["sets"]["evals/quiz.jsonl"]
        assert report["hits"][0]["source"].endswith(":14") and report["hits"][0]["evaluation"] == "evals/quiz.jsonl:1"
        found = list(read_documents(out / "stages/clean/documents/00000.jsonl.zst"))
        assert sum("contaminated" in one.metadata for one in found) == 6 * (not remove)
        assert any(one.id == report["hits"][0]["id"] for one in found) != remove
        step = json.loads((out / "stages/clean/tally/00000.json").read_text())["steps"]["contamination"]
        assert step["removed"].get("contaminated by evals/quiz.jsonl", {"documents": 0})["documents"] == 6 * remove


def test_stages_run_in_other_processes_with_the_same_bytes(tmp_path):
    write_corpus(tmp_path / "in")
    config = make_config(tmp_path / "in", tasks=3, filters=("gopher-quality",))
    here = run(config, tmp_path / "here")
    deal(config, tmp_path / "there")
    [stage] = stages(config, tmp_path / "there", again=None)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(stage.function, range(stage.tasks))
    assert files_of(tmp_path / "there") == here


def test_killed_at_any_moment_it_gives_the_same_bytes(tmp_path):
    write_corpus(tmp_path / "in", num_files=2, num_documents=5000, filler=150)
    config = make_config(tmp_path / "in", max_document_bytes=700)
    expected = run(config, tmp_path / "whole")
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_clean import deal, make_config, stages
config = make_config(Path({str(tmp_path / "in")!r}), max_document_bytes=700)
deal(config, Path({str(tmp_path / "out")!r}))
[stage] = stages(config, Path({str(tmp_path / "out")!r}), again=None)
print("starts", flush=True)
stage.function(0)
"""
    out = tmp_path / "out"
    for size in (0, 600_000):  # of documents written
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"starts\n"
        while process.poll() is None and not any(path.stat().st_size > size for path in half_written(out)):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        assert complete(out) == []
        for path in half_written(out):
            path.unlink()
    run(config, out)
    assert files_of(out) == expected


def test_an_error_in_the_middle_leaves_nothing_that_looks_complete(tmp_path):
    write_corpus(tmp_path / "in")
    (tmp_path / "in" / "7.jsonl").symlink_to("nowhere")
    with pytest.raises(StorageError, match=r"7\.jsonl cannot be read"):
        run(make_config(tmp_path / "in"), tmp_path / "out")
    assert complete(tmp_path / "out") == []


def test_a_full_disk_leaves_nothing_that_looks_complete(tmp_path):
    """In a process that may write files of 4 KiB: the system then says what it says of a full disk."""
    write_corpus(tmp_path / "in", num_files=2, num_documents=2000)
    script = f"""
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_clean import deal, make_config, stages
config, out = make_config(Path({str(tmp_path / "in")!r})), Path({str(tmp_path / "out")!r})
deal(config, out)
[stage] = stages(config, out, again=None)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
stage.function(0)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1 and "File too large" in result.stderr.splitlines()[-1]
    assert complete(tmp_path / "out") == []


def test_what_is_missing_is_found_before_anything_is_read(tmp_path):
    write_corpus(tmp_path / "in")
    check(make_config(tmp_path / "in"))
    with pytest.raises(ConfigError, match="no file matches"):
        check(make_config(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="language_model"):
        check(make_config(tmp_path / "in", language_model="none.bin"))
    config = make_config(tmp_path / "in")
    config.contamination.sources = ("jsonl:none/*.jsonl",)
    with pytest.raises(ConfigError, match="no file matches"):
        check(config)


def test_files_of_later_dumps_are_not_read(tmp_path):
    for dump in ("CC-MAIN-2013-20", "CC-MAIN-2024-30", "CC-MAIN-2024-33", "CC-MAIN-2025-05"):
        (tmp_path / dump).mkdir()
        (tmp_path / dump / "a.jsonl").write_text('{"text": "a"}')
    config = recipe.base()
    dumps = ("CC-MAIN-2013-20", "CC-MAIN-2024-30")
    config.subsets.web = recipe.subset(f"jsonl:{tmp_path}/*/*.jsonl", dumps=dumps)
    recipe.validate(config)
    assert sorted(file.name[:15] for file in dealing.listed(config)["web"]) == list(dumps)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jsonl").write_text('{"text": "b"}')
    with pytest.raises(ConfigError, match=r"subsets.web.dumps: elsewhere/b.jsonl names no dump in its path"):
        dealing.listed(config)
    config.subsets.web = recipe.subset(f"jsonl:{tmp_path}/*/*.jsonl", dumps=dumps[:1])
    with pytest.raises(ConfigError, match="dumps=.*must be the first and the last"):
        recipe.validate(config)


@pytest.mark.fault("S7")
def test_names_that_climb_stay_inside_the_output(tmp_path):
    """A record's own id and URL, and a file's name, are never part of a path."""
    (tmp_path / "in").mkdir()
    record = {"text": "text", "id": "../../../escaped", "url": "file:///../..", "dump": "../up\n"}
    (tmp_path / "in" / "a\n..%2f..\\.jsonl").write_text(json.dumps(record) + "\n")
    names = run(make_config(tmp_path / "in"), tmp_path / "out")
    assert len(names) == 7 and sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    [row] = pq.read_table(tmp_path / "out/stages/clean/index/00000.parquet").to_pylist()
    assert row["dump"] == "../up\\n" and row["source"] == "a\\n..%2f..\\.jsonl:1"


def test_what_is_heavy_is_imported_where_it_is_used():
    heavy = "jax, flax, tensorflow, torch, ray, fasttext, trafilatura, warcio, spacy, nltk"
    script = f"import sys, k2jax.prepare.clean; print(set(sys.modules) & set({heavy.split(', ')!r}))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
