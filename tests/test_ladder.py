"""The answer to a spike as a function of journal, order and checkpoints: runs played through without a model."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from test_journal import EPOCHS

from k2jax.data.epochs import check_journal, order_of
from k2jax.data.journal import in_force
from k2jax.errors import NumericsError
from k2jax.stability import ladder
from k2jax.stability.detect import Row, Spike


def rules(**changes):
    return ConfigDict({"most": 3, "how": "defer", "before": 1, "after": 1, "watch": 2} | changes)


def play(bad, every, rules):
    """(journal, {step: positions} of the run's line, and of each branch) where steps that read `bad` are spikes."""
    journal, read, branches, step = [], {}, [], 0
    order = order_of(EPOCHS, journal)
    while step < order.num_steps:
        step += 1
        read[step] = tuple(order.positions(step).tolist())
        if bad & set(read[step]):
            spike = Spike("skips", step, step, "played")
            journal.append(ladder.answer(spike, EPOCHS, journal, range(0, step, every), rules))
            step = journal[-1]["at_step"]
            branches.append(read)
            read = {n: positions for n, positions in read.items() if n <= step}
            order = order_of(EPOCHS, journal)
    return journal, read, branches


@settings(max_examples=40)
@given(
    bad=st.sets(st.integers(0, 129), max_size=4),
    every=st.integers(1, 6),
    how=st.sampled_from(("defer", "skip")),
    around=st.tuples(st.integers(0, 3), st.integers(1, 3)),
)
def test_every_run_ends_and_reads_no_row_twice(bad, every, how, around):
    """It ends without the bad rows, or says that it cannot; each row is read once or was taken out; the journal holds;
    and every step, of the run and of what it left, is found again by the entries that held when it was made."""
    try:
        journal, read, branches = play(bad, every, rules(how=how, before=around[0], after=around[1], most=9))
    except NumericsError as error:
        assert "did not help" in str(error)
        return
    check_journal(EPOCHS, journal)
    positions = [position for step in read.values() for position in step]
    assert len(positions) == len(set(positions)) and not bad & set(positions)
    skipped = {p for e in journal if e["how"] == "skip" for a, b in e["ranges"] for p in range(a, b)}
    assert set(positions) == set(range(130)) - skipped
    for line, known in zip([*branches, read], [*(journal[:i] for i in range(len(branches))), journal], strict=True):
        for step, expected in line.items():
            assert tuple(order_of(EPOCHS, in_force(known, step)).positions(step)) == expected


def spike(step):
    return Spike("skips", step, step + 1, "a test")


def test_it_goes_further_back_each_time():
    first = ladder.answer(spike(12), EPOCHS, [], [0, 5, 10], rules())
    assert (first["at_step"], first["ranges"], first["attempt"], first["branch"]) == (10, [[50, 65]], 1, 1)
    again = ladder.answer(spike(11), EPOCHS, [first], [0, 5, 10], rules())
    assert (again["at_step"], again["attempt"], again["branch"]) == (5, 2, 2), "before the first step taken out"
    assert again["ranges"] == [[40, 50], [65, 75], [75, 80]] or again["ranges"] == [[40, 50], [65, 80]]
    other = ladder.answer(spike(19), EPOCHS, [first], [0, 5, 10, 15], rules())
    assert (other["at_step"], other["attempt"]) == (15, 1), "beyond its watch: another one"


@pytest.mark.parametrize(
    "changes, checkpoints, said",
    [
        ({"most": 0}, [10], "stability.rollback.most=0"),
        ({}, [], "there is no checkpoint before it"),
        ({}, [12, 14], "there is no checkpoint before it"),
    ],
)
def test_what_cannot_be_answered_is_one_line(changes, checkpoints, said):
    with pytest.raises(NumericsError, match=said) as error:
        ladder.answer(spike(12), EPOCHS, [], checkpoints, rules(**changes))
    assert "\n" not in str(error.value) and "k2jax.doctor" in str(error.value)


def test_a_change_of_the_run_is_not_gone_back_behind():
    """The configuration changed after step 10: an epoch that had not begun could not be gone back to."""
    epochs = [*EPOCHS, EPOCHS[0]._replace(number=2, after_step=10, previous=EPOCHS[0].digest)]
    assert ladder.answer(spike(12), epochs, [], [0, 10], rules())["at_step"] == 10
    with pytest.raises(NumericsError, match="no checkpoint before it"):
        ladder.answer(spike(12), epochs, [], [0, 9], rules())


def test_it_has_helped_when_nothing_may_still_become_the_same_spike():
    entry = ladder.answer(spike(12), EPOCHS, [], [10], rules())  # watched up to step 15
    rows = [Row(step, 1.0, 1.0, step != 14, step == 14) for step in range(1, 21)]
    assert ladder.helped([entry], rows[:13], 8) is None, "watched still"
    assert ladder.helped([entry], rows[:16], 8) is None, "step 14 is in the window still"
    assert ladder.helped([entry], rows[:13] + rows[14:16], 8) == entry
    assert ladder.helped([entry, {"kind": "helped"}], rows, 1) is None, "said already"
    note = ladder.note_helped(entry, rows)
    assert (note["kind"], note["at_step"], note["branch"]) == ("helped", 20, 1)
    assert ladder.helped([], rows, 8) is None


def test_each_step_without_an_update_is_noted_once_and_again_after_a_roll_back():
    rows = [Row(1, 1.0, 1.0, True, False), Row(2, 9.0, 1.0, False, True), Row(3, math.nan, 1.0, False, False)]
    rows.append(Row(4, 9.0, 1.0, True, True))  # stability.skip is off: it made an update
    first = ladder.without_update([], rows)
    assert [(entry["kind"], entry["at_step"]) for entry in first] == [("no_update", 2), ("no_update", 3)]
    assert "above a limit" in first[0]["why"] and "loss nan" in first[1]["why"] and "not finite" in first[1]["why"]
    assert ladder.without_update(first, rows) == [], "of a resume, which reads the same rows"
    assert [e["at_step"] for e in ladder.without_update(first[:1], rows)] == [3], "killed between the two"
    back = ladder.answer(spike(12), EPOCHS, [], [10], rules())
    assert ladder.without_update([*first, back], rows) == [], "what is before it was not made again"
    later = [*rows, Row(11, 9.0, 1.0, False, True)]
    of_later = ladder.without_update(first, later)
    assert [entry["at_step"] for entry in of_later] == [11]
    assert ladder.without_update([*first, *of_later, back], later)[0]["at_step"] == 11, "made again, of other data"


def test_pins_are_what_may_be_gone_back_to():
    entry = {"kind": "rollback", "at_step": 3}
    assert ladder.to_pin([entry], [7, 12], [2, 5, 10, 11]) == {3, 5, 11}
    assert ladder.to_pin([], [1], [2, 5]) == set()
