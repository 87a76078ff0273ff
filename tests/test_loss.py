"""k2jax.model.loss: the value and gradient of the loss, which targets count, and the loss by subset."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import on_tpu_compiler, run_compiling
from test_model import initial_params, logits_of, small_model

from k2jax import config
from k2jax.model.loss import LossOptions, head_loss, targets_and_weights
from k2jax.training.step import loss_sums

EOS = 2
WHOLE = LossOptions()


def reference(logits, targets, weights):
    """(nats of every position, gradient of their weighted sum by the logits), in float64."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    nats = -np.take_along_axis(log_softmax, targets[..., None], axis=-1)[..., 0]
    one_hot = np.eye(logits.shape[-1])[targets]
    return nats, weights[..., None] * (np.exp(log_softmax) - one_hot)


def draw(scale, shape=(2, 5, 33)):
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(0, scale, shape), jnp.float32)
    return logits, random.integers(0, shape[-1], shape[:-1]), random.uniform(0, 2, shape[:-1])


def head_loss_of(x, head, targets, weights, options=WHOLE):
    """(sum, what is told of each position, gradients by x and head)."""
    targets, weights = jnp.asarray(targets), jnp.asarray(weights, jnp.float32)
    run = jax.value_and_grad(lambda x, head: head_loss(x, head, targets, weights, options), (0, 1), has_aux=True)
    (total, told), gradients = jax.jit(run)(x, head)
    return total, told, *gradients


def of_logits(logits, targets, weights, options=WHOLE):
    """(nats, gradient by the logits): the head is the identity, which products with float32 leave as they are."""
    _, told, gradient, _ = head_loss_of(logits, jnp.eye(logits.shape[-1]), targets, weights, options)
    return told.nats, gradient


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4, 1e30])
def test_the_loss_and_its_gradient_are_float64s(scale):
    """1e4 overflows exp() without the shift by the largest logit; a float32 sum of exp's is as exact as its log."""
    logits, targets, weights = draw(scale)
    nats, gradient = of_logits(logits, targets, weights)
    expected_nats, expected_gradient = reference(logits, targets, weights)
    assert nats.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5 if scale == 1.0 else 1e-3, atol=1e-6)


def test_the_loss_of_one_certain_and_of_all_equal_logits():
    logits = jnp.zeros((1, 2, 7)).at[0, 0, 3].set(200.0)
    nats, gradient = of_logits(logits, np.array([[3, 3]]), np.ones((1, 2)))
    np.testing.assert_allclose(nats, [[0.0, np.log(7)]], rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0], 0.0, atol=1e-12)
    np.testing.assert_allclose(gradient.sum(axis=-1), 0.0, atol=1e-6)


@pytest.mark.parametrize("block", [1, 4, 5, 8, 15, 100])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_blocks_give_value_and_gradients_of_the_whole(block, z_loss):
    """15 positions by blocks that divide them and that do not, uneven weights; the value without a gradient, too."""
    B, T, D, V = 3, 15, 8, 33
    random = np.random.default_rng(1)
    x, head = random.normal(size=(B, T, D)), random.normal(size=(D, V))
    targets, weights = random.integers(0, V, (B, T)), random.uniform(0, 2, (B, T))
    options = LossOptions(block, z_loss)
    arrays = jnp.asarray(x, jnp.float32), jnp.asarray(head, jnp.float32)
    total, told, dx, dhead = head_loss_of(*arrays, targets, weights, options)
    logits = x @ head
    expected_nats, delta = reference(logits, targets, weights)
    lse = np.log(np.exp(logits).sum(axis=-1))
    delta += (weights * 2 * z_loss * lse)[..., None] * np.exp(logits - lse[..., None])
    np.testing.assert_allclose(told.nats, expected_nats, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(told.log_z, lse, rtol=1e-6)
    np.testing.assert_allclose(told.logit, np.abs(logits).max(axis=-1), rtol=1e-5)
    np.testing.assert_allclose(total, (weights * (expected_nats + z_loss * lse**2)).sum(), rtol=1e-6)
    np.testing.assert_allclose(dx, delta @ head.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dhead, np.einsum("btd,btv->dv", x, delta), rtol=1e-4, atol=1e-5)
    value = jax.jit(head_loss, static_argnums=4)
    alone = value(*arrays, jnp.asarray(targets), jnp.asarray(weights, jnp.float32), options)
    np.testing.assert_allclose(alone[0], total, rtol=1e-6)
    for found, expected in zip(alone[1], told, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_gradient_is_that_of_what_comes_after():
    """Of 3 times the sum: 3 times as large."""
    logits, targets, weights = draw(1.0)
    weights, head = jnp.asarray(weights, jnp.float32), jnp.eye(33)
    once, thrice = (
        jax.jit(jax.grad(lambda x, f=f: f * head_loss(x, head, jnp.asarray(targets), weights, LossOptions())[0]))(
            logits
        )
        for f in (1.0, 3.0)
    )
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)


def test_bfloat16_goes_into_products_and_float32_adds_up():
    """x and the logits in bfloat16: sums over V and the head's gradient are in float32 none the less."""
    logits, targets, weights = draw(3.0, (2, 3, 4000))
    options = LossOptions(logits_dtype="bfloat16")
    x, head = logits.astype(jnp.bfloat16), jnp.eye(4000)
    _, told, gradient, dhead = head_loss_of(x, head, targets, weights, options)
    expected_nats, expected_gradient = reference(x, targets, weights)
    assert told.nats.dtype == told.logit.dtype == dhead.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(told.nats, expected_nats, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(gradient, np.float32), expected_gradient, rtol=2.0**-8, atol=1e-9)


def test_no_array_holds_all_logits():
    """Neither forward nor backward, in the compiled program: 8 rows of 64 positions by blocks of 8."""
    x, head = jnp.zeros((8, 64, 16)), jnp.zeros((16, 1000))
    targets, weights = jnp.zeros((8, 64), jnp.int32), jnp.ones((8, 64))

    def temporary_bytes(block):
        loss = partial(head_loss, options=LossOptions(block))
        run = jax.jit(jax.grad(lambda x, head: loss(x, head, targets, weights)[0], (0, 1)))
        return run.lower(x, head).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(64) > 8 * 64 * 1000 * 4 > 2 * temporary_bytes(8)


# ---- which targets count -------------------------------------------------------------------------------------------


def test_next_gives_every_position_the_token_after_it():
    tokens = jnp.array([[5, 6, 7, 8], [9, 4, 3, 5]])
    inputs, targets, weights = targets_and_weights(tokens, "next")
    assert inputs.tolist() == [[5, 6, 7], [9, 4, 3]]
    assert targets.tolist() == [[6, 7, 8], [4, 3, 5]]
    assert weights.tolist() == [[1.0] * 3] * 2


def test_inside_is_k2s_shift_which_loses_the_last_position():
    tokens = jnp.array([[5, 6, 7, 8], [9, 4, 3, 5]])
    inputs, targets, weights = targets_and_weights(tokens, "inside")
    assert inputs.tolist() == tokens.tolist()
    assert targets[:, :-1].tolist() == [[6, 7, 8], [4, 3, 5]]
    assert weights.tolist() == [[1.0, 1.0, 1.0, 0.0]] * 2


@pytest.mark.fault("F8")
@pytest.mark.parametrize("label_shift", ["next", "inside"])
def test_a_target_in_another_document_than_its_input_is_dropped(label_shift):
    tokens = jnp.array([[5, EOS, 7, 8, EOS, 9]])
    inputs = tokens[:, :-1] if label_shift == "next" else tokens
    weights = targets_and_weights(tokens, label_shift, inputs == EOS)[2]
    assert weights[0].tolist() == [1, 0, 1, 1, 0] + ([0] if label_shift == "inside" else [])


# ---- the loss of a batch -------------------------------------------------------------------------------------------


def initial_logits(tokens):
    return jax.jit(partial(logits_of, small_model()))(initial_params(), tokens)


@cache
def program_of(label_shift, masked, num_subsets):
    c = config.base().unlock()
    c.model, c.data.label_shift = small_model(mask_documents=masked), label_shift
    arguments = {"config": c, "stage": config.stage(), "eos_id": EOS, "num_subsets": num_subsets}
    return jax.jit(partial(loss_sums, **arguments, compute_dtype=jnp.float32))


def sums_of(tokens, subset=None, label_shift="next", masked=False, num_subsets=1):
    subset = np.asarray(np.zeros(len(tokens)) if subset is None else subset, np.int32)
    loss, sums = program_of(label_shift, masked, num_subsets)(initial_params(), tokens, subset)
    assert float(loss) == pytest.approx(float(sums.loss), rel=1e-6)
    return sums


def tokens_of(rows, length=13):
    return np.random.default_rng(rows).integers(3, 61, (rows, length)).astype(np.int32)


def test_inside_is_the_mean_over_t_minus_1_targets_of_each_row():
    tokens = tokens_of(3)
    sums = sums_of(tokens, label_shift="inside")
    assert sums.targets == 3 * (13 - 1)
    logits = initial_logits(tokens)
    nats = reference(logits[:, :-1], tokens[:, 1:], np.ones((3, 12)))[0]
    assert float(sums.loss / sums.targets) == pytest.approx(nats.mean(), rel=1e-6)


def test_next_is_the_mean_over_all_t_targets():
    tokens = tokens_of(3)
    sums = sums_of(tokens)
    logits = initial_logits(tokens[:, :-1])
    assert sums.targets == 3 * 12
    nats = reference(logits, tokens[:, 1:], np.ones((3, 12)))[0]
    assert float(sums.loss / sums.targets) == pytest.approx(nats.mean(), rel=1e-6)
    same_inputs = sums_of(tokens[:, :-1], label_shift="inside")
    assert same_inputs.loss < sums.loss and same_inputs.targets == 3 * 11


def test_the_subsets_losses_add_up_to_the_loss():
    tokens, subset = tokens_of(5), [2, 0, 2, 1, 2]
    sums = sums_of(tokens, subset, num_subsets=4)
    assert sums.subset_targets.tolist() == [12, 12, 36, 0] and sums.subset_loss[3] == 0
    assert float(sums.subset_loss.sum()) == pytest.approx(float(sums.loss), rel=1e-6)
    for number in range(3):
        alone = sums_of(tokens[np.array(subset) == number])
        assert float(sums.subset_loss[number]) == pytest.approx(float(alone.loss), rel=1e-5)


@pytest.mark.fault("F8")
@pytest.mark.parametrize("label_shift", ["next", "inside"])
def test_masked_rows_have_the_loss_of_their_documents_alone(label_shift):
    """Without the mask the loss of the same row is another one, or this would prove nothing.

    Seen red without the weights of targets.
    """
    tokens = tokens_of(1, 20)
    tokens[0, [6, 13]] = EOS
    masked = sums_of(tokens, label_shift=label_shift, masked=True)
    alone = [sums_of(tokens[:, a:b], label_shift=label_shift) for a, b in ((0, 7), (7, 14), (14, 20))]
    assert masked.targets == sum(part.targets for part in alone) == 6 + 6 + 5
    assert float(masked.loss) == pytest.approx(sum(float(part.loss) for part in alone), rel=1e-5)
    packed = sums_of(tokens, label_shift=label_shift)
    assert packed.targets == 19 and abs(packed.loss / 19 - masked.loss / 17) > 1e-3


@pytest.mark.fault("D12")
def test_rows_of_one_token_and_of_ends_alone_weigh_what_they_have():
    """Of one token there is one target with label_shift "next" and none inside; of EOS alone there is none."""
    one = sums_of(tokens_of(2, 2))
    assert one.targets == 2 and 0 < one.loss < 2 * 20
    ends = np.full((2, 5), EOS)
    for none in (sums_of(tokens_of(2, 1), label_shift="inside"), sums_of(ends, masked=True)):
        assert none.targets == 0 and none.loss == 0


# ---- on a TPU, by its compiler -------------------------------------------------------------------------------------

COMPILE = """
from k2jax.plan import topologies
topologies.use_tpu_compiler()
import jax, jax.numpy as jnp
from k2jax.model.loss import LossOptions, head_loss
place = jax.sharding.SingleDeviceSharding(topologies.tpu_devices("v5p:2x2x1")[0])
shape = lambda *sizes, dtype: jax.ShapeDtypeStruct(sizes, dtype, sharding=place)
arrays = shape(4, 2048, 1024, dtype=jnp.bfloat16), shape(1024, 32032, dtype=jnp.float32)
rows = shape(4, 2048, dtype=jnp.int32), shape(4, 2048, dtype=jnp.float32)
for block in (256, 2048):
    loss = lambda x, head, targets, weights: head_loss(x, head, targets, weights, LossOptions(block))[0]
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays, *rows).compile()
    print(compiled.memory_analysis().temp_size_in_bytes)
"""


@on_tpu_compiler
def test_at_k2s_vocabulary_a_tpu_holds_a_block_of_logits(tmp_path: Path):
    """Four rows of 2,048 positions: all logits would be 1.05 GB in float32, and their gradient 0.5 GB in bfloat16."""
    blocks, whole = map(int, run_compiling(COMPILE, tmp_path).split())
    head = 1024 * 32032
    assert blocks < 4 * 256 * 32032 * 4 + 8 * head, "a block of logits, and the head in bfloat16 and its gradient"
    assert whole > 4 * 2048 * 32032 * 2
