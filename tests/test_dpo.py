"""A dpo stage's loss: of each pair by itself against torch, its gradient against what jax.grad makes of the formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversation_stores import write_pairs
from test_packing import manifest_of, source
from test_sft import EOS, step_on
from test_sft import small as of_sft

from k2jax import config as configuration
from k2jax.data.conversations import is_target, most_pairs, pair_numbers
from k2jax.errors import ConfigError
from k2jax.model.decoder import Decoder, init_params
from k2jax.model.preferences import REWARDS
from k2jax.training.losses import pair_log_probabilities, row_losses
from k2jax.training.step import Batch, mean_gradients

torch = pytest.importorskip("torch")

ROWS, LENGTH, BETA = 16, 64, 0.3
P = most_pairs(LENGTH)
SIZES = {"a": 40, "b": 60}  # documents


def small(**options) -> configuration.ConfigDict:
    c = of_sft(**options).copy_and_resolve_references().unlock()
    c.loss.z_loss = 0.0
    c.stages[0].unlock().update(kind="dpo", beta=BETA, sequence_length=LENGTH, rows_per_step=ROWS)
    configuration.validate(c)
    return c.lock()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A step's rows by label_shift, with a reference that is no model's."""
    draw = np.random.default_rng(0)
    lengths = [tuple(pair) for pair in draw.integers(4, 33, (300, 2)).tolist()]
    store = write_pairs(tmp_path_factory.mktemp("stores") / "a", lengths, eos_id=EOS, seed=4)
    found = {}
    for shift in ("next", "inside"):
        manifest = manifest_of(
            {"a": store}, shift=shift, length=LENGTH, rows=ROWS, chunks=2, mix={"a": 1}, kind="dpo"
        )
        read = source(manifest, {"a": store})[0]
        reference = draw.normal(-20.0, 5.0, (ROWS, P, 2)).astype(np.float32)
        found[shift] = read | {"reference": np.where(read["pairs"][..., None] >= 0, reference, 0.0)}
    return found


def pairs_of(rows: dict[str, np.ndarray]) -> list[tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]]:
    """([(tokens, mask) of chosen and rejected], their reference) of each pair of all rows."""
    found = []
    for tokens, marks, reference in zip(rows["tokens"], rows["marks"], rows["reference"], strict=True):
        for p in range((marks.max() >> 1) // 2):
            halves = [marks >> 1 == 2 * p + 1 + half for half in (0, 1)]
            found.append(([(tokens[of], marks[of] & 1) for of in halves], reference[p]))
    return found


def test_rows_hold_whole_pairs_side_by_side(rows):
    found = rows["next"]
    assert ((found["pairs"] >= 0).sum(axis=1) == (found["marks"].max(axis=1) >> 1) // 2).all()
    assert (found["pairs"] >= 0).sum() > 1.2 * ROWS, "some rows hold several"
    for (chosen, rejected), _ in pairs_of(found):
        alike = min(len(chosen[0]), len(rejected[0])) // 2
        assert np.array_equal(chosen[0][:alike], rejected[0][:alike])
        assert not chosen[1][:alike].any() and chosen[1][alike:].all() and rejected[1][alike:].all()


def test_pairs_are_numbered_through_the_stages_stores(tmp_path):
    draw = np.random.default_rng(1)
    lengths = {name: draw.integers(4, 33, (count, 2)).tolist() for name, count in SIZES.items()}
    stores = {name: write_pairs(tmp_path / name, pairs, eos_id=EOS, seed=3) for name, pairs in lengths.items()}
    manifest = manifest_of(stores, length=LENGTH, rows=ROWS, chunks=2, mix={"a": 1, "b": 1}, kind="dpo")
    assert pair_numbers(manifest, 0) == ({"a": 0, "b": SIZES["a"]}, sum(SIZES.values()))
    seen = set()
    for read in (source(manifest, stores)[step] for step in range(6)):
        rows = zip(*(read[key] for key in ("tokens", "marks", "pairs", "subset")), strict=True)
        for tokens, marks, pairs, subset in rows:
            for p, number in enumerate(pairs[pairs >= 0].tolist()):
                name = "ab"[subset]
                document = stores[name].document(number - (SIZES["a"] if name == "b" else 0))
                [own] = stores[name].read([document["start"]], document["num_tokens"])
                assert np.array_equal(tokens[np.isin(marks >> 1, (2 * p + 1, 2 * p + 2))], own)
                seen.add(number)
    assert min(seen) < SIZES["a"] < max(seen)


def expected_of(c, params, rows):
    """[(loss, chosen reward, rejected reward, chosen nats)] of each pair, every conversation run alone, by torch."""
    found = []
    for halves, reference in pairs_of(rows):
        said = []
        for tokens, mask in halves:
            decoder = Decoder(c.model, params)
            logits = decoder.logits(decoder(jnp.asarray(tokens[None]), c.stages[0].rope_base))[0, :-1]
            log_p = torch.log_softmax(torch.tensor(np.asarray(logits, np.float64)), dim=-1)
            picked = log_p[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:], dtype=torch.long)]
            said.append(float(picked[torch.tensor(mask[1:] == 1)].sum()))
        rewards = BETA * (np.array(said) - reference)
        loss = -torch.nn.functional.logsigmoid(torch.tensor(rewards[0] - rewards[1]))
        found.append((float(loss), *rewards, -said[0]))
    return np.array(found)


def batch_of(c, rows):
    def cut(x):
        return jnp.asarray(x.reshape(c.stages[0].microbatches, -1, *x.shape[1:]))

    names = ("tokens", "subset", "digest", "marks", "pairs", "reference")
    return Batch(**{name: cut(rows[name]) for name in names})


def gradients(c, params, rows):
    arguments = {"stage": c.stages[0], "eos_id": EOS, "num_subsets": 1, "compute_dtype": jnp.float32}
    return jax.jit(lambda p: mean_gradients(p, batch_of(c, rows), config=c, **arguments))(params)


@pytest.fixture(scope="module")
def params():
    return init_params(small().model, 0)


@pytest.mark.parametrize("shift", ["next", "inside"])
def test_the_loss_is_that_of_each_pair_alone(rows, params, shift):
    c = small(shift=shift)
    with jax.default_matmul_precision("highest"):
        expected = expected_of(c, params, rows[shift])
        _, sums = gradients(c, params, rows[shift])
    assert float(sums.targets) == len(expected)
    np.testing.assert_allclose(float(sums.loss), expected[:, 0].sum(), rtol=1e-4)
    told = dict(zip(REWARDS, np.asarray(sums.preferences), strict=True))
    assert told["right"] == (expected[:, 1] > expected[:, 2]).sum() not in (0, len(expected))
    assert told["tokens"] == sum(mask[1:].sum() for halves, _ in pairs_of(rows[shift]) for _, mask in halves)
    for i, name in enumerate(("chosen_reward", "rejected_reward", "chosen_nats"), 1):
        np.testing.assert_allclose(told[name], expected[:, i].sum(), rtol=1e-4, err_msg=name)


def test_the_gradient_is_that_of_the_formula(rows, params):
    """The loss goes through weights that are given: autodiff of the pairs' log-probabilities must agree."""
    c, found = small(), rows["next"]

    def mean_loss(p):
        said = pair_log_probabilities(
            p, found["tokens"], found["marks"], P=P, config=c, stage=c.stages[0], compute_dtype=jnp.float32
        )
        reward = BETA * (said - found["reference"])
        losses = jnp.logaddexp(0.0, reward[..., 1] - reward[..., 0])
        there = found["pairs"] >= 0
        return jnp.where(there, losses, 0.0).sum() / there.sum()

    def by_difference(direction, h=1e-3):
        up, down = (mean_loss({k: params[k] + s * h * direction[k] for k in params}) for s in (1, -1))
        return float(up - down) / (2 * h)

    with jax.default_matmul_precision("highest"):
        grads, _ = gradients(c, params, found)
        for seed in range(3):
            keys = jax.random.split(jax.random.key(seed), len(params))
            direction = {k: jax.random.normal(key, params[k].shape) for k, key in zip(params, keys, strict=True)}
            if seed == 0:
                direction = grads
            norm = float(jnp.sqrt(sum((d**2).sum() for d in direction.values())))
            direction = {k: d / norm for k, d in direction.items()}
            along = float(sum((grads[k] * direction[k]).sum() for k in grads))
            scale = float(jnp.sqrt(sum((g**2).sum() for g in grads.values())))
            assert abs(by_difference(direction) - along) < 5e-3 * scale, seed


@pytest.mark.parametrize("microbatches", [4])
def test_microbatches_are_one_big_batch(rows, params, microbatches):
    with jax.default_matmul_precision("highest"):
        expected, sums = gradients(small(), params, rows["next"])
        found, parts = gradients(small(microbatches=microbatches), params, rows["next"])
    np.testing.assert_allclose(np.asarray(parts.preferences), np.asarray(sums.preferences), rtol=1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-5 * np.abs(value).max(), err_msg=name)


def test_a_model_that_is_its_own_reference_has_log_2_a_pair(rows, params):
    c, found = small(), rows["next"]
    said = pair_log_probabilities(
        params, found["tokens"], found["marks"], P=P, config=c, stage=c.stages[0], compute_dtype=jnp.float32
    )
    _, sums = gradients(c, params, found | {"reference": np.asarray(said)})
    np.testing.assert_allclose(float(sums.loss / sums.targets), np.log(2), rtol=1e-4)


def test_a_pair_without_a_reference_spoils_the_step_and_is_not_left_out(rows, params):
    found = dict(rows["next"])
    found["reference"] = found["reference"].copy()
    found["reference"][3, 0, 1] = np.nan
    _, sums = gradients(small(), params, found)
    assert np.isnan(float(sums.loss))


def test_held_out_losses_are_of_the_chosen_conversations(rows, params):
    c, found = small(), rows["next"]
    run = partial(row_losses, config=c, stage=c.stages[0], eos_id=EOS, compute_dtype=jnp.float32)
    with jax.default_matmul_precision("highest"):
        told = run(params, found["tokens"], None, found["marks"])[1]
        expected = expected_of(c, params, found)
    assert float(told.targets.sum()) == is_target(found["marks"], pairs=True).sum()
    np.testing.assert_allclose(float(told.nats.sum()), expected[:, 3].sum(), rtol=1e-5)


MESHES = {
    "data, tensor": ({"replica": 2, "fsdp": 2, "tensor": 2}, {"microbatches": 2}),
    "context": ({"context": 4, "fsdp": 2}, {"microbatches": 2}),
    "pipeline": ({"stage": 2, "fsdp": 2}, {}),
}


@pytest.fixture(scope="module")
def on_one_device(rows):
    return step_on(small(), {}, rows["next"])


@pytest.mark.parametrize("case", MESHES)
def test_every_mesh_gives_the_loss_and_gradients_of_one_device(case, rows, on_one_device):
    sizes, options = MESHES[case]
    c = small(**options)
    if case == "pipeline":
        with c.unlocked():
            c.model.pipeline.update(microbatches=2, repeats=2)
    metrics, moments = step_on(c, sizes, rows["next"])
    expected, first = on_one_device
    for key in ("loss", "targets", "padding", "grad_norm", *(f"pairs/{name}" for name in REWARDS)):
        np.testing.assert_allclose(metrics[key], expected[key], rtol=5e-5, err_msg=key)
    for name, value in first.items():
        np.testing.assert_allclose(moments[name], value, rtol=0, atol=1e-4 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize(
    "overrides, what",
    [
        ({"stage": {"too_long": "cut"}}, "too_long.*half a pair"),
        ({"loss": {"z_loss": 1e-4}}, "z_loss"),
        ({"stage": {"kind": "sft"}}, "beta.*for stages of kind 'dpo'"),
        ({"data": {"mask_repeats": 3}}, "mask_repeats"),
        ({"stage": {"name": "a/../b"}}, "name.*letters, digits"),
    ],
)
def test_settings_that_would_mean_something_else_are_refused(overrides, what):
    c = small().copy_and_resolve_references().unlock()
    for section, values in overrides.items():
        (c.stages[0].unlock() if section == "stage" else c[section]).update(values)
    with pytest.raises(ConfigError, match=what):
        configuration.validate(c)
