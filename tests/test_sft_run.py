"""A run with a stage of conversations: its records, what each step read, the same bits after a stop and again."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conversation_stores import load

from k2jax.data.conversations import is_target
from k2jax.data.epochs import order_of, read_epochs
from k2jax.data.loader import BatchSource, batch_digest
from k2jax.data.provenance import open_run, which_docs, which_steps
from k2jax.data.store import open_stores
from k2jax.replay import replay
from k2jax.run.ledger import Ledger, StepLog
from k2jax.run.storage import read_meta
from k2jax.train import train
from k2jax.training.setup import open_data

OPTIONS = {"eval.at_checkpoints": 2, "stability.attention_every": 7, "mesh.fsdp": 4, "mesh.tensor": 2}


@pytest.fixture(scope="module")
def run(made_once, chat_data) -> Path:
    return made_once("chat-run", lambda workdir: train(load(chat_data, **OPTIONS), workdir))


def batches(run: Path) -> dict[int, dict[str, np.ndarray]]:
    order = order_of(read_epochs(run))
    options = {"label_shift": order.manifest["label_shift"]}
    stores = open_stores(order.manifest)
    found = {}
    for plan in order.stages:
        source = BatchSource(order, stores, first_step=plan.first_step, last_step=plan.last_step, **options)
        found |= {plan.first_step + i: source[i] for i in range(len(source))}
    return found


def test_ledger_and_metrics_have_what_each_step_learned(run):
    ledger = {row["step"]: row for row in Ledger(run / "ledger", None).steps.rows()}
    metrics = {row["step"]: row for row in StepLog(run / "metrics", None).rows()}
    read = batches(run)
    assert ledger.keys() == metrics.keys() == read.keys() == set(range(1, 21))
    for step, batch in read.items():
        assert ledger[step]["batch"] == batch_digest(batch["digest"])
        if step <= 5:
            assert "supervised_tokens" not in ledger[step] and "padding_tokens" not in metrics[step]
            continue
        learned, padding = int(is_target(batch["marks"]).sum()), int((batch["marks"][:, :64] == 0).sum())
        for row in (ledger[step], metrics[step]):
            assert (row["supervised_tokens"], row["padding_tokens"]) == (learned, padding)
        by_subset = [int(is_target(batch["marks"][batch["subset"] == i]).sum()) for i in (1, 2)]
        assert [metrics[step]["targets/sums"], metrics[step]["targets/talk"]] == by_subset
    assert metrics[20]["tokens_seen"] == 5 * 8 * 32 + 15 * 8 * 64
    timed = metrics[12]
    expected = (8 * 64 - timed["padding_tokens"]) / timed["step_s"]
    assert timed["tokens_per_s"] == pytest.approx(expected)
    assert metrics[14]["attention_logit"] > 0
    assert np.mean([metrics[s]["loss"] for s in (18, 19, 20)]) < metrics[6]["loss"]


def test_held_out_losses_are_of_learned_tokens(run, chat_data):
    rows = list(StepLog(run / "held_out", None).rows())
    assert [row["stage"] for row in rows] == ["text", "chat", "chat", "chat"]
    stores, _ = open_data(load(chat_data))
    end = json.loads((run / "validation.json").read_text())["subsets"]
    assert end.keys() == {"talk", "sums"}
    for name, found in end.items():  # eight rows hold all that these stores hold out
        store = stores[name]
        starts = store.document_starts()[store.num_train_documents :]
        learned = sum(store.read_mask([a], b - a)[0, 1:].sum() for a, b in zip(starts, starts[1:], strict=False))
        assert found["tokens"] == learned and 0 < found["loss"] < 10
        assert rows[-1][f"targets/{name}"] <= learned


def test_every_row_of_a_step_names_its_conversations_and_back(run):
    opened, read = open_run(run), batches(run)
    where = {}
    for step in (6, 13, 20):
        for origin in which_docs(opened, step, text=True):
            marks = read[step]["marks"][origin.row]
            assert len(origin.documents) == (marks >> 1).max()
            for number, part in enumerate(origin.documents, 1):
                at = np.flatnonzero(marks >> 1 == number)
                assert part.in_row == (at[0], at[-1] + 1) and part.in_document == (0, len(at))
                store = opened.stores[origin.subset]
                start = store.document(part.index)["start"]
                tokens = read[step]["tokens"][origin.row][at]
                assert np.array_equal(store.read([start], len(at))[0], tokens)
                where.setdefault(part.id, []).append((step, origin.row, origin.position, origin.epoch, part.in_row))
    for id, places in list(where.items())[::7]:
        [document] = which_steps(opened, id)
        found = [(r.step, r.row, r.position, r.epoch, r.in_row) for r in document.reads if r.step in (6, 13, 20)]
        assert sorted(found) == sorted(places)


def test_every_reading_of_a_conversation_is_found(run):
    """By brute force over all steps: of one store in all its epochs."""
    opened = open_run(run)
    expected = {}
    for step in range(6, 21):
        for origin in which_docs(opened, step):
            for part in origin.documents:
                expected.setdefault(part.id, []).append((step, origin.row))
    ids = [opened.stores["sums"].document(i)["id"] for i in (0, 50, 107, 119)]
    for id in ids:
        [document] = which_steps(opened, id)
        assert [(r.step, r.row) for r in document.reads if r.step] == sorted(expected.get(id, []))
    assert which_steps(opened, ids[-1])[0].held_out


def last_state(run: Path) -> dict:
    return read_meta(run / "checkpoints" / "20")["digests"]


def test_a_run_that_is_stopped_within_an_epoch_goes_on_bit_for_bit(run, chat_data, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    for step in (15, 20):
        shutil.rmtree(again / "checkpoints" / str(step))
    order = order_of(read_epochs(run))
    epochs = order.rows(order.positions(11)).epoch
    assert order.rows(order.positions(10)).epoch[0] == epochs[0], "within an epoch"
    train(load(chat_data, **OPTIONS), again)
    ours, theirs = ([*Ledger(of / "ledger", None).steps.rows()] for of in (again, run))
    assert ours == theirs and last_state(again) == last_state(run)


def test_a_step_is_replayed_with_its_bits(run):
    [step] = replay(run, 12, 1, say=lambda line: None)
    assert step.batch and step.bits, step


def test_a_meshs_shape_changes_no_row(run, chat_data, tmp_path):
    other = {"mesh.tensor": 1, "mesh.context": 2, "stages.1.microbatches": 2}
    train(load(chat_data, **OPTIONS | other), tmp_path / "run")
    ours, theirs = ([*Ledger(of / "ledger", None).steps.rows()] for of in (tmp_path / "run", run))
    same = ("step", "batch", "supervised_tokens", "padding_tokens")
    assert [[row.get(key) for key in same] for row in ours] == [[row.get(key) for key in same] for row in theirs]
    assert jax.device_count() == 8
