"""A few lines of text from a model, for the end of a run: one compiled program, the whole row recomputed each token."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from k2jax.data.tokenizer import load_tokenizer
from k2jax.model import Decoder, Params

TEMPERATURE = 0.8
ROW_MULTIPLE = 64  # rows are padded to this, so that prompts of different lengths share a compiled program


def sample_text(
    config: ConfigDict,
    rope_base: float,
    params: Params,
    tokenizer: Path,
    compute_dtype: jnp.dtype,
    eos_id: int,
) -> list[tuple[str, str]]:
    """[(prompt, continuation)] for `config.eval.prompts`, sampled at temperature 0.8 with the run's seed."""
    encoder = load_tokenizer(tokenizer)
    fill = jax.jit(partial(_continue, config=config, rope_base=rope_base, compute_dtype=compute_dtype))
    texts = []
    for i, prompt in enumerate(config.eval.prompts):
        ids = encoder.encode(prompt, add_special_tokens=False).ids or [eos_id]
        length = -(-(len(ids) + config.eval.new_tokens) // ROW_MULTIPLE) * ROW_MULTIPLE
        row = jnp.zeros((1, length), jnp.int32).at[0, : len(ids)].set(jnp.array(ids, jnp.int32))
        out = fill(params, row, jnp.int32(len(ids)), jax.random.fold_in(jax.random.key(config.seed), i))
        new = jax.device_get(out)[0, len(ids) : len(ids) + config.eval.new_tokens].tolist()
        new = new[: new.index(eos_id)] if eos_id in new else new
        whole = encoder.decode(ids + new, skip_special_tokens=False)
        texts.append((prompt, whole[len(encoder.decode(ids, skip_special_tokens=False)) :]))
    return texts


def _continue(
    params: Params,
    row: jax.Array,
    length: jax.Array,
    key: jax.Array,
    *,
    config: ConfigDict,
    rope_base: float,
    compute_dtype: jnp.dtype,
) -> jax.Array:
    """Fills (1, S) tokens from position `length` on, `new_tokens` of them. Padding to the right is causally unseen."""
    decoder = Decoder(config.model, params, compute_dtype)

    def one(i: int, row: jax.Array) -> jax.Array:
        position = length + i
        hidden = jax.lax.dynamic_slice_in_dim(decoder(row, rope_base), position - 1, 1, axis=1)
        logits = decoder.logits(hidden)[0, 0].astype(jnp.float32) / TEMPERATURE
        token = jax.random.categorical(jax.random.fold_in(key, i), logits)
        return row.at[0, position].set(token.astype(jnp.int32))

    return jax.lax.fori_loop(0, config.eval.new_tokens, one, row)
