"""A shuffle gives each partition what was written to it, in the writers' order, whatever stages lie between; it keeps
few files open; what is damaged is one error that names the file.
"""

import os
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("datatrove")
from k2jax.errors import StorageError  # noqa: E402
from k2jax.prepare import shuffle  # noqa: E402
from k2jax.prepare.shuffle import Shuffle  # noqa: E402


def run(one: Shuffle, written: list[list[tuple[int, bytes]]]) -> list[bytes]:
    """What each partition gives, once writers and the stages behind them have run, in any order."""
    for rank in random.sample(range(one.writers), one.writers):
        with one.writer(rank) as out:
            for partition, data in written[rank]:
                out.add(partition, data)
    for stage in one.stages("x"):
        for rank in random.sample(range(stage.tasks), stage.tasks):
            stage.function(rank)
    return [b"".join(one.read(partition)) for partition in range(one.partitions)]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_partition_gets_its_own_in_order(tmp_path_factory, data):
    sizes = {name: data.draw(st.integers(1, 7)) for name in ("FAN", "SLOTS", "OPENS")}
    one = Shuffle(tmp_path_factory.mktemp("x"), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)))
    parts = st.lists(st.tuples(st.integers(0, one.partitions - 1), st.binary(max_size=9)), max_size=12)
    written = [data.draw(parts) for _ in range(one.writers)]
    expected = defaultdict(bytes)
    for partition, piece in (pair for task in written for pair in task):
        expected[partition] += piece
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (sizes | {"RUN_BYTES": data.draw(st.sampled_from([1, 500, 1 << 20])), "BUFFER": 7}).items():
            patch.setattr(shuffle, name, value)
        found = run(one, written)
    assert found == [expected[partition] for partition in range(one.partitions)]


def test_records_are_dealt_out_in_their_order(tmp_path):
    dtype = np.dtype([("key", "<u8"), ("number", "<u4")])
    records = np.zeros(10_000, dtype)
    records["key"], records["number"] = np.random.default_rng(0).integers(0, 1 << 60, 10_000), np.arange(10_000)
    one = Shuffle(tmp_path, 1, 7)
    with one.writer(0) as out:
        out.add_records(records["key"] % 7, records)
    for partition in range(7):
        assert one.read_records(partition, dtype).tolist() == records[records["key"] % 7 == partition].tolist()


def test_few_files_are_open_and_few_are_opened(tmp_path, monkeypatch):
    """300 writers to 330 partitions, by FAN=20: all stages, each with at most 20 files and some open."""
    monkeypatch.setattr(shuffle, "FAN", 20)
    monkeypatch.setattr(shuffle, "SLOTS", 50)
    most, opened, real = 0, 0, open

    def counted(*args, **kwargs):
        nonlocal most, opened
        file = real(*args, **kwargs)
        opened += 1
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
        return file

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("builtins.open", counted)
    one = Shuffle(tmp_path, 300, 330)
    found = run(one, [[(rank, b"%d " % rank)] for rank in range(300)])
    assert found == [b"%d " % partition if partition < 300 else b"" for partition in range(330)]
    assert most < 20 + 5
    # each writer's file twice, each of 15 groups once and by each of 20 ranges, each range's once and by its partitions
    assert opened <= 300 * 2 + 15 * 21 + 20 + 330


def test_what_is_opened_grows_as_the_tasks():
    """Of TxT360's numbers, and of a hundred smaller ones: never as tasks times partitions."""
    for writers in (1, 16, 300, 512, 513, 8_000, 100_448):
        for partitions in (1, 40, 300, 800, 4_096, 5_000, 40_000, 100_448):
            one = Shuffle(Path("x"), writers, partitions)
            files, ranges = one._groups, one._slots if one._range > 1 else 0
            read = ranges * files + partitions if ranges else partitions * files
            assert read + writers * (files < writers) <= 65 * (writers + partitions)
            assert files <= 512 and ranges <= 512 and one._range <= 8_192


@pytest.mark.parametrize("stage", ["written", "group", "split"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped", "index"])
def test_a_damaged_file_is_named(stage, damage, tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "FAN", 1000 if stage == "written" else 3)
    monkeypatch.setattr(shuffle, "SLOTS", 2 if stage == "split" else 1000)  # and many OPENS
    one = Shuffle(tmp_path, 5, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "RUN_BYTES", 400)
        run(one, [[(partition, b"some bytes") for partition in range(8)]] * 5)
    path = sorted(tmp_path.glob("*.runs" if stage == "written" else f"{stage}/*.runs"))[0]
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        flipped = bytes([data[30] ^ 1])
        path.write_bytes(
            {"empty": b"", "cut": data[:-9], "flipped": data[:30] + flipped + data[31:], "index": data[:-30]}[damage]
        )
    with pytest.raises(StorageError, match=f"{path.name} cannot be read .*: prepare again with --redo=STAGE"):
        for partition in range(8):
            list(one.read(partition))


def test_a_task_that_fails_leaves_nothing(tmp_path):
    one = Shuffle(tmp_path, 1, 1)
    with pytest.raises(RuntimeError), one.writer(0) as out:
        out.add(0, b"half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
