"""The verifier's own order, a second implementation from the specification, gives what training reads."""

import hashlib
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_order import defer, manifests, tiny_manifest
from test_order_change import histories
from verifier import SPECIFICATION, verifier

from k2jax.data.chunks import checkpoint_steps, tokens_before
from k2jax.data.loader import batch_digest, row_digests
from k2jax.data.manifest import canonical_json, manifest_digest, sha256_json
from k2jax.data.order import Order
from k2jax.data.permutation import derive_key, permute, splitmix
from k2jax.run.digest import combine, numpy_digest


def assert_the_same(part, order):
    """All that both say of every step."""
    assert (part.digest, part.last) == (order.digest(), order.num_steps)
    assert [last for _, last in part.chunks()] == checkpoint_steps(order)
    for step in range(1, order.num_steps + 1):
        assert (part.positions(step) == order.positions(step)).all()
        ours, theirs = order.of_step(step).rows(order.positions(step)), part.rows(step)
        assert [column.tolist() for column in theirs] == [column.tolist() for column in ours[1:]]
        assert part.stage_of(step).name == order.stage_of_step(step).name
        assert part.tokens(step) == tokens_before(order, step + 1)


def ranges(draw, order):
    """Entries of a journal that fit what is still read of an order."""
    entries, now = [], order
    for _ in range(draw(st.integers(0, 3))):
        steps = range(now.after_step + 1, now.num_steps + 1)
        if not steps:
            break
        positions = now.positions(draw(st.sampled_from(steps)))
        entries.append(
            defer(int(positions[0]), int(positions[-1]) + 1, draw(st.sampled_from(["skip", "defer"])))
        )
        now = Order(order.manifest, entries, order.past, order.after_step)
    return entries, now


def decided(entries):
    return [(e["kind"], *e["positions"]) for e in entries]


@settings(max_examples=60)
@given(manifests(), st.data())
def test_one_manifest_with_a_journal(manifest, data):
    entries, order = ranges(data.draw, Order(manifest))
    assert_the_same(verifier.Part(manifest, decided(entries)), order)


@settings(max_examples=40)
@given(histories(), st.data())
def test_manifests_that_take_over(changing, data):
    part = order = None
    for manifest in changing:
        after = 0
        if order:
            if order.after_step == order.num_steps:
                break
            after = data.draw(st.integers(order.after_step + 1, order.num_steps))
        entries, new = ranges(data.draw, Order(manifest, (), order, after))
        part, order = verifier.Part(manifest, decided(entries), part, after), new
        assert_the_same(part, order)


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permutations(n, key):
    found = verifier.permute(np.arange(n), n, key)
    assert sorted(found.tolist()) == list(range(n))
    assert found.tolist() == permute(np.arange(n), n, key).tolist()


@pytest.mark.parametrize("n", [2**48, 2**48 - 1, 2**47 + 12345, 10**12])
def test_large_permutations(n):
    some = np.array([0, 1, n // 2, n - 1])
    assert verifier.permute(some, n, 2**64 - 1).tolist() == [permute(int(x), n, 2**64 - 1) for x in some]


def test_batches():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 2**31, (9, 33)).astype(np.uint32)
    assert verifier.batch_digest(tokens) == batch_digest(row_digests(np.arange(9), tokens))


# ---- the specification's own numbers, by k2jax: what a stranger would check a third implementation with -------------


def vectors(name):
    """The lines of a block of SPECIFICATION.md, each split at its equals sign."""
    [block] = re.findall(rf"```vectors {name}\n(.*?)```", SPECIFICATION.read_text(), re.S)
    return [[part.strip() for part in line.split("=", 1)] for line in block.splitlines()]


def test_the_specification_has_the_keys_and_permutations_of_training():
    for left, right in vectors("keys"):
        assert derive_key(*json.loads(left)) == int(right, 16)
    for left, right in vectors("permutation"):
        x, n, key = (int(number, 0) for number in left.removeprefix("permute(").rstrip(")").split(","))
        assert permute(x, n, key) == int(right)


def rows_told(rows, manifest):
    """As the specification writes them."""
    names = sorted(manifest["stores"])
    return " ".join(f"{names[s]}/{e}/{w}" for s, e, w in zip(*rows, strict=True))


def example():
    [block] = re.findall(r"```json example\n(.*?)```", SPECIFICATION.read_text(), re.S)
    return json.loads(block)


def changed(manifest):
    """Of the specification's third example: other repeats in the first stage."""
    manifest = json.loads(json.dumps(manifest))
    for subset, repeats, rows in zip(manifest["stages"][0]["subsets"], (3.0, 1.0), (14, 2), strict=True):
        subset |= {"repeats": repeats, "rows": rows}
    return manifest


@pytest.mark.parametrize("name", ["example", "example with a journal", "example that changes"])
def test_the_specification_has_the_examples_of_training(name):
    """By training's code, and by the verifier's."""
    manifest, found = example(), dict(vectors(name))
    entries = [] if name == "example" else [defer(0, 4), defer(16, 18, "skip")]
    entries = entries[:1] if name.endswith("changes") else entries
    order, part = Order(manifest, entries), verifier.Part(manifest, decided(entries))
    if name.endswith("changes"):
        order, part = (
            kind(changed(manifest), (), before, 1) for kind, before in ((Order, order), (verifier.Part, part))
        )
    if name == "example":
        assert found.pop("manifest digest") == manifest_digest(manifest) == verifier.manifest_digest(manifest)
    assert found.pop("order digest") == order.digest() == part.digest
    for step in range(1, order.num_steps + 1):
        told = found.pop(f"step {step}")
        assert told == rows_told(order.rows(order.positions(step))[1:] if step > order.after_step else
                                 order.past.rows(order.positions(step))[1:], manifest)  # fmt: skip
        assert told == rows_told(part.rows(step), manifest)
    assert not found


def test_the_specification_has_the_ledgers_digests():
    found = dict(vectors("ledger"))
    row, content = json.loads(found["row"]), json.loads(found["content"])
    assert (canonical_json(row).decode(), canonical_json(content).decode()) == (
        found["row"],
        found["content"],
    )
    assert hashlib.sha256(canonical_json(row) + b"\n").hexdigest() == found["steps"] == content["steps"]
    assert sha256_json(content) == found["record"]


def test_the_specification_has_the_digests_of_arrays():
    text = SPECIFICATION.read_text()
    values = np.array([[1, -2, 0.5], [0, 3.25, -0.125]], np.float32)
    assert f"of float32: {numpy_digest(values)}." in text
    digests = {"params/b": 1, "params/a": 2**32 - 1}
    assert combine(digests) == verifier.combine(digests) and combine(digests) in text
    assert f"mix(5, 3) = {splitmix(5, 3):#x}" in text


def test_digests_of_arrays_in_blocks():
    values = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
    parts = [(0, 0, 0), (0, 4, 0), (2, 0, 0), (2, 4, 0)]
    blocks = [values[:2, :4], values[:2, 4:], values[2:, :4], values[2:, 4:]]
    found = sum(verifier.weighted_sum(b, at, values.shape) for at, b in zip(parts, blocks, strict=True))
    assert found & 0xFFFFFFFF == numpy_digest(values)


def test_the_specification_has_the_batch_digest_of_training():
    found = dict(vectors("batch"))
    tokens = np.array(json.loads(found["rows"]), np.uint32)
    lanes = row_digests(np.arange(len(tokens)), tokens)
    for i, row in enumerate(lanes):
        assert found[f"row {i}"] == row.astype("<u4").tobytes().hex()
        assert (
            found[f"row {i}"]
            == hashlib.sha256(i.to_bytes(8, "little") + tokens[i].astype("<u4").tobytes()).hexdigest()
        )
    assert found["batch"] == batch_digest(lanes)


def test_a_hostile_manifest_is_refused_before_it_takes_memory():
    huge = tiny_manifest([(1 << 40, 1, 1, {"a": (7, 1)})])
    with pytest.raises(verifier.Wrong, match="chunks"):
        verifier.Part(huge, [])
    many = tiny_manifest([(1, 1 << 40, 1, {"a": (1, 1)})])
    with pytest.raises(verifier.Wrong, match="epochs"):
        verifier.Part(many, [])
