"""Outliers and spikes: no outlier moves a limit, warm-up is no alarm, and what persists has its first step."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2jax import config
from k2jax.stability.detect import BEFORE, FEWEST, HISTORY, LAG, RECENT, Limits, Row, limits_of, spike_of

RULES = config.base().stability.to_dict()
IN_A_ROW = 3
WINDOW = RULES["window"]


def judged(losses, grad_norms=None, rules=RULES):
    """(rows, [spike]) of a run with these curves, as trainer and step decide; it ends with its first spike."""
    rows = []
    for step, loss in enumerate(losses, 1):
        grad_norm = 1.0 if grad_norms is None else grad_norms[step - 1]
        known = rows[: max(step - LAG, 0)][-HISTORY:]
        limits = limits_of(known, rules)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        outlier = finite and (loss > limits.loss or grad_norm > limits.grad_norm)
        rows.append(
            Row(step, float(loss), float(grad_norm), finite and not (rules["skip"] and outlier), outlier)
        )
        if spike := spike_of(rows[-HISTORY:], rules, IN_A_ROW):
            return rows, [spike]
    return rows, []


def falling(steps, seed=0, noise=0.02):
    """A loss from 10.4 to about 2 and the gradient norm that belongs to it: steep at first, with heavy tails."""
    draw, t = np.random.default_rng(seed), np.arange(1, steps + 1)
    losses = (1.9 + 8.5 * (1 + t / 30) ** -0.8) * np.exp(noise * draw.standard_normal(steps))
    grad_norms = (0.3 + 4 * np.exp(-t / 40) + 1.5 * np.exp(-(((t - 200) / 100) ** 2))) * np.exp(
        0.2 * draw.standard_normal(steps)
    )
    return losses, grad_norms


def flat(steps, seed=0, level=2.0, noise=0.01):
    return level * np.exp(noise * np.random.default_rng(seed).standard_normal(steps))


# ---- limits --------------------------------------------------------------------------------------------------------

values = st.floats(0.125, 8.0, width=32)


@st.composite
def histories(draw, least=FEWEST, most=2 * WINDOW):
    """Rows as a run may have them: accepted ones, with outliers and steps that are not finite between."""
    number = draw(st.integers(least, most))
    seed = draw(st.integers(0, 2**32 - 1))
    bad = draw(st.floats(0, 0.4))
    random = np.random.default_rng(seed)
    kinds = random.choice(3, number, p=[1 - bad, bad / 2, bad / 2])
    scale = draw(values)
    rows = []
    for step, kind in enumerate(kinds, 1):
        loss, norm = (float(x) for x in np.float32(scale * (1 + random.random(2))))
        if kind == 1:
            rows.append(Row(step, float(random.choice([math.nan, math.inf])), norm, False, False))
        else:
            rows.append(Row(step, loss * (100 if kind else 1), norm, kind == 0, kind == 2))
    return rows


@given(histories(), st.data())
def test_no_outlier_and_nothing_that_is_not_finite_moves_a_limit(rows, data):
    good = [row for row in rows if row.applied]
    assert limits_of(rows, RULES) == limits_of(good, RULES)
    place = data.draw(st.integers(0, len(rows)))
    loss = data.draw(st.floats())
    noted = Row(
        0, loss, 1.0, True, True
    )  # with stability.skip off an outlier makes an update; it moves no limit
    skipped = Row(0, loss, math.nan, False, False)
    for row in (noted, skipped, Row(0, 1.0, 1.0, False, False), Row(0, math.nan, 1.0, True, False)):
        assert limits_of([*rows[:place], row, *rows[place:]], RULES) == limits_of(rows, RULES)


@given(histories(least=0, most=FEWEST + 20))
def test_there_are_no_limits_before_64_accepted_rows(rows):
    limits = limits_of(rows, RULES)
    if sum(row.applied for row in rows) < FEWEST:
        assert limits == Limits(math.inf, math.inf)
    else:
        assert all(map(math.isfinite, limits))


@given(histories(), st.integers(-20, 20))
def test_limits_scale_with_the_series(rows, power):
    scale = 2.0**power
    scaled = [row._replace(loss=row.loss * scale, grad_norm=row.grad_norm * scale) for row in rows]
    assert limits_of(scaled, RULES) == tuple(scale * limit for limit in limits_of(rows, RULES))
    assert spike_of(scaled, RULES, 1000) == spike_of(rows, RULES, 1000)


def test_limits_are_the_median_and_a_margin():
    rows = [Row(step, 2.1 * 1.05 ** (step % 3 - 1), 1.0, True, False) for step in range(1, WINDOW + 2)]
    assert limits_of(rows, RULES) == pytest.approx((2.1 * 1.05 ** (6 * 1.4826), 1 + RULES["grad_norm_floor"]))
    flat_rows = [row._replace(loss=2.0) for row in rows]
    assert limits_of(flat_rows, RULES).loss == pytest.approx(2 * (1 + RULES["loss_floor"]))
    assert limits_of([Row(0, 1e9, 1e9, True, False)] * 99 + rows, RULES) == limits_of(rows, RULES)


@given(histories(most=200), st.integers(0, 2**32 - 1), st.sampled_from([WINDOW, 2000]), st.booleans())
def test_more_rows_than_history_change_no_answer(newest, seed, window, rising):
    rules = {**RULES, "window": window, "max_skips": 1000}
    draw = np.random.default_rng(seed)
    losses = 2.0 + 0.01 * draw.standard_normal(2 * HISTORY) + 0.2 * rising * np.linspace(0, 1, 2 * HISTORY)
    bad = draw.random(2 * HISTORY) < draw.choice([0, 0.02, 0.2])
    older = [
        Row(i, float(x), 1.0, not b, bool(b)) for i, (x, b) in enumerate(zip(losses, bad, strict=True), 1)
    ]
    rows = [*older, *(row._replace(step=row.step + len(older)) for row in newest)]
    for end in (len(older), len(older) - 7, len(rows)):
        for enough in (HISTORY, HISTORY + 1, HISTORY + 777):
            assert limits_of(rows[:end], rules) == limits_of(rows[:end][-enough:], rules)
            assert spike_of(rows[:end], rules, 3) == spike_of(rows[:end][-enough:], rules, 3)


# ---- curves --------------------------------------------------------------------------------------------------------


@pytest.mark.fault("D5")
@pytest.mark.parametrize("seed", range(3))
def test_a_clean_run_with_its_warm_up_raises_no_alarm(seed):
    rows, spikes = judged(*falling(3000, seed))
    assert not spikes and not any(row.outlier for row in rows)


def test_a_clean_stage_of_noisy_gradient_norms_raises_no_alarm():
    norms = 0.2 * np.exp(0.35 * np.random.default_rng(1).standard_normal(3000))
    rows, spikes = judged(flat(3000), norms)
    assert not spikes and not any(row.outlier for row in rows)


@pytest.mark.fault("D4")
@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (3.0, 1.0), (2.0, 20.0)]
)
def test_a_single_bad_step_costs_one_step(loss, norm):
    losses, norms = flat(500), np.ones(500)
    losses[299], norms[299] = loss, norm
    rows, spikes = judged(losses, norms)
    assert not spikes
    assert [row.step for row in rows if not row.applied] == [300]
    assert [row.step for row in rows if row.outlier] == [300] * math.isfinite(loss + norm)


def test_steps_not_finite_in_a_row_are_a_spike_and_fewer_are_not():
    losses = flat(400)
    losses[[99, 100, 149, 151, 299, 300, 301]] = math.nan
    _, [spike] = judged(losses)
    assert (spike.kind, spike.crossing, spike.step) == ("not finite", 300, 302)
    assert "3 steps in a row" in spike.why


def test_many_skips_in_a_window_are_a_spike_and_an_older_one_is_no_part_of_it():
    losses = flat(600)
    losses[399] = 9.0
    losses[500:520:2] = 3.0
    _, [spike] = judged(losses)
    assert (spike.kind, spike.crossing) == ("skips", 501)
    assert spike.step == 501 + 2 * (RULES["max_skips"] - 2)  # the older one counts
    assert f"{RULES['max_skips']} of the last {WINDOW} steps" in spike.why


def test_skips_further_apart_than_a_window_are_none():
    losses = flat(3000)
    losses[200::20] = 3.0
    assert not judged(losses)[1]
    losses[200::15] = 3.0
    assert judged(losses)[1][0].kind == "skips"


def test_steps_without_an_update_long_ago_are_no_spike_of_a_healthy_step():
    rows = [Row(step, 2.0, 1.0, not 100 < step <= 110, 100 < step <= 110) for step in range(1, 201)]
    assert spike_of(rows[:110], RULES, IN_A_ROW).kind == "skips"
    assert not any(spike_of(rows[:end], RULES, IN_A_ROW) for end in range(111, 201))


def k2_spike(steps=1200, start=700):
    """K2's malignant one: the loss leaves its level within some steps, and stays away for tens of thousands."""
    rise = np.clip((np.arange(steps) - start) / 20, 0, 1)
    return flat(steps) + 1.5 * rise, np.exp(0.1 * np.random.default_rng(2).standard_normal(steps)) * (
        1 + 4 * rise
    )


@pytest.mark.fault("D4")
def test_a_long_spike_is_found_when_its_steps_make_no_updates():
    _, [spike] = judged(*k2_spike())
    assert spike.kind == "skips" and 701 <= spike.crossing <= 710 and spike.step <= 715


def test_a_long_spike_is_found_by_its_persistence_when_they_do():
    rules = {**RULES, "skip": False}
    rows, [spike] = judged(*k2_spike(), rules)
    assert spike.kind == "persistent" and 701 <= spike.crossing <= 710
    assert spike.step == spike.crossing + RULES["persistence"] - 1
    assert all(row.applied for row in rows)


def test_a_step_that_is_not_finite_does_not_end_a_long_spike():
    losses, norms = k2_spike()
    losses[750] = math.nan
    _, [spike] = judged(losses, norms, {**RULES, "skip": False})
    assert spike.kind == "persistent" and spike.crossing <= 710 and spike.step <= 810


def test_a_spike_older_than_history_begins_with_it():
    rows = [Row(step, 9.0, 1.0, True, step > 100) for step in range(1, 3 * HISTORY)]
    spike = spike_of(rows, RULES, IN_A_ROW)
    assert spike == spike_of(rows[-HISTORY:], RULES, IN_A_ROW)
    assert spike.crossing == 2 * HISTORY


def test_a_benign_spike_is_no_spike():
    losses, norms = k2_spike()
    losses[700 + 99 :], norms[700 + 99 :] = 2.0, 1.0  # less than `persistence`
    rows, spikes = judged(losses, norms, {**RULES, "skip": False})
    assert not spikes and 80 < sum(row.outlier for row in rows) < 100


@pytest.mark.fault("D4")
def test_the_loss_of_marins_fatal_spike_is_a_drift():
    losses = np.concatenate([flat(2500, level=1.96, noise=0.006), flat(600, 1, level=2.02, noise=0.006)])
    rows, [spike] = judged(losses)
    assert not any(row.outlier for row in rows)  # none that skipping could have cured
    assert spike.kind == "drift" and 2480 <= spike.crossing <= 2510 and spike.step <= 2560
    assert f"over {np.median([row.loss for row in rows[-RECENT - 200 : -RECENT]]):.4g} of the 200 before" in spike.why


@pytest.mark.fault("D4")
def test_a_loss_that_rises_while_it_is_lower_than_long_before_is_a_drift():
    """As one does whose learning rate is ten times too high, late in a short run. Red without the shorter BEFORE."""
    losses = falling(1000)[0]
    losses[700:] *= 1.08
    rows, [spike] = judged(losses)
    assert not any(row.outlier for row in rows)
    assert spike.kind == "drift" and 690 <= spike.crossing <= 715 and spike.step <= 750


def test_a_slow_rise_is_a_drift_and_a_slow_fall_is_none():
    slow = np.concatenate([np.zeros(2200), np.linspace(0, 0.1, 1500)])
    losses = flat(len(slow), level=1.96, noise=0.006)
    _, [spike] = judged(losses + slow)
    assert spike.kind == "drift" and 2200 <= spike.crossing < spike.step - 100 < 3400
    assert not judged(losses - slow)[1]


def test_a_rise_within_the_noise_is_no_drift():
    """3% more, of a loss that varies by 15% from step to step."""
    losses = np.concatenate([flat(2500, noise=0.15), flat(600, 1, level=2.06, noise=0.15)])
    assert not judged(losses)[1]


def test_a_rise_of_less_than_the_share_is_no_drift():
    losses = np.concatenate([flat(2500, noise=0.001), flat(600, 1, level=2.02, noise=0.001)])
    assert not judged(losses)[1]
    assert judged(losses, rules={**RULES, "drift": 0.005})[1]


def test_a_drift_needs_a_level_to_rise_from():
    losses = np.concatenate([flat(170), flat(79, level=2.08)])  # under the outliers' limit
    assert not judged(losses)[1]
    assert judged(np.concatenate([losses, flat(1, level=2.08)]))[1]


@given(st.integers(0, 2**32 - 1))
def test_a_constant_series_is_quiet_whatever_it_is(seed):
    level = float(np.random.default_rng(seed).uniform(0, 5))
    rows = [Row(step, level, level, True, False) for step in range(1, RECENT + max(BEFORE) + 1)]
    assert limits_of(rows, RULES).loss >= level
    assert spike_of(rows, RULES, IN_A_ROW) is None


def test_a_series_of_zeros_has_limits():
    rows = [Row(step, 0.0, 0.0, True, False) for step in range(1, WINDOW)]
    assert all(0 < limit < 1e-20 for limit in limits_of(rows, RULES))


def test_no_rows_are_no_alarm():
    assert limits_of([], RULES) == Limits()
    assert spike_of([], RULES, IN_A_ROW) is None
