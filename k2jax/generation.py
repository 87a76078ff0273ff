"""Generation: prompts of different lengths go on together from a cache of keys and values, sampled on the device.

Each row's prompt but its last token is put in the cache (prefill, in pieces of at most PREFILL tokens); then one
compiled loop feeds every row's last token, samples the next, and goes on until all rows have ended or the call's limit
is reached. The limit is an argument of the program, so that streaming calls the same program for a few tokens at a time.

Shorter prompts are padded on the right, and all rows write their new tokens to the same slot of the cache, behind the
longest prompt: attention does not mind the gap, which `visible_BS` hides, and positions are each row's own.

Axes as in model.py; S counts the slots of the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from k2jax import sharding
from k2jax.attention import attend_where
from k2jax.errors import ConfigError
from k2jax.launch import compute_dtype
from k2jax.model import Block, Params, dense, document_ids, parameter_table, rms_norm, rope_table
from k2jax.saved import SavedStep, restore_params
from k2jax.sharding import shard

PREFILL = 512  # tokens of each row that one call of the prefill takes, at most: bounds its attention's memory
PIECE = 8  # tokens between two calls of `on_tokens`


class Sampling(NamedTuple):
    """How a token is drawn: the temperature first, then top-k, then top-p of what that leaves."""

    temperature: float = 0.0  # 0: greedy, the other two do not matter
    top_k: int = 0  # the k likeliest and what ties with the last of them; 0: all
    top_p: float = 1.0  # the fewest tokens that have this probability together, and ties; 1: all


class State(NamedTuple):
    """The rows of a call between two tokens; on the device, donated from call to call."""

    cache: list[tuple[jax.Array, jax.Array]]  # of each layer: keys and values (B, K, S, H)
    visible_BS: jax.Array  # the slots that the next token sees, besides its own
    token_B: jax.Array  # each row's last token, not in the cache yet
    position_B: jax.Array  # of that token in its row
    slot: jax.Array  # where in the cache that token goes, in every row
    ended_B: jax.Array


class Generator:
    """A model ready to generate: layers unstacked, matrices in the type that products are computed in."""

    def __init__(
        self,
        m: ConfigDict,
        rope_base: float,
        params: Params,
        mesh: Mesh,
        compute_dtype: jnp.dtype,
        *,
        eos_id: int,
        keep_params: bool = True,
    ):
        """`params` as parameter_table names them. `keep_params=False` empties the dictionary on the way, so that
        memory peaks at the parameters and one array more."""
        self.m, self.mesh, self.dtype, self.eos_id = m, mesh, jnp.dtype(compute_dtype), eos_id
        self.weights = _unstack(m, dict(params) if keep_params else params, self.dtype)
        self._prefill = jax.jit(partial(_prefill, m, rope_base), donate_argnums=1)
        self._decode = jax.jit(partial(_decode, m, rope_base, eos_id), donate_argnums=1)
