"""k2jax.data.provenance: steps to documents and back, against a brute-force reading of every row."""

import hashlib
import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import begin_run

from k2jax.data.epochs import decide, read_epochs
from k2jax.data.journal import append_entry
from k2jax.data.manifest import build_manifest
from k2jax.data.order import Order
from k2jax.data.provenance import open_run, which_docs, which_steps
from k2jax.data.store import Store
from k2jax.data.store_writer import StoreWriter
from k2jax.data.tokenizer import load_tokenizer, tokenizer_sha256, train_bpe
from k2jax.errors import ConfigError

ROOT = Path(__file__).parent.parent
WORDS = ["the quick brown fox", "jumps over", "a lazy dog", "ünï"]
SENTENCES = [" ".join(WORDS[: 1 + i % 4] * (i % 9)) for i in range(30)]  # some are empty, so have the same id
STAGE = {"rows_per_step": 4, "steps_per_chunk": 3, "chunks": 2}
STAGES = [
    {**STAGE, "name": "short", "chunks": 30, "sequence_length": 8, "mix": {"books": 2.5, "code": 1}},
    {**STAGE, "name": "long", "sequence_length": 20, "mix": {"code": 1}},
]


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="module", params=["next", "inside"])
def workdir(request, tmp_path_factory):
    """A run over two stores, which share some documents; step 2 is skipped, step 4 (then 3) is deferred."""
    workdir = tmp_path_factory.mktemp("run")
    tokenizer_file = workdir / "tokenizer.json"
    train_bpe(SENTENCES, 320).save(str(tokenizer_file))
    tokenizer = load_tokenizer(tokenizer_file)
    options = {"tokenizer_sha256": tokenizer_sha256(tokenizer_file), "vocab_size": 320, "eos_id": 2}
    summaries = {}
    for name, texts in {"books": SENTENCES[:20], "code": SENTENCES[10:], "unused": SENTENCES[:1]}.items():
        with StoreWriter(workdir / "stores" / name, **options, shard_tokens=64, chunk_tokens=16) as writer:
            for i, text in enumerate(texts):
                writer.add(tokenizer.encode(text), id=sha256(text), source=f"{name}/{i}.txt")
            writer.finish(validation_fraction=0.1)
        summaries[name] = Store.open(workdir / "stores" / name).summary()
    manifest = build_manifest(stages=STAGES, stores=summaries, seed=3, label_shift=request.param)
    begin_run(workdir, manifest)
    journal = []
    for kind, positions in (("skip", (4, 8)), ("defer", (12, 16))):
        entry = decide(read_epochs(workdir), journal, kind=kind, ranges=[positions], at_step=0, by="test", why="spike")
        append_entry(workdir / "journal.jsonl", entry)
        journal.append(entry)
    return workdir


@pytest.fixture(scope="module")
def run(workdir):
    return open_run(workdir)


def brute_force(run):
    """Every token that any position reads: {(step, row, place in the row): (subset, index of document, place in it)}.

    Steps come from walking all of them; positions that none of them reads are under step None.
    """
    label_shift = run.manifest["label_shift"]
    owners = {}
    for name, store in run.stores.items():
        sizes = [store.document(i)["num_tokens"] for i in range(store.num_documents)]
        owners[name] = [(i, place) for i, size in enumerate(sizes) for place in range(size)]
    places = {int(p): (step, row) for step in range(1, run.order.num_steps + 1)
              for row, p in enumerate(run.order.positions(step))}  # fmt: skip
    tokens = {}
    for stage in run.order.stages:
        for position in range(stage.first_position, stage.stop_position):
            row = run.order.row(position)
            name, start = run.subset_names[row.subset], row.window * stage.sequence_length
            for i in range(stage.sequence_length + (label_shift == "next")):
                where = places.get(position, (None, None))
                tokens[(*where, position, i)] = (name, *owners[name][start + i])
    return tokens


def test_which_docs_is_what_the_step_read(run):
    """Over all steps and rows: exactly the tokens' documents, and the text is what the tokens say."""
    expected = {key: value for key, value in brute_force(run).items() if key[0] is not None}
    found = {}
    for step in range(1, run.order.num_steps + 1):
        for origin in which_docs(run, step):
            for part in origin.documents:
                a, b = part.in_row
                first = part.in_document[0]
                assert part.in_document[1] - first == b - a > 0
                document = run.stores[origin.subset].document(part.index)
                assert (document["id"], document["source"]) == (part.id, part.source)
                for i in range(a, b):
                    key = (step, origin.row, origin.position, i)
                    assert key not in found
                    found[key] = (origin.subset, part.index, first + i - a)
    assert found == expected
    assert len({step for step, *_ in found}) == run.order.num_steps == 95


def test_which_steps_is_the_inverse(run):
    """Over all documents: every token of every row, those that the journal skips too, and nothing else."""
    expected = brute_force(run)
    found = {}
    for document_id in {sha256(text) for text in SENTENCES}:
        for document in which_steps(run, document_id):
            assert document.source == run.stores[document.subset].document(document.index)["source"]
            assert not (document.held_out and document.reads)
            for read in document.reads:
                assert read.subset == document.subset
                assert run.order.row(read.position)[1:] == (
                    run.subset_names.index(read.subset),
                    read.epoch,
                    read.window,
                )
                for place, i in zip(range(*read.in_document), range(*read.in_row), strict=True):
                    key = (read.step, read.row, read.position, i)
                    assert key not in found
                    found[key] = (document.subset, document.index, place)
            steps = [read.step for read in document.reads]
            assert steps == sorted(steps, key=lambda step: step or 10**9)
    assert found == expected
    assert {key[2] for key in found if key[0] is None} == {4, 5, 6, 7}
    assert any(document.held_out for document in which_steps(run, sha256(SENTENCES[-1])))


def test_epochs_and_duplicates(run):
    """A document that stands in two stores and is read in several epochs is found with all of them."""
    shared = max(SENTENCES[11:14], key=len)
    documents = which_steps(run, sha256(shared))
    assert [document.subset for document in documents] == ["books", "code"]
    assert {read.epoch for read in documents[0].reads} >= {0, 1}
    assert documents[1].reads


def test_text(run):
    """The decoded parts of a row are the documents' text; a whole document is found in its rows."""
    texts = {sha256(text): text for text in SENTENCES}
    seen = 0
    for origin in which_docs(run, 1, text=True):
        for part in origin.documents:
            assert part.text.replace("</s>", "").strip("\ufffd") in texts[part.id]
            seen += len(part.text) > 5
    assert seen


def test_errors(run, workdir, tmp_path):
    """Unknown step, row, document; a tokenizer, a store or a journal that is not the run's: named."""
    with pytest.raises(ConfigError, match="step 96: the run's steps are 1 to 95"):
        which_docs(run, 96)
    with pytest.raises(ConfigError, match="row 4: the rows of step 3 are 0 to 3"):
        which_docs(run, 3, 4)
    with pytest.raises(ConfigError, match="document 123: none of the stores books, code, unused has it"):
        which_steps(run, "123")
    other = train_bpe(SENTENCES[:9], 300)
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="tokenizer.json has SHA-256"):
        which_docs(replace(run, workdir=tmp_path), 1, text=True)
    manifest = run.manifest
    begin_run(tmp_path, {**manifest, "seed": 4})
    (tmp_path / "journal.jsonl").write_bytes((workdir / "journal.jsonl").read_bytes())
    with pytest.raises(ConfigError, match="journal entry 1"):
        open_run(tmp_path)
    assert Order(manifest).digest() != run.order.digest()


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs a tool's `main` with arguments; returns what it prints."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "tools" / name))["main"]()
        return capsys.readouterr().out

    return call


def test_tools(workdir, tool):
    """Both tools say what the functions say, as text and as JSON, of stores that have moved, too."""
    moved = workdir.parent / f"{workdir.name}-stores"
    (workdir / "stores").rename(moved)
    try:
        run = open_run(workdir, moved)
        where = ("--workdir", workdir, "--stores", moved)
        rows = [
            json.loads(line) for line in tool("which_docs.py", *where, "--step", 3, "--json").splitlines()
        ]
        assert rows == [json.loads(json.dumps(row)) for row in map(as_dict, which_docs(run, 3))]
        part = rows[2]["documents"][0]
        text = tool("which_docs.py", *where, "--step", 3, "--row", 2, "--text")
        assert text.startswith(f"row 2: {rows[2]['subset']}")
        assert part["id"] in text and repr(part["source"]) in text and "row 3" not in text

        documents = map(
            json.loads, tool("which_steps.py", *where, "--doc", part["id"], "--json").splitlines()
        )
        reads = [read for document in documents for read in document["reads"]]
        assert any((read["step"], read["row"], read["in_row"]) == (3, 2, part["in_row"]) for read in reads)
        assert "step 3, row 2: stage short" in tool("which_steps.py", *where, "--doc", part["id"])
        skipped = which_docs(replace(run, order=Order(run.manifest)), 2)[0].documents[0].id
        assert "skipped by the journal" in tool("which_steps.py", *where, "--doc", skipped)
        assert "held out for validation" in tool("which_steps.py", *where, "--doc", sha256(SENTENCES[-1]))
        with pytest.raises(ConfigError, match="no store.json"):
            tool("which_docs.py", "--workdir", workdir, "--step", 3)
    finally:
        moved.rename(workdir / "stores")


def as_dict(row):
    return {**row._asdict(), "documents": [part._asdict() for part in row.documents]}


def test_tools_from_anywhere(tmp_path):
    """Run by path from another folder: an error is one line and exit code 74."""
    for name, arguments in (("which_docs.py", ["--step", "1"]), ("which_steps.py", ["--doc", "00"])):
        command = [sys.executable, ROOT / "tools" / name, "--workdir", "nowhere", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 78 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and "--workdir=nowhere: no run" in done.stderr
