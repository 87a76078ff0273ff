"""The doctor's pure parts: which series left its range, what changed, repeated n-grams, and the verdict on evidence."""

import json
import random

import numpy as np
import pytest
from ml_collections import ConfigDict

from k2jax import config as configuration
from k2jax.data.epochs import new_epoch
from k2jax.doctor import examine
from k2jax.stability import telling
from k2jax.stability.changes import changes
from k2jax.stability.crossing import crossings, layers, series_of
from k2jax.stability.repeats import Repeat, repeats
from k2jax.stability.verdict import is_unusual, verdicts

RULES = configuration.base().stability


def rows_of(number, seed=0, **more):
    """Of a run that goes well: a loss that falls, norms that are noisy."""
    draw = random.Random(seed)
    return [
        {
            "step": step,
            "loss": 2 + 4 * 0.9**step + draw.gauss(0, 0.01),
            "grad_norm": 0.3 * draw.lognormvariate(0, 0.1),
            "logit": 20 + draw.gauss(0, 0.5),
            "log_z": draw.gauss(0, 0.1),
            "update_norm/q": 0.01 * draw.lognormvariate(0, 0.05),
            "param_norm/q": 5.0,
            "lr": 1e-3,
            "applied": True,
            "outlier": False,
            "host_memory_peak_bytes": step**9,
            "tokens_per_s_per_device": step**9,
            "data_wait_s": step**9,
            **more,
        }
        for step in range(1, number + 1)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_a_clean_run_leaves_no_range(seed):
    rows = rows_of(300, seed)
    assert [one for step in range(1, 301, 7) for one in crossings(rows, step, RULES)] == []


def test_the_series_that_left_first_is_first():
    """A logit that grows for 30 steps, an update for 3, the loss at the end; a clock and a count are no series."""
    rows = rows_of(300)
    for row in rows[269:]:
        row["logit"] += 3 * (row["step"] - 265)
    for row in rows[296:]:
        row["update_norm/q"] *= 30
    rows[299]["loss"] += 1
    found = crossings(rows, 300, RULES)
    assert [one.series for one in found] == ["logit", "update_ratio/q", "loss"]
    assert [(one.lead, one.last) for one in found[1:]] == [(3, 300), (0, 300)] and 20 <= found[0].lead <= 30
    assert found[2].limit < 2.2 and found[2].median == pytest.approx(2, abs=0.05)
    assert examine(rows, 300, RULES)["at"] == 300 and examine(rows, 299, RULES)["verdict"]["cause"] == "nothing unusual"


def test_a_jump_early_in_a_run_is_seen():
    """The loss is at what it was ten steps before, which it has long left."""
    rows = rows_of(22)
    assert rows[11]["loss"] > 3
    rows[21]["loss"] = 3.0
    assert [one.series for one in crossings(rows, 22, RULES)] == ["loss"]


def test_what_is_not_finite_has_left_and_what_is_absent_has_not():
    rows = rows_of(50)
    rows[-1] |= {"loss": None, "loss/web": None, "targets/web": 0, "loss/code": None, "targets/code": 8, "logit": None}
    assert [one.series for one in crossings(rows, 50, RULES)] == ["loss", "loss/code"]
    assert "loss/code" in series_of(rows[-1]) and not {"loss/web", "logit"} & series_of(rows[-1]).keys()
    rows[-1] |= {"loss": float("nan")}
    found = examine(rows, 50, RULES)
    assert (found["verdict"]["cause"], found["verdict"]["confidence"]) == ("numerics (not finite)", "likely")
    assert json.loads(telling.as_json(found))["crossings"][0]["value"] is None


def test_a_skipped_step_has_no_small_update():
    row = {"step": 1, "update_norm": 0.0, "update_ratio": 0.0, "param_norm": 1.0, "applied": False}
    assert series_of(row) == {"param_norm": 1.0}
    assert series_of({**row, "applied": True, "update_ratio": 0.5})["update_ratio"] == 0.5


def test_layers_that_grew():
    rows = rows_of(20)
    rows[9]["layers"] = {"grad_norm/q": [1.0, 1.0, 1.0]}
    rows[19]["layers"] = {"grad_norm/q": [1.0, 40.0, 2.0]}
    found = layers(rows, 20)
    assert [(one.layer, one.value, one.step) for one in found] == [(1, 40.0, 10), (2, 2.0, 10)]
    assert layers(rows, 15) == [] == layers(rows, 10)


# ---- repeated n-grams ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [1, 2, 7, 13])
def test_repeats_are_found_from_32_on(period):
    draw = np.random.default_rng(0)
    rows = draw.integers(0, 30_000, (4, 2049))
    gram = draw.permutation(30_000)[:period]
    rows[1, 100 : 100 + 32 * period] = np.tile(gram, 32)
    rows[2, 100 : 100 + 31 * period] = np.tile(gram, 31)
    assert repeats(rows) == [Repeat(1, period, 32, 100)]
    assert repeats(rows[:, : 20 * period]) == []


# ---- what changed ----------------------------------------------------------------------------------------------------


class Stages:
    """An order of two stages, as much of it as is asked for."""

    past = None

    def __init__(self):
        sizes = {"sequence_length": 32, "rows_per_step": 8, "done": 0}
        self.stages = [
            ConfigDict({"name": "a", "index": 0, "first_step": 1, "last_step": 100, **sizes}),
            ConfigDict({"name": "b", "index": 1, "first_step": 101, "last_step": 400, **sizes}),
        ]

    def stage_of_step(self, step):
        return self.stages[step > 100]


def test_what_changed_is_found_with_its_step():
    config = {"stages": [{"warmup_steps": 10, "mix": {"web": 1}}, {"warmup_steps": 0, "mix": {"code": 1}}]}
    first = new_epoch([], run="0" * 32, after_step=0, config=config, manifest=None)
    second = new_epoch([first], after_step=150, config=config, manifest=None, changes={"model.x": [1, 2]})
    rows = rows_of(200)
    for row in rows[100:]:
        row["lr"] = 5e-4
    for row in rows[160:]:
        row["lr"] = 5e-3
    launches = [
        {"time": "t1", "host": "h1", "versions": {"jax": "1", "k2jax": "1"}, "newest_step": None},
        {"time": "t2", "host": "h1", "versions": {"jax": "2", "k2jax": "1"}, "newest_step": 115},
    ]
    launches[1]["first_step"] = {"step": 121}
    journal = [
        {"kind": "rollback", "how": "defer", "why": "a\x1b[2J", "at_step": 180},
        {"kind": "skip", "at_step": 260, "why": "later"},
    ]
    found = changes(
        200, rows=rows, epochs=[first, second], journal=journal, order=Stages(), launches=launches,
        scheduled=lambda epoch, step: 1e-3 if step <= 100 else 5e-4,
    )  # fmt: skip
    assert [(one.step, one.kind) for one in found] == [
        (181, "journal"), (161, "learning rate"), (151, "configuration"), (121, "launch"), (101, "learning rate"),
        (101, "stage"), (11, "warm-up"),
    ]  # fmt: skip
    by = {one.step: one for one in found}
    assert by[161].ratio == pytest.approx(10) and "where the configuration before had 0.0005" in by[161].what
    assert by[151].keys == ("model.x",) and "model.x: 1 -> 2" in by[151].what
    assert by[121].keys == ("versions",) and by[121].what.endswith("versions: jax 1 -> 2")
    told = telling.text(examine(rows, 200, RULES, [one._asdict() for one in found]))
    assert "  step 181: journal: rollback (defer): a\\u001b[2J" in told


# ---- the verdict -----------------------------------------------------------------------------------------------------


def evidence(**more):
    """Of a step whose loss was above its limit, with all that was run again ordinary but that."""
    reading = {"own": {"unusual": True, "finite": True}, "others": {"unusual": False, "finite": True}}
    crossing = {"series": "loss", "step": 300, "lead": 0, "last": 300, "value": 3.0, "limit": 2.2, "median": 2.0}
    return {
        "step": 300,
        "at": 300,
        "row": {"finite": True, "applied": True, "outlier": False},
        "crossings": [crossing],
        "changes": [],
        "replay": {"again": True, "first_difference": None, "first_norm": None, "same_program": True, "close": 1e-3},
        "checkpoint": {"step": 290, "params": [], "moments": [], "through": None},
        "state": [reading],
        "data": {"rows": [], "swapped": None},
        **more,
    }


def reading(own, others=False):
    return {"own": {"unusual": own, "finite": True}, "others": {"unusual": others, "finite": True}}


ROW = {"row": 3, "subset": "web", "loss": 9.0, "median": 2.0, "repeat": None, "documents": [{"source": "x"}]}
REPEAT = {**ROW, "repeat": {"row": 3, "period": 1, "times": 99, "first": 0}}
CURED = {"rows": [3], "ordinary": True}
RATE = {"step": 295, "kind": "learning rate", "what": "up", "keys": (), "ratio": 10.0}
MODEL = {"step": 295, "kind": "configuration", "what": "x", "keys": ("model.x",), "ratio": None}
LATER = {**RATE, "step": 301}
LOGIT = {"series": "logit", "step": 250, "lead": 50, "last": 300, "value": 90, "limit": 40, "median": 20}
DIFFERS = {"step": 299, "apart": 0.5, "batch": True}
STEPS = {
    "always and cured": ({"state": [reading(True)] * 3, "data": {"rows": [ROW], "swapped": CURED}}, "data", "certain"),
    "n-gram, one state": ({"data": {"rows": [REPEAT], "swapped": CURED}}, "data", "certain"),
    "always, no row": ({"state": [reading(True)] * 2}, "data", "likely"),
    "this state only": ({"state": [reading(True), reading(False)]}, "state", "likely"),
    "any batch": ({"state": [reading(True, True), reading(False)]}, "state", "likely"),
    "growing": ({"state": [reading(True, True)], "crossings": [LOGIT]}, "state", "likely"),
    "rate": ({"state": [reading(True, True)], "changes": [RATE]}, "optimizer or learning rate", "likely"),
    "rate, recorded only": ({"state": None, "changes": [RATE]}, "optimizer or learning rate", "possible"),
    "rate after it": ({"state": None, "changes": [LATER]}, "not known", "possible"),
    "model": ({"state": [reading(True, True)], "changes": [MODEL]}, "configuration change", "likely"),
    "ordinary again": ({"state": [reading(False)]}, "not the data", "likely"),
    "differs twice": ({"replay": {"again": False, "first_difference": None}}, "hardware or nondeterminism", "certain"),
    "not possible": ({part: {"not_possible": "no"} for part in ("replay", "checkpoint", "state", "data")}, "not known",
                     "possible"),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_verdict(name):
    more, cause, confidence = STEPS[name]
    crossing = evidence()["crossings"]
    more = {**more, "crossings": [*more.get("crossings", []), *crossing]}
    [first, *_] = verdicts(evidence(**more))
    assert (first.cause, first.confidence) == (cause, confidence) and first.reasons


def test_other_devices_explain_rounding_and_no_more():
    def hardware(apart, same):
        differs = {"first_difference": {**DIFFERS, "apart": apart}, "first_norm": None}
        replay = {"again": True, "same_program": same, "close": 1e-3, **differs}
        return [one.confidence for one in verdicts(evidence(replay=replay)) if one.cause.startswith("hardware")]

    assert [hardware(1e-6, True), hardware(1e-6, False), hardware(0.5, False)] == [["likely"], [], ["possible"]]


def test_a_batch_is_judged_by_others_of_its_state():
    others = [5.0, 5.1, 4.9, 5.05, 5.0, 4.95]
    assert not is_unusual(5.15, others, 2.0, 6.0, 0.02), "above the run's limit, as all of them are"
    assert is_unusual(9.0, others, 20.0, 6.0, 0.02) and is_unusual(float("nan"), others, 20.0, 6.0, 0.02)
    assert is_unusual(9.0, [], 8.0, 6.0, 0.02) and not is_unusual(7.0, [], 8.0, 6.0, 0.02)
