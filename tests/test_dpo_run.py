"""A run with a stage of pairs: its reference, its records, what a step read, the same bits after a stop and again."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conversation_stores import load, make_preferences
from faults import runs
from test_sft_run import _edited
from verifier import verifier

from k2jax.data.provenance import open_run, which_docs, which_steps
from k2jax.data.store import Store
from k2jax.errors import ConfigError
from k2jax.model.preferences import REWARDS
from k2jax.release.build import Options, release
from k2jax.replay import replay
from k2jax.rerun import Rerun, checkpoints_before
from k2jax.run.ledger import StepLog
from k2jax.run.saved import open_step
from k2jax.run.storage import read_meta
from k2jax.train import train
from k2jax.training import reference
from k2jax.training.setup import open_data
from k2jax.trials import Trials

OPTIONS = {"eval.at_checkpoints": 2, "stability.attention_every": 7, "mesh.fsdp": 4, "mesh.tensor": 2}


@pytest.fixture(scope="module")
def data(made_once, tiny_data) -> Path:
    return made_once("preferences", lambda root: make_preferences(root, tiny_data))


@pytest.fixture(scope="module")
def run(made_once, data) -> Path:
    return made_once("dpo-run", lambda workdir: train(load(data, **OPTIONS), workdir))


def metrics_of(run: Path) -> dict[int, dict]:
    return {row["step"]: row for row in StepLog(run / "metrics", None).rows()}


def test_the_stage_begins_at_its_reference_and_learns_to_prefer(run):
    metrics = metrics_of(run)
    assert metrics.keys() == set(range(1, 21)) and "pairs/right" not in metrics[5]
    np.testing.assert_allclose(metrics[6]["loss"], np.log(2), rtol=1e-4)
    assert abs(metrics[6]["pairs/chosen_reward"]) < 1e-3
    last = [np.mean([metrics[step][key] for step in (18, 19, 20)]) for key in ("loss", "pairs/right")]
    assert last[0] < 0.95 * np.log(2) and last[1] > 0.6
    for step in range(6, 21):
        row = metrics[step]
        assert {f"pairs/{name}" for name in REWARDS} <= row.keys() and row["targets/liked"] == row["num_pairs"] > 0
        assert row["pairs/tokens"] * row["num_pairs"] == pytest.approx(row["supervised_tokens"])


def test_the_reference_is_what_the_checkpoint_before_the_stage_says(run, data):
    """Of every pair that is trained on, held out ones aside, by its own digest, which checkpoints of the stage have."""
    table = np.load(run / "reference" / "prefer.npy")
    about = json.loads((run / "reference" / "prefer.json").read_text())
    assert about["sha256"] == hashlib.sha256((run / "reference" / "prefer.npy").read_bytes()).hexdigest()
    assert about["after_step"] == 5 and about["stage"] == "prefer"
    metas = {step: read_meta(run / "checkpoints" / str(step)) for step in (5, 10, 20)}
    assert [metas[step].get("reference") for step in (5, 10, 20)] == [None, about["sha256"], about["sha256"]]
    stores, manifest = open_data(load(data))
    known = np.isfinite(table).all(axis=1)
    assert len(table) == stores["liked"].num_documents and known.sum() == stores["liked"].num_train_documents
    assert known[: known.sum()].all() and (table[known] < 0).all()
    assert about["stores"] == {"liked": manifest["stores"]["liked"]["root_digest"]}


def last_digests(run: Path) -> dict:
    return read_meta(run / "checkpoints" / "20")["digests"]


def stopped(run: Path, folder: Path, after: int) -> Path:
    shutil.copytree(run, folder)
    for step in (10, 15, 20):
        if step > after:
            shutil.rmtree(folder / "checkpoints" / str(step))
    return folder


@pytest.mark.parametrize("after", [5, 15])
def test_a_resume_within_the_stage_and_at_its_beginning_has_the_same_bits(run, data, tmp_path, after):
    again = stopped(run, tmp_path / "run", after)
    train(load(data, **OPTIONS), again)
    assert runs.ledger_rows(again) == runs.ledger_rows(run) and last_digests(again) == last_digests(run)
    assert (again / "reference" / "prefer.npy").read_bytes() == (run / "reference" / "prefer.npy").read_bytes()


def test_on_one_device_the_same_run_within_rounding(run, data, tmp_path):
    train(load(data, **OPTIONS | {"mesh.fsdp": 8, "mesh.tensor": 1, "stages.1.microbatches": 1}), tmp_path / "run")
    ours, theirs = metrics_of(tmp_path / "run"), metrics_of(run)
    for step in (6, 12, 20):
        np.testing.assert_allclose(ours[step]["loss"], theirs[step]["loss"], rtol=2e-3)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda folder: (folder / "prefer.npy").unlink(), "prefer.npy is not there.*restore it"),
        (lambda folder: np.save(folder / "prefer.npy", np.zeros((3, 2), np.float32)), "prefer.json has"),
        (lambda folder: reference.write(folder, "prefer", np.zeros((3, 2), np.float32), {}), "the checkpoint has"),
        (lambda folder: edit(folder / "prefer.json", stores={"liked": "0" * 64}), "is of other stores than those of"),
    ],
    ids=["gone", "changed", "another", "of other stores"],
)
def test_a_reference_that_is_not_the_stages_ends_a_resume(run, data, tmp_path, harm, complaint):
    again = stopped(run, tmp_path / "run", 15)
    harm(again / "reference")
    with pytest.raises(ConfigError, match=complaint):
        train(load(data, **OPTIONS), again)
    assert not (again / "checkpoints" / "20").exists()


def test_steps_are_replayed_and_name_their_pairs(run):
    found = list(replay(run, 12, 2, say=lambda line: None))
    assert all(step.batch and step.bits for step in found) and len(found) == 2
    opened = open_run(run)
    origins = which_docs(opened, 12, text=True)
    part = origins[0].documents[0]
    assert part.source.startswith("liked.jsonl:")
    [document] = which_steps(opened, part.id)
    assert (12, origins[0].row) in [(read.step, read.row) for read in document.reads]


def test_held_out_losses_are_of_the_chosen(run, data):
    stores, _ = open_data(load(data))
    store = stores["liked"]
    starts = store.document_starts()[store.num_train_documents :]
    masks = [store.read_mask([a], b - a)[0] for a, b in zip(starts, starts[1:], strict=False)]
    end = json.loads((run / "validation.json").read_text())["subsets"]["liked"]
    assert end["tokens"] == sum((mask[1:] == 1).sum() for mask in masks) and 0 < end["loss"] < 10


def test_a_fork_within_the_stage_has_its_reference(run, data, tmp_path):
    train(load(data, **OPTIONS), tmp_path / "fork", (run, 15))
    assert last_digests(tmp_path / "fork") == last_digests(run)
    assert open_step(tmp_path / "fork", 20).meta["reference"] == open_step(run, 15).meta["reference"]


def test_conversations_are_no_pairs(data):
    with pytest.raises(ConfigError, match="store 'liked' holds pairs.*expected conversations.*kind to 'dpo'"):
        open_data(load(data, **{"stages.1.kind": "sft"}))




@pytest.mark.processes
def test_two_processes_that_are_killed_are_one_that_was_not(data, tmp_path):
    """In the stage: each process has the reference again, which process 0 reads."""
    runs.check_killed_pair(data, tmp_path, "saved 10", 20)


@pytest.fixture(scope="module")
def released(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("release") / "out"
    release(run, out, Options("last", True, "none", "tokens"))
    return out


def test_a_release_has_the_pairs_and_a_stranger_checks_them(released, run):
    found = {result.name: result for result in verifier.verify(verifier.Release(released, None), say=lambda line: None)}
    assert {name: r.found for name, r in found.items() if r.state == verifier.FAILED} == {}
    assert found["batches"].count == found["order"].count == 20
    kept = released / "run" / "reference" / "prefer.npy"
    assert kept.read_bytes() == (run / "reference" / "prefer.npy").read_bytes()


def test_halves_that_are_no_pairs_are_seen(released, tmp_path):
    path = released / "data" / "chunk_00002.parquet"
    shutil.copytree(released, tmp_path / "out")
    table = pq.read_table(path)
    marks = _edited(table["marks"], lambda m: m - 2 * (m >> 1 == 2))  # the first pair's second half as its first
    pq.write_table(table.set_column(8, "marks", marks), tmp_path / "out" / "data" / path.name)
    opened = verifier.Release(tmp_path / "out", None)
    order, ledger, data = opened.fact("journal").now, opened.fact("ledger"), verifier.Data()
    chunk = verifier.Chunk(opened, "data/chunk_00002.parquet", 6, 10, 8, 65, True)
    verifier.look_at(data, 6, chunk.step(6), order.of(6), 65, ledger.rows[6]["batch"])
    assert "half of pair 0" in data.wrong["documents"] and "have digest" in data.wrong["batches"]


def test_a_replay_of_a_release_asks_for_the_stores(released, monkeypatch):
    monkeypatch.setattr(Store, "open", None)
    with pytest.raises(ConfigError, match="does not say which pairs a row holds.*--stores"):
        list(replay(released / "run", 12, 1, say=lambda line: None))


@pytest.mark.slow
def test_the_spike_detective_runs_a_step_of_pairs_again(run):
    rerun = Rerun(run, 12, say=lambda line: None)
    found = Trials(rerun, 12, checkpoints_before(run, 12), {}, True, False).run()
    assert found["replay"]["again"] and found["replay"]["first_difference"] is None
    assert found["data"]["of"] == 8 and not any(row["repeat"] for row in found["data"]["rows"])
