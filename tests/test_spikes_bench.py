"""tools/bench/spikes.py, small: faults planted in real runs are found, and the other rule is as its formula says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

BENCH = REPOSITORY / "tools" / "bench"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import spikes

        yield spikes


@pytest.mark.processes
def test_what_is_planted_is_found_and_a_nan_costs_one_step(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["spikes.py", "--quick"])
    bench.main()
    head, *lines, clean, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert head["cores"] and clean["clean_steps"] == 330
    assert {line["fault"] for line in lines} == set(bench.QUICK)
    faults = {line["fault"]: line for line in lines}
    nan = faults["NaN in a step"]
    assert (nan["found_after"], nan["steps_skipped"], nan["steps_rolled_back"]) == (0, 1, 0)
    assert nan["mean_sigma"]["steps_skipped"] == 38 and not nan["harms"]  # all that are left of the run
    explosion = faults["an exploding step: learning rate x1000"]
    assert explosion["harms"] and explosion["found_after"] == 1 and explosion["steps_rolled_back"] > 0
    assert explosion["guarded_harm"] < 0.1 < explosion["harm"]["end"] and not explosion["ended_with_65"]
    assert explosion["lead_over_loss"]["update_norm"] == 1  # it is there a step before the loss
    total = last["summary"]
    assert total["recall_of_harmful"] == 1.0 and total["outliers"] == total["spikes"] == 0


def test_the_rule_of_olmo_core_and_maxtext_is_its_formula(bench):
    draw = np.random.default_rng(0)
    curves = np.stack([2 + 0.1 * draw.standard_normal(600), 1 + 0.1 * draw.standard_normal(600)], axis=1)
    assert not bench.mean_and_sigma(curves).any()
    curves[[20, 300, 320], [0, 1, 0]] = 50, 9, 2.9
    assert np.flatnonzero(bench.mean_and_sigma(curves)).tolist() == [300, 320]  # and none before there are 64
    curves[400, 0] = np.nan
    assert np.flatnonzero(bench.mean_and_sigma(curves)).tolist() == [
        300,
        320,
        *range(400, 529),
    ]  # 129 for one NaN
    curves = np.tile([2.0, 1.0], (300, 1)) + 0.01 * draw.standard_normal((300, 2))
    curves[[200, 205], 0] = 9.0, 4.0  # the first is in the window by which the second is measured
    assert np.flatnonzero(bench.mean_and_sigma(curves)).tolist() == [200]


def test_series_cross_their_limits_one_after_the_other(bench):
    rules = bench.configuration.base().stability.to_dict()
    curves = np.exp(0.01 * np.random.default_rng(0).standard_normal((400, len(bench.SERIES))))
    curves[300:, bench.SERIES.index("grad_norm/q")] *= 4
    curves[307:, bench.SERIES.index("loss")] = np.nan
    assert bench.first_crossings(curves, 291, rules) == {"grad_norm/q": 10, "loss": 17}


def test_a_result_that_is_committed_says_how_many_clean_steps_were_run():
    [*_, newest] = sorted((BENCH / "results").glob("*_spikes_cpu.jsonl"))
    total = json.loads(Path(newest).read_text().splitlines()[-1])["summary"]
    assert total["clean_steps"] > 10_000 and total["recall_of_harmful"] == 1.0
