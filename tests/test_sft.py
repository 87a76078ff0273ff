"""An sft stage's loss: of each conversation by itself, over learned targets, divided once by all of a step's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversation_stores import write_store
from test_packing import manifest_of, source

from k2jax import config as configuration
from k2jax.data.order import StagePlan
from k2jax.model import conversations
from k2jax.model.attention_logits import attention_logits
from k2jax.model.decoder import Decoder, init_params
from k2jax.parallel import sharding
from k2jax.training.losses import row_losses
from k2jax.training.optimizer import first_state
from k2jax.training.placement import check_mesh, make_state, place_batches, place_state
from k2jax.training.program import step_function
from k2jax.training.step import Batch, mean_gradients

torch = pytest.importorskip("torch")

ROWS, LENGTH, EOS = 16, 32, 5
Z_LOSS = 1e-3


def small(*, shift: str = "next", microbatches: int = 1, reset: bool = True) -> configuration.ConfigDict:
    c = configuration.base().copy_and_resolve_references()
    with c.unlocked():
        c.model.update(vocab_size=512, dim=32, num_layers=4, num_heads=8, num_kv_heads=8, head_dim=4, ffn_dim=44)
        c.model.init_std = 0.2  # so that what a position sees matters
        c.data.label_shift, c.loss.z_loss, c.loss.block = shift, Z_LOSS, 16
        c.stages = (
            configuration.stage(
                kind="sft",
                reset_positions=reset,
                sequence_length=LENGTH,
                rows_per_step=ROWS,
                microbatches=microbatches,
                steps_per_chunk=10,
                chunks=1,
                lr_peak=1e-2,
                warmup_steps=2,
                mix={"a": 1},
            ),
        )
    configuration.validate(c)
    return c.lock()


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """{label_shift: rows of a step}, of whose second half every answer is learned, of its first a few tokens."""
    root = tmp_path_factory.mktemp("stores")
    draw = np.random.default_rng(0)
    lengths = [*draw.integers(25, LENGTH + 1, 60).tolist(), *draw.integers(2, 9, 600).tolist()]
    store = write_store(root / "a", lengths, eos_id=EOS, seed=4)
    found = {}
    for shift in ("next", "inside"):
        manifest = manifest_of({"a": store}, shift=shift, length=LENGTH, rows=ROWS, chunks=2, mix={"a": 1})
        rows = source(manifest, {"a": store})[0]
        few = (np.arange(ROWS) < ROWS // 2)[:, None] & (np.arange(rows["marks"].shape[1]) % 8 > 0)
        found[shift] = {**rows, "marks": np.where(few, rows["marks"] & ~1, rows["marks"])}
    return found


def conversations_of(rows: dict[str, np.ndarray]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """By row, (tokens, mask) of each conversation."""
    found = []
    for tokens, marks in zip(rows["tokens"], rows["marks"], strict=True):
        numbers = range(1, (marks >> 1).max() + 1)
        found.append([(tokens[marks >> 1 == n], marks[marks >> 1 == n] & 1) for n in numbers])
    return found


def reference(c: configuration.ConfigDict, params: dict, rows: dict[str, np.ndarray]) -> tuple[float, float, int]:
    """(nats, nats and z-loss, targets): every conversation run alone, its labels those of torch's cross-entropy."""
    nats = total = count = 0
    for row in conversations_of(rows):
        for tokens, mask in row:
            decoder = Decoder(c.model, params)
            logits = decoder.logits(decoder(jnp.asarray(tokens[None]), c.stages[0].rope_base))[0, :-1]
            labels = torch.tensor(np.where(mask[1:], tokens[1:], -100), dtype=torch.long)
            logits = torch.tensor(np.asarray(logits, np.float64))
            own = float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            log_z = torch.logsumexp(logits, dim=-1)[labels != -100]
            nats, total = nats + own, total + own + Z_LOSS * float((log_z**2).sum())
            count += int((labels != -100).sum())
    return nats, total, count


@pytest.mark.parametrize("shift", ["next", "inside"])
@pytest.mark.parametrize("reset", [True, False])
def test_the_loss_is_that_of_each_conversation_alone(batches, shift, reset):
    c, rows = small(shift=shift, reset=reset), batches[shift]
    params = init_params(c.model, 0)
    some = {key: value[1::5] for key, value in rows.items()}
    with jax.default_matmul_precision("highest"):
        expected = reference(c, params, some)
        run = jax.jit(partial(row_losses, config=c, stage=c.stages[0], eos_id=EOS, compute_dtype=jnp.float32))
        loss, told = run(params, some["tokens"], None, some["marks"])
    assert float(told.targets.sum()) == expected[2] > 20
    np.testing.assert_allclose(float(told.nats.sum()), expected[0], rtol=1e-5)
    np.testing.assert_allclose(float(loss), expected[1], rtol=1e-5)


def test_positions_begin_anew_with_each_conversation_and_padding_is_last():
    marks = jnp.array([[2, 3, 2, 4, 5, 5, 7, 0, 0], [3, 3, 3, 3, 3, 3, 3, 3, 3]])
    documents = conversations.documents(marks)
    assert documents.tolist() == [[1, 1, 1, 2, 2, 2, 3, 10, 10], [1] * 9]
    assert conversations.positions(documents).tolist() == [[0, 1, 2, 0, 1, 2, 0, 0, 1], list(range(9))]


def test_targets_are_learned_tokens_of_the_same_conversation():
    marks = np.array([[3, 3, 2, 5, 5, 0]])  # the first token of a conversation is nobody's target
    tokens = jnp.array([[9, 8, 7, 6, 5, 0]])
    inputs, targets, weights, own = conversations.targets_and_weights(tokens, jnp.asarray(marks), "next")
    assert weights.tolist() == [[1, 0, 0, 1, 0]] and targets.tolist() == [[8, 7, 6, 5, 0]] and own.shape == inputs.shape
    _, targets, weights, _ = conversations.targets_and_weights(tokens, jnp.asarray(marks), "inside")
    assert weights.tolist() == [[1, 0, 0, 1, 0, 0]] and targets[0, :5].tolist() == [8, 7, 6, 5, 0]
    full = jnp.full((1, 6), 3)  # of "inside" the last position has no target, whatever the first token is
    assert conversations.targets_and_weights(tokens, full, "inside")[2].tolist() == [[1, 1, 1, 1, 1, 0]]


def gradients(c, params, rows):
    shape = (c.stages[0].microbatches, -1)

    def cut(x):
        return jnp.asarray(x.reshape(*shape, *x.shape[1:]))

    batch = Batch(cut(rows["tokens"]), cut(rows["subset"]), cut(rows["digest"]), marks=cut(rows["marks"]))
    arguments = {"stage": c.stages[0], "eos_id": EOS, "num_subsets": 1, "compute_dtype": jnp.float32}
    return jax.jit(lambda p: mean_gradients(p, batch, config=c, **arguments))(params)


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_microbatches_of_unequal_counts_are_one_big_batch(batches, microbatches):
    """Averaging the microbatches' means would be wrong by far: their counts differ several times."""
    c, params = small(), init_params(small().model, 0)
    with jax.default_matmul_precision("highest"):
        expected, sums = gradients(c, params, batches["next"])
        found, parts = gradients(small(microbatches=microbatches), params, batches["next"])
    counts = (batches["next"]["marks"][:, 1:] & 1).sum(axis=1).reshape(microbatches, -1).sum(axis=1)
    assert counts.max() > 4 * counts.min()
    assert float(sums.targets) == float(parts.targets)
    np.testing.assert_allclose(float(parts.loss), float(sums.loss), rtol=1e-6)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-5 * np.abs(value).max(), err_msg=name)


MESHES = {
    "data": ({"replica": 2, "fsdp": 4}, {}),
    "tensor": ({"fsdp": 2, "tensor": 4}, {"microbatches": 2}),
    "context": ({"context": 4, "fsdp": 2}, {"microbatches": 2}),
    "context, inside": ({"context": 2, "replica": 2}, {"shift": "inside"}),
    "pipeline": ({"stage": 2, "fsdp": 2}, {"pipeline": (2, 1)}),
    "pipeline in turns": ({"stage": 2, "context": 2, "tensor": 2}, {"pipeline": (2, 2)}),
}

SLOW = ("tensor", "context, inside", "pipeline")  # the others have all axes, too


def step_on(c, sizes, rows):
    """(metrics, Adam's first moment) of one step on a mesh."""
    mesh = sharding.make_mesh({"fsdp": 1, **sizes}, jax.devices()[: int(np.prod(list(sizes.values())))])
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        check_mesh(c, mesh)
        shardings = place_state(c, jax.eval_shape(lambda: first_state(c)), mesh)
        length, count = c.stages[0].sequence_length, c.stages[0].rows_per_step
        plan = StagePlan("stage1", 0, length, count, 10, 1, 0, count * 10, 1, 10)
        step = step_function(c, plan, shardings, mesh, eos_id=EOS, num_subsets=1)
        placement = place_batches(c.stages[0], mesh)
        batch = placement.globalize(rows)
        if "reference" in rows:  # of test_dpo.py's
            batch = batch._replace(reference=placement._global(rows["reference"]))
        state, metrics = step(make_state(c, shardings), batch)
        return jax.device_get(metrics), jax.device_get(state.mu)


@pytest.fixture(scope="module")
def on_one_device(batches):
    return {shift: step_on(small(shift=shift), {}, batches[shift]) for shift in ("next", "inside")}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in MESHES]
)
def test_every_mesh_gives_the_loss_and_gradients_of_one_device(case, batches, on_one_device):
    sizes, options = MESHES[case]
    pipeline, shift = options.get("pipeline"), options.get("shift", "next")
    c = small(shift=shift, microbatches=options.get("microbatches", 1))
    if pipeline:
        with c.unlocked():
            c.model.pipeline.update(microbatches=pipeline[0], repeats=pipeline[1])
    metrics, moments = step_on(c, sizes, batches[shift])
    expected, first = on_one_device[shift]
    for key in ("targets", "padding", "subset_targets"):
        np.testing.assert_array_equal(metrics[key], expected[key])
    for key in ("loss", "log_z", "grad_norm"):
        np.testing.assert_allclose(metrics[key], expected[key], rtol=2e-5, err_msg=key)
    for name, value in first.items():
        np.testing.assert_allclose(moments[name], value, rtol=0, atol=1e-4 * np.abs(value).max(), err_msg=name)


def test_padding_is_nothing(batches):
    """Other tokens in its place change no bit of loss and gradients, nor attention's largest logit."""
    c, params = small(), init_params(small().model, 0)
    rows = {key: value[:8] for key, value in batches["next"].items()}
    rows["marks"], rows["tokens"] = rows["marks"].copy(), rows["tokens"].copy()
    rows["marks"][:, 20:] = 0
    other = {**rows, "tokens": np.where(rows["marks"] == 0, 77, rows["tokens"])}
    found = [gradients(c, params, some) for some in (rows, other)]
    assert all(np.array_equal(found[0][0][name], found[1][0][name]) for name in params)
    options = {"rope_base": 1e4, "eos_id": EOS, "compute_dtype": jnp.float32}
    logits = [
        attention_logits(c, params, some["tokens"][None], **options, marks=jnp.asarray(some["marks"][None]))
        for some in (rows, other)
    ]
    assert np.array_equal(*logits) and np.isfinite(logits[0]).all()
    unmarked = [attention_logits(c, params, some["tokens"][None], **options) for some in (rows, other)]
    assert not np.array_equal(*unmarked), "the comparison shows something"


def test_masked_rows_do_not_count_padding_as_repeats(batches):
    c = small()
    with c.unlocked():
        c.data.mask_repeats = 3
    rows = {key: value[:8] for key, value in batches["next"].items()}
    rows = {**rows, "marks": np.where(np.arange(LENGTH + 1) < 16, rows["marks"], 0)}
    rows["tokens"] = np.where(rows["marks"] == 0, 0, rows["tokens"])
    _, sums = gradients(c, init_params(c.model, 0), rows)
    assert float(sums.masked_rows) == 0 and float(sums.targets) > 0
