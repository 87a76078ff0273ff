"""The goodput clock and its sums: causes are the wall time, whatever launches, kills and clocks did."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2jax.errors import ConfigError
from k2jax.run import goodput
from k2jax.training import clock as clocks
from k2jax.training.launch import Launch


def record(began=0.0, start=5.0, steps=(), from_step=0, open_=("step", 0.0), ended="done", again=False, **causes):
    """Of a launch that made `steps`, {step: seconds}, with a mark at each."""
    marks, spent = [[from_step, 0.0, 0.0]], 0.0
    for step, seconds in dict(steps).items():
        spent += seconds
        marks.append([step, spent, 0.0])
    causes = {"start": start, "step": spent, **causes}
    return {
        "began": began, "seconds": sum(causes.values()) + open_[1], "again": again, "step": marks[-1][0],
        "causes": causes, "open": list(open_), "marks": marks, "ended": ended,
    }  # fmt: skip


def test_a_resume_loses_what_came_after_its_checkpoint():
    """Killed at step 25 and 2 s into the next, resumed from 20; half of the time to it is not known to be down."""
    first = record(steps={10: 10.0, 20: 10.0, 25: 6.0}, open_=("step", 2.0), ended=None)
    second = record(began=33.0 + 90.0, steps={30: 10.0}, from_step=20)
    found = goodput.add_up([first, second])
    known = {"step": 30.0, "run again": 8.0, "start": 10.0, "down": 30.0, "unknown": 60.0}
    assert found.seconds | known == found.seconds
    assert found.wall_s == 138.0 == sum(found.seconds.values())
    assert (found.launches, found.last_step) == (2, 30)
    # From an older checkpoint than the newest: all after it is lost, and only once.
    third = record(began=138.0, steps={20: 9.0}, from_step=10)
    found = goodput.add_up([first, second, third])
    assert found.seconds["step"] == 10.0 + 9.0 and found.seconds["run again"] == 8.0 + 20.0


def test_a_roll_back_loses_the_branch():
    first = record(steps={10: 10.0, 20: 12.0}, ended="rolled back")
    second = record(began=27.0, start=1.0, steps={20: 10.0}, from_step=10, again=True)
    found = goodput.add_up([first, second])
    assert (found.seconds["rolled back"], found.seconds["run again"], found.seconds["step"]) == (12.0, 0.0, 20.0)
    assert found.launches == 1


def test_between_two_marks_time_is_shared():
    first = record(steps={100: 50.0}, ended=None)
    found = goodput.add_up([first, record(began=55.0, from_step=80, steps={})])
    assert found.seconds["step"] == pytest.approx(40.0) and found.seconds["run again"] == pytest.approx(10.0)


def test_launches_without_a_record_are_unknown():
    """Before the first, of an older k2jax, and between two: from when they are known to have begun."""
    records = [record(began=1000.0, steps={10: 95.0}), record(began=2000.0, from_step=10)]
    found = goodput.add_up(records, launches=[400.0, 1001.0, 1500.0, 2001.0])
    assert (found.seconds["unknown"], found.seconds["down"]) == (600.0 + 500.0, 400.0)


def test_a_clock_that_was_set_back_is_told():
    found = goodput.add_up([record(began=1000.0, steps={10: 95.0}), record(began=900.0, from_step=10)])
    assert found.seconds["down"] == found.seconds["unknown"] == 0 and found.overlap_s == 200.0
    assert found.wall_s == 105.0 and "count twice" in goodput.table(found, 0.0)


LAUNCHES = st.lists(
    st.tuples(
        st.floats(-50, 500),  # gap before
        st.integers(0, 8),  # resumed so many tens of steps before the newest
        st.lists(st.floats(0, 100), max_size=5),  # seconds of ten steps each
        st.floats(0, 20),  # in the open step
        st.booleans(),  # ended in order
        st.booleans(),  # after a roll-back
        st.floats(0, 30),  # that nobody told
    ),
    min_size=1,
    max_size=6,
)


@given(LAUNCHES)
def test_causes_are_the_wall_time(launches):
    records, at, last, overlap = [], 1000.0, 0, 0.0
    kept = {}  # {end of ten steps: seconds}, as a person would do it
    for gap, back, tens, open_s, in_order, again, untold in launches:
        from_step = max(0, last - 10 * back)
        steps = {from_step + 10 * (i + 1): seconds for i, seconds in enumerate(tens)}
        kept = {step: s for step, s in kept.items() if step <= from_step} | steps
        one = record(at + gap, 1.0, steps, from_step, ("step", open_s), "done" if in_order else None, again)
        one["seconds"] += untold
        overlap += max(0.0, -gap) if records else 0.0
        records.append(one)
        at, last = one["began"] + one["seconds"], one["step"]
    found = goodput.add_up(records)
    assert min(found.seconds.values()) > -1e-6
    assert found.wall_s == pytest.approx(at - records[0]["began"] + overlap)
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s)
    assert found.seconds["step"] == pytest.approx(sum(kept.values()) + launches[-1][3])
    assert found.seconds["unknown"] + 1e-6 >= sum(launch[-1] for launch in launches)
    assert found.overlap_s == pytest.approx(overlap)


def test_damaged_lines_are_left_out_and_told(tmp_path):
    good = json.dumps(record(began=time.time(), steps={10: 1.0})).encode()
    lines = [b"{", b"[1]", b"\xff", good.replace(b'"again": false', b'"again": 1'), good.replace(b"1.0", b"-1.0")]
    lines += [good.replace(b'"start"', b'"lunch"'), good.replace(b"5.0", b"NaN"), good, good[:50]]
    (tmp_path / "goodput.jsonl").write_bytes(b"\n".join(lines))
    found = goodput.read_goodput(tmp_path)
    assert found.damaged == 8 and found.launches == 1 and "8 damaged" in goodput.table(found, time.time())
    (tmp_path / "goodput.jsonl").write_bytes(b"{")
    with pytest.raises(ConfigError, match="is damaged"):
        goodput.read_goodput(tmp_path)
    with pytest.raises(ConfigError, match="is not there"):
        goodput.read_goodput(tmp_path / "nowhere")


@pytest.fixture
def hands(monkeypatch):
    """The clocks of the trainer, moved by hand: `hands(3.0)`."""
    now = [1000.0]

    def move(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0] + 1e9)
    return move


def test_the_clock_tells_phases_apart(hands, tmp_path):
    """What is compiled in the phase "data", a step without update, and an hour of Ctrl-Z in the middle of a step."""
    launch, told = Launch(2.0), []
    clock = clocks.Clock(launch, told.append)
    clock._thread = type("NoThread", (), {"start": lambda _: None, "is_alive": lambda _: False})()
    with clock:
        hands(3), clock.at("restore"), clock.keep(tmp_path)
        hands(4), clock.goes_on_from(0), clock.at("data")
        hands(1), launch.compiles(), hands(20)
        assert goodput.parse(json.dumps(clock._record()).encode())["causes"]["compile"] == 20
        launch.compiled(False), hands(2)
        row = {}
        for step, seconds in ((1, 5), (2, 6), (3, 7)):
            clock.at("step"), hands(20), clock.beside("check", 20), clock.stepped(step, row), hands(seconds)
            row = {"step": step, "applied": step != 2}
            if step == 3:
                clock._tick(time.perf_counter()), hands(3600), clock._tick(time.perf_counter())
            clock.at("data"), hands(1)
        clock.at("save"), hands(9), clock.at("evaluate"), hands(10)
    found = goodput.read_goodput(tmp_path)
    known = {"start": 5, "restore": 4, "compile": 20, "data": 6, "save": 9, "evaluate": 10, "skipped": 6, "check": 60}
    assert found.seconds | known == found.seconds
    assert found.seconds["unknown"] == 3600 - clocks.TICK_S and found.seconds["step"] == 12 + clocks.TICK_S
    assert found.wall_s == 3732 and found.ended == "done" and found.last_step == 3
    assert told == [goodput.describe(found)] and told[0].startswith("goodput 0.5% of 1 h 2 min in 1 launch: ")


def test_it_is_told_every_hour(hands, tmp_path):
    told = []
    clock = clocks.Clock(Launch(), told.append)
    with clock:
        clock.keep(tmp_path), clock.goes_on_from(0)
        for step in range(1, 301):
            clock.at("step"), clock.stepped(step, {}), hands(29), clock.at("data"), hands(1)
        assert len(told) == 2


def test_a_full_disk_costs_the_record_alone(tmp_path, monkeypatch):
    told = []

    def full(*_):
        raise OSError(28, "No space left on device", "goodput.jsonl")

    monkeypatch.setattr(clocks.files, "write_bytes", full)
    with clocks.Clock(Launch(), told.append) as clock:
        clock.keep(tmp_path)
        clock.at("step")
    assert len([line for line in told if "not kept" in line]) == 1
