"""One row of generation whose keys and values stay between calls: of a prompt that begins as the row does, only the
rest is computed.

Slots of the cache are positions here. What a new prompt does not share with the row is cut off, and overwritten; the
tokens are those that `Generator.generate` gives the whole prompt. Axes as in generation.py.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.model import generation
from k2jax.model.generation import Generator, State
from k2jax.model.sampling import GREEDY, Sampling
from k2jax.parallel import sharding

# Few sizes, as each is compiled anew: a turn that waits for a compiler is slower than one with some padding.
FIRST_SLOTS = 512  # that a row begins with; then twice as many, and so on
SIZES = (32, 128, generation.PREFILL)  # tokens in one call


class KeptRow:
    """A row of `generator`, whose model must not tell documents apart: a conversation is one, with any EOS."""

    def __init__(self, generator: Generator):
        assert not generator.m.mask_documents, "the row would be cut at the EOS of its turns"
        self.generator = generator
        self.ids: list[int] = []  # whose keys and values are in the cache
        self.num_computed = 0  # tokens of prompts, over all calls
        self._num_rows = sharding.row_parts(generator.mesh)  # but the first, they fill up the mesh
        self._slots, self._cache = 0, None

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        number: int = 0,
        on_tokens: Callable[[list[int]], bool | None] | None = None,
    ) -> list[int]:
        """The new ids, without the token that ended them. `number` is the row's, of which draws depend.

        `on_tokens(ids)` is called with every piece as it comes; where it returns True, the row ends there.
        """
        g = self.generator
        [prompt] = g.checked([prompt], max_new_tokens, sampling)
        shared = len([*takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, prompt[:-1], strict=False))])
        self.num_computed += len(prompt) - shared
        new: list[int] = []
        if max_new_tokens <= 0:
            return new
        with jax.set_mesh(g.mesh):
            state = self._begin(prompt, shared, max_new_tokens)
            number_B = g.place(np.arange(number, number + self._num_rows, dtype=np.int32))
            drawn: list[int] = []
            ended = False
            while not ended and len(drawn) < max_new_tokens:
                limit = min(max_new_tokens - len(drawn), generation.PIECE if on_tokens else generation.LONG_PIECE)
                rest = np.uint32(seed % 2**32), np.int32(limit), sampling, np.bool_(True)
                model = g.m, g.rope_base, g.eos_id, g.stop_ids
                out_BS, state = generation.decode(*model, g.weights, state, number_B, *rest)
                piece = np.asarray(out_BS)[0, :limit].tolist()
                end = next((i for i, id in enumerate(piece) if id in g.stop_ids), None)
                ended = end is not None
                drawn += piece[: end + 1] if ended else piece
                new += piece[:end] if ended else piece
                if on_tokens and piece[:end] and on_tokens(piece[:end]):
                    break
            self._cache, self.ids = state.cache, (prompt + drawn)[: int(state.slot)]
        return new

    def _begin(self, prompt: list[int], shared: int, max_new_tokens: int) -> State:
        """The prompt but its last token in the cache. Until `generate` is done with it, the row holds nothing."""
        g, last = self.generator, len(prompt) - 1
        calls, first = [], shared
        while first < last:
            size = next((size for size in SIZES if last - first <= size), SIZES[-1])
            calls.append((first, size))
            first += size
        self._reserve(max(first, len(prompt) + max_new_tokens))
        cache, self._cache, self.ids = self._cache, None, []
        documents = g.place(np.zeros((self._num_rows, self._slots), np.int32))
        for first, size in calls:
            tokens_BC = np.zeros((self._num_rows, size), np.int32)
            part = prompt[first : min(first + size, last)]
            tokens_BC[0, : len(part)] = part
            cache = generation.prefill(
                g.m, g.rope_base, g.weights, cache, g.place(tokens_BC), documents, np.int32(first)
            )
        one = np.zeros(self._num_rows, np.int32)
        visible_BS = np.broadcast_to(np.arange(self._slots) < last, (self._num_rows, self._slots))
        parts = map(g.place, (visible_BS, one + prompt[-1], one + last))
        return State(cache, *parts, jnp.int32(last), g.place(np.arange(self._num_rows) > 0))

    def _reserve(self, slots: int) -> None:
        """Room for so many, with what is in the cache."""
        if self._cache is not None and slots <= self._slots:
            return
        before, self._slots = self._cache, self._slots or FIRST_SLOTS
        while self._slots < slots:
            self._slots *= 2
        self._cache = self.generator.empty_cache(self._num_rows, self._slots)
        if before is not None:
            self._cache = jax.tree.map(_put, self._cache, before)


def _put(empty: jax.Array, before: jax.Array) -> jax.Array:
    longer = jax.lax.dynamic_update_slice(empty, before, (0,) * empty.ndim)
    return jax.device_put(longer, empty.sharding)
