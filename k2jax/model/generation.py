"""Generation: prompts of different lengths go on together from a cache of keys and values, sampled on the device.

Every token of the prompts but the last is put in the cache (prefill, at most PREFILL of a row at a time). Then one
compiled loop feeds each row's last token and draws the next, until all rows have ended or the call's limit is reached;
the limit is an argument of the program, so that streaming calls the same program for a few tokens at a time.

Shorter prompts are padded on the right, and all rows write a new token to the same slot of the cache, behind the
longest prompt. Attention does not mind the gap, which `visible_BS` hides; positions are each row's own.

Axes as in decoder.py; S counts the slots of the cache.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, FrozenConfigDict

from k2jax.errors import ConfigError
from k2jax.model.attention import attend_where
from k2jax.model.decoder import Block, Matrices, Params, parameter_table, rms_norm, rope_table
from k2jax.model.sampling import GREEDY, Sampling, check_sampling, draw
from k2jax.parallel import sharding
from k2jax.parallel.sharding import shard

PREFILL = 512  # tokens of a row in one call: bounds the memory of attention and of activations
PIECE, LONG_PIECE = 8, 64  # tokens of a row in one call of the loop: with `on_tokens`, without (answers Ctrl-C, too)
SMALLEST = 16  # bucket

INPUTS = {"layers.wo_LNHD": 2}  # leading dimensions that a product contracts (after L), where they are not one

# As in parameter_table, but "layers" is a list of each layer's, and matrices are (out..., in...), the head (V, D): so
# each output reads one run of memory. One row is then a fifth faster on CPU, 32 rows are up to 1.7 times.
Weights = dict[str, Any]


class State(NamedTuple):
    """The rows of a call between two tokens, on the device."""

    cache: list[tuple[jax.Array, jax.Array]]  # of each layer: keys and values (B, K, S, H); (K, S, H) where B is 1
    visible_BS: jax.Array  # bool: the slots that the next token sees
    token_B: jax.Array  # each row's last token, not in the cache yet
    position_B: jax.Array  # that token's, in its row
    slot: jax.Array  # in the cache, where that token goes: the same in all rows
    ended_B: jax.Array  # bool


class Generator:
    """A model made ready: its layers unstacked, its matrices in the type that products are computed in."""

    def __init__(
        self,
        m: ConfigDict,
        rope_base: float,
        params: Params,
        mesh: Mesh,
        compute_dtype: jnp.dtype,
        *,
        eos_id: int,
        stop_ids: Sequence[int] = (),
        keep_params: bool = True,
    ):
        """`params` as parameter_table names them, on `mesh`. EOS ends documents; a text is ended by it or `stop_ids`.

        With `keep_params=False` the dictionary is emptied on the way: memory peaks at the parameters and one array.
        """
        self.m, self.rope_base, self.mesh, self.eos_id = FrozenConfigDict(m), rope_base, mesh, eos_id
        self.stop_ids = tuple(dict.fromkeys((eos_id, *stop_ids)))
        self.weights = _unstack(m, dict(params) if keep_params else params, mesh, jnp.dtype(compute_dtype))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop_at_eos: bool = True,
        on_tokens: Callable[[int, list[int]], bool | None] | None = None,
        first_row: int = 0,
    ) -> list[list[int]]:
        """The new ids of each prompt, without the token that ended it. An empty prompt is a document's beginning.

        `on_tokens(row, ids)` is called with every piece as it comes; where it returns True, the row ends there.
        What a row draws depends on the seed, its number (`first_row` is that of the first prompt here) and the
        position: not on the other rows.
        """
        rows = self.checked(prompts, max_new_tokens, sampling)
        new: list[list[int]] = [[] for _ in rows]
        going, left = set(range(len(rows))), max_new_tokens
        if not rows or left <= 0:
            return new
        with jax.set_mesh(self.mesh):
            state, number_B = self._begin(rows, max_new_tokens, first_row)
            while going and left:
                limit = min(left, PIECE if on_tokens else LONG_PIECE)
                left -= limit
                rest = np.uint32(seed % 2**32), np.int32(limit), sampling, np.bool_(stop_at_eos)
                model = self.m, self.rope_base, self.eos_id, self.stop_ids
                out_BS, state = decode(*model, self.weights, state, number_B, *rest)
                pieces = np.asarray(out_BS)[: len(rows), :limit].tolist()
                for row in sorted(going):
                    ids = pieces[row]
                    end = next((i for i, id in enumerate(ids) if id in self.stop_ids), None) if stop_at_eos else None
                    if end is not None:
                        ids = ids[:end]
                        going.remove(row)
                    new[row] += ids
                    if on_tokens and ids and on_tokens(row, ids):
                        going.discard(row)
        return new

    def checked(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling
    ) -> list[list[int]]:
        """The prompts as rows that have a token. Raises ConfigError for what cannot be computed."""
        check_sampling(sampling)
        rows = [list(ids) or [self.eos_id] for ids in prompts]
        largest = max(map(max, rows), default=0)
        longest = max(map(len, rows), default=0) + max_new_tokens
        if self.m.sliding_window and longest > self.m.sliding_window:
            raise ConfigError(
                f"prompt and new tokens are {longest:,} together, beyond model.sliding_window={self.m.sliding_window}: "
                f"attention within a window is not computed: give shorter prompts, or ask for fewer tokens"
            )
        if largest >= self.m.vocab_size:
            raise ConfigError(
                f"token id {largest} in a prompt: the model has {self.m.vocab_size}; is this the tokenizer it is for?"
            )
        return rows

    def _begin(self, rows: list[list[int]], max_new_tokens: int, first_row: int) -> tuple[State, jax.Array]:
        """The prompts in the cache, and the rows' numbers."""
        data_parallel = sharding.row_parts(self.mesh)
        B = data_parallel * (1 << (-(-len(rows) // data_parallel) - 1).bit_length())
        longest = max(map(len, rows)) - 1
        calls = -(-longest // PREFILL)
        C = bucket(-(-longest // calls)) if calls else 0  # tokens a call
        S = bucket(calls * C + max_new_tokens)
        length_B = np.ones(B, np.int32)  # rows that fill up the batch have one token and have ended
        tokens_BS = np.zeros((B, S), np.int32)
        for row, ids in enumerate(rows):
            length_B[row], tokens_BS[row, : len(ids)] = len(ids), ids
        ends_BS = (tokens_BS == self.eos_id).astype(np.int32) if self.m.mask_documents else np.zeros_like(tokens_BS)
        document_BS = np.cumsum(ends_BS, axis=1, dtype=np.int32) - ends_BS
        last_B = (np.arange(B), length_B - 1)
        visible_BS = (np.arange(S) < length_B[:, None] - 1) & (document_BS == document_BS[last_B][:, None])

        cache = self.empty_cache(B, S)
        documents = self.place(document_BS)
        for first in range(0, calls * C, C or 1):
            tokens_BC = self.place(tokens_BS[:, first : first + C])
            cache = prefill(self.m, self.rope_base, self.weights, cache, tokens_BC, documents, np.int32(first))
        token_B, position_B = tokens_BS[last_B], length_B - 1
        parts = map(self.place, (visible_BS, token_B, position_B))
        ended_B = self.place(np.arange(B) >= len(rows))
        state = State(cache, *parts, jnp.int32(calls * C), ended_B)
        return state, self.place(np.arange(first_row, first_row + B, dtype=np.int32))

    def empty_cache(self, B: int, S: int) -> list[tuple[jax.Array, jax.Array]]:
        """Of each layer keys and values, zeros, for B rows of S slots."""
        m, place = self.m, sharding.named(self.mesh, sharding.ACTIVATIONS["cache_BKSH"])
        shape = B, m.num_kv_heads, S, m.head_dim
        if B == 1:  # without it: XLA's CPU backend would copy the cache at every token
            shape, place = shape[1:], sharding.named(self.mesh, sharding.ACTIVATIONS["cache_BKSH"][1:])
        zeros = partial(jnp.zeros, shape, self.weights["embed_VD"].dtype, device=place)
        return [(zeros(), zeros()) for _ in range(m.num_layers)]

    def place(self, array_BX: np.ndarray) -> jax.Array:
        """An array of the host, the same in every process, split over the batch."""
        place = sharding.named(self.mesh, ("batch", "position")[: array_BX.ndim])
        return jax.make_array_from_callback(array_BX.shape, place, lambda index: array_BX[index])


def bucket(size: int) -> int:
    """`size` rounded up to one of a few sizes (2^n and 1.5 * 2^n), so that few programs are compiled."""
    power = 1 << max(size - 1, SMALLEST - 1).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 and power > SMALLEST else power


def _unstack(m: ConfigDict, params: Params, mesh: Mesh, dtype: jnp.dtype) -> Weights:
    """Takes every array out of `params`: layers apart, and matrices in `dtype`.

    Layers stay apart because a loop over stacked ones copies each layer's weights before it uses them.
    """
    weights: Weights = {"layers": [{} for _ in range(m.num_layers)]}
    for name, p in parameter_table(m).items():
        array, axes = params.pop(name), p.axes
        kind = dtype if p.is_matrix else array.dtype  # norms and biases are computed in float32
        if name.startswith("layers."):
            inputs = INPUTS.get(name, 1) if p.is_matrix else 0
            place = sharding.named(mesh, axes[1 + inputs :] + axes[1 : 1 + inputs])
            for number, layer in enumerate(weights["layers"]):
                layer[name.removeprefix("layers.")] = _take_layer(array, number, inputs, kind, place)
        elif name == "head_DV":
            place = sharding.named(mesh, axes[::-1])
            weights["head_VD"] = _transpose(array, dtype, place)
        else:
            weights[name] = jax.device_put(array.astype(kind), sharding.named(mesh, axes))
    weights.setdefault("head_VD", weights["embed_VD"])
    return weights


@partial(jax.jit, static_argnums=(2, 3, 4))
def _take_layer(w_LX: jax.Array, number: int, inputs: int, dtype: jnp.dtype, place: NamedSharding) -> jax.Array:
    layer = jax.lax.dynamic_index_in_dim(w_LX, number, keepdims=False).astype(dtype)
    layer = layer.transpose(*range(inputs, layer.ndim), *range(inputs))
    return jax.lax.with_sharding_constraint(layer, place)


@partial(jax.jit, static_argnums=(1, 2))
def _transpose(w_DV: jax.Array, dtype: jnp.dtype, place: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(w_DV.T.astype(dtype), place)


# ---- the two programs ------------------------------------------------------------------------------------------------


def _forward(
    m: ConfigDict,
    weights: Weights,
    cache: list[tuple[jax.Array, jax.Array]],
    tokens_BT: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    slot: jax.Array,
    allowed_BTS: jax.Array,
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """Hidden states of T tokens that go to the slots from `slot` on, and the cache with them in it."""
    written: list[tuple[jax.Array, jax.Array]] = []

    def attend(q_BTNH: jax.Array, *kv: jax.Array) -> jax.Array:
        B, _, K, H = kv[0].shape
        written.append(tuple(_write(old, new, slot) for old, new in zip(cache[len(written)], kv, strict=True)))
        return attend_where(q_BTNH, *(c.reshape(B, K, -1, H) for c in written[-1]), allowed_BTS)

    x_BTD = shard(weights["embed_VD"][tokens_BT], "x_BTD")
    for arrays in weights["layers"]:
        x_BTD = Block(m, arrays)(x_BTD, rope, attend, _product)
    return rms_norm(x_BTD, weights["final_norm_D"], m.norm_eps), written


def _product(x: jax.Array, w: Matrices, into: int = 1) -> Any:
    """x[B, T, in...] . w[out..., in...] -> [B, T, out...]: model.dense for weights as they are here."""
    if isinstance(w, tuple):
        return tuple(_product(x, each, into) for each in w)
    B, T = x.shape[:2]
    x_XI = x.reshape(B * T, -1)
    if 8 <= B * T < 16:  # XLA's CPU backend takes longer for these than for 16
        x_XI = jnp.pad(x_XI, ((0, 16 - B * T), (0, 0)))
    y_XO = jnp.einsum("XI,OI->XO", x_XI, w.reshape(-1, x_XI.shape[1]))
    return y_XO[: B * T].reshape(B, T, *w.shape[: w.ndim - into])


def _write(cache: jax.Array, new_BTKH: jax.Array, slot: jax.Array) -> jax.Array:
    """The cache of keys or of values with new ones from `slot` on."""
    new = new_BTKH.transpose(0, 2, 1, 3).reshape(*cache.shape[:-2], -1, cache.shape[-1])
    return jax.lax.dynamic_update_slice(cache, new, (*[0] * (cache.ndim - 2), slot, 0))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def prefill(
    m: FrozenConfigDict,
    rope_base: float,
    weights: Weights,
    cache: list[tuple[jax.Array, jax.Array]],
    tokens_BC: jax.Array,
    document_BS: jax.Array,
    first: jax.Array,
) -> list[tuple[jax.Array, jax.Array]]:
    """The cache with the prompts' tokens from position `first` on; there, slots and positions are the same."""
    S, C = document_BS.shape[1], tokens_BC.shape[1]
    position_C = first + jnp.arange(C)
    document_BC = jax.lax.dynamic_slice_in_dim(document_BS, first, C, axis=1)
    allowed_BCS = (jnp.arange(S)[None, None, :] <= position_C[None, :, None]) & (
        document_BS[:, None, :] == document_BC[:, :, None]
    )
    rope = tuple(t[position_C] for t in rope_table(m, rope_base, S))
    return _forward(m, weights, cache, tokens_BC, rope, first, allowed_BCS)[1]


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def decode(
    m: FrozenConfigDict,
    rope_base: float,
    eos_id: int,
    stop_ids: tuple[int, ...],
    weights: Weights,
    state: State,
    number_B: jax.Array,
    seed: jax.Array,
    limit: jax.Array,
    sampling: Sampling,
    stop_at_eos: jax.Array,
) -> tuple[jax.Array, State]:
    """At most `limit` tokens of each row: (B, S), filled from the left, and the state after them."""
    tables = rope_table(m, rope_base, state.visible_BS.shape[1])
    key_B = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(number_B)

    def more(carry: tuple[jax.Array, jax.Array, State]) -> jax.Array:
        return (carry[0] < limit) & ~carry[2].ended_B.all()

    def one(carry: tuple[jax.Array, jax.Array, State]) -> tuple[jax.Array, jax.Array, State]:
        i, out_BS, s = carry
        own = jnp.ones_like(s.visible_BS[:, :1])
        visible_BS = jax.lax.dynamic_update_slice(s.visible_BS, own, (0, s.slot))
        rope = tuple(t[s.position_B[:, None]] for t in tables)
        x_BTD, cache = _forward(
            m, weights, s.cache, s.token_B[:, None], rope, s.slot, visible_BS[:, None, :]
        )
        # The larger array first: XLA's CPU backend reads it twice as fast so.
        scores_VB = jnp.einsum("VD,BD->VB", weights["head_VD"], x_BTD[:, 0], preferred_element_type=jnp.float32)
        uniform_B = jax.vmap(jax.random.uniform)(jax.vmap(jax.random.fold_in)(key_B, s.position_B + 1))
        token_B = draw(shard(scores_VB.T, "scores_BV"), uniform_B, sampling)
        if m.mask_documents:
            visible_BS = visible_BS & (s.token_B != eos_id)[:, None]
        stops_B = (token_B[:, None] == jnp.asarray(stop_ids)).any(axis=1)
        ended_B = s.ended_B | (stop_at_eos & stops_B)
        out_BS = jax.lax.dynamic_update_slice(out_BS, token_B[:, None], (0, i))
        return i + 1, out_BS, State(cache, visible_BS, token_B, s.position_B + 1, s.slot + 1, ended_B)

    out_BS = jnp.zeros(state.visible_BS.shape, jnp.int32)
    _, out_BS, state = jax.lax.while_loop(more, one, (jnp.int32(0), out_BS, state))
    return jax.lax.with_sharding_constraint(out_BS, PartitionSpec()), state
