"""A whole run writes what it promises: metrics, TensorBoard events, ledger, environment; read one step late."""

import json
import os
import platform
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pandas
import pytest
from conftest import REPOSITORY
from tensorboardX.proto.event_pb2 import Event

import k2jax
from k2jax.data import chunks
from k2jax.data.epochs import order_of, read_epochs
from k2jax.data.journal import read_journal
from k2jax.data.loader import batch_digest, make_loader
from k2jax.data.manifest import manifest_digest
from k2jax.data.order import Order, StagePlan
from k2jax.data.store import open_stores
from k2jax.run.ledger import Ledger, StepLog
from k2jax.train import train
from k2jax.training.metrics import Recorder


GROUPS = ("embed", "q", "k", "v", "o", "gate", "up", "down", "norms", "head")


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Path:
    return tiny_run


@pytest.fixture(scope="module")
def metrics(run: Path) -> pandas.DataFrame:
    return pandas.concat(pandas.read_json(f, lines=True) for f in sorted((run / "metrics").glob("*.jsonl")))


def test_metrics_hold_one_row_a_step_and_pandas_reads_them(metrics: pandas.DataFrame):
    assert metrics.step.tolist() == list(range(1, 26))
    assert metrics.stage.tolist() == ["stage1"] * 20 + ["stage2"] * 5
    assert metrics.tokens_seen.tolist() == [256 * i for i in range(1, 21)] + [
        5120 + 512 * i for i in range(1, 6)
    ]
    for kind in ("grad", "param", "update"):
        groups = metrics[[f"{kind}_norm/{group}" for group in GROUPS]]
        np.testing.assert_allclose((groups**2).sum(axis=1) ** 0.5, metrics[f"{kind}_norm"], rtol=1e-5)
    assert (metrics.applied & (metrics.lr > 0)).all()
    timed = metrics[~metrics.step.isin([1, 21])]  # the first step of each stage has compiling before it
    assert timed.tokens_per_s.notna().all() and metrics[metrics.step.isin([1, 21])].tokens_per_s.isna().all()
    assert (metrics.data_wait_s >= 0).all() and (metrics.host_memory_peak_bytes > 0).all()


def test_rows_count_clipped_steps_and_some_have_norms_by_layer(metrics: pandas.DataFrame):
    """Every ten steps; of the layers' groups alone, whose squares add up to the group's."""
    assert metrics.clipped_steps.tolist() == metrics.clipped.cumsum().tolist()
    assert metrics.clipped.equals(metrics.applied & (metrics.grad_norm > 1.0))
    assert (metrics.log_z > 0).all() and (metrics.logit > 0).all()
    assert metrics[metrics.layers.notna()].step.tolist() == [10, 20]
    for row in metrics[metrics.layers.notna()].to_dict("records"):
        groups = {group for group in GROUPS if group not in ("embed", "head")}
        assert row["layers"].keys() == {f"{kind}/{group}" for kind in ("grad_norm", "update_ratio") for group in groups}
        for group in groups - {"norms"}:  # which has the last one besides
            values = row["layers"][f"grad_norm/{group}"]
            assert len(values) == 2 and np.hypot(*values) == pytest.approx(row[f"grad_norm/{group}"], rel=1e-3)
            assert min(row["layers"][f"update_ratio/{group}"]) <= row[f"update_ratio/{group}"]


def test_the_loss_is_the_subsets_losses_weighed_by_their_targets(metrics: pandas.DataFrame):
    names = ["books", "code", "web"]
    targets = metrics[[f"targets/{name}" for name in names]].to_numpy()
    losses = metrics[[f"loss/{name}" for name in names]].fillna(0).to_numpy()
    np.testing.assert_allclose((targets * losses).sum(axis=1) / targets.sum(axis=1), metrics.loss, rtol=1e-5)
    assert (targets.sum(axis=1) == [256] * 20 + [512] * 5).all()


def test_the_loss_falls(metrics: pandas.DataFrame):
    assert metrics.loss.iloc[-3:].mean() < metrics.loss.iloc[0] - 1.0


def test_tensorboard_has_every_number(run: Path, metrics: pandas.DataFrame):
    [path] = (run / "tensorboard").glob("events.out.tfevents.*")
    data, at, found = path.read_bytes(), 0, {}
    while at < len(data):  # TFRecord: length, its checksum, bytes, their checksum
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        found.update({(value.tag, event.step): value.simple_value for value in event.summary.value})
        at += 12 + length + 4
    for row in metrics.to_dict("records"):
        for tag in ("loss", "grad_norm/gate", "lr", "loss/code"):
            if row[tag] == row[tag]:
                assert found[tag, row["step"]] == pytest.approx(row[tag], rel=1e-6)


def test_the_ledger_has_the_digests_of_the_batches_that_the_manifest_gives(run: Path):
    """Anyone can recompute them from the run directory and the stores."""
    [epoch] = read_epochs(run)
    manifest, order = epoch.manifest, order_of([epoch], read_journal(run / "journal.jsonl"))
    stores = open_stores(manifest, verify="sha256")
    rows = {row["step"]: row for row in Ledger(run / "ledger", None).steps.rows()}
    for first, last in ((1, 20), (21, 25)):
        for step, batch in make_loader(order, stores, label_shift="next", first_step=first, last_step=last):
            assert rows[step]["batch"] == batch_digest(batch["digest"])


def test_records_close_each_chunk_with_its_checkpoint(run: Path):
    ledger = Ledger(run / "ledger", None)
    ledger.verify()
    assert [(r["first_step"], r["last_step"]) for r in ledger.records()] == [(1, 10), (11, 20), (21, 25)]
    metas = [
        json.loads((run / "checkpoints" / str(s) / "meta" / "meta.json").read_text()) for s in (10, 20, 25)
    ]
    assert [meta["digest"] for meta in metas] == [r["checkpoint"] for r in ledger.records()]
    assert [meta["parent"] and meta["parent"]["step"] for meta in metas] == [None, 10, 20]
    assert metas[1]["parent"]["digest"] == metas[0]["digest"]


def test_the_run_explains_itself(run: Path):
    [launch] = json.loads((run / "environment.json").read_text())["launches"]
    assert launch["versions"]["k2jax"] == k2jax.__version__ and launch["versions"]["jax"] == jax.__version__
    assert launch["devices"]["count"] == 8 and launch["devices"]["mesh"] == {
        "replica": 1,
        "stage": 1,
        "fsdp": 8,
        "context": 1,
        "tensor": 1,
    }
    assert launch["flags"]["XLA_FLAGS"] and launch["host_hardware"]["cpus"] > 0
    [epoch] = read_epochs(run)
    meta = json.loads((run / "checkpoints" / "25" / "meta" / "meta.json").read_text())
    assert meta["config"] == epoch.config and meta["epoch"] == epoch.name
    assert meta["manifest_digest"] == manifest_digest(epoch.manifest)
    data = json.loads((run / "checkpoints" / "25" / "data" / "metadata").read_text())
    assert data["next_step"] == 26


@pytest.mark.fault("S9")
def test_secrets_in_the_environment_are_written_nowhere(tiny_config, tmp_path: Path, monkeypatch):
    """By a run of the usual steps, which compiles nothing new. Seen red without the allow-list of variables."""
    monkeypatch.setenv("WANDB_API_KEY", "hunter2-wandb")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-aws")
    train(tiny_config(), tmp_path / "r")
    written = [path for path in (tmp_path / "r").rglob("*") if path.is_file()]
    assert written and not [path for path in written if b"hunter2" in path.read_bytes()]


def test_a_finished_run_says_so_and_changes_nothing(run: Path, tiny_config, tmp_path: Path, capsys):
    again = shutil.copytree(run, tmp_path / "run")
    train(tiny_config(**{"log.tensorboard": False}), again)
    assert "resuming after step 25 of 25" in capsys.readouterr().out
    ledgers = [{path.name: path.read_bytes() for path in (folder / "ledger").iterdir()} for folder in (run, again)]
    assert ledgers[0] == ledgers[1]


def test_metrics_are_read_one_step_late(tiny_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`push` reads the step before: what it is given is not touched until the next push, or flush."""
    plan = StagePlan("stage1", 0, 32, 8, 10, 2, 0, 160, 1, 20, 0)
    steps, ledger = StepLog(tmp_path / "metrics", lambda s: 1), Ledger(tmp_path / "ledger", lambda s: 1)
    lines: list[str] = []
    guard = SimpleNamespace(add=lambda row: None)
    recorder = Recorder(tiny_config(), tmp_path, None, ["a"], steps, ledger, guard, lines.append, 0, first_step=1)
    values = {key: np.float32(1) for key in ("loss", "grad_norm", "param_norm", "lr", "applied", "outlier")}
    values |= {key: np.float32(np.inf) for key in ("loss_limit", "grad_norm_limit")}
    values |= {"clipped": np.bool(False), "log_z": np.float32(1), "logit": np.float32(1), "layers": {}}
    values |= {"batch_digest": np.zeros(8, np.uint32)}
    values |= {"subset_loss": np.ones(1), "subset_targets": np.ones(1)}
    clock = iter([10.0, 17.0])
    monkeypatch.setattr("k2jax.training.metrics.time.perf_counter", lambda: next(clock))
    recorder.push(1, plan, values, 0.0)
    assert list(steps.rows()) == []
    recorder.push(2, plan, values, 0.0)
    assert [row["step"] for row in steps.rows()] == [1]
    recorder.flush()
    assert [row["step"] for row in steps.rows()] == [1, 2]
    assert [row["step_s"] for row in steps.rows()] == [None, 7.0], "on CPU, from one push to the next"


def test_chunk_numbers_follow_the_journal():
    """A range skipped makes the last chunk of its stage shorter, and the stage still ends with a checkpoint."""
    manifest = {
        "format": 1,
        "seed": 0,
        "tokenizer_sha256": "",
        "vocab_size": 10,
        "eos_id": 2,
        "label_shift": "next",
        "stores": {
            "a": {
                "path": "",
                "root_digest": "",
                "num_tokens": 999,
                "num_train_tokens": 999,
                "num_documents": 1,
            }
        },
        "stages": [
            {
                "name": name,
                "sequence_length": 4,
                "rows_per_step": 2,
                "steps_per_chunk": 3,
                "chunks": 2,
                "subsets": [{"name": "a", "repeats": 1.0, "windows": 249, "rows": 12}],
            }
            for name in ("one", "two")
        ],
    }
    entry = {"kind": "skip", "positions": [2, 6], "at_step": 0}
    order = Order(manifest, [entry])
    assert chunks.checkpoint_steps(Order(manifest)) == [3, 6, 9, 12]
    assert chunks.checkpoint_steps(order) == [3, 4, 7, 10]
    assert [chunks.chunk_of_step(order, step) for step in (3, 4, 5, 10)] == [1, 2, 3, 4]
    assert chunks.tokens_before(order, 5) == 4 * 2 * 4


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has the setting")
def test_a_program_starts_once_more_for_huge_pages(tmp_path: Path):
    """With its arguments, once; and not where the setting is the user's."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nfrom k2jax.parallel.host_memory import use_huge_pages\nprint('start', flush=True)\n"
        "use_huge_pages()\nprint(sys.argv[1:], os.environ['GLIBC_TUNABLES'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"PYTHONPATH": str(REPOSITORY)}

    def run(**more: str) -> list[str]:
        command = [sys.executable, str(program), "--a=1", "b c"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment | more, check=True)
        return done.stdout.splitlines()

    assert run() == ["start", "start", "['--a=1', 'b c'] glibc.malloc.hugetlb=1"]
    assert run(GLIBC_TUNABLES="") == ["start", "['--a=1', 'b c'] "]
