"""What a user can get wrong: one clear line, the right exit code, no traceback, nothing lost."""

import json
import re
import shutil

import pytest

from faults import runs
from k2jax.data.manifest import sha256_json

KEYS = {
    "misspelt key": ("model.num_layer=3", ["unknown key", "did you mean 'model.num_layers'?"]),
    "misspelt section": ("modle.dim=64", ["unknown key", "did you mean 'model.dim'?"]),
    "key of a stage": ("stages.0.lr_peek=1", ["unknown key", "did you mean 'stages.0.lr_peak'?"]),
    "no such stage": ("stages.2.lr_peak=1", ["stages.2.lr_peak: unknown key"]),
    "wrong type": ("model.dim=wide", ["model.dim=wide", "expected int"]),
    "float for int": ("model.dim=3.5", ["model.dim=3.5", "expected int"]),
    "no value": ("model.dim", ["--config.model.dim=VALUE"]),
    "out of range": ("model.dim=-32", ["model.dim=-32", "must lie in [1, inf)"]),
    "unknown choice": ("model.remat=some", ["model.remat='some'", "none, dots, full, or names"]),
    "heads": ("model.num_kv_heads=3", ["model.num_kv_heads=3", "must divide model.num_heads=8"]),
    "a mix of nothing": ("stages.0.mix.web=0.0", ["stages.0.mix.web=0.0", "must lie in (0, inf)"]),
    "mesh larger than the devices": ("mesh.fsdp=16", ["'fsdp': 16", "needs 16 devices, this run has 8"]),
    "mesh smaller than the devices": ("mesh.fsdp=3", ["'fsdp': 3", "needs 3 devices, this run has 8"]),
    "too few rows for the mesh": ("stages.0.rows_per_step=4", ["stages.0", "rows_per_step=4", "mesh.fsdp"]),
    "model smaller than the tokenizer": ("model.vocab_size=400", ["model.vocab_size=400", "512"]),
    "no such store": ("data.root=/nowhere", ["data.root=/nowhere", "no store lies there", "prepare"]),
    "no such tokenizer": ("data.tokenizer=/nowhere.json", ["/nowhere.json", "cannot be read"]),
    "rows too long for the data": ("stages.1.sequence_length=9999", ["stage2", "code", "too few"]),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys(tiny_data, command, tmp_path, name):
    override, words = KEYS[name]
    error = command.refuse(78, *runs.arguments(tiny_data, tmp_path / "run", {}), f"--config.{override}")
    assert all(word in error for word in words), error


@pytest.mark.fault("C3")
def test_mesh_that_does_not_divide_a_dimension(tiny_data, command, tmp_path):
    """Names the parameter, its dimension, its size and the mesh axis, before anything is compiled.

    Seen red without the check of the mesh.
    """
    overrides = {"mesh.fsdp": 2, "mesh.tensor": 4, "model.num_heads": 6, "model.num_kv_heads": 6}
    error = command.refuse(78, *runs.arguments(tiny_data, tmp_path / "run", overrides))
    assert all(word in error for word in ("wq_LDNH", "'heads' of 6", "mesh.tensor=4")), error
    assert not (tmp_path / "run").exists()


def test_everything_wrong_is_told_at_once(tiny_data, command, tmp_path):
    overrides = {"model.dim": 0, "model.remat": "some", "stages.1.chunks": 0, "data.verify": "no"}
    error = command.refuse(78, *runs.arguments(tiny_data, tmp_path / "run", overrides))
    assert "4 problem(s)" in error and all(key in error for key in overrides)


EXPERIMENTS = {
    "missing": (None, ["experiment.py: no such experiment file", "tiny.py"]),
    "without get_config": ("x = 1\n", ["experiment.py does not define get_config()"]),
    "no Python": ("def get_config(:\n", ["experiment.py: line 1: SyntaxError"]),
    "misspelt key": (
        "c = config.base()\n    c.model.num_layer = 3",
        ["experiment.py", "num_layer", "num_layers"],
    ),
    "misspelt section": ("c = config.base()\n    c.optimiser.b1 = 0.5", ["optimiser", "optimizer"]),
    "misspelt stage key": ("config.stage(lr_peek=1.0)", ["lr_peek", "did you mean 'lr_peak'?"]),
    "wrong type": ("c = config.base()\n    c.model.dim = 'wide'", ["dim", "int"]),
    "no stages": ("return config.base()", ["stages", "at least one row"]),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_files(tiny_data, command, tmp_path, name):
    text, words = EXPERIMENTS[name]
    path = tmp_path / "experiment.py"
    shutil.copy(tiny_data / "tiny.py", tmp_path)
    if text is not None:
        body = f"from k2jax import config\ndef get_config():\n    {text}\n" if "config." in text else text
        path.write_text(body)
    error = command.refuse(78, f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert all(word in error for word in words), error


# ---- the data ----------------------------------------------------------------------------------------------


@pytest.fixture
def data(tiny_data, tmp_path):
    """A copy of the tiny data that a test may damage."""
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    (root / "tiny.py").write_text((root / "tiny.py").read_text().replace(str(tiny_data), str(root)))
    return root


def edit_store(store, **changes):
    """Another store.json, consistent in itself."""
    info = json.loads((store / "store.json").read_text())
    del info["root_digest"]
    info |= changes
    (store / "store.json").write_text(json.dumps({**info, "root_digest": sha256_json(info)}))


def flip(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 4
    path.write_bytes(content)


@pytest.mark.fault("C8", "F6")
def test_stores(data, command, tmp_path):
    """One after the other: a file changed, cut, or lost; store.json changed, lost; another tokenizer's store."""
    books, argv = data / "books", runs.arguments(data, tmp_path / "run", {"data.verify": "sha256"})
    tokens = next(
        path for path in (books / "tokens").rglob("*") if path.is_file() and path.name != "zarr.json"
    )
    good = tokens.read_bytes()

    flip(tokens)
    error = command.refuse(78, *argv)
    assert str(books) in error and tokens.name in error and "SHA-256" in error
    tokens.write_bytes(good[:-10])
    assert f"expected {len(good)} bytes" in command.refuse(78, *argv)
    tokens.unlink()
    assert "no file" in command.refuse(78, *argv)
    tokens.write_bytes(good)

    text = (books / "store.json").read_text()
    (books / "store.json").write_text(text.replace('"num_documents": 60', '"num_documents": 61'))
    assert "root digest" in command.refuse(78, *argv)
    (books / "store.json").write_text(text[:-20])
    assert "no JSON" in command.refuse(78, *argv)
    (books / "store.json").unlink()
    assert "no store.json" in command.refuse(78, *argv)
    (books / "store.json").write_text(text)
    edit_store(books, tokenizer_sha256="ab" * 32)
    assert "differ in tokenizer_sha256" in command.refuse(78, *argv)
    (books / "store.json").write_text(text)

    (data / "tokenizer.json").write_text((data / "tokenizer.json").read_text() + "\n")
    assert "SHA-256" in command.refuse(78, *argv)
    assert not (tmp_path / "run" / "epochs").exists()


@pytest.mark.fault("F5")
@pytest.mark.parametrize("workers", [0, 1])
def test_token_id_outside_the_vocabulary(data, command, tmp_path, workers):
    """Found when it is read, named with its place; from a worker process, too.

    Seen red without the store's look at ids.
    """
    for name in ("books", "code", "web"):
        edit_store(data / name, vocab_size=450, max_token_id=440)
    error = command.refuse(78, *runs.arguments(data, tmp_path / "run", {"data.workers": workers}))
    assert re.search(r"token \d+ has id \d+, outside the vocabulary of 450", error), error


@pytest.mark.fault("F6")
@pytest.mark.parametrize("workers", [0, 1])
def test_damage_found_while_reading(data, command, tmp_path, workers):
    """Sizes are right, so the start does not see it: the checksum does, and the run stops with 74."""
    for path in (data / "books" / "tokens").rglob("*"):
        if path.is_file() and path.name != "zarr.json":
            flip(path)
    error = command.refuse(74, *runs.arguments(data, tmp_path / "run", {"data.workers": workers}))
    assert str(data / "books") in error and "cannot read the window" in error, error


# ---- the run directory -------------------------------------------------------------------------------------


@pytest.mark.fault("B6")
def test_unwritable_workdir(tiny_data, command, tmp_path):
    """A file in the place of a folder: root may write anywhere else. Refused before anything is compiled."""
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        assert f"--workdir={workdir}" in command.refuse(74, *runs.arguments(tiny_data, workdir, {}))
    for part in ("checkpoints", "metrics", "ledger"):
        workdir = tmp_path / f"run-{part}"
        workdir.mkdir()
        (workdir / part).write_text("mine")
        assert f"{workdir}/{part}" in command.refuse(74, *runs.arguments(tiny_data, workdir, {}))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.fault("B4")
def test_damaged_run_directory(tiny_data, straight, command, tmp_path):
    """Each of its files, cut or with a line broken: named."""
    codes = {"epochs/0001.json": 78, "environment.json": 78, "ledger/chunk-00001.jsonl": 74,
             "ledger/records.jsonl": 74, "metrics/chunk-00002.jsonl": 74}  # fmt: skip
    for i, (name, code) in enumerate(codes.items()):
        workdir = runs.copy_run(straight, tmp_path / f"run{i}")
        text = (workdir / name).read_text()
        (workdir / name).write_text("x" + text if name.endswith("jsonl") else text[: len(text) // 2])
        assert name in command.refuse(code, *runs.arguments(tiny_data, workdir, {})), name
    workdir = runs.copy_run(straight, tmp_path / "journal")
    (workdir / "journal.jsonl").write_text('{"kind": "skip"\n')
    assert "journal.jsonl, line 1" in command.refuse(78, *runs.arguments(tiny_data, workdir, {}))


@pytest.mark.fault("B8")
def test_two_runs_in_one_workdir(tiny_data, start, command, tmp_path):
    """The second is refused with the first one's host and process; the first goes on."""
    first = start(tmp_path / "run", environment=runs.READ_ONLY_CACHE)
    first.wait_for("starting at step 1")
    error = command.refuse(78, *runs.arguments(tiny_data, tmp_path / "run", {}))
    assert "in use by another run" in error and f"pid {first.process.pid}" in error
    first.wait_for("saved 10")


# ---- the command line --------------------------------------------------------------------------------------


def test_command_line(command, start, tiny_data, tmp_path):
    """Missing and unknown arguments are argparse's: usage and 2. The program itself gives our codes, too."""
    for argv, word in (
        ([], "--config"),
        (["--config=x", "--workdir=y", "--steps=3"], "unknown argument --steps=3"),
    ):
        ended = command(*argv)
        assert ended.code == 2 and word in ended.error and "Traceback" not in ended.error
    trainer = start(tmp_path / "run", {"model.dmi": 3})
    assert "did you mean 'model.dim'?" in trainer.wait_for_error(78)
    assert not (tmp_path / "run").exists()
