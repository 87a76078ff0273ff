"""k2jax.data.loader: batches depend on the step alone, and no worker is left behind or missed."""

import hashlib
import itertools
import multiprocessing
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2jax.data.loader import BatchSource, batch_digest, make_loader, row_digests, validation_rows
from k2jax.data.manifest import build_manifest
from k2jax.data.order import Order
from k2jax.data.store import Store
from k2jax.data.store_writer import StoreWriter
from k2jax.errors import ConfigError, RunError, StorageError

ROWS, LENGTH, STEPS = 8, 16, 24  # of the first stage
STAGES = [
    {
        "name": "short",
        "sequence_length": LENGTH,
        "rows_per_step": ROWS,
        "steps_per_chunk": 6,
        "chunks": 4,
        "mix": {"books": 2, "code": 1},
    },
    {
        "name": "long",
        "sequence_length": 4 * LENGTH,
        "rows_per_step": 4,
        "steps_per_chunk": 3,
        "chunks": 2,
        "mix": {"code": 1},
    },
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    draw = np.random.default_rng(0)
    stores = {}
    for name in ("code", "books", "unused"):
        path = tmp_path_factory.mktemp("stores") / name
        options = {"tokenizer_sha256": "ab" * 32, "vocab_size": 1000, "eos_id": 2}
        with StoreWriter(path, **options, shard_tokens=512, chunk_tokens=64) as writer:
            for i in range(40):
                writer.add(draw.integers(0, 1000, draw.integers(0, 80)), id=str(i), source=name)
            writer.finish(validation_fraction=0.2)
        stores[name] = Store.open(path)
    return stores


def make_order(stores, label_shift="next"):
    summaries = {name: store.summary() for name, store in stores.items()}
    return Order(build_manifest(stages=STAGES, stores=summaries, seed=1, label_shift=label_shift))


@pytest.fixture(scope="module")
def order(stores):
    return make_order(stores)


def load(order, stores, first_step=1, last_step=STEPS, label_shift="next", **options):
    options = {"label_shift": label_shift, "first_step": first_step, "last_step": last_step, **options}
    return list(make_loader(order, stores, **options))


@pytest.fixture(scope="module")
def all_steps(order, stores):
    """The first stage, read without threads or workers: what every other way must give."""
    return load(order, stores, threads=0)


def assert_same(found, expected):
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (step, batch), (_, other) in zip(found, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            assert batch[name].dtype == other[name].dtype and type(batch[name]) is np.ndarray
            np.testing.assert_array_equal(batch[name], other[name], err_msg=f"{name} of step {step}")


@pytest.mark.parametrize("label_shift", ["next", "inside"])
def test_batches_are_the_order_s_windows(stores, label_shift):
    """Row by row, in both stages: the window of the store that the order names."""
    order = make_order(stores, label_shift)
    names = sorted(stores)
    everything = {name: store.read([0], store.num_tokens)[0] for name, store in stores.items()}
    for stage in order.stages:
        length = stage.sequence_length + (label_shift == "next")
        batches = load(order, stores, stage.first_step, stage.last_step, label_shift)
        assert len(batches) == stage.last_step - stage.first_step + 1
        for step, batch in batches:
            assert batch["tokens"].dtype == np.int32 and batch["tokens"].shape == (
                stage.rows_per_step,
                length,
            )
            np.testing.assert_array_equal(batch["position"], order.positions(step))
            for tokens, subset, position in zip(
                batch["tokens"], batch["subset"], batch["position"], strict=True
            ):
                row = order.row(int(position))
                start = row.window * stage.sequence_length
                assert subset == row.subset
                np.testing.assert_array_equal(tokens, everything[names[subset]][start : start + length])


@pytest.mark.fault("F4")
@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_same_global_batch_for_any_number_of_hosts(order, stores, all_steps, hosts):
    """Contiguous shares and interleaved ones: put together they are the batch of one host, digest too.

    Seen red without the rows' own indices in the digest; without each host's own rows.
    """
    per_host = ROWS // hosts
    shares = [slice(h * per_host, (h + 1) * per_host) for h in range(hosts)]
    parts = [load(order, stores, local_rows=share) for share in shares]
    for i, (_, whole) in enumerate(all_steps):
        for name in whole:
            np.testing.assert_array_equal(np.concatenate([part[i][1][name] for part in parts]), whole[name])
        sums = [part[i][1]["digest"].sum(axis=0, dtype=np.uint32) for part in parts]
        assert batch_digest(sums) == batch_digest(whole["digest"])

    interleaved = [
        load(order, stores, last_step=3, local_rows=np.arange(h, ROWS, hosts)) for h in range(hosts)
    ]
    for i, (_, whole) in enumerate(all_steps[:3]):
        digests = np.concatenate([part[i][1]["digest"] for part in interleaved])
        assert batch_digest(digests) == batch_digest(whole["digest"])


@pytest.mark.fault("F4")
@pytest.mark.parametrize(("workers", "threads"), [(0, 1), (0, 4), (1, 0), (3, 2)])
def test_same_batches_for_any_number_of_workers(order, stores, all_steps, workers, threads):
    assert_same(load(order, stores, workers=workers, threads=threads), all_steps)


@pytest.mark.fault("F4")
@settings(max_examples=20, deadline=None)
@given(step=st.integers(1, STEPS))
def test_resume_at_any_step(order, stores, all_steps, step):
    """The step number is the whole state."""
    assert_same(load(order, stores, first_step=step), all_steps[step - 1 :])


@pytest.mark.fault("F4")
def test_resume_with_workers_on_another_host_count(order, stores, all_steps):
    """From the middle, an odd number of steps for two workers, for the second of two hosts."""
    found = load(order, stores, first_step=STEPS - 4, workers=2, local_rows=slice(4, 8))
    expected = [(step, {name: array[4:] for name, array in batch.items()}) for step, batch in all_steps[-5:]]
    assert_same(found, expected)


def test_digest_notices_every_change(all_steps):
    """One changed token, two swapped rows, two swapped tokens: another digest."""
    tokens = all_steps[0][1]["tokens"]
    indices = np.arange(ROWS)
    digest = batch_digest(row_digests(indices, tokens))
    assert digest == batch_digest(all_steps[0][1]["digest"])

    swapped = tokens[[1, 0, *range(2, ROWS)]]
    changed = tokens.copy()
    changed[3, 5] ^= 1
    turned = tokens.copy()
    turned[2, :2] = turned[2, 1::-1]
    digests = [batch_digest(row_digests(indices, other)) for other in (tokens, swapped, changed, turned)]
    assert len(set(digests)) == 4
    shuffle = np.random.default_rng(0).permutation(ROWS)
    assert batch_digest(row_digests(indices[shuffle], tokens[shuffle])) == digest


def test_digest_is_as_documented():
    """Anyone can compute it without this code: SHA-256 of struct-packed rows, added up as 32-bit lanes."""
    tokens = np.array([[1, 2, 65535, 100_000], [5, 6, 7, 8]])
    found = row_digests(np.array([3, 11]), tokens)
    hashes = [
        hashlib.sha256(struct.pack("<Q4I", i, *row)).digest() for i, row in zip((3, 11), tokens, strict=True)
    ]
    lanes = [struct.unpack("<8I", digest) for digest in hashes]
    assert found.dtype == np.uint32 and found.tolist() == [list(row) for row in lanes]
    sums = [(a + b) % 2**32 for a, b in zip(*lanes, strict=True)]
    assert batch_digest(found) == struct.pack("<8I", *sums).hex()


def test_source_is_random_access_and_picklable(order, stores, all_steps):
    options = {"label_shift": "next", "first_step": 3, "last_step": 10}
    source = pickle.loads(pickle.dumps(BatchSource(order, stores, **options)))
    assert len(source) == 8
    for index in (7, 0, 3, 3):
        assert_same([(3 + index, source[index])], [all_steps[2 + index]])


@pytest.mark.fault("F5")
@pytest.mark.parametrize("workers", [0, 1])
def test_store_errors_reach_the_trainer(order, stores, workers):
    """A token outside the vocabulary: the store's own one-line error, also out of a worker."""
    small = {name: Store(store.path, {**store.info, "vocab_size": 900}) for name, store in stores.items()}
    with pytest.raises(ConfigError, match=r"store .*: token \d+ has id 9\d\d, outside the vocabulary of 900"):
        load(order, small, workers=workers)


def test_lost_store_reaches_the_trainer(order, stores):
    gone = {name: Store(store.path + "-gone", store.info) for name, store in stores.items()}
    with pytest.raises(StorageError, match="cannot read the store .*-gone"):
        load(order, gone)


def grain_workers():
    return [p for p in multiprocessing.active_children() if p.name.startswith("grain-process-prefetch")]


@pytest.mark.fault("F1")
def test_worker_killed(order, stores):
    """SIGKILL of a worker raises in the trainer; SIGTERM and SIGINT, meant for the trainer, do not harm it."""
    options = {"label_shift": "next", "first_step": 1, "last_step": STEPS, "workers": 2, "prefetch": 2}
    loader = make_loader(order, stores, **options)
    assert [next(loader)[0], next(loader)[0]] == [1, 2]  # one from each worker: both are up
    workers = grain_workers()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert next(loader)[0] == 3 and all(worker.is_alive() for worker in workers)
    os.kill(workers[0].pid, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(RunError, match=r"the loader failed before step \d+: .*exit code -9"):
        list(loader)
    assert time.monotonic() - begin < 10
    assert not grain_workers()


def test_closing_ends_the_workers(order, stores):
    """An iterator that is closed early leaves no process behind."""
    options = {"label_shift": "next", "first_step": 1, "last_step": STEPS, "workers": 1}
    loader = make_loader(order, stores, **options)
    next(loader)
    assert grain_workers()
    loader.close()
    assert not grain_workers()


TRAINER = """
import multiprocessing, pickle, sys, time
from k2jax.data.loader import make_loader

if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        order, stores = pickle.load(file)
    loader = make_loader(order, stores, label_shift="next", first_step=1, last_step=24, workers=2)
    next(loader)
    print(*(p.pid for p in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


@pytest.mark.fault("F2")
def test_workers_die_with_the_trainer(order, stores, tmp_path):
    """SIGKILL of the trainer: its workers, which nobody else would stop, are gone within 10 seconds.

    Seen red without the thread that ends a worker with its parent.
    """
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "data").write_bytes(pickle.dumps((order, stores)))
    trainer = subprocess.Popen(
        [sys.executable, "trainer.py", "data"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with trainer:
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(pids) == 2 and all(is_running(pid) for pid in pids)
        trainer.kill()
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid):
    """Whether the process exists and is not a zombie that its new parent has yet to reap."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("label_shift", ["next", "inside"])
def test_validation_rows_are_held_out(stores, label_shift):
    """Whole windows from the held-out tokens, evenly spaced, none of which training reads."""
    store = stores["code"]
    held_out = store.read([store.num_train_tokens], store.num_tokens - store.num_train_tokens)[0]
    length = LENGTH + (label_shift == "next")
    rows = validation_rows(store, LENGTH, label_shift, 1000)
    available = (len(held_out) - (label_shift == "next")) // LENGTH
    assert rows.dtype == np.int32 and rows.shape == (available, length)
    for window, row in enumerate(rows):
        np.testing.assert_array_equal(row, held_out[window * LENGTH : window * LENGTH + length])
    few = validation_rows(store, LENGTH, label_shift, 3)
    np.testing.assert_array_equal(few, rows[[0, available // 3, available * 2 // 3]])
    assert validation_rows(store, 10_000, label_shift, 3).shape == (0, 10_000 + (label_shift == "next"))


def test_training_reads_no_held_out_token(order, stores):
    """Over both stages, the last token of every row lies before the held-out ones."""
    for stage in order.stages:
        for position in range(stage.first_position, stage.stop_position):
            row = order.row(position)
            store = stores[sorted(stores)[row.subset]]
            assert (row.window + 1) * stage.sequence_length + 1 <= store.num_train_tokens


def test_steps_of_two_stages_are_two_loaders(order, stores):
    with pytest.raises(AssertionError):
        load(order, stores, first_step=STEPS, last_step=STEPS + 1)
    assert [
        step for step, _ in itertools.chain(load(order, stores), load(order, stores, STEPS + 1, STEPS + 6))
    ]
