"""The data order: exact shares, epochs whole before repeats, lookup both ways, skip and defer."""

import hashlib
import math
import pickle
import runpy
import tracemalloc
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2jax.data.layout import chunk_counts
from k2jax.data.manifest import StoreSummary, build_manifest
from k2jax.data.order import Order
from k2jax.errors import ConfigError

BENCH = Path(__file__).parents[1] / "tools" / "bench" / "order.py"


def tiny_manifest(stages, seed=1):
    """A manifest of stages (chunks, steps_per_chunk, rows_per_step, {subset: (windows, repeats)})."""
    num_tokens = {name: 4 * windows + 1 for *_, mix in stages for name, (windows, _) in mix.items()}
    stores = {
        name: StoreSummary(f"stores/{name}", name, "0" * 64, 100, 2, tokens, tokens, 1)
        for name, tokens in num_tokens.items()
    }
    stages = [
        {"name": f"stage{i}", "sequence_length": 4, "rows_per_step": rows, "steps_per_chunk": steps,
         "chunks": chunks, "mix": {name: repeats for name, (_, repeats) in mix.items()}}
        for i, (chunks, steps, rows, mix) in enumerate(stages)
    ]  # fmt: skip
    return build_manifest(stages=stages, stores=stores, seed=seed, label_shift="next")


@st.composite
def manifests(draw):
    windows = draw(st.lists(st.integers(1, 60), min_size=1, max_size=5))
    repeats = st.sampled_from([0.1, 0.5, 1, 1 / 3, 3, 6])
    size = st.integers(1, 7)
    names = st.sets(st.integers(0, len(windows) - 1), min_size=1)
    stages = [
        (draw(size), draw(size), draw(size), {"dbeca"[i]: (windows[i], draw(repeats)) for i in draw(names)})
        for _ in range(draw(st.integers(1, 3)))
    ]
    return tiny_manifest(stages, draw(st.integers(0, 2**63)))


def stage_rows(order, stage):
    return order.rows(np.arange(stage.first_position, stage.stop_position))


@cache
def k2_manifest():
    return runpy.run_path(str(BENCH))["k2_manifest"]()


@cache
def k2_order():
    return Order(k2_manifest())


@pytest.mark.fault("F7")
@given(manifests())
def test_every_epoch_is_whole_before_a_window_repeats_and_find_is_the_inverse(manifest):
    order = Order(manifest)
    names = sorted(manifest["stores"])
    for plan, stage in zip(order.stages, manifest["stages"], strict=True):
        rows = stage_rows(order, plan)
        for subset in stage["subsets"]:
            index = names.index(subset["name"])
            mine = rows.subset == index
            epochs, windows = rows.epoch[mine], rows.window[mine]
            assert mine.sum() == subset["rows"]
            assert (epochs == np.arange(len(epochs)) // subset["windows"]).all()
            for epoch in np.unique(epochs):
                read = windows[epochs == epoch]
                assert len(set(read)) == len(read) and 0 <= read.min() and read.max() < subset["windows"]
            positions = plan.first_position + np.flatnonzero(mine)
            for window in range(subset["windows"]):
                assert order.find(plan.index, index, window) == positions[windows == window].tolist()
            assert order.find(plan.index, index, subset["windows"]) == []


@given(manifests())
def test_one_row_and_many_rows_agree(manifest):
    order = Order(manifest)
    positions = np.arange(order.num_positions)[::-1]
    many = np.stack(order.rows(positions), axis=1)
    assert many.dtype == np.int64
    assert many.tolist() == [list(order.row(p)) for p in positions.tolist()]
    assert order.row(np.int64(0)) == order.row(0)


@given(manifests())
def test_every_chunk_holds_every_subset_in_its_share(manifest):
    order = Order(manifest)
    names = sorted(manifest["stores"])
    for plan, stage in zip(order.stages, manifest["stages"], strict=True):
        chunks = stage_rows(order, plan).subset.reshape(plan.chunks, -1)
        for subset in stage["subsets"]:
            found = (chunks == names.index(subset["name"])).sum(1)
            exact = subset["rows"] / plan.chunks
            assert set(found) <= {math.floor(exact), math.ceil(exact)} and found.sum() == subset["rows"]


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=14), st.integers(1, 400))
def test_chunk_counts_are_rounded_shares_without_drift(rows, chunks):
    rows[0] += -sum(rows) % chunks
    counts = chunk_counts(np.array(rows), chunks)
    assert (counts.sum(1) == sum(rows) // chunks).all() and counts.sum(0).tolist() == rows
    exact = np.array(rows) / chunks
    assert (np.floor(exact) <= counts).all() and (counts <= np.ceil(exact)).all()
    drift = np.cumsum(counts, 0) - np.arange(1, chunks + 1)[:, None] * exact
    assert np.abs(drift).max() <= 1 + math.log2(chunks)


def test_repeats_lie_a_repeat_of_the_stage_apart():
    order = Order(tiny_manifest([(60, 10, 10, {"thrice": (1000, 3), "once": (3000, 1)})]))
    for window in range(1000):
        chunks = [position // 100 for position in order.find(0, 1, window)]
        assert len(chunks) == 3 and all(19 <= b - a <= 21 for a, b in pairwise(chunks))


def test_rows_of_a_chunk_are_shuffled_anew_in_each_epoch():
    order = Order(tiny_manifest([(2, 50, 100, {"a": (2500, 2), "b": (2500, 2)})]))
    rows = stage_rows(order, order.stages[0])
    read = list(zip(rows.subset, rows.window, strict=True))
    halves = [read[:5000], read[5000:]]
    assert sorted(halves[0]) == sorted(halves[1])
    assert sum(x == y for x, y in zip(*halves, strict=True)) < 10
    # Runs of one subset: 5000 fair tosses change sides 2500 times, standard deviation 35.
    assert abs((np.diff(rows.subset[:5000]) != 0).sum() - 2500) < 150
    assert abs(np.corrcoef(rows.window[:5000], np.arange(5000))[0, 1]) < 0.05


def test_seed_stage_and_subset_each_change_which_windows_meet_in_a_chunk():
    mix = {"a": (500, 1), "b": (500, 1)}
    order, other = (Order(tiny_manifest([(10, 10, 10, mix)] * 2, seed)) for seed in (1, 2))
    chunks = [
        [chosen.find(stage, subset, window)[0] // 100 % 10 for window in range(500)]
        for chosen, stage, subset in ((order, 0, 0), (order, 0, 1), (order, 1, 0), (other, 0, 0))
    ]
    off_diagonal = np.corrcoef(chunks)[~np.eye(4, dtype=bool)]
    assert np.abs(off_diagonal).max() < 0.2  # 4.5 standard deviations


def test_k2_size_needs_no_memory_to_speak_of():
    tracemalloc.start()
    order = Order(k2_manifest())
    order.rows(order.positions(338_760))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    assert order.num_steps == 360 * 941 + 20 * 831
    assert order.stages[0].stop_position == 691_070_400


def test_k2_order_has_exact_shares_far_repeats_and_answers_anywhere():
    manifest, order = k2_manifest(), k2_order()
    names = sorted(manifest["stores"])
    draw = np.random.default_rng(0)
    positions = draw.integers(0, order.num_positions, 2040)
    rows = order.rows(positions)
    for i, position in enumerate(positions[:300].tolist()):
        row = order.row(position)
        assert row == tuple(field[i] for field in rows)
        assert position in order.find(row.stage, row.subset, row.window)
    chunk = order.rows(np.arange(200 * 941 * 2040, 201 * 941 * 2040))
    for subset in manifest["stages"][0]["subsets"]:
        index, windows = names.index(subset["name"]), subset["windows"]
        assert abs((chunk.subset == index).sum() - subset["rows"] / 360) < 1
        for window in draw.integers(0, windows, 10):
            chunks = [position // (941 * 2040) for position in order.find(0, index, window)]
            assert len(chunks) in (subset["rows"] // windows, subset["rows"] // windows + 1)
            apart = 360 * windows / subset["rows"]
            assert all(abs(b - a - apart) < 1.01 for a, b in pairwise(chunks))


def test_the_order_of_a_manifest_never_changes():
    # If this fails, every run so far would be read in another order: raise manifest.FORMAT with the change.
    rows = np.stack(k2_order().rows(np.arange(0, k2_order().num_positions, 100_003)))
    digest = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
    assert digest == "11d411d3e98352eeabb76286a9f45dac1254ba9015c1409f0081be9c182cec44"


def test_a_hundred_thousand_segments_are_still_small_and_right():
    manifest = tiny_manifest([(100, 100, 100, {"tiny": (5, 5 * 10**4), "large": (750_000, 1)})])
    tracemalloc.start()
    order = Order(manifest)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    tiny = manifest["stages"][0]["subsets"][1]
    assert tiny["rows"] // tiny["windows"] > 40_000
    rows = order.rows(np.arange(300_000, 400_000))
    epochs = rows.epoch[rows.subset == 1]
    assert (np.diff(epochs) >= 0).all() and set(np.bincount(epochs - epochs[0])[1:-1]) == {5}
    found = order.find(0, 1, 3)
    assert len(found) in (tiny["rows"] // 5, tiny["rows"] // 5 + 1)
    assert {order.row(p)[1::2] for p in found[::1000]} == {(1, 3)}


def defer(a, b, kind="defer"):
    return {"kind": kind, "positions": [a, b]}


def test_k2s_chunks_160_and_186_move_to_the_end():
    chunk = 941 * 2040
    journal = [defer(160 * chunk, 161 * chunk), {"kind": "allow_drift"}, defer(186 * chunk, 187 * chunk)]
    order = Order(k2_manifest(), journal)
    read = [int(order.positions(1 + 941 * i)[0]) // chunk for i in range(360)]
    assert read == [*range(160), *range(161, 186), *range(187, 360), 160, 186]
    assert order.positions(358 * 941 + 1)[0] == 160 * chunk
    assert order.positions(360 * 941)[-1] == 187 * chunk - 1
    assert order.stages == k2_order().stages and order.digest() != k2_order().digest()
    assert (order.positions(360 * 941 + 1) == k2_order().positions(360 * 941 + 1)).all()


decisions = st.lists(
    st.tuples(st.sampled_from(["skip", "defer"]), st.integers(0, 2), st.integers(0, 48), st.integers(1, 30)),
    max_size=6,
)


@settings(max_examples=200)
@given(manifests(), decisions)
def test_skipped_is_never_read_deferred_is_read_last_and_the_rest_keeps_its_order(manifest, wanted):
    plain = Order(manifest)
    left = [[tuple(plain.positions(s)) for s in range(p.first_step, p.last_step + 1)] for p in plain.stages]
    journal = []
    for kind, i, first, count in wanted:
        plan = plain.stages[i % len(plain.stages)]
        steps = [tuple(plain.positions(s)) for s in range(plan.first_step, plan.last_step + 1)]
        steps = steps[first % len(steps) :][:count]
        entry = defer(int(steps[0][0]), int(steps[-1][-1]) + 1, kind)
        if not set(steps) <= set(left[plan.index]):
            with pytest.raises(ConfigError, match="skipped already"):
                Order(manifest, [*journal, entry])
            continue
        journal.append(entry)
        left[plan.index] = [s for s in left[plan.index] if s not in steps] + steps * (kind == "defer")

    order = Order(manifest, journal)
    sequence = [step for stage in left for step in stage]
    assert [tuple(order.positions(s)) for s in range(1, order.num_steps + 1)] == sequence
    assert [p.last_step - p.first_step + 1 for p in order.stages] == [len(stage) for stage in left]
    for s in range(1, order.num_steps + 1):
        plan = order.stage_of_step(s)
        assert plan.first_step <= s <= plan.last_step and plan.first_position <= sequence[s - 1][0]
    step_of = {p: s for s, step in enumerate(sequence, 1) for p in step}
    assert [order.step_of_position(p) for p in range(order.num_positions)] == [
        step_of.get(p) for p in range(order.num_positions)
    ]


@pytest.mark.parametrize(
    "positions, complaint",
    [((5, 20), "whole steps"), ((10, 25), "whole steps"), ((20, 20), "inside 0:200"),
     ((-10, 10), "inside 0:200"), ((150, 210), "inside 0:200"), ((90, 110), "'stage0' ends at 100"),
     ((30, 50), "skipped already")],
)  # fmt: skip
def test_a_range_that_does_not_fit_is_refused(positions, complaint):
    manifest = tiny_manifest([(2, 5, 10, {"a": (30, 1)}), (2, 5, 10, {"a": (30, 1)})])
    with pytest.raises(ConfigError, match=complaint):
        Order(manifest, [defer(40, 60, "skip"), defer(*positions)])


def test_steps_and_positions_beyond_the_run_are_refused():
    order = Order(tiny_manifest([(2, 5, 10, {"a": (30, 1)})]))
    for ask in (lambda: order.positions(0), lambda: order.positions(11), lambda: order.row(100),
                lambda: order.rows(np.array([0, -1])), lambda: order.step_of_position(100)):  # fmt: skip
        with pytest.raises(ConfigError, match="the run's (steps are 1 to 10|positions are 0 to 99)"):
            ask()


def test_the_digest_is_that_of_the_order_alone():
    manifest = tiny_manifest([(2, 5, 10, {"a": (30, 1)})])
    digest = Order(manifest).digest()
    moved = {**manifest, "stores": {"a": {**manifest["stores"]["a"], "path": "gs://elsewhere/a"}}}
    assert Order(moved).digest() == digest
    assert Order(manifest, [{"kind": "allow_drift"}]).digest() == digest
    assert Order(manifest, [defer(80, 90), defer(90, 100)]).digest() == digest  # puts all back where it was
    journals = [[], [defer(0, 10)], [defer(0, 10, "skip")], [defer(0, 10), defer(30, 40)]]
    digests = {Order({**manifest, "seed": seed}, journal).digest() for seed in (1, 2) for journal in journals}
    assert len(digests) == 8 and digest in digests


def test_an_order_survives_pickling():
    order = Order(k2_manifest(), [defer(0, 2040)])
    copy = pickle.loads(pickle.dumps(order))
    assert copy.digest() == order.digest() and copy.row(10**8) == order.row(10**8)
    assert len(pickle.dumps(order)) < 10**5
