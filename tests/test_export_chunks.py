"""k2jax.data.export_chunks: the chunks of a real run are what its steps read, and anyone can read them."""

import hashlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import begin_run

from k2jax.data import export_rows
from k2jax.data.document_table import DocumentTable
from k2jax.data.epochs import decide, new_epoch, read_epochs
from k2jax.data.export_chunks import export_chunks
from k2jax.data.journal import append_entry
from k2jax.data.loader import BatchSource, batch_digest, row_digests
from k2jax.data.manifest import build_manifest
from k2jax.data.provenance import open_run, which_docs
from k2jax.data.store import Store
from k2jax.data.store_writer import StoreWriter
from k2jax.errors import ConfigError, StorageError
from k2jax.run.ledger import Ledger
from k2jax.train import train
from k2jax.training.setup import open_data

ROOT = Path(__file__).parent.parent
STAGES = {"stages.0.steps_per_chunk": 4, "stages.0.warmup_steps": 1, "stages.1.steps_per_chunk": 3}


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    """Three chunks, trained: step 2 of the plan is skipped, step 4 is deferred to the end of the first stage."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config(**STAGES)
    _, manifest = open_data(config)
    journal, epochs = [], [new_epoch([], run="0" * 32, after_step=0, config={}, manifest=manifest)]
    for kind, positions in (("skip", (8, 16)), ("defer", (24, 32))):
        options = {"kind": kind, "ranges": [positions], "at_step": 0, "by": "test", "why": "a spike"}
        journal.append(decide(epochs, journal, **options))
        append_entry(workdir / "journal.jsonl", journal[-1])
    train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out"
    export_chunks(run, out)
    return out


def ledger(workdir):
    return {row["step"]: row["batch"] for row in Ledger(workdir / "ledger", None).steps.rows()}


def files(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("[!.]*"))}


def copy_of(run, tmp_path, *names):
    """A run directory with some of the files of another."""
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((run / name).read_bytes())
    return tmp_path


def test_step_batches_rebuilt_from_the_chunks_have_the_ledgers_digests(run, exported):
    chunks = [pandas.read_parquet(path) for path in sorted(exported.glob("*.parquet"))]
    assert [sorted(set(chunk.step)) for chunk in chunks] == [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10]]
    rows = pandas.concat(chunks)
    found = {}
    for step, batch in rows.groupby("step"):
        assert batch.row.tolist() == list(range(8))
        found[step] = batch_digest(row_digests(batch.row.to_numpy(), np.stack(batch.token_ids)))
    assert found == ledger(run) and len(found) == 10
    assert rows.step.is_monotonic_increasing
    firsts = rows[rows.row == 0].position.tolist()
    assert firsts == [
        0,
        16,
        32,
        40,
        48,
        56,
        24,
        64,
        72,
        80,
    ]  # 8:16 is skipped, 24:32 deferred to the stage's end


def test_the_columns_are_what_the_run_says_of_each_row(run, exported):
    opened = open_run(run)
    for path in sorted(exported.glob("*.parquet")):
        for step, rows in pandas.read_parquet(path).groupby("step"):
            for origin, (_, row) in zip(which_docs(opened, step), rows.iterrows(), strict=True):
                for key in ("row", "position", "subset", "epoch", "window"):
                    assert row[key] == getattr(origin, key)
                expected = [
                    dict(
                        id=p.id,
                        source=p.source,
                        start_in_document=p.in_document[0],
                        start=p.in_row[0],
                        stop=p.in_row[1],
                    )
                    for p in origin.documents
                ]
                assert row.documents.tolist() == expected
                assert row.documents[0]["start"] == 0 and row.documents[-1]["stop"] == len(row.token_ids)


def test_types_are_small(exported):
    table = pq.read_table(exported / "chunk_00000.parquet")
    types = {field.name: str(field.type) for field in table.schema}
    assert types["token_ids"] == "list<element: uint16>" and types["row"] == types["epoch"] == "int32"
    assert types["step"] == types["position"] == types["window"] == "int64"
    assert types["subset"].startswith("dictionary<values=string")
    assert pandas.read_parquet(exported / "chunk_00000.parquet").subset.dtype == "category"
    assert {len(ids) for ids in table["token_ids"].to_pylist()} == {33}


def test_chunks_json_lists_the_files_and_the_identity_of_the_data(run, exported):
    summary = json.loads((exported / "chunks.json").read_text())
    assert [chunk["file"] for chunk in summary["chunks"]] == [f"chunk_0000{i}.parquet" for i in range(3)]
    for chunk in summary["chunks"]:
        content = (exported / chunk["file"]).read_bytes()
        assert chunk["sha256"] == hashlib.sha256(content).hexdigest() and chunk["bytes"] == len(content)
        table = pq.read_table(exported / chunk["file"])
        assert chunk["rows"] == len(table) == 8 * (chunk["last_step"] - chunk["first_step"] + 1)
        assert chunk["token_ids"] == sum(map(len, table["token_ids"].to_pylist()))
        assert chunk["document_parts"] == sum(map(len, table["documents"].to_pylist()))
        assert chunk["steps_in_ledger"] == chunk["last_step"] - chunk["first_step"] + 1
    assert [chunk["positions"] for chunk in summary["chunks"]] == [
        [[0, 8], [16, 24], [32, 48]],
        [[48, 64], [24, 32]],
        [[64, 88]],
    ]
    opened = open_run(run)
    assert summary["order"] == opened.order.digest()
    assert summary["tokenizer_sha256"] == hashlib.sha256((run / "tokenizer.json").read_bytes()).hexdigest()
    assert summary["subsets"] == {name: store.root_digest for name, store in opened.stores.items()}


def test_what_the_readme_says_works_without_our_code(run, exported):
    snippets = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.S)
    shown = []
    for snippet in snippets:
        assert "k2jax" not in snippet
        done = subprocess.run(
            [sys.executable, "-c", snippet], cwd=exported, capture_output=True, text=True, check=True
        )
        shown.append(done.stdout)
    assert shown[0].startswith("(8, 33)") and "start_in_document" in shown[0]
    assert shown[1].split() == [word for step in range(1, 5) for word in (str(step), ledger(run)[step])]


def test_the_same_bytes_with_workers_in_parts_and_over_leftovers(run, exported, tmp_path):
    """Parts may come in any order; what a kill left behind is written over; chunks.json comes with every part."""
    first = export_chunks(run, tmp_path / "parts", chunks=(1, 2))
    assert [chunk["file"] for chunk in first["chunks"]] == ["chunk_00001.parquet"] and first[
        "num_chunks"
    ] == 3
    (tmp_path / "parts" / "chunk_00000.parquet.new-elsewhere-7").write_bytes(b"half")
    (tmp_path / "parts" / "chunk_00002.parquet").write_bytes(b"complete, but nobody said so")
    seen = {}
    export_chunks(
        run, tmp_path / "parts", workers=2, report=lambda entry, there: seen.update({entry["file"]: there})
    )
    assert seen == {"chunk_00000.parquet": False, "chunk_00001.parquet": True, "chunk_00002.parquet": False}
    assert files(tmp_path / "parts") == files(exported)


KILLED = """
import os, signal, sys
from k2jax.data import export_chunks
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
{point} = die
export_chunks.export_chunks(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize(
    ("point", "left"),
    [
        ("os.fsync", {"chunk_00000.parquet.new-"}),  # written, not yet under its name
        ("export_chunks._sha256", {"chunk_00000.parquet"}),  # under its name, nobody has said so
        ("export_chunks.readme", {f"chunk_0000{i}.parquet" for i in range(3)}),  # no summary
    ],
)
def test_a_kill_leaves_no_summary_and_is_mended(run, exported, tmp_path, point, left):
    command = [sys.executable, "-c", KILLED.replace("{point}", point), run, tmp_path / "out"]
    assert subprocess.run(command, check=False).returncode == -9
    names = {re.sub("new-.*", "new-", name) for name in files(tmp_path / "out")}  # less host and process
    assert names == left
    export_chunks(run, tmp_path / "out")
    assert files(tmp_path / "out") == files(exported)


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
sys.argv = sys.argv[1:2] + sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(run, exported, tmp_path):
    """A limit on the size of files, as a disk has one on all of them: the largest chunk does not fit, or no scratch."""
    size = max(path.stat().st_size for path in exported.glob("*.parquet"))
    tool = ROOT / "tools" / "export_chunks.py"
    for limit, left, shown in ((size - 1, 2, "File too large"), (1000, 0, "cannot copy documents.parquet")):
        command = [
            sys.executable,
            "-c",
            LIMITED,
            tool,
            str(limit),
            "--workdir",
            run,
            "--out",
            tmp_path / str(limit),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 74 and done.stderr.count("\n") == 1 and shown in done.stderr
        names = list(files(tmp_path / str(limit)))
        assert len(names) == left and all(name.endswith(".parquet") for name in names)


def test_finished_chunks_are_checked_and_left(run, tmp_path):
    out, seen = tmp_path / "out", []
    export_chunks(run, out)
    expected, inode = files(out), (out / "chunk_00002.parquet").stat().st_ino
    damaged = bytearray(expected["chunk_00001.parquet"])
    damaged[100] ^= 1
    (out / "chunk_00001.parquet").write_bytes(damaged)
    export_chunks(run, out, report=lambda entry, was_there: seen.append((entry["file"][6:11], was_there)))
    assert seen == [("00000", True), ("00002", True), ("00001", False)]
    assert files(out) == expected and (out / "chunk_00002.parquet").stat().st_ino == inode


def test_a_step_that_the_ledger_has_otherwise_is_refused_and_nothing_is_left(run, tmp_path):
    workdir = copy_of(run, tmp_path / "run", "epochs/0001.json", "journal.jsonl")
    export_chunks(workdir, tmp_path / "out", chunks=(0, 1))
    copy_of(run, workdir, "ledger/chunk-00002.jsonl")
    path = workdir / "ledger" / "chunk-00002.jsonl"
    path.write_text(path.read_text().replace(ledger(run)[6], "0" * 64))
    with pytest.raises(ConfigError, match="step 6: the stores give a batch of digest .* 000000000000"):
        export_chunks(workdir, tmp_path / "out")
    assert sorted(files(tmp_path / "out")) == [
        "README.md",
        "chunk_00000.parquet",
    ]  # and no chunks.json any more


def test_a_run_at_work(run, exported, tmp_path):
    """Steps to come are what they will read; once they are in the ledger, the chunk is compared, its bytes the same."""
    workdir = copy_of(run, tmp_path / "run", "epochs/0001.json", "journal.jsonl")
    summary = export_chunks(workdir, tmp_path / "out")
    assert [chunk["steps_in_ledger"] for chunk in summary["chunks"]] == [0, 0, 0]
    copy_of(run, workdir, "ledger/chunk-00001.jsonl")
    path = workdir / "ledger" / "chunk-00001.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # the fourth step's line is being written
    seen = {}
    export_chunks(
        workdir, tmp_path / "out", report=lambda entry, there: seen.update({entry["file"][6:11]: there})
    )
    assert seen == {"00000": False, "00001": True, "00002": True}
    summary = json.loads((tmp_path / "out" / "chunks.json").read_text())
    assert [chunk["steps_in_ledger"] for chunk in summary["chunks"]] == [3, 0, 0]
    assert (tmp_path / "out" / "chunk_00000.parquet").read_bytes() == (
        exported / "chunk_00000.parquet"
    ).read_bytes()
    path.write_bytes(b"{}\n")
    with pytest.raises(StorageError, match="chunk-00001.jsonl: cannot be read"):
        export_chunks(workdir, tmp_path / "out")


def test_a_decision_of_the_journal_after_an_export_changes_what_it_must(run, tmp_path):
    """A step that is deferred within its chunk; then a skip of the whole last chunk."""
    workdir = copy_of(run, tmp_path / "run", "epochs/0001.json", "journal.jsonl")
    journal = [json.loads(line) for line in (workdir / "journal.jsonl").read_text().splitlines()]
    contents, summaries = [], []

    def export():
        summaries.append(export_chunks(workdir, tmp_path / "out"))
        contents.append(files(tmp_path / "out"))

    export()
    for kind, positions in (("defer", (64, 72)), ("skip", (64, 88))):
        options = {
            "kind": kind,
            "ranges": [positions],
            "at_step": 7,
            "by": "test",
            "why": "the end comes early",
        }
        journal.append(decide(read_epochs(workdir), journal, **options))
        append_entry(workdir / "journal.jsonl", journal[-1])
        export()
    first, deferred, skipped = contents
    assert [summary["num_chunks"] for summary in summaries] == [3, 3, 2]
    assert summaries[1]["chunks"][2]["positions"] == [[72, 88], [64, 72]]
    rows = [pq.read_table(pa.BufferReader(content["chunk_00002.parquet"])) for content in (first, deferred)]
    assert rows[1]["position"].to_pylist() == [*range(72, 88), *range(64, 72)]
    assert rows[0].sort_by("position")["token_ids"].equals(rows[1].sort_by("position")["token_ids"])
    assert sorted(skipped) == ["README.md", "chunk_00000.parquet", "chunk_00001.parquet", "chunks.json"]
    for name in ("chunk_00000.parquet", "chunk_00001.parquet"):
        assert skipped[name] == deferred[name] == first[name]


def test_rows_are_written_in_groups_of_bounded_size(run, exported, tmp_path, monkeypatch):
    """However long a step is: here a group holds three rows."""
    for module in (export_rows, sys.modules["k2jax.data.export_chunks"]):
        monkeypatch.setattr(module, "GROUP_TOKENS", 3 * 33)
    export_chunks(run, tmp_path / "out", chunks=(0, 1))
    small, large = (pq.ParquetFile(out / "chunk_00000.parquet") for out in (tmp_path / "out", exported))
    assert large.num_row_groups == 1 and small.metadata.num_rows == 32
    # Groups are of what was read at once: 3, 3 and 2 rows of a step, and two of those where the first is small.
    assert {small.metadata.row_group(i).num_rows for i in range(small.num_row_groups)} == {3, 5, 2}
    assert small.read().equals(large.read())


@pytest.mark.parametrize("row_group", [1, 7, 1 << 16])
def test_document_table_finds_what_the_store_finds(tiny_data, tmp_path, monkeypatch, row_group):
    """For any window; in a store of one group of records, or of many."""
    for module in ("document_table", "store", "store_writer"):
        monkeypatch.setattr(sys.modules[f"k2jax.data.{module}"], "ROW_GROUP", row_group)
    with StoreWriter(tmp_path / "store", tokenizer_sha256="0", vocab_size=9, eos_id=2) as writer:
        for i, size in enumerate([0, 5, 0, 0, 31, 2] * 4):
            writer.add([3] * size, id=f"{i:064x}", source=f"ünï/{i}")
        writer.finish()
    store = Store.open(tmp_path / "store")
    table = DocumentTable.build(store, tmp_path / "scratch")
    for length in (1, 2, 40, store.num_tokens):
        begins = np.random.default_rng(length).permutation(store.num_tokens - length + 1)
        for begin, found in zip(begins.tolist(), table.spans(begins, length).to_pylist(), strict=True):
            spans = store.documents_in(begin, begin + length)
            records = [store.document(span.index) for span in spans]
            assert found == [
                dict(
                    id=record["id"],
                    source=record["source"],
                    start_in_document=span.start - record["start"],
                    start=span.start - begin,
                    stop=span.stop - begin,
                )
                for span, record in zip(spans, records, strict=True)
            ]


def test_documents_that_are_not_the_stores_are_refused(tiny_data, tmp_path):
    store = Store.open(tiny_data / "web")
    with pytest.raises(ConfigError, match="documents.parquet has .* documents and tokens"):
        DocumentTable.build(
            Store(store.path, {**store.info, "num_tokens": store.num_tokens + 1}), tmp_path / "scratch"
        )
    with pytest.raises(StorageError, match="cannot copy documents.parquet"):
        DocumentTable.build(store, tmp_path / "absent" / "scratch")


def test_large_vocabularies_and_rows_without_a_target_at_their_end(tmp_path):
    with StoreWriter(tmp_path / "big", tokenizer_sha256="0", vocab_size=1 << 17, eos_id=2) as writer:
        for i in range(9):
            writer.add(np.arange(20) + 100_000, id=f"{i:064x}", source=str(i))
        writer.finish()
    stage = {
        "name": "s",
        "sequence_length": 10,
        "rows_per_step": 2,
        "steps_per_chunk": 2,
        "chunks": 2,
        "mix": {"big": 1},
    }
    stores = {"big": Store.open(tmp_path / "big").summary()}
    begin_run(tmp_path, build_manifest(stages=[stage], stores=stores, seed=3, label_shift="inside"))
    export_chunks(tmp_path, tmp_path / "out")
    opened, rows = open_run(tmp_path), pandas.read_parquet(tmp_path / "out" / "chunk_00001.parquet")
    batch = BatchSource(opened.order, opened.stores, label_shift="inside", first_step=3, last_step=4)[0]
    assert np.stack(rows[rows.step == 3].token_ids).tolist() == batch["tokens"].tolist()
    assert rows.token_ids[0].dtype == np.uint32 and len(rows.token_ids[0]) == 10
    assert "10 token ids a row\n" in (tmp_path / "out" / "README.md").read_text()


def test_errors(run, exported, tmp_path):
    for chunks, shown in (((2, 5), "2:5"), ((2, 2), "2:2"), ((-1, None), "-1:3")):
        with pytest.raises(ConfigError, match=f"--chunks={shown}: the run's chunks are 0:3"):
            export_chunks(run, tmp_path / "out", chunks=chunks)
    (tmp_path / "mine").write_text("")
    with pytest.raises(ConfigError, match="no export of ours"):
        export_chunks(run, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    begin_run(other, {**read_epochs(run)[0].manifest, "seed": 4})
    with pytest.raises(ConfigError, match="holds chunks of data"):
        export_chunks(other, exported)
    assert len(files(exported)) == 5


def test_a_chunk_that_another_process_is_writing_is_refused(run, tmp_path):
    export_chunks(run, tmp_path / "out", chunks=(0, 1))
    holder = f"""
import fcntl, sys
file = open({str(tmp_path / "out/.export/00002.lock")!r}, "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", holder], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout.readline() == "held\n"
        export_chunks(run, tmp_path / "out", chunks=(1, 2))
        with pytest.raises(ConfigError, match="another process .* is writing chunk 2"):
            export_chunks(run, tmp_path / "out", chunks=(2, 3))
        process.stdin.close()


def test_the_tool(run, exported, tiny_data, tmp_path, monkeypatch, capsys):
    (tmp_path / "moved").symlink_to(tiny_data)
    arguments = ["--workdir", run, "--out", tmp_path / "out", "--stores", tmp_path / "moved", "--chunks"]

    def call(chunks):
        monkeypatch.setattr(sys, "argv", ["export_chunks.py", *map(str, arguments), chunks])
        runpy.run_path(str(ROOT / "tools" / "export_chunks.py"))["main"]()
        return capsys.readouterr().out

    assert "chunk_00001.parquet: steps 5 to 7 (3 in the ledger), 24 rows" in call("1:2")
    assert "1 of 3 chunks" in call("1:2")
    assert "chunk_00001.parquet" in call("1:") and "3 of 3 chunks" in call(":1")
    assert files(tmp_path / "out") == files(exported)
    with pytest.raises(SystemExit):
        call("1")
    command = [sys.executable, ROOT / "tools" / "export_chunks.py", "--workdir", "nowhere", "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 78 and done.stderr.count("\n") == 1
