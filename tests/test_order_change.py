"""The order of a run whose data change: the past stays, and what was not read is read once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_order import defer, tiny_manifest

from k2jax.data.chunks import checkpoint_steps, chunk_of_step, tokens_before
from k2jax.data.order import Order
from k2jax.errors import ConfigError

WINDOWS = {"a": 7, "b": 20, "c": 3, "d": 45}


@st.composite
def histories(draw):
    """Manifests of one seed and the same stores, of the same or more stages, and after which step each begins."""
    size = st.integers(1, 6)
    mix = st.dictionaries(st.sampled_from(sorted(WINDOWS)), st.sampled_from([0.5, 1, 3]), min_size=1)

    def stages():
        mixes = [{name: (WINDOWS[name], repeats) for name, repeats in draw(mix).items()} for _ in range(2)]
        return [(draw(size), draw(size), draw(size), mix) for mix in mixes]

    return [tiny_manifest(stages()) for _ in range(draw(st.integers(2, 4)))]


def rows_of(order, step):
    """(stage's name, subset's name, epoch, window) of each row that a step reads."""
    at = order.of_step(step)
    names = sorted(at.manifest["stores"])
    found = at.rows(at.positions(step))
    stage = at.stage_of_step(step).name
    assert [tuple(order.row(int(p))) for p in order.positions(step)] == [tuple(row) for row in zip(*found, strict=True)]
    return [(stage, names[s], int(e), int(w)) for s, e, w in zip(found.subset, found.epoch, found.window, strict=True)]


@settings(max_examples=150)
@given(histories(), st.data())
def test_no_window_is_read_twice_or_lost(manifests, data):
    """With defers before and after each change, too; rows are only missing where the last stage ends before them."""
    order, changes = None, []
    for manifest in manifests:
        journal, before = [], order
        if order is None:
            order = Order(manifest)
        else:
            if order.after_step == order.num_steps:
                break
            soon = min(order.after_step + 3, order.num_steps)
            after = data.draw(st.integers(order.after_step + 1, data.draw(st.sampled_from([soon, order.num_steps]))))
            changes.append(after)
            order = Order(manifest, (), before, after)
        if order.num_steps - order.after_step > 2 and data.draw(st.booleans()):
            plan = next(p for p in order.stages if p.last_step >= p.first_step)
            steps = plan.last_step - plan.first_step + 1
            first = data.draw(st.integers(0, 20)) % steps
            count = min(data.draw(st.integers(1, 9)), steps - first)
            journal = [defer(*(plan.first_position + plan.rows_per_step * n for n in (first, first + count)))]
            order = Order(manifest, journal, before, order.after_step)
        if before:
            for step in range(1, order.after_step + 1):
                assert rows_of(order, step) == rows_of(before, step)
            assert order.reads(order.after_step) == before.reads(order.after_step) != before.reads(order.after_step - 1)
            assert order.stage_of_step(order.after_step) == before.stage_of_step(order.after_step)

    steps = range(1, order.num_steps + 1)
    rows = {step: rows_of(order, step) for step in steps}
    assert [len(rows[step]) for step in steps] == [order.stage_of_step(step).rows_per_step for step in steps]
    # By position and step, there and back.
    for step in steps:
        positions = order.positions(step).tolist()
        assert [order.step_of_position(p) for p in positions] == [step] * len(positions)
    read = {}
    for step in steps:
        for stage, subset, epoch, window in rows[step]:
            read.setdefault((stage, subset), []).append((epoch, window))
    for (stage, subset), found in read.items():
        assert len(set(found)) == len(found), f"{subset} of {stage}: a window twice in an epoch"
        epochs = np.bincount([epoch for epoch, _ in found], minlength=1)
        assert (epochs[:-1] <= WINDOWS[subset]).all()
    # A stage that was read to its end by the last manifest that has it leaves no gap in what its mix still asks for.
    last = order.manifest["stages"]
    for i, plan in enumerate(order.stages):
        if plan.last_step < plan.first_step:
            continue
        for subset in last[i]["subsets"]:
            found = read.get((plan.name, subset["name"]), [])
            epochs = np.bincount([epoch for epoch, _ in found], minlength=1)
            missing = sum(WINDOWS[subset["name"]] - epochs[:-1])
            assert missing == 0 or owed(order, plan, subset["name"]) >= missing
    # Chunks run on, and each lies under one manifest.
    chunks = [chunk_of_step(order, step) for step in steps]
    assert chunks == sorted(chunks) and set(chunks) == set(range(1, len(set(chunks)) + 1))
    ends = [step for step in steps if step == order.num_steps or chunks[step] != chunks[step - 1]]
    assert checkpoint_steps(order) == ends and set(changes) <= {*ends} | {c for c in changes if c >= order.num_steps}
    assert tokens_before(order, order.num_steps + 1) == sum(len(r) * 4 for r in rows.values())


def owed(order, plan, name):
    """Rows of a subset that the stage had still to read when it ended: it went on in a smaller share."""
    streams = {key[2]: stream for key, stream in order.streams(plan.last_step).items() if key[1] == plan.index}
    return len(streams[name].left)


def test_rows_left_behind_stay_so_through_several_changes():
    """Chunks of 20 rows become chunks of 2, twice within the first: all 40 rows are read, each once."""
    long, short = (tiny_manifest([(40 // steps, steps, 1, {"d": (45, 1)})]) for steps in (20, 2))
    order = Order(short, (), Order(short, (), Order(long), 5), 6)
    rows = [row for step in range(1, 41) for row in rows_of(order, step)]
    assert order.num_steps == 40 and len(set(rows)) == 40


def test_a_stage_goes_on_or_is_over_by_the_new_manifest():
    """Longer, shorter, over, and gone; the learning rate's steps are the whole stage's."""
    stages = [(4, 5, 2, {"a": (7, 1)}), (2, 5, 2, {"b": (20, 1)})]
    old = Order(tiny_manifest(stages))
    longer = Order(tiny_manifest([(6, 5, 2, {"a": (7, 1)}), stages[1]]), (), old, 20)
    assert [(p.first_step, p.done, p.num_steps) for p in longer.stages] == [(21, 20, 30), (31, 0, 10)]
    bigger = Order(tiny_manifest([(4, 5, 3, {"a": (7, 1)}), stages[1]]), (), old, 7)
    assert [(p.first_step, p.done, p.num_steps) for p in bigger.stages] == [(8, 7, 20), (21, 0, 10)]
    over = Order(tiny_manifest([(1, 5, 2, {"a": (7, 1)}), stages[1]]), (), old, 7)
    assert [(p.first_step, p.last_step) for p in over.stages] == [(8, 7), (8, 17)]
    assert over.find(0, 0, 3) == []
    other = tiny_manifest(stages)
    other["stages"][0]["name"] = "another"
    with pytest.raises(ConfigError, match="stands in stage 'stage0', after step 7, and the new stages are another"):
        Order(other, (), old, 7)
    assert len({o.digest() for o in (old, longer, bigger, over, Order(tiny_manifest(stages), (), old, 7))}) == 5


def test_another_store_begins_and_the_same_goes_on():
    """A subset whose content is another one is read from its start; the others go on."""
    stages = [(4, 5, 2, {"a": (7, 1), "b": (20, 1)})]
    old, new = Order(tiny_manifest(stages)), tiny_manifest(stages)
    new["stores"]["a"]["root_digest"] = "another"
    rows = [row for step in range(6, 11) for row in rows_of(Order(new, (), old, 5), step)]
    before = {row for step in range(1, 6) for row in rows_of(old, step)}
    assert {row for row in rows if row[1] == "a"} & before
    assert not {row for row in rows if row[1] == "b"} & before
