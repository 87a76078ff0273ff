"""The certificate of an export: logits of k2jax beside those of the written files, on fixed tokens.

k2jax's come from its own model code and the checkpoint, the files' from reference.py: two paths that share no layout,
no names and no mathematics. Weights are rounded to the export's type in both, and all computing is float32, so that
nothing but rounding may lie between them. Letters as in model/decoder.py.
"""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from k2jax.errors import NumericsError
from k2jax.hf.reference import numpy_logits
from k2jax.hf.stream import BUDGET_BYTES, ahead, blocks, read, rounded
from k2jax.model.attention import attend_causally
from k2jax.model.decoder import Block, dense, parameter_table, rms_norm, rope_table
from k2jax.run.saved import SavedStep, open_array

FORMAT = 1  # of parity.json
ROWS, POSITIONS = 2, 32
# Measured over 200 random models, of 1 to 16 layers and weights small to large: the difference was 0.2 to 4.4 times the
# noise, and 2e-7 to 2e-3 of the largest logit (median 1e-6): a fixed tolerance would refuse some, or miss mistakes.
TIMES_NOISE = 16
MOST, LEAST = 1e-2, 1e-6  # of the largest logit: bounds of the tolerance, whatever the noise

Wanted = tuple[str, tuple[int | slice, ...]]  # name in parameter_table, and which part of the array


class Comparison(NamedTuple):
    """How far the two sets of logits are apart, and how far they may be."""

    largest_difference: float
    tolerance: float
    noise: float  # see reference.Logits
    largest_logit: float


def probe_tokens(m: ConfigDict, context: int) -> np.ndarray:
    """(B, T) int32 over the whole vocabulary: fixed for ever, whatever a library's random numbers do."""
    length = min(POSITIONS, context)
    hashes = [
        [hashlib.sha256(f"k2jax parity {row} {t}".encode()).digest() for t in range(length)] for row in range(ROWS)
    ]
    return np.array([[int.from_bytes(h[:8], "big") % m.vocab_size for h in row] for row in hashes], np.int32)


class _Next:
    """Stands for a weight of a Block: read when the Block takes it, and dropped when it is used."""

    def __init__(self, weights: Iterator[np.ndarray]):
        self._weights = weights

    def __getitem__(self, index: Any) -> jax.Array:
        return jnp.asarray(next(self._weights))


def checkpoint_logits(saved: SavedStep, dtype: np.dtype, tokens_BT: np.ndarray) -> np.ndarray:
    """k2jax's logits, float32 (B, T, V), its weights rounded to `dtype` and read one after the other.

    The table of parameters has a layer's in the order in which a Block takes them; another order would show at once.
    """
    m = saved.config.model
    arrays = {name: open_array(saved, f"{saved.weights}/{name}") for name in parameter_table(m)}
    layers = [name for name in arrays if name.startswith("layers.")]
    head, axis = ("embed_VD", 0) if m.tie_embeddings else ("head_DV", 1)
    wanted = [("embed_VD", (part, slice(None))) for part in blocks(arrays["embed_VD"], 0)]
    wanted += [(name, (layer,)) for layer in range(m.num_layers) for name in layers] + [("final_norm_D", ())]
    wanted += [(head, (part, slice(None)) if axis == 0 else (slice(None), part)) for part in blocks(arrays[head], axis)]

    def start(item: Wanted) -> np.ndarray:
        name, index = item
        return rounded(read(arrays[name], index, arrays[name][index].shape, f"checkpoint {saved.step}: {name}"), dtype)

    weights = ahead(wanted, start, lambda item: 4 * math.prod(arrays[item[0]][item[1]].shape), BUDGET_BYTES)
    with jax.default_matmul_precision("float32"):
        x_BTD = jnp.asarray(_lookup(tokens_BT, weights, m.vocab_size))
        rope = rope_table(m, saved.stage.rope_base, tokens_BT.shape[1])
        block = Block(m, {})
        for name in layers:
            setattr(block, name.removeprefix("layers."), _Next(weights))
        for _ in range(m.num_layers):
            x_BTD = block(x_BTD, rope, attend_causally)
        x_BTD = rms_norm(x_BTD, jnp.asarray(next(weights)), m.norm_eps)
        return np.concatenate([dense(x_BTD, w.T if axis == 0 else w) for w in weights], axis=-1)


def _lookup(tokens_BT: np.ndarray, weights: Iterator[np.ndarray], num_rows: int) -> np.ndarray:
    """The tokens' rows of the embedding, whose blocks are the first of `weights`."""
    rows, first = {}, 0
    while first < num_rows:
        block_VD = next(weights)
        inside = tokens_BT[(tokens_BT >= first) & (tokens_BT < first + len(block_VD))]
        rows |= {token: block_VD[token - first].astype(np.float32) for token in inside.tolist()}
        first += len(block_VD)
    return np.stack([np.stack([rows[token] for token in row]) for row in tokens_BT.tolist()])


def compare_logits(folder: Path, tokens_BT: np.ndarray, logits_BTV: np.ndarray) -> Comparison:
    """k2jax's logits against those of the files in `folder`; NumericsError when they differ by more than rounding."""
    try:
        found = numpy_logits(folder, tokens_BT)
    except (ValueError, KeyError, IndexError) as error:
        raise NumericsError(f"the exported files are not of a model that can be computed: {error}") from error
    if found.logits.shape != logits_BTV.shape:
        shapes = f"{found.logits.shape}, k2jax's {logits_BTV.shape}"
        raise NumericsError(f"the exported files do not compute what k2jax does: their logits are {shapes}")
    difference_BTV = np.abs(found.logits - logits_BTV)
    largest = float(np.abs(logits_BTV).max())
    tolerance = min(max(TIMES_NOISE * found.noise, LEAST * largest), MOST * largest)
    result = Comparison(float(difference_BTV.max()), tolerance, found.noise, largest)
    if not result.largest_difference <= tolerance:  # not, too, when either is NaN
        worst = np.nan_to_num(difference_BTV, nan=np.inf).argmax()
        row, position, token = np.unravel_index(worst, difference_BTV.shape)
        raise NumericsError(
            f"the exported files do not compute what k2jax does: at row {row}, position {position}, token {token} "
            f"their logit is {found.logits[row, position, token]:.7g}, k2jax's {logits_BTV[row, position, token]:.7g}, "
            f"a difference of {difference_BTV[row, position, token]:.3g} where rounding explains {tolerance:.2g}: "
            f"the conversion is wrong, do not use them"
        )
    return result


def describe(tokens_BT: np.ndarray, logits_BTV: np.ndarray, comparison: Comparison) -> dict[str, Any]:
    """The part `logits` of parity.json. With the best token of each position, its logit and the log of the sum of
    exponentials, a third party can check its own implementation without ours and without the checkpoint."""
    best_BT = logits_BTV.argmax(axis=-1)
    top_BT = np.take_along_axis(logits_BTV, best_BT[..., None], axis=-1)[..., 0].astype(np.float64)
    sums_BT = np.log(np.exp(logits_BTV - top_BT[..., None]).sum(axis=-1, dtype=np.float64)) + top_BT
    return {
        **comparison._asdict(),
        "paths": {
            "k2jax": "its own model code over the checkpoint's arrays",
            "files": "a forward pass in plain numpy over the written files",
            "both": "weights rounded to the export's type, computed in float32, no document mask",
        },
        "tokens": tokens_BT.tolist(),
        "best_token": best_BT.tolist(),
        "best_logit": top_BT.tolist(),
        "log_sum_exp": sums_BT.tolist(),
    }


def compare_recorded(recorded: dict[str, Any], logits_BTV: np.ndarray) -> None:
    """The best tokens' logits in a certificate are those of `logits_BTV`; NumericsError when they are not."""
    best_BT = np.array(recorded["best_token"])
    found_BT = np.take_along_axis(logits_BTV, best_BT[..., None], axis=-1)[..., 0]
    difference = float(np.abs(found_BT - np.array(recorded["best_logit"])).max())
    if not difference <= recorded["tolerance"]:
        raise NumericsError(
            f"the logits that the certificate records differ from k2jax's by {difference:.3g}, where rounding explains "
            f"{recorded['tolerance']:.2g}"
        )
