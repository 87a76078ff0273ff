"""Optimizer and step: AdamW as PyTorch's, the learning rate, accumulation, steps that are not finite."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_model import EOS, small_model

import k2jax.training.step
from k2jax import config, keys
from k2jax.errors import ConfigError
from k2jax.model.decoder import parameter_table
from k2jax.training.optimizer import SCHEDULES, direction, init_state, learning_rate
from k2jax.training.step import Batch, mean_gradients, train_step

STAGE = {"sequence_length": 12, "rows_per_step": 8, "steps_per_chunk": 10, "chunks": 2, "warmup_steps": 4}


def experiment(masked=False, **stage):
    c = config.base().unlock()
    c.model = small_model(mask_documents=masked)
    c.stages = (config.stage(**{**STAGE, "lr_peak": 1e-2, "lr_final": 1e-3, "mix": {"all": 1}, **stage}),)
    return c


def batch_of(seed=0, microbatches=1, shape=(8, 13)):
    draw = np.random.default_rng(seed)
    tokens, subset = draw.integers(3, 61, shape), draw.integers(0, 2, shape[0])
    for row, ends in enumerate([0, 0, 6, 1, 0, 11, 3, 2]):  # how many documents end in a row: uneven
        tokens[row, draw.choice(shape[1], ends, replace=False)] = EOS
    cut = partial(np.reshape, order="C")
    tokens, subset = (cut(x, (microbatches, -1, *x.shape[1:])) for x in (tokens, subset))
    digest = draw.integers(0, 2**32, (*subset.shape, 8), np.uint32)
    return Batch(jnp.asarray(tokens, jnp.int32), jnp.asarray(subset, jnp.int32), jnp.asarray(digest))


def loss_arguments(c):
    arguments = {"config": c, "stage": c.stages[0], "eos_id": EOS, "num_subsets": 2}
    return {**arguments, "compute_dtype": jnp.float32}


@cache
def step_of(masked=False, first_step=1):
    return jax.jit(partial(train_step, first_step=first_step, num_steps=20, **loss_arguments(experiment(masked))))


@cache
def start():
    """A state of `experiment()`, whether documents are masked or not."""
    return jax.jit(partial(init_state, experiment().model, seed=1))()


@pytest.fixture(scope="module")
def run_step():
    """(the jitted step of `experiment()`, a state to start from)."""
    return step_of(), start()


# ---- AdamW ---------------------------------------------------------------------------------------------------------


def step_and_gradients(state, batch, c=None):
    """A step and the gradients that it took: those of a program of their own are rounded otherwise, which Adam's first
    steps make much of where they are nearly 0."""
    taken = []

    def keep(params, batch, **arguments):
        taken.append(mean_gradients(params, batch, **arguments))
        return taken[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(k2jax.training.step, "mean_gradients", keep)
        new, metrics = train_step(state, batch, first_step=1, num_steps=20, **loss_arguments(c or experiment()))
    return new, metrics, taken[0][0]


def test_ten_steps_are_pytorchs_adamw_with_clipping():
    torch = pytest.importorskip("torch")
    step, state = jax.jit(step_and_gradients), start()
    theirs = {name: torch.nn.Parameter(torch.tensor(np.array(p))) for name, p in state.params.items()}
    groups = [  # K2's rule: 0.1 on matrices and embeddings, none on one-dimensional parameters, which are the norms
        {"params": [p for name, p in theirs.items() if "norm" not in name], "weight_decay": 0.1},
        {"params": [p for name, p in theirs.items() if "norm" in name], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    clipped = 0
    for number in range(1, 11):
        batch = batch_of(number)
        state, metrics, gradients = step(state, batch)
        for name, g in gradients.items():
            theirs[name].grad = torch.tensor(np.array(g))
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0).item()
        clipped += norm > 1.05
        for group in optimizer.param_groups:
            group["lr"] = float(numpy_rate(number, 20, 4, 1e-2, 1e-3))
        optimizer.step()
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
        for name, p in state.params.items():
            largest = np.abs(np.asarray(p) - theirs[name].detach().numpy()).max()
            assert largest < 1e-6, f"step {number}, {name}: largest difference {largest:.1e}"
            moment = optimizer.state[theirs[name]]["exp_avg"].numpy()  # sees the clipping, which Adam's direction hides
            np.testing.assert_allclose(state.mu[name], moment, rtol=1e-5, atol=1e-5 * np.abs(moment).max())
    assert 3 < clipped, "clipping was hardly at work"
    assert int(state.step) == int(state.updates) == 10


def test_decay_falls_on_matrices_and_embeddings_only():
    c, state = experiment(), start()
    state = state._replace(params={name: p + 1.0 for name, p in state.params.items()})
    found, mu, nu = jax.jit(partial(direction, c))(state, jax.tree.map(np.zeros_like, state.params))
    for name, d in found.items():
        expected = 0.0 * d if "norm" in name else 0.1 * state.params[name]
        np.testing.assert_allclose(d, expected, rtol=1e-6, err_msg=name)
    assert {name for name in found if "norm" in name} == {
        name for name, p in parameter_table(c.model).items() if p.std is None
    }
    assert all(not np.any(m) for m in (*mu.values(), *nu.values()))


# ---- the learning rate ---------------------------------------------------------------------------------------------


def numpy_rate(step, total, warmup, peak, final, start=0.0):
    """Float64, by the text of k2-facts 2.1."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return final + (peak - final) * (1 + np.cos(np.pi * (step - warmup) / (total - warmup))) / 2


def test_k2s_learning_rate_at_chosen_steps():
    k2 = config.stage()
    total = 338_760
    rate = jax.jit(partial(learning_rate, k2, num_steps=total))
    for step in (1, 2, 1000, 1999, 2000, 2001, 50_000, 170_380, 300_000, total - 1, total):
        expected = numpy_rate(step, total, 2000, 1.5e-4, 1.5e-5)
        assert float(rate(jnp.int32(step))) == pytest.approx(expected, rel=2e-6), step
    assert float(rate(jnp.int32(1))) == pytest.approx(1.5e-4 / 2000)
    assert float(rate(jnp.int32(2000))) == pytest.approx(1.5e-4, rel=2e-7), "the peak is reached"
    assert rate(jnp.int32(170_380)) == pytest.approx((1.5e-4 + 1.5e-5) / 2), "halfway along the cosine"
    assert rate(jnp.int32(total)) == jnp.float32(1.5e-5), "the last step is at lr_final, exactly"
    every = np.asarray(jax.vmap(rate)(jnp.arange(1, total + 1, 97)))
    assert (np.diff(every[: 2000 // 97]) > 0).all() and (np.diff(every[2000 // 97 + 1 :]) <= 1e-11).all()


def test_the_warmup_starts_at_lr_start_and_may_be_none():
    warm = config.stage(**STAGE, lr_peak=1e-2, lr_final=1e-3, lr_start=4e-3)
    steps = jnp.arange(1, 21)
    found = jax.vmap(partial(learning_rate, warm, num_steps=20))(steps)
    expected = [numpy_rate(i, 20, 4, 1e-2, 1e-3, start=4e-3) for i in range(1, 21)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    cold = config.stage(**{**STAGE, "warmup_steps": 0}, lr_peak=1e-2, lr_final=1e-3)
    for total in (20, 15):  # 15: the journal skipped a quarter
        found = jax.vmap(partial(learning_rate, cold, num_steps=total))(steps[:total])
        expected = [numpy_rate(i, total, 0, 1e-2, 1e-3) for i in range(1, total + 1)]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_each_schedule_is_its_closed_form(name: str, warmup: int):
    peak, final, total, share = 1e-2, 1e-3, 24, 0.25
    row = config.stage(
        **{**STAGE, "warmup_steps": warmup}, lr_peak=peak, lr_final=final, schedule=name, decay_share=share
    )
    found = np.asarray(jax.vmap(partial(learning_rate, row, num_steps=total))(jnp.arange(1, total + 1)))
    after = total - warmup
    decay = int(after * share)
    falls = {
        "cosine": optax.cosine_decay_schedule(peak, after, alpha=final / peak),
        "linear": optax.linear_schedule(peak, final, after),
        "constant": optax.constant_schedule(peak),
        "wsd": optax.linear_schedule(peak, final, decay, transition_begin=after - decay),
        "wsd_sqrt": lambda i: peak - (peak - final) * max(0, (i - (after - decay)) / decay) ** 0.5,
    }
    expected = [peak * i / warmup if i < warmup else float(falls[name](i - warmup)) for i in range(1, total + 1)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[-1] == np.float32(peak if name == "constant" else final)
    with pytest.raises(ConfigError, match="stages.0.schedule='cosin': must be one of cosine, linear"):
        broken = config.base().unlock()
        broken.stages = (config.stage(**STAGE, schedule="cosin"),)
        config.validate(broken)


def test_the_names_of_schedules_are_those_of_the_table():
    assert keys.SCHEDULES == tuple(SCHEDULES)


def test_a_stages_rate_counts_from_the_stages_first_step():
    _, metrics = step_of(first_step=334)(start()._replace(step=jnp.int32(340)), batch_of())
    assert float(metrics["lr"]) == pytest.approx(numpy_rate(341 - 334 + 1, 20, 4, 1e-2, 1e-3))


# ---- gradient accumulation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
def test_accumulation_is_one_big_batch(masked):
    """With documents masked, microbatches have unequal numbers of targets; the mean of their means is another loss."""
    step, state = step_of(masked), start()
    whole, expected = step(state, batch_of())
    cut, found = step(state, batch_of(microbatches=4))
    ends = int((batch_of().tokens[..., :-1] == EOS).sum())
    assert found["targets"] == expected["targets"] == 8 * 12 - masked * ends
    layers = found.pop("layers"), expected.pop("layers")
    for of_cut, of_whole in ((found, expected), layers):
        for key in of_whole:
            np.testing.assert_allclose(of_cut[key], of_whole[key], rtol=2e-5, atol=1e-7, err_msg=key)
    for name in whole.mu:
        scale = np.abs(whole.mu[name]).max()
        np.testing.assert_allclose(cut.mu[name], whole.mu[name], atol=1e-5 * scale, err_msg=name)
    if masked:
        parts = batch_of(microbatches=4)
        means = [step(state, Batch(*(x[i][None] for x in parts[:3])))[1] for i in range(4)]
        assert len({int(m["targets"]) for m in means}) > 1
        assert abs(np.mean([m["loss"] for m in means]) - expected["loss"]) > 1e-3


@pytest.mark.fault("D12")
def test_a_batch_without_a_single_target_changes_nothing_but_counts():
    """Seen red without a division by at least one."""
    batch = batch_of()._replace(tokens=jnp.full((1, 8, 13), EOS))
    state, metrics = step_of(masked=True)(start(), batch)
    assert metrics["targets"] == 0 and metrics["loss"] == 0 and metrics["finite"]
    assert all(np.isfinite(p).all() for p in state.params.values())


# ---- steps that are not finite -------------------------------------------------------------------------------------


def bits(state):
    arrays = {**state.params, **{"mu." + k: v for k, v in state.mu.items()}}
    arrays |= {"nu." + k: v for k, v in state.nu.items()}
    return {name: np.asarray(value).tobytes() for name, value in arrays.items()}


@pytest.fixture(scope="module")
def trained(run_step):
    """A state with moments."""
    step, state = run_step
    return step(state, batch_of())[0]


@pytest.mark.fault("D1")
def test_a_loss_that_is_not_finite_leaves_every_bit_of_the_state(run_step, trained):
    """Seen red without the look at whether it is finite."""
    step, _ = run_step
    broken = trained._replace(params=trained.params | {"final_norm_D": jnp.full(24, 1e38)})
    after, metrics = step(broken, batch_of(1))
    assert not metrics["finite"] and not np.isfinite(metrics["loss"])
    assert bits(after) == bits(broken)
    assert (int(after.step), int(after.updates), int(after.skips_in_a_row)) == (2, 1, 1)
    again, metrics = step(after, batch_of(2))
    assert int(again.skips_in_a_row) == metrics["skips_in_a_row"] == 2 and bits(again) == bits(broken)
    mended, metrics = step(again._replace(params=trained.params), batch_of(3))
    assert metrics["finite"] and int(mended.skips_in_a_row) == 0
    assert (int(mended.step), int(mended.updates)) == (4, 2) and bits(mended) != bits(trained)


def test_a_skipped_step_keeps_a_minus_zero(run_step, trained):
    step, _ = run_step
    minus_zero = {"head_DV": trained.params["head_DV"].at[0, 0].set(-0.0)}
    broken = trained._replace(
        params=trained.params | minus_zero | {"final_norm_D": jnp.full(24, 1e38)},
    )
    after, metrics = step(broken, batch_of(1))
    assert not metrics["finite"] and bits(after) == bits(broken)


@pytest.mark.fault("D1")
def test_one_number_of_a_gradient_that_is_not_finite_leaves_every_bit(monkeypatch, trained):
    """1e30 is finite, but its square, and so the norm, is not.

    Seen red without the look at the gradient's norm.
    """
    names = ("layers.mlp_norm_LD", "head_DV", "embed_VD")

    def broken(params, batch, **arguments):
        """What is bad, and where, comes in with the digests, which the step does not look at."""
        grads, sums = mean_gradients(params, batch, **arguments)
        bad = jnp.array([0.0, np.nan, np.inf, -np.inf, 1e30])[batch.digest[0, 0, 0]]
        at = {name: jnp.where(batch.digest[0, 0, 1] == i, bad, 0.0) for i, name in enumerate(names)}
        return grads | {name: grads[name].at[1, 1].add(at[name]) for name in names}, sums

    monkeypatch.setattr(k2jax.training.step, "mean_gradients", broken)
    step, batch = step_of.__wrapped__(), batch_of(1)
    for which in range(len(names)):
        for bad in range(5):
            digest = batch.digest.at[0, 0, :2].set(jnp.array([bad, which], jnp.uint32))
            after, metrics = step(trained, batch._replace(digest=digest))
            assert np.isfinite(metrics["loss"]) and metrics["finite"] == (bad == 0)
            assert (bits(after) == bits(trained)) == (bad != 0), (names[which], bad)
            assert (int(after.skips_in_a_row), int(after.updates)) == ((0, 2) if bad == 0 else (1, 1))
            assert np.isfinite(metrics["param_norm"]) and (metrics["update_norm"] == 0) == (bad != 0)
