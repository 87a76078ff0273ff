"""The journal: written whole, read back, damage named; no decision takes away what was read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_order import tiny_manifest

from k2jax.data.epochs import check_journal, decide, new_epoch, write_epoch
from k2jax.data.journal import append_entry, read_journal
from k2jax.data.order import Order
from k2jax.errors import ConfigError, StorageError

TOOL = Path(__file__).parents[1] / "tools" / "journal.py"
# 20 steps of 5 rows in 10 chunks, then 6 steps of 5 rows.
MANIFEST = tiny_manifest([(10, 2, 5, {"a": (30, 1), "b": (30, 2)}), (3, 2, 5, {"a": (30, 1)})])


EPOCHS = [new_epoch([], run="0" * 32, after_step=0, config={}, manifest=MANIFEST)]


def decision(journal, kind, positions, at_step):
    return decide(EPOCHS, journal, kind=kind, ranges=[positions], at_step=at_step, by="me", why="a spike")


def test_entries_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "journal.jsonl"
    assert read_journal(path) == []
    journal = []
    for kind, positions, at_step in (("defer", (40, 50), 8), ("skip", (60, 65), 9)):
        journal.append(decision(journal, kind, positions, at_step))
        append_entry(path, journal[-1])
    append_entry(path, {"kind": "allow_drift", "why": "ünïcode\nand a line end"})
    assert read_journal(path)[:2] == journal and len(path.read_bytes().splitlines()) == 3
    assert journal[0]["positions"] == [40, 50] and journal[0]["time"].endswith("+00:00")


@pytest.mark.parametrize(
    "line", ["", "\xff", "{", "[1]", "{}", '{"kind": 3}', '{"kind": "skip"}',
             '{"kind": "skip", "positions": [1]}', '{"kind": "skip", "positions": [0, 5]}',
             '{"kind": "skip", "positions": [0, 5], "epoch": 1, "at_step": 0, "order_before": ""}',
             '{"kind": "defer", "positions": [1, 2.5]}', '{"kind": "defer", "positions": [0, true]}']
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"kind": "allow_drift"}\n' + line.encode("latin-1") + b'\n{"kind": "allow_drift"}\n')
    with pytest.raises(ConfigError, match=r"journal\.jsonl, line 2( is damaged)?: ") as error:
        read_journal(path)
    assert "\n" not in str(error.value)


def test_a_line_cut_off_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    for tail in (b'{"kind": "al', b'{"kind": "allow_drift"}'):
        path.write_bytes(b'{"kind": "allow_drift"}\n' + tail)
        with pytest.raises(ConfigError, match=r"journal\.jsonl, line 2: cut off"):
            read_journal(path)


def test_a_journal_that_cannot_be_written_or_read_is_a_storage_error(tmp_path):
    for path in ("/dev/full", tmp_path, tmp_path / "absent" / "journal.jsonl"):
        with pytest.raises(StorageError, match="cannot write the journal"):
            append_entry(path, {"kind": "allow_drift"})
    with pytest.raises(StorageError, match="cannot read the journal"):
        read_journal(tmp_path)


def test_k2s_two_decisions_in_the_order_in_which_they_were_taken():
    first = decision([], "defer", (20, 30), at_step=4)  # chunk 2, after steps 1 to 4
    second = decision([first], "defer", (50, 60), at_step=8)  # chunk 5, now at steps 9 and 10
    order = Order(MANIFEST, [first, second])
    read = [int(order.positions(1 + 2 * i)[0]) // 10 for i in range(10)]
    assert read == [0, 1, 3, 4, 6, 7, 8, 9, 2, 5]
    assert second["order_before"] == first["order_after"] and second["order_after"] == order.digest()
    assert first["order_before"] == Order(MANIFEST).digest()


decisions = st.lists(
    st.tuples(st.sampled_from(["skip", "defer"]), st.integers(0, 25), st.integers(1, 8), st.integers(0, 26)),
    max_size=8,
)


@given(decisions)
def test_steps_up_to_the_decision_read_what_they_read(wanted):
    journal = []
    for kind, first, count, at_step in wanted:
        before = Order(MANIFEST, journal)
        positions = (5 * first, 5 * (first + count))
        steps = [before.step_of_position(p) for p in range(*positions) if p < 130]
        try:
            journal.append(decision(journal, kind, positions, at_step))
        except ConfigError as error:
            if "has read some" in str(error):
                assert min(steps) <= at_step
            continue
        assert min(steps) > at_step
        after = Order(MANIFEST, journal)
        for step in range(1, at_step + 1):
            assert before.positions(step).tolist() == after.positions(step).tolist()
            assert before.stage_of_step(step).index == after.stage_of_step(step).index
    check_journal(EPOCHS, journal)


@pytest.mark.parametrize(
    "positions, at_step, complaint",
    [((20, 30), 5, "step 5 has read some .* before step 5"), ((0, 20), 1, "step 1 has read"),
     ((20, 31), 0, "whole steps"), ((95, 105), 0, "ends at 100"), ((20, 30), 27, "steps are 1 to 26"),
     ((20, 30), -1, "steps are 1 to 26")],
)  # fmt: skip
def test_a_decision_that_does_not_fit_is_refused(positions, at_step, complaint):
    with pytest.raises(ConfigError, match=complaint):
        decision([], "defer", positions, at_step)


def test_an_edited_or_lost_line_or_another_manifest_is_found():
    journal = []
    for positions in ((20, 30), (50, 60), (70, 80)):
        journal.append(decision(journal, "defer", positions, 0))
    check_journal(EPOCHS, [*journal, {"kind": "abandon"}])
    check_journal(EPOCHS, [])
    edited = [journal[0], {**journal[1], "positions": [40, 50]}, journal[2]]
    first_lost, second_lost = journal[1:], journal[::2]
    for damaged, name in ((first_lost, "entry 1"), (second_lost, "entry 2"), (edited, "entry 2")):
        with pytest.raises(ConfigError, match=name):
            check_journal(EPOCHS, damaged)
    other = [EPOCHS[0]._replace(manifest={**MANIFEST, "seed": 9})]
    with pytest.raises(ConfigError, match="entry 1 was decided on data order"):
        check_journal(other, journal)
    with pytest.raises(ConfigError, match="no such epoch"):
        check_journal(EPOCHS, [{**journal[0], "epoch": 2}])


def run_tool(workdir, *arguments):
    command = [sys.executable, str(TOOL), "--workdir", str(workdir), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_tool_defers_steps_and_lists_them(tmp_path):
    write_epoch(tmp_path, EPOCHS[0])
    done = run_tool(tmp_path, "--defer", "5:6", "--steps", "--at-step", 4, "--why", "a spike", "--by", "Ada")
    assert done.returncode == 0, done.stderr
    assert "positions 20:30 written: 26 steps" in done.stdout
    [entry] = read_journal(tmp_path / "journal.jsonl")
    assert (entry["kind"], entry["positions"], entry["by"], entry["at_step"]) == ("defer", [20, 30], "Ada", 4)

    refused = run_tool(tmp_path, "--skip", "0:5", "--at-step", 4)
    assert refused.returncode == 78 and "step 1 has read" in refused.stderr
    split = run_tool(tmp_path, "--skip", "4:5", "--steps", "--at-step", 0)  # 4 reads chunk 1, 5 chunk 3
    assert split.returncode == 78 and "do not read one range" in split.stderr
    listed = run_tool(tmp_path, "--list")
    assert "defer 20:30 by Ada: a spike" in listed.stdout and "1 entries, 26 steps" in listed.stdout


def test_the_tool_names_a_missing_run_and_a_damaged_journal(tmp_path):
    missing = run_tool(tmp_path, "--list")
    assert missing.returncode == 78 and "no epochs/0001.json" in missing.stderr
    write_epoch(tmp_path, EPOCHS[0])
    (tmp_path / "journal.jsonl").write_text(json.dumps({"no": "kind"}) + "\n")
    damaged = run_tool(tmp_path, "--skip", "0:5", "--at-step", 0)
    assert damaged.returncode == 78 and "line 1" in damaged.stderr
    assert damaged.stderr.count("\n") == 1
