"""A run with a stage of conversations: its records, what each step read, the same bits after a stop and again."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversation_stores import load
from faults import runs
from test_convert_from_hf import importing, make_folder
from verifier import verifier

from k2jax import config as configuration
from k2jax.data.conversations import is_target
from k2jax.data.epochs import order_of, read_epochs
from k2jax.data.loader import BatchSource, batch_digest
from k2jax.data.provenance import open_run, which_docs, which_steps
from k2jax.data.store import Store, open_stores
from k2jax.release.build import Options, release
from k2jax.replay import replay
from k2jax.rerun import Rerun, checkpoints_before
from k2jax.run import drift
from k2jax.run.ledger import Ledger, StepLog
from k2jax.run.saved import open_step
from k2jax.run.storage import read_meta
from k2jax.train import train
from k2jax.training.setup import open_data
from k2jax.trials import Trials

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


@pytest.mark.processes
def test_two_processes_that_are_killed_are_one_that_was_not(chat_data, tmp_path):
    """Within an epoch; each process reads its part of every step."""
    runs.check_killed_pair(chat_data, tmp_path, "saved 10", 20)


def test_conversations_begin_from_an_imported_folder(chat_data, tmp_path):
    """The stage is the run's first; the folder's weights are what it starts from."""
    importing(make_folder(tmp_path / "source", chat_data / "tokenizer.json"), tmp_path / "run", name="small")
    path = tmp_path / "run" / "experiment.py"
    path.write_text(path.read_text().replace("mix={}", 'mix={"talk": 1, "sums": 1}'))
    keys = {"name": "chat", "kind": "sft", "sequence_length": 64, "rows_per_step": 8, "steps_per_chunk": 2, "chunks": 1}
    keys |= {"warmup_steps": 0, "lr_peak": 0.0, "lr_final": 0.0}
    keys = {f"stages.0.{key}": value for key, value in keys.items()}
    keys |= {"data.root": chat_data, "log.tensorboard": False, "eval.at_checkpoints": 0}
    train(configuration.load(str(path), [f"{key}={value}" for key, value in keys.items()]), tmp_path / "run")
    first, last = (read_meta(tmp_path / "run" / "checkpoints" / str(step))["digests"] for step in (0, 2))
    assert all(last[name] == digest for name, digest in first.items() if name.startswith("params/"))
    assert [row["supervised_tokens"] > 0 for row in runs.ledger_rows(tmp_path / "run")] == [True, True]


@pytest.fixture(scope="module")
def released(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("release") / "out"
    release(run, out, Options("last", True, "none", "tokens"))
    return out


def test_a_release_has_the_rows_and_a_stranger_checks_them(released):
    found = {result.name: result for result in verifier.verify(verifier.Release(released, None), say=lambda line: None)}
    assert {name: r.found for name, r in found.items() if r.state == verifier.FAILED} == {}
    assert found["batches"].count == found["order"].count == 20


def test_a_release_is_replayed_without_its_stores_and_names_its_conversations(released, run, monkeypatch):
    expected = which_docs(open_run(run), 12)
    monkeypatch.setattr(Store, "open", None)
    [step] = replay(released / "run", 12, 1, say=lambda line: None)
    assert step.batch and step.bits
    found = which_docs(open_run(released / "run"), 12)
    assert [[(p.id, p.in_row) for p in row.documents] for row in found] == [
        [(p.id, p.in_row) for p in row.documents] for row in expected
    ]


@pytest.mark.parametrize(
    ("forge", "check", "complaint"),
    [
        (lambda t: t.set_column(8, "marks", _edited(t["marks"], lambda m: m | (m > 0))), "batches", "have digest"),
        (lambda t: t.set_column(8, "marks", _edited(t["marks"], lambda m: m + 2 * (m > 0))), "documents", "number its"),
        (lambda t: t.set_column(7, "documents", t["documents"].take(pa.array([0] * len(t)))), "documents", ""),
    ],
    ids=["all learned", "other numbers", "other conversations"],
)
def test_forged_rows_are_seen(released, tmp_path, forge, check, complaint):
    """Seen by the verifier's own reading of a chunk, whatever its other digests say."""
    path = released / "data" / "chunk_00002.parquet"
    shutil.copytree(released, tmp_path / "out")
    pq.write_table(forge(pq.read_table(path)), tmp_path / "out" / "data" / path.name)
    opened = verifier.Release(tmp_path / "out", None)
    order, ledger, data = opened.fact("journal").now, opened.fact("ledger"), verifier.Data()
    chunk = verifier.Chunk(opened, "data/chunk_00002.parquet", 11, 15, 8, 65, True)
    verifier.look_at(data, 12, chunk.step(12), order.of(12), 65, ledger.rows[12]["batch"])
    assert complaint in data.wrong[check]


def _edited(lists, change):
    flat = lists.combine_chunks()
    values = change(flat.flatten().to_numpy(zero_copy_only=False).astype(np.int64)).astype(np.uint32)
    return pa.ListArray.from_arrays(flat.offsets, pa.array(values))


def test_no_conversation_is_read_twice_in_an_epoch_though_the_mix_changes(run, chat_data, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    for step in (15, 20):
        shutil.rmtree(again / "checkpoints" / str(step))
    changed = {"stages.1.mix.talk": 3.0, "allow_drift": "('stages',)"}
    train(load(chat_data, **OPTIONS | changed), again)
    opened, read = open_run(again), []
    for step in range(6, 21):
        for row in which_docs(opened, step):
            read += [(row.subset, row.epoch, part.index) for part in row.documents]
    assert len(read) == len(set(read))
    document = opened.stores["talk"].document(3)["id"]
    [found] = which_steps(opened, document)
    steps = [s for s in range(6, 21) for row in which_docs(opened, s) if document in {p.id for p in row.documents}]
    assert [r.step for r in found.reads if r.step] == steps


@pytest.mark.slow
def test_a_run_of_before_these_keys_is_read_and_goes_on(tiny_config, tmp_path, monkeypatch):
    """Its epoch and checkpoints know nothing of kinds of stages; what is saved from now on does."""
    to_dict = configuration.to_dict

    def before(config):
        values = to_dict(config)
        for stage in values["stages"] if "stages" in values else [values]:
            for key in ("kind", "too_long", "reset_positions"):
                stage.pop(key, None)
        return values

    with monkeypatch.context() as older:
        for module in (configuration, drift):
            older.setattr(module, "to_dict", before)
        train(tiny_config(), tmp_path / "run")
    assert "kind" not in read_epochs(tmp_path / "run")[0].config["stages"][0]
    assert open_step(tmp_path / "run", 25).config.stages[0].kind == "pretrain"
    for step in (20, 25):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    before_it = runs.ledger_rows(tmp_path / "run")
    train(tiny_config(), tmp_path / "run")
    assert runs.ledger_rows(tmp_path / "run") == before_it
    assert open_step(tmp_path / "run", 25).step == 25 and open_step(tmp_path / "run", 10).step == 10


@pytest.mark.slow
def test_the_spike_detective_names_conversations(run):
    """Rows' losses are those that the step had; padding is no repeated n-gram; of a row its conversations are told."""
    rerun = Rerun(run, 12, say=lambda line: None)
    places = checkpoints_before(run, 12)
    trials = Trials(rerun, 12, places, {}, True, False)
    found = trials.run()
    assert found["replay"]["again"] and found["replay"]["first_difference"] is None
    assert not any(row["repeat"] for row in found["data"]["rows"]) and found["data"]["of"] == 8
    assert found["data"]["baselines"]["all"]["median"] > 0
    told = trials._documents({"row": 3, "repeat": None})
    expected = which_docs(open_run(run), 12, 3)[0].documents
    longest = sorted(expected, key=lambda part: part.in_row[0] - part.in_row[1])[:3]
    assert [one["id"] for one in told] == [part.id for part in longest]
