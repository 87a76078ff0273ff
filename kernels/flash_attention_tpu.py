"""Flash attention for TPU, in Pallas: softmax(q k') v and its gradients, with no array of queries times keys in HBM.

What it computes is `reference.attention`. How, and what it is faster by than the peers' kernels (cycles of the TPU
compiler; tools/bench/tpu_kernel_cost.py prints them):

- Keys and values of a head stay in VMEM, and one grid step takes a block of queries past all keys that it sees, in a
  loop. Splash attention has a grid step for each pair of blocks, at 500 cycles each besides the arithmetic.
- The block on the diagonal is cut into strips of queries, each with no more keys than it sees.
- Softmax by powers of two, its factor multiplied into q; row sums are kept by lane and added up once, at the end.
- One backward kernel computes scores and their gradient once for dq, dk and dv (five products where separate kernels
  need seven); it works on transposed scores, keys by queries, where lse and delta are rows and dk and dv need no
  transposition. dq is added up in VMEM.

Flash attention: Dao et al. 2022 (arXiv:2205.14135); Dao 2023 (arXiv:2307.08691).

Axes: B batch, N query heads, K key and value heads, T queries, S keys, H head dim; Q, J block of queries, of keys.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Documents = tuple[jax.Array, jax.Array] | None  # int32 (B, T) and (B, S): a query sees the keys with its own number
Interpret = bool | pltpu.InterpretParams  # True: on a CPU; InterpretParams: as on a TPU, with its races

LANES = 128
MASKED = -1e30  # finite: a row that sees no key has weights and a sum of its own, which lse then takes out
LOG2_E = math.log2(math.e)
COMPILER_PARAMS = pltpu.CompilerParams(
    # A head's blocks come one after the other: what stays in VMEM, stays. The limit is cut to what a generation has.
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=100 << 20
)  # fmt: skip


@dataclass(frozen=True)
class BlockSizes:
    """How the work is cut, in positions: blocks, one to a turn of a kernel's loop, and strips of a block.

    Raises ValueError where a kernel cannot be cut so.
    """

    forward: int = 512
    forward_strip: int = 256
    backward: int = 512
    backward_strip: int = 256
    resident: int = 16384  # of a head that are in VMEM at once; longer rows are taken in pairs of such parts

    def __post_init__(self) -> None:
        for name in ("forward", "backward"):
            block, strip = getattr(self, name), getattr(self, f"{name}_strip")
            if strip < LANES or strip % LANES or block % strip:
                raise ValueError(
                    f"BlockSizes.{name}={block}, {name}_strip={strip}: the strip must be a multiple of {LANES}, the "
                    f"block one of the strip"
                )
            if self.resident % block:
                raise ValueError(f"BlockSizes.resident={self.resident} must be a multiple of {name}={block}")
        if max(self.forward, self.backward) % min(self.forward, self.backward):
            raise ValueError(f"BlockSizes.forward={self.forward}, backward={self.backward}: one must divide the other")

    @property
    def unit(self) -> int:
        """A row's length is a multiple of it, once padded."""
        return max(self.forward, self.backward)


GENERATION_OF_KIND = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def block_sizes(generation: str, length: int, row_bytes: int) -> BlockSizes:
    """The fewest cycles by tpu_kernel_cost.py of those tried, head_dim 128, at lengths 2048 and 8192.

    Larger blocks spend less outside products, up to where a long row leaves enough of them; smaller ones where they
    would be filled up by more than an eighth. v4 has 16 MiB of VMEM, the others 64 or more.

    Args:
        row_bytes: of one position of a head, as q, k and v have it.
    """
    wide = max(row_bytes // 256, 1)  # times head_dim 128 in bfloat16
    largest = 2048 if generation == "v6e" and length >= 8192 else 1024
    resident = 16384 // wide
    if generation == "v4":
        largest, resident = 512 // min(wide, 2), 4096 // wide
    sizes = (size for size in (2048, 1024, 512, 256) if size <= largest and -length % size <= length // 8)
    block = next(sizes, LANES)
    strips = min(block, 256), LANES if block <= 1024 else 256
    return BlockSizes(block, strips[0], block, strips[1], resident)


def _product(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Products with float32 sums; of float32 numbers in full, where the matrix unit would round them to bfloat16."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _across(x_Q1: jax.Array, width: int) -> jax.Array:
    """(Q, LANES) with equal lanes to (Q, width)."""
    return jnp.tile(x_Q1, (1, -(-width // LANES)))[:, :width]


def _as_column(row_1Q: jax.Array) -> jax.Array:
    """(1, Q) to (Q, LANES) with equal lanes."""
    return jnp.broadcast_to(row_1Q, (LANES, row_1Q.shape[1])).T


# ---- forward ---------------------------------------------------------------------------------------------------------


def _forward_kernel(
    first_ref, q_ref, k_ref, v_ref, *refs, block: int, strip: int, causal: bool, masked: bool
):
    """One block of queries past the keys that it sees. `first_ref` (B, queries' blocks): the first block of keys."""
    if masked:
        q_document_ref, k_document_ref, *refs = refs
    out_ref, lse_ref, most_ref, sum_ref, acc_ref = refs
    batch, i, num_blocks = pl.program_id(0), pl.program_id(2), k_ref.shape[0] // block
    H = q_ref.shape[1]
    document_QL = _as_column(q_document_ref[...]) if masked else None

    def take(j: jax.Array, diagonal: bool) -> None:
        """The j-th block of keys, by strips of queries, which do not depend on each other. The diagonal comes first."""
        for first in range(0, block, strip):
            rows, width = pl.ds(first, strip), first + strip if diagonal else block
            keys = pl.ds(pl.multiple_of(j * block, block), width)
            score_QJ = _product(q_ref[rows, :], k_ref[keys, :], (1, 1))
            if masked:
                own_QJ = _across(document_QL[first : first + strip], width)
                score_QJ = jnp.where(own_QJ == k_document_ref[:, keys], score_QJ, MASKED)
            if diagonal:
                row, column = (lax.broadcasted_iota(jnp.int32, score_QJ.shape, axis) for axis in (0, 1))
                score_QJ = jnp.where(column <= row + first, score_QJ, MASKED)
            most_QL = jnp.broadcast_to(score_QJ.max(axis=1, keepdims=True), (strip, LANES))
            if not diagonal:
                before_QL = most_ref[rows, :]
                most_QL = jnp.maximum(before_QL, most_QL)
                fade_QL = jnp.exp2(before_QL - most_QL)
            weight_QJ = jnp.exp2(score_QJ - _across(most_QL, width))
            sum_QL = sum(weight_QJ[:, lane : lane + LANES] for lane in range(0, width, LANES))
            out_QH = _product(weight_QJ.astype(v_ref.dtype), v_ref[keys, :], (1, 0))
            if not diagonal:
                sum_QL += fade_QL * sum_ref[rows, :]
                out_QH += _across(fade_QL, H) * acc_ref[rows, :]
            most_ref[rows, :], sum_ref[rows, :], acc_ref[rows, :] = most_QL, sum_QL, out_QH

    if causal:
        take(i, True)
    else:
        most_ref[...] = jnp.full_like(most_ref, MASKED)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)
    lax.fori_loop(first_ref[batch, i], i if causal else num_blocks, lambda j, _: take(j, False), None)
    sum_Q1 = sum_ref[...].sum(axis=1, keepdims=True)
    some_Q1 = most_ref[:, :1] > MASKED / 2  # a row that sees no key has weights of 1 here
    out_ref[...] = (acc_ref[...] * jnp.where(some_Q1, 1.0 / sum_Q1, 0.0)).astype(out_ref.dtype)
    lse_QL = jnp.where(some_Q1, most_ref[...] + jnp.log2(sum_Q1), MASKED)
    lse_ref[...] = lse_QL.T[:1]


def forward(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, documents: Documents,
    *, sizes: BlockSizes, causal: bool, out_dtype: jnp.dtype, interpret: Interpret,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(out_BNTH, lse_BN1T float32) of q times log2(e) / sqrt(H).

    lse is the log to base 2 of softmax's denominator, MASKED where a query sees no key (its out is 0). T and S are
    multiples of the block; `causal` takes them as the same positions.
    """
    B, N, T, H = q_BNTH.shape
    K, S = k_BKSH.shape[1:3]
    block, G, masked = sizes.forward, N // K, documents is not None
    first_BI, _ = _visible(documents, (B, T, S), block)
    row = pl.BlockSpec((None, None, 1, block), lambda b, n, i, _: (b, n, 0, i))
    queries = pl.BlockSpec((None, None, block, H), lambda b, n, i, _: (b, n, i, 0))
    keys = pl.BlockSpec((None, None, S, H), lambda b, n, i, _: (b, lax.div(n, G), 0, 0))
    ids = [
        pl.BlockSpec((None, 1, block), lambda b, n, i, _: (b, 0, i)),
        pl.BlockSpec((None, 1, S), lambda b, n, i, _: (b, 0, 0)),
    ]
    state = pltpu.VMEM((block, LANES), jnp.float32)
    kernel = partial(_forward_kernel, block=block, strip=sizes.forward_strip, causal=causal, masked=masked)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N, T // block),
            in_specs=[queries, keys, keys, *(ids if masked else [])],
            out_specs=[queries, row],
            scratch_shapes=[state, state, pltpu.VMEM((block, H), jnp.float32)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q_BNTH.shape, out_dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ],
        compiler_params=COMPILER_PARAMS,
        name="flash_attention_forward" + ("" if causal else "_full"),
        interpret=interpret,
    )(first_BI, q_BNTH, k_BKSH, v_BKSH, *([ids[:, None] for ids in documents] if masked else []))


def _visible(documents: Documents, shape: tuple[int, int, int], block: int) -> tuple[jax.Array, jax.Array]:
    """(first block of keys of each block of queries, last block of queries + 1 of each block of keys), int32.

    By ranges of document numbers: where those grow along a row, as they do, no block is taken that is masked whole.
    """
    B, T, S = shape
    if documents is None:
        return jnp.zeros((B, T // block), jnp.int32), jnp.full((B, S // block), T // block, jnp.int32)
    q_BIQ, k_BIJ = (ids.reshape(B, -1, block) for ids in documents)
    meet_BIJ = (k_BIJ.max(-1)[:, None] >= q_BIQ.min(-1)[..., None]) & (
        k_BIJ.min(-1)[:, None] <= q_BIQ.max(-1)[..., None]
    )
    first_BI = jnp.argmax(meet_BIJ, axis=2)
    last_BJ = T // block - jnp.argmax(meet_BIJ[:, ::-1], axis=1)
    nothing_BI, nothing_BJ = ~meet_BIJ.any(2), ~meet_BIJ.any(1)
    first_BI = jnp.where(nothing_BI, S // block, first_BI).astype(jnp.int32)
    return first_BI, jnp.where(nothing_BJ, 0, last_BJ).astype(jnp.int32)


# ---- backward --------------------------------------------------------------------------------------------------------


def _backward_kernel(
    last_ref, q_ref, dout_ref, lse_ref, delta_ref, k_ref, v_ref, *refs,
    block: int, strip: int, causal: bool, masked: bool, scale: float,
):  # fmt: skip
    """One block of keys past the queries that see it. `last_ref` (B, keys' blocks): the last block of queries + 1."""
    if masked:
        q_document_ref, k_document_ref, *refs = refs
    dq_ref, dk_ref, dv_ref, dq_acc_ref, dk_acc_ref, dv_acc_ref = refs
    batch, j = pl.program_id(0), pl.program_id(2)
    dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
    dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)
    document_JL = _as_column(k_document_ref[...]) if masked else None

    @pl.when(j == 0)
    def _():
        dq_acc_ref[...] = jnp.zeros_like(dq_acc_ref)

    def take(i: jax.Array, diagonal: bool) -> None:
        """The i-th block of queries, by strips of keys."""
        for first in range(0, block, strip):
            keys, skip = pl.ds(first, strip), first if diagonal else 0
            width = block - skip
            queries = pl.ds(pl.multiple_of(i * block + skip, strip), width)
            q_QH, dout_QH, k_JH = q_ref[queries, :], dout_ref[queries, :], k_ref[keys, :]
            score_JQ = _product(k_JH, q_QH, (1, 1))
            if masked:
                own_JQ = _across(document_JL[first : first + strip], width)
                score_JQ = jnp.where(own_JQ == q_document_ref[:, queries], score_JQ, MASKED)
            if diagonal:
                row, column = (lax.broadcasted_iota(jnp.int32, score_JQ.shape, axis) for axis in (0, 1))
                score_JQ = jnp.where(row <= column, score_JQ, MASKED)
            weight_JQ = jnp.exp2(score_JQ - lse_ref[:, queries])
            dweight_JQ = _product(v_ref[keys, :], dout_QH, (1, 1))
            dscore_JQ = (weight_JQ * (dweight_JQ - delta_ref[:, queries])).astype(q_QH.dtype)
            dv_acc_ref[keys, :] += _product(weight_JQ.astype(dout_QH.dtype), dout_QH, (1, 0))
            dk_acc_ref[keys, :] += _product(dscore_JQ, q_QH, (1, 0))
            dq_acc_ref[queries, :] += _product(dscore_JQ, k_JH, (0, 0))

    if causal:
        take(j, True)
    lax.fori_loop(j + 1 if causal else 0, last_ref[batch, j], lambda i, _: take(i, False), None)
    dk_ref[...] = (dk_acc_ref[...] / LOG2_E).astype(dk_ref.dtype)  # q holds scale * log2(e)
    dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        dq_ref[...] = (dq_acc_ref[...] * scale).astype(dq_ref.dtype)


def backward(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, documents: Documents,
    lse_BN1T: jax.Array, delta_BN1T: jax.Array, dout_BNTH: jax.Array,
    *, sizes: BlockSizes, causal: bool, out_dtype: jnp.dtype, interpret: Interpret,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """(dq_BNTH by q without its factor, dk_BKSH, dv_BKSH); arguments as in `forward`, delta is dout . out."""
    B, N, T, H = q_BNTH.shape
    K, S = k_BKSH.shape[1:3]
    block, G, masked = sizes.backward, N // K, documents is not None
    _, last_BJ = _visible(documents, (B, T, S), block)
    whole = pl.BlockSpec((None, None, T, H), lambda b, n, j, _: (b, n, 0, 0))
    row = pl.BlockSpec((None, None, 1, T), lambda b, n, j, _: (b, n, 0, 0))
    keys = pl.BlockSpec((None, None, block, H), lambda b, n, j, _: (b, lax.div(n, G), j, 0))
    own_keys = pl.BlockSpec((None, None, block, H), lambda b, n, j, _: (b, n, j, 0))
    ids = [
        pl.BlockSpec((None, 1, T), lambda b, n, j, _: (b, 0, 0)),
        pl.BlockSpec((None, 1, block), lambda b, n, j, _: (b, 0, j)),
    ]
    kernel = partial(
        _backward_kernel, block=block, strip=sizes.backward_strip, causal=causal, masked=masked, scale=H**-0.5
    )
    # A kernel's grid step is of one query head: dk and dv of those that share keys are added up after.
    dkeys = jax.ShapeDtypeStruct((B, N, S, H), out_dtype if G == 1 else jnp.float32)
    lse_BN1T = jnp.where(lse_BN1T > MASKED / 2, lse_BN1T, -MASKED)  # so that weights are 0 where no key is seen
    dq_BNTH, dk_BNSH, dv_BNSH = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N, S // block),
            in_specs=[whole, whole, row, row, keys, keys, *(ids if masked else [])],
            out_specs=[whole, own_keys, own_keys],
            scratch_shapes=[
                pltpu.VMEM((T, H), jnp.float32),
                pltpu.VMEM((block, H), jnp.float32),
                pltpu.VMEM((block, H), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q_BNTH.shape, out_dtype), dkeys, dkeys],
        compiler_params=COMPILER_PARAMS,
        name="flash_attention_backward" + ("" if causal else "_full"),
        interpret=interpret,
    )(
        last_BJ, q_BNTH, dout_BNTH, lse_BN1T, delta_BN1T, k_BKSH, v_BKSH,
        *([ids[:, None] for ids in documents] if masked else []),
    )  # fmt: skip
    if G > 1:
        dk_BNSH, dv_BNSH = (x.reshape(B, K, G, S, H).sum(axis=2).astype(out_dtype) for x in (dk_BNSH, dv_BNSH))
    return dq_BNTH, dk_BNSH, dv_BNSH
