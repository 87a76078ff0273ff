"""Ring attention: causal attention of rows that C devices share, keys and values going round from one to the next.

Liu et al. 2023 (arXiv:2310.01889). Device c holds chunks c and 2C-1-c of a row's 2C (k2jax/parallel/context.py says
why). In turn i it has the keys and values of device s = c - i (modulo C), and of those it takes, at the same cost
each time:

    turn 0, s = c:  its own, causally: within a device positions grow
    s < c:          chunk s, which all its queries see; they are before chunk 2C-1-s
    s > c:          both chunks, which the queries of chunk 2C-1-c see; those of chunk c are before both

What comes next is sent while a turn is computed. The backward pass goes round again, and the gradients of keys and
values go with them, a turn behind, so that they are on their way while the next are computed.

Axes: B batch, N query heads, K key and value heads, T, S positions of a device (two chunks), H head dim.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from k2jax.kernels.flash_attention import merge, scaled

AXIS = "context"


class Parts(NamedTuple):
    """How attention of some queries to some keys is computed: `reference.forward` and `backward`, or a kernel's."""

    forward: Callable[..., tuple[jax.Array, jax.Array]]  # q, k, v, documents, causal=: out_BNTH, lse_BN1T; float32
    backward: Callable[..., tuple[jax.Array, ...]]  # q, k, v, documents, lse, delta, dout, causal=: dq, dk, dv; float32


def ring_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, document_BT: jax.Array | None, device_1: jax.Array,
    *, parts: Parts,
) -> jax.Array:  # fmt: skip
    """A device's part (B, T, N, H) of causal attention, in the type of `q`; called within shard_map over `context`.

    Args:
        document_BT: int32, of this device's positions; keeps each position within its own document. None: rows are one.
        device_1: int32, c. Not lax.axis_index: under jax.checkpoint, what depends on no argument becomes a shard_map of
            its own, and XLA takes none without arguments (jax 0.10.2).
    """
    heads_first = (x.transpose(0, 2, 1, 3) for x in (q_BTNH, k_BTKH, v_BTKH))
    return _attend(*heads_first, document_BT, device_1, parts).transpose(0, 2, 1, 3)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q_BNTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, document_BT: jax.Array | None, device_1: jax.Array,
    parts: Parts,
) -> jax.Array:  # fmt: skip
    return _attend_forward(q_BNTH, k_BKTH, v_BKTH, document_BT, device_1, parts)[0]


def _pass_on(tree: tuple) -> tuple:
    """To the next device; from the one before."""
    devices = lax.axis_size(AXIS)
    to_next = [(device, (device + 1) % devices) for device in range(devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, AXIS, to_next), tree)


def _documents(document_BT: jax.Array | None, of_keys_BS: jax.Array | None, rows: slice, keys: slice) -> tuple | None:
    return None if document_BT is None else (document_BT[:, rows], of_keys_BS[:, keys])


def _halves(T: int) -> tuple[slice, slice, slice]:
    """(a device's early chunk, its late one, both)."""
    return slice(0, T // 2), slice(T // 2, T), slice(0, T)


def _attend_forward(
    q_BNTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, document_BT: jax.Array | None, device_1: jax.Array,
    parts: Parts,
) -> tuple[jax.Array, tuple]:  # fmt: skip
    q, devices = scaled(q_BNTH), lax.axis_size(AXIS)
    early, late, both = _halves(q.shape[2])

    def take(found: tuple, visiting: tuple, rows: slice, keys: slice) -> tuple:
        """`found` (out, lse) with the part that `rows` of the queries see of `keys`."""
        k, v, document = visiting
        documents = _documents(document_BT, document, rows, keys)
        seen = parts.forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], documents, causal=False)
        out, lse = merge([(found[0][:, :, rows], found[1][..., rows]), seen])
        return found[0].at[:, :, rows].set(out), found[1].at[..., rows].set(lse)

    def compute(turn: jax.Array | int, found: tuple, visiting: tuple) -> tuple:
        cases = partial(take, rows=both, keys=early), partial(take, rows=late, keys=both)  # s < c, s > c
        return lax.cond(turn <= device_1[0], *cases, found, visiting)

    def one(turn: jax.Array, carry: tuple) -> tuple:
        found, visiting = carry
        ahead = _pass_on(visiting)
        return compute(turn, found, visiting), ahead

    own = k_BKTH, v_BKTH, document_BT
    ahead = _pass_on(own)
    found = parts.forward(q, k_BKTH, v_BKTH, _documents(document_BT, document_BT, both, both), causal=True)
    found, ahead = lax.fori_loop(1, devices - 1, one, (found, ahead))
    out_BNTH, lse_BN1T = compute(devices - 1, found, ahead)
    out_BNTH = checkpoint_name(out_BNTH.astype(q_BNTH.dtype), "attention")
    lse_BN1T = checkpoint_name(lse_BN1T, "attention_sums")
    return out_BNTH, (q_BNTH, k_BKTH, v_BKTH, document_BT, device_1, out_BNTH, lse_BN1T)


def _attend_backward(parts: Parts, saved: tuple, dout_BNTH: jax.Array) -> tuple:
    q_BNTH, k_BKTH, v_BKTH, document_BT, device_1, out_BNTH, lse_BN1T = saved
    q, devices = scaled(q_BNTH), lax.axis_size(AXIS)
    early, late, both = _halves(q.shape[2])
    delta_BN1T = (dout_BNTH.astype(jnp.float32) * out_BNTH.astype(jnp.float32)).sum(axis=-1)[:, :, None]

    def take(dq: jax.Array, visiting: tuple, rows: slice, keys: slice, causal: bool = False) -> tuple:
        """`dq` with what `rows` of the queries get of `keys`, and what all keys here get of them, dk and dv."""
        k, v, document = visiting
        documents = _documents(document_BT, document, rows, keys)
        arrays = q[:, :, rows], k[:, :, keys], v[:, :, keys], documents
        of_rows = lse_BN1T[..., rows], delta_BN1T[..., rows], dout_BNTH[:, :, rows]
        more, *dkv = parts.backward(*arrays, *of_rows, causal=causal)
        whole = [jnp.pad(d, ((0, 0), (0, 0), (0, k.shape[2] - d.shape[2]), (0, 0))) for d in dkv]
        return dq.at[:, :, rows].add(more), *whole

    def compute(turn: jax.Array | int, dq: jax.Array, dkv: tuple, visiting: tuple) -> tuple[jax.Array, tuple]:
        dkv = _pass_on(dkv)  # on its way while the turn is computed
        cases = partial(take, rows=both, keys=early), partial(take, rows=late, keys=both)
        dq, *more = lax.cond(turn <= device_1[0], *cases, dq, visiting)
        return dq, tuple(map(jnp.add, dkv, more))

    def one(turn: jax.Array, carry: tuple) -> tuple:
        dq, dkv, visiting = carry
        ahead = _pass_on(visiting)
        return *compute(turn, dq, dkv, visiting), ahead

    own = k_BKTH, v_BKTH, document_BT
    ahead = _pass_on(own)
    dq, *dkv = take(jnp.zeros(q.shape, jnp.float32), own, both, both, causal=True)
    dq, dkv, ahead = lax.fori_loop(1, devices - 1, one, (dq, tuple(dkv), ahead))
    dq, dkv = compute(devices - 1, dq, dkv, ahead)
    return *(d.astype(q_BNTH.dtype) for d in (dq, *_pass_on(dkv))), None, None


_attend.defvjp(_attend_forward, _attend_backward)
