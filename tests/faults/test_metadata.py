"""What a run says of itself, as other programs, disks and people leave it: one line, or the same answer as before."""

import json
import random
import shutil

import pytest

from faults import runs
from k2jax.data.epochs import Epoch
from k2jax.data.launches import read_launches
from k2jax.data.manifest import sha256_json
from k2jax.data.provenance import open_run, which_docs
from k2jax.errors import ConfigError, RunError
from k2jax.run import ledger as ledger_module
from k2jax.run.saved import open_step

FILES = {
    "epochs/0001.json": 40, "journal.jsonl": 0, "environment.json": 10, "ledger/records.jsonl": 20,
    "ledger/chunk-00002.jsonl": 10, "checkpoints/20/meta/meta.json": 20,
}  # fmt: skip
DEEP = b"[" * 200_000
WRONG = {
    "empty": b"", "a NUL": b"\0", "no UTF-8": b"\xff\xfe{}", "deep": DEEP, "deep objects": b'{"a":' * 100_000,
    "a list": b"[]\n", "null": b"null\n", "a number": b"1e999\n", "an object": b"{}\n", "a text": b'"x"\n',
    "long number": b"9" * 100_000 + b"\n", "nested": b'{"sha256": {"a": []}, "format": 1, "kind": "skip"}\n',
}  # fmt: skip


@pytest.fixture
def run(straight, tmp_path):
    workdir = runs.copy_run(straight, tmp_path / "run", last_step=20)
    (workdir / "journal.jsonl").touch()
    return workdir


def ask(workdir):
    """What readers of a run are asked, each in its way: the documents of a step, a checkpoint's identity, the chain."""

    def documents():
        return which_docs(open_run(workdir), 13)

    def checkpoint():
        saved = open_step(workdir, 20)
        return saved.digest, saved.meta["config_digest"], saved.epochs

    def chain():
        ledger = runs.ledger(workdir)
        ledger.verify()
        open_step(workdir, 20)  # which names the record before its own
        return [record["record"] for record in ledger.records()]

    return [answer(question) for question in (documents, checkpoint, chain)]


def answer(question):
    try:
        return question()
    except RunError as error:
        assert len(str(error)) < 1000 and "\n" not in str(error) and str(error).isprintable(), error
        return error


@pytest.mark.fault("B4")
@pytest.mark.parametrize("name", FILES)
def test_wrong_content_is_one_line(run, name):
    before, path = ask(run), run / name
    assert not any(isinstance(found, RunError) for found in before)
    text = path.read_bytes()
    wrong = {**WRONG, "half": text[: len(text) // 2], "twice": text + text, "missing": None}
    for content in wrong.values():
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        for found, expected in zip(ask(run), before, strict=True):
            # Records may lack their end, as after a kill between a checkpoint and its record.
            cut = name == "ledger/records.jsonl" and isinstance(found, list) and found == expected[: len(found)] != []
            assert isinstance(found, RunError) or found == expected or cut
    path.write_bytes(text)
    assert ask(run) == before


@pytest.mark.fault("B4", "S15")
@pytest.mark.parametrize("name", [name for name, count in FILES.items() if count])
def test_a_digit_or_letter_changed_is_seen_or_means_nothing(run, name):
    """A digit of the manifest would otherwise name other documents, with exit code 0."""
    before, path = ask(run), run / name
    text, draw, refused = path.read_bytes(), random.Random(name), 0
    for _ in range(FILES[name]):
        at = draw.choice([i for i, byte in enumerate(text) if chr(byte).isalnum()])
        other = draw.choice([c for c in b"0123456789abcdef" if c != text[at]])
        path.write_bytes(text[:at] + bytes([other]) + text[at + 1 :])
        for found, expected in zip(ask(run), before, strict=True):
            assert isinstance(found, RunError) or found == expected
            refused += isinstance(found, RunError)
    assert refused


@pytest.mark.fault("B4")
def test_a_launch_that_was_changed_is_seen(run):
    """Seen red without the digest: which step a launch began from would be another one."""
    path = run / "environment.json"
    values = json.loads(path.read_text())
    values["launches"][0]["newest_step"] = 7
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="its launches are not those of its digest: restore it"):
        read_launches(run)


def test_another_runs_files_are_not_taken_for_ones_own(run, straight, tmp_path):
    """A whole epoch, digest and all, of a run with another seed: the checkpoint does not name it."""
    other = runs.copy_run(straight, tmp_path / "other", last_step=20)
    path = run / "epochs" / "0001.json"
    values = json.loads(path.read_text())
    values["run"] = "f" * 32
    content = {key: value for key, value in values.items() if key not in ("sha256", "format")}
    path.write_text(json.dumps({**values, "sha256": Epoch(**content).digest}))
    with pytest.raises(RunError, match="is of another run: it names epoch 1 of run"):
        open_step(run, 20)
    shutil.rmtree(other / "epochs")
    with pytest.raises(RunError, match="there is no such epoch"):
        open_step(other, 20)


@pytest.mark.fault("S4")
def test_absurd_sizes_are_refused_at_once(run):
    """Sound in itself, digest and all: a manifest of more chunks than could be laid out in memory."""
    path = run / "epochs" / "0001.json"
    values = json.loads(path.read_text())
    stage = values["manifest"]["stages"][0]
    rows = stage["rows_per_step"] * stage["steps_per_chunk"] * (1 << 40)
    stage["chunks"] = 1 << 40
    for subset in stage["subsets"]:
        subset["rows"] = 0
    stage["subsets"][0]["rows"] = rows
    content = {key: value for key, value in values.items() if key not in ("sha256", "format")}
    path.write_text(json.dumps({**values, "sha256": Epoch(**content).digest}))
    with pytest.raises(RunError, match="more than 10,000,000 chunks"):
        open_run(run)
    with open(path, "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(RunError, match="more than 67,108,864 bytes"):
        open_run(run)


@pytest.mark.fault("C9")
def test_a_run_of_an_older_version_is_one_line(run):
    """Its checkpoints name no epoch, and there are none; nor is it begun anew."""
    path = run / "checkpoints" / "20" / "meta" / "meta.json"
    meta = json.loads(path.read_text())
    del meta["epoch"], meta["meta_sha256"]
    path.write_text(json.dumps({**meta, "meta_sha256": sha256_json(meta)}))
    with pytest.raises(ConfigError, match="names no epoch: it was written by an older k2jax"):
        open_step(run, 20)


@pytest.mark.parametrize(
    "change", [{"after_step": "0"}, {"after_step": -1}, {"run": 1}, {"config": []}, {"changes": None}]
)
def test_an_epoch_of_odd_types_is_one_line(run, change):
    path = run / "epochs" / "0001.json"
    values = {**json.loads(path.read_text()), **change}
    content = {key: value for key, value in values.items() if key not in ("sha256", "format")}
    path.write_text(json.dumps({**values, "sha256": Epoch(**content).digest}))
    with pytest.raises(ConfigError, match="its after_step, run, config or changes are none"):
        open_run(run)


@pytest.mark.fault("S10")
def test_code_in_a_saved_configuration_is_text(run, tmp_path):
    """Whole, digests and all: it is read, and nothing of it is run."""
    code = f"__import__('os').mkdir({str(tmp_path / 'marker')!r})"
    path = run / "checkpoints" / "20" / "meta" / "meta.json"
    meta = json.loads(path.read_text())
    del meta["meta_sha256"]
    meta["config"]["name"], meta["config"]["eval"]["prompts"] = code, [f"{{{code}}}", f"!!python/object/apply:{code}"]
    path.write_text(json.dumps({**meta, "meta_sha256": sha256_json(meta)}))
    for found in (*ask(run), answer(lambda: open_step(run, 20).config.name)):
        assert isinstance(found, RunError) or found
    assert not (tmp_path / "marker").exists()


def test_a_ledger_is_read_once_however_many_records_it_has(run, monkeypatch):
    """K2's has 4,000 records over 360 files; and rows of some steps are looked for where they are."""
    ledger, read = runs.ledger(run), []
    real = ledger_module.files.read_bytes
    monkeypatch.setattr(ledger_module.files, "read_bytes", lambda path, *a: read.append(path.name) or real(path, *a))
    names = sorted(path.name for path in (run / "ledger").glob("chunk-*"))
    ledger.verify()
    assert len(ledger.records()) == len(names) == 3 and [name for name in read if name in names] == names
    read.clear()
    assert [row["step"] for row in ledger.steps.rows(13, 14)] == [13, 14] and read == [names[1]]
    assert [row["step"] for row in ledger.steps.rows(10, 11)] == [10, 11]
