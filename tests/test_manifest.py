"""The manifest: exact shares, one identity, and every misfit of stores and stages named."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2jax.data.manifest import (
    StoreSummary,
    build_manifest,
    canonical_json,
    check_manifest,
    describe,
    manifest_digest,
    num_windows,
    sha256_json,
    share_out,
)
from k2jax.errors import ConfigError

STORE = StoreSummary(
    path="stores/x", root_digest="ab" * 32, tokenizer_sha256="cd" * 32, vocab_size=100, eos_id=2,
    num_tokens=90, num_train_tokens=81, num_documents=3,
)  # fmt: skip
STORES = {"web": STORE, "code": replace(STORE, num_train_tokens=41, path="gs://b/code")}
STAGE = {"name": "one", "sequence_length": 8, "rows_per_step": 4, "steps_per_chunk": 5, "chunks": 2,
         "mix": {"web": 1, "code": 2}}  # fmt: skip


def build(stage=(), stores=STORES, label_shift="next"):
    return build_manifest(stages=[STAGE | dict(stage)], stores=stores, seed=7, label_shift=label_shift)


@given(st.integers(0, 10**12), st.dictionaries(st.text(max_size=3), st.fractions(0, 10**6), min_size=1))
def test_shares_are_exact_by_largest_remainder(total, weights):
    weights = {name: weight + Fraction(1, 1000) for name, weight in weights.items()}
    shares = share_out(total, weights)
    assert sum(shares.values()) == total
    rest = {name: total * weight / sum(weights.values()) - shares[name] for name, weight in weights.items()}
    assert all(-1 < r < 1 for r in rest.values())
    rounded_up = [r + 1 for r in rest.values() if r < 0]
    rounded_down = [r for r in rest.values() if r >= 0]
    assert not rounded_up or min(rounded_up) >= max(rounded_down)


def test_a_window_shares_its_last_token_with_the_next_for_label_shift_next():
    assert [num_windows(n, 8, "next") for n in (0, 8, 9, 16, 17)] == [0, 0, 1, 1, 2]
    assert [num_windows(n, 8, "inside") for n in (0, 7, 8, 16, 17)] == [0, 0, 1, 2, 2]


def test_rows_follow_windows_times_repeats_of_the_training_tokens():
    [stage] = build()["stages"]
    assert stage["subsets"] == [
        {"name": "code", "repeats": 2.0, "windows": 5, "rows": 20},
        {"name": "web", "repeats": 1.0, "windows": 10, "rows": 20},
    ]


def test_repeats_are_the_decimals_that_were_written():
    # 15 * 0.1 = 5 * 0.3: 2.5 rows each, and the tie goes by name. As floats, web's share would be the larger.
    stores = {**STORES, "web": replace(STORE, num_train_tokens=121)}
    one_step = {"mix": {"web": 0.1, "code": 0.3}, "rows_per_step": 5, "steps_per_chunk": 1, "chunks": 1}
    assert [s["rows"] for s in build(one_step, stores)["stages"][0]["subsets"]] == [3, 2]


def test_the_digest_is_of_the_content_and_not_of_the_place():
    digest = manifest_digest(build())
    moved = {name: replace(store, path="elsewhere") for name, store in STORES.items()}
    assert manifest_digest(build(stores=moved)) == digest
    assert manifest_digest(build({"mix": {"code": 2, "web": 1}})) == digest
    assert manifest_digest(build({"chunks": 3})) != digest
    assert manifest_digest(build(stores={**STORES, "web": replace(STORE, root_digest="ef" * 32)})) != digest
    assert canonical_json({"b": [1, "é"], "a": None}) == b'{"a":null,"b":[1,"\\u00e9"]}'
    assert sha256_json({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"stage": {"mix": {"wbe": 1}}}, "'one'.*'wbe'.*code, web"),
        ({"stage": {"mix": {}}}, "mix is empty"),
        ({"stage": {"mix": {"web": 0}}}, "'web' is 0"),
        ({"stage": {"mix": {"web": -1}}}, "'web' is -1"),
        ({"stage": {"sequence_length": 41}}, "'code' has 41 training tokens"),
        ({"stores": {}}, "no stores"),
        ({"stores": {**STORES, "web": replace(STORE, tokenizer_sha256="0")}}, "'code' and 'web'.* tokenizer"),
        ({"stores": {**STORES, "web": replace(STORE, vocab_size=99)}}, "vocab_size .100 and 99"),
        ({"stores": {**STORES, "web": replace(STORE, eos_id=1)}}, "eos_id .2 and 1"),
        ({"label_shift": "left"}, "'left'.*next, inside"),
    ],
)
def test_what_does_not_fit_is_named(change, complaint):
    with pytest.raises(ConfigError, match=complaint) as error:
        build(**change)
    assert "\n" not in str(error.value)


NONE = {
    "format": lambda m: m.update(format=2), "seed": lambda m: m.update(seed=-1),
    "stores": lambda m: m.update(stores=[]),
    "no stage": lambda m: m.update(stages=[]), "a store": lambda m: m["stores"]["web"].update(num_tokens="90"),
    "chunks": lambda m: m["stages"][0].update(chunks=1.0), "absurd": lambda m: m["stages"][0].update(chunks=1 << 60),
    "subset": lambda m: m["stages"][0]["subsets"][0].update(name="other"),
    "rows": lambda m: m["stages"][0]["subsets"][0].update(rows=1), "label": lambda m: m.update(label_shift=None),
    "windows": lambda m: m["stages"][0]["subsets"][0].update(windows=0), "nothing": lambda m: m.clear(),
}  # fmt: skip


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_manifest_is_refused(name):
    manifest = build()
    check_manifest(manifest, "x.json")
    NONE[name](manifest)
    with pytest.raises(ConfigError, match="x.json: its manifest is none: .*: restore it from a copy"):
        check_manifest(manifest, "x.json")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        check_manifest([], "x.json")


def test_the_table_at_start_up_shows_shares_and_epochs():
    lines = describe(build()).splitlines()
    assert "stage one: 10 steps in 2 chunks, 320 tokens, 4 rows of 8 a step" in lines
    assert lines[-2].split() == ["code", "160", "50.00%", "2", "4"]
    assert lines[-1].split() == ["web", "160", "50.00%", "1", "2"]
