"""Products of a layer with inputs in 8 bits: `precision.products`.

"float8": all three products (y = x w, dx = dy w', dw = x' dy) have inputs in float8: x and w in e4m3, whose step is
finer, dy in e5m2, whose range is wider. That is the hybrid format of Micikevicius et al. (arXiv:2209.05433) with the
"current scaling" of NVIDIA's Transformer Engine: an array's scale is of its own largest magnitude, so that there is no
state of scales and nothing more in a checkpoint. Results are added up as exactly as the device can in dx and dw, and as
fast as it can in y, as in Transformer Engine (its `use_split_accumulator`).

Scales are powers of two, as torchao's float8 rounds them: a number times one keeps its bits, and is then rounded as its
format rounds, whatever the scale. So each device may take the scale of the part that it has: the cut of an array over
devices or microbatches changes only what becomes of numbers below about 2^-14 of the largest in e4m3, 2^-29 in e5m2.

"int8": y and dx have inputs in int8, rounded to the nearest, and are added up in int32; dw is as `precision.compute`
says. That is SwitchBack (Wortsman et al., arXiv:2304.13013): dw adds up over all tokens, and its noise grows with them.
(AQT, by which MaxText trains in int8, can round gradients at random and take dw in int8, too.) Each row that is
contracted has a scale of its own, of its largest magnitude over all devices: what is computed does not depend on the
mesh. A row of more than 133,000 numbers could overflow int32.

The head and the embedding stay in the type of `precision.compute`, as torchtitan's float8 leaves its output layer: they
are a small part of the arithmetic, and the loss is nowhere more sensitive. Weights are gathered in that type and then
scaled: the scale is of what is used, and a gather's bytes are the same.

Devices without such products compute them from the same 8-bit numbers in wider types, no faster: float8 on GPUs before
Ada and on TPUs before TPU7x, int8 on TPU7x. tools/plan.py shows what a device gains.

Qwix (github.com/google/qwix) was tried: its public `quantize` and `dot_general` work within gradients of one's own. But
they know no scales that are powers of two or of several devices, and no choice of how products are added up.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

E4M3, E5M2, INT8 = jnp.dtype("float8_e4m3fn"), jnp.dtype("float8_e5m2"), jnp.dtype("int8")
Types = tuple[jnp.dtype, jnp.dtype]

# By `precision.products`: the types of the two inputs of each product; those that are not named stay as they are.
TYPES: dict[str, dict[str, Types]] = {
    "compute": {},
    "float8": {"y": (E4M3, E4M3), "dx": (E5M2, E4M3), "dw": (E4M3, E5M2)},
    "int8": {"y": (INT8, INT8), "dx": (INT8, INT8)},
}
TINY = 1e-30  # in the place of a largest magnitude of 0; the scales of smaller numbers would not be finite
EXPONENT = 0x7F800000  # bits of a float32


def dot(
    x: jax.Array,
    y: jax.Array,
    contract: tuple,
    dtype: jnp.dtype,
    types: Types,
    shared: Callable[[jax.Array], jax.Array] = lambda largest: largest,
) -> jax.Array:
    """x . y over the dimensions `contract` ((of x), (of y)), their numbers scaled and rounded to `types`; in `dtype`.

    `shared` makes largest magnitudes those of all devices that have a part of what is contracted. Where a number is not
    finite, no result that it enters is.
    """
    if types == (INT8, INT8):
        (x, x_scale), (y, y_scale) = (
            _int8(array, tuple(dims), shared) for array, dims in zip((x, y), contract, strict=True)
        )
        product = jax.lax.dot_general(x, y, (contract, ((), ())), preferred_element_type=jnp.int32)
        scale = x_scale.reshape(x_scale.shape + (1,) * y_scale.ndim) * y_scale
        return (product.astype(jnp.float32) * scale).astype(dtype)
    (x, x_scale), (y, y_scale) = (_float8(array, kind) for array, kind in zip((x, y), types, strict=True))
    # On GPU, cuBLASLt's "fast accumulation" is what a lower precision asks for.
    precision = None if types == (E4M3, E4M3) else jax.lax.Precision.HIGHEST
    product = jax.lax.dot_general(x, y, (contract, ((), ())), precision, preferred_element_type=dtype)
    return product * (x_scale * y_scale).astype(dtype)


def _float8(x: jax.Array, kind: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """(numbers in `kind`, what they are to be multiplied by): a power of two, and the largest within a factor of two of
    the largest there is."""
    largest = jnp.maximum(jnp.abs(x).max().astype(jnp.float32), TINY)
    ratio = jax.lax.bitcast_convert_type(float(jnp.finfo(kind).max) / largest, jnp.int32)
    scale = jax.lax.bitcast_convert_type(ratio & EXPONENT, jnp.float32)
    return (x * scale.astype(x.dtype)).astype(kind), 1 / scale


def _int8(x: jax.Array, dims: tuple[int, ...], shared: Callable) -> tuple[jax.Array, jax.Array]:
    """(numbers from -127 to 127, what they are to be multiplied by): the latter without `dims`, which share it."""
    largest = shared(jnp.abs(x).max(axis=dims, keepdims=True).astype(jnp.float32))
    largest = jnp.maximum(largest, TINY)
    return jnp.round(x * (127 / largest)).astype(INT8), largest.squeeze(dims) / 127
