"""What is said of a long stage's progress, and what it costs to know it."""

import sys
import threading
import time

import pytest

pytest.importorskip("datatrove")

from k2jax.prepare.engine import progress, said  # noqa: E402


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1200, 100_448, 1100, 354.8), "stage clean: 1,200 of 100,448 tasks, 3.1 a second, about 8 h 54 min left"),
        ((8, 12, 4, 600.0), "stage clean: 8 of 12 tasks, 24 an hour, about 10 min left"),
        ((20, 100, 20, 600.0), "stage clean: 20 of 100 tasks, 2 a minute, about 40 min left"),
        ((50, 90_000, 50, 3000.0), "stage clean: 50 of 90,000 tasks, 1 a minute, about 62 days 11 h left"),
        ((4, 4, 2, 1.0), "stage clean: 4 of 4 tasks, 2 a second, about 0 s left"),
        ((7, 12, 0, 39.0), "stage clean: 7 of 12 tasks, none of them in the last 39 s"),
    ],
)
def test_a_line_has_the_rate_of_this_attempt_and_the_time_left(arguments, expected):
    assert progress.line_of("clean", *arguments) == expected


def test_lines_come_where_there_is_no_terminal_ever_more_seldom_and_none_of_a_short_stage(tmp_path, capfd, monkeypatch):
    with progress.shown("clean", 3, tmp_path):
        (tmp_path / "00000").touch()
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.02)
    monkeypatch.setattr(progress, "PAUSE_S", 0.01)
    with progress.shown("clean", 3, tmp_path):
        (tmp_path / "00001").touch()
        found = ""
        while found.count("\n") < 3:
            found += capfd.readouterr().err
            time.sleep(0.01)
    assert found.startswith("stage clean: 2 of 3 tasks, ") and " left\n" in found


def test_what_a_task_of_this_process_prints_and_the_progress_are_apart(tmp_path, capfd, monkeypatch):
    """With one worker a task runs here, and its stderr is kept for the libraries that it calls."""
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.02)
    with progress.shown("clean", 3, tmp_path), said.kept(tmp_path / "said.json"):
        found = ""
        for _ in range(500):
            found += capfd.readouterr().err
            if "stage clean: 0 of 3 tasks" in found:
                break
            time.sleep(0.01)
    assert "stage clean: 0 of 3 tasks" in found and not (tmp_path / "said.json").exists()


def test_a_bar_stands_on_a_terminal_and_no_line(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "PAUSE_S", 0.01)
    with progress.shown("clean", 3, tmp_path):
        (tmp_path / "00000").touch()
        found = ""
        while "1/3" not in found:
            found += capfd.readouterr().err
            time.sleep(0.01)
    assert "clean:" in found and "stage clean" not in found


def test_looks_take_a_small_share_of_the_time_however_slow_they_are():
    for look_s in (0.0, 0.01, 0.3, 4.0):
        assert look_s / (look_s + progress.pause_after(look_s)) <= progress.SHARE
        assert progress.pause_after(look_s) >= progress.PAUSE_S
    assert threading.active_count() < 50 and progress.count(progress.Path("/nowhere")) == 0
