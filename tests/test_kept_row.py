"""A row that stays between calls: the tokens of the whole prompt, and only what is new of it computed."""

import jax
import jax.numpy as jnp
import pytest
from test_generate import EOS, generator
from test_model import small_model

from k2jax.errors import ConfigError
from k2jax.model import kept_row
from k2jax.model.generation import Generator
from k2jax.model.kept_row import KeptRow
from k2jax.model.sampling import Sampling
from k2jax.parallel import sharding

FIRST = [3, 3, EOS, 17, 30, 31, 40]


@pytest.fixture(scope="module")
def grouped() -> Generator:
    return generator(small_model())


@pytest.fixture
def row(grouped: Generator, monkeypatch: pytest.MonkeyPatch) -> KeptRow:
    monkeypatch.setattr(kept_row, "FIRST_SLOTS", 16)
    monkeypatch.setattr(kept_row, "SIZES", (4, 8))
    return KeptRow(grouped)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)], ids=["greedy", "drawn"])
def test_turns_give_the_tokens_of_their_whole_prompts(grouped: Generator, row: KeptRow, sampling: Sampling):
    """Whatever was cut: nothing, the last answer, or all but the beginning; and the cache has grown meanwhile."""
    prompt, computed = FIRST, []
    for turn, cut in enumerate((0, 0, 6, 0, 25)):
        before = row.num_computed
        new = row.generate(prompt, 9, sampling=sampling, seed=3)
        computed.append(row.num_computed - before)
        assert new == grouped.generate([prompt], 9, sampling=sampling, seed=3)[0], turn
        whole = prompt + new
        prompt = whole[: len(whole) - cut] + [30 + turn, 17, 20]
    assert row.ids[: len(FIRST)] == FIRST and len(row.ids) > 40 > kept_row.FIRST_SLOTS
    if not sampling.temperature:
        # All of the first; then the last answer's last token, which was drawn and not yet fed, and the three new ones;
        # of the third, which was cut six tokens short, the three alone.
        assert computed == [7, 4, 4, 3, 4]


def test_only_the_last_token_of_a_prompt_that_is_there_is_computed(row: KeptRow):
    first = row.generate(FIRST, 5)
    assert (row.num_computed, row.generate(FIRST, 5)) == (7, first)
    assert row.num_computed == 8
    other = row.generate([*FIRST[:4], 8], 5)
    assert row.num_computed == 9 and other != first


def test_a_stop_ends_it_and_is_no_new_token(grouped: Generator):
    free = grouped.generate([FIRST], 12, stop_at_eos=False)[0]
    stop = next(id for i, id in enumerate(free) if i > 2 and id not in free[:i])
    weights = {"eos_id": EOS, "stop_ids": (stop,)}
    ended = Generator(grouped.m, 1e4, _params(grouped), grouped.mesh, jnp.float32, **weights)
    row, pieces = KeptRow(ended), []
    new = row.generate(FIRST, 12, on_tokens=lambda ids: pieces.extend(ids))
    assert new == pieces == free[: free.index(stop)] == ended.generate([FIRST], 12)[0]
    assert row.ids == FIRST + new, "the stop itself was drawn, and not fed"


def _params(grouped: Generator) -> dict:
    from k2jax.model.decoder import init_params

    with jax.set_mesh(grouped.mesh):
        return jax.jit(lambda: init_params(grouped.m, seed=3))()


def test_a_listener_ends_it_and_the_row_goes_on_from_there(grouped: Generator, row: KeptRow):
    new = row.generate(FIRST, 40, on_tokens=lambda ids: True)
    assert 0 < len(new) <= 8
    longer = [*FIRST, *new, 33, 34]
    before = row.num_computed
    assert row.generate(longer, 6) == grouped.generate([longer], 6)[0]
    assert row.num_computed - before <= 3


def test_what_fails_in_the_middle_leaves_nothing_that_is_wrong(grouped: Generator, row: KeptRow):
    expected = row.generate(FIRST, 9)

    def fail(ids: list[int]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        row.generate([*FIRST, 21], 9, on_tokens=fail)
    assert row.ids == [] and row.generate(FIRST, 9) == expected
    with pytest.raises(ConfigError, match="token id 61"):
        row.generate([61], 1)
    assert row.generate(FIRST, 0) == []


def test_a_sharded_model_keeps_its_row_too(grouped: Generator):
    mesh = sharding.make_mesh({"replica": 1, "fsdp": 4, "tensor": 2})
    m = small_model(vocab_size=64, num_kv_heads=2)
    row, plain = KeptRow(generator(m, mesh)), generator(m)
    first = row.generate(FIRST, 5)
    assert first == plain.generate([FIRST], 5)[0]
    longer = [*FIRST, *first, 20, 21]
    assert row.generate(longer, 5) == plain.generate([longer], 5)[0] and row.num_computed <= 7 + 3
