"""The attention of gpu_suite.py: who is right (numerics), who is fast (attention), and by which blocks (blocks).

Programs are compiled in threads, all of a section's at once, and measured one after the other when none is compiled.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gpu_suite_cases import SECTIONS, Row, tried
from k2jax.kernels.flash_attention import flash_attention
from k2jax.kernels.triton_block_sizes import HOPPER

from k2jax.kernels import mosaic_block_sizes, reference, triton_block_sizes
from k2jax.model.attention import attend_causally

ERROR_LIMITS = {"bfloat16": 2**-6, "float32": 1e-4}  # of the largest number: a bit more than rounding (8 and 24 bits)
DOCUMENTS = 8  # of a row, where they are masked; lengths are drawn
MOST_DOCUMENTS = 16  # that the packed call takes: a bound is part of its program
NUMBERS = 1_048_573  # drawn, then repeated: a prime, so that no two positions or heads of a row are equal

Attend = Callable[..., jax.Array]  # of q, k, v and document_BT


# ---- the contestants -------------------------------------------------------------------------------------------------


def contestant(case: Row, smoke: bool) -> Attend:
    """By its name. NotImplementedError where it cannot be on this device."""
    name, kind = case["attention"], jax.devices()[0].device_kind
    if name in ("mosaic", "mosaic_ahead") and not any(hopper in kind for hopper in HOPPER):
        raise NotImplementedError(f"needs a Hopper GPU, this is {kind}")
    if name == "flash":
        small = triton_block_sizes.BlockSizes(*[triton_block_sizes.Cut(32, 32, 4, 1)] * 3)
        return partial(flash_attention, sizes=small if smoke else None, interpret=smoke)
    if name in ("mosaic", "mosaic_ahead"):
        sizes = mosaic_block_sizes.block_sizes(case["head_dim"])
        return partial(flash_attention, sizes=sizes.ahead() if name == "mosaic_ahead" else sizes)
    if name == "cudnn_packed":
        return cudnn_packed
    return partial(attend_causally, implementation=name)


def cudnn_packed(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, document_BT: jax.Array) -> jax.Array:
    """cuDNN's attention with documents 0, 1, ... as sequences packed into each row: by a function that JAX keeps
    private, for at most MOST_DOCUMENTS, and as many heads of keys as of queries (it takes k's offsets by q's heads).
    """
    try:
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention
    except ImportError as error:
        raise NotImplementedError(f"this JAX has its packed call elsewhere: {error}") from error
    length_BM = (document_BT[:, :, None] == jnp.arange(MOST_DOCUMENTS)).sum(axis=1, dtype=jnp.int32)
    first_BM = jnp.where(length_BM > 0, jnp.cumsum(length_BM, axis=1) - length_BM, -1)
    first_BM = jnp.pad(first_BM, ((0, 0), (0, 1)), constant_values=-1)
    length_BM = jnp.where(length_BM > 0, length_BM, -1)
    packed = {"q_seqlen": length_BM, "kv_seqlen": length_BM, "q_offsets": first_BM, "kv_offsets": first_BM}
    mask = {"scale": q_BTNH.shape[-1] ** -0.5, "mask_type": MaskType.PADDING_CAUSAL}
    return dot_product_attention(q_BTNH, k_BTKH, v_BTKH, **packed, **mask)


def with_gradients(attend: Attend) -> Callable[..., Any]:
    """(out, dq, dk, dv) of q, k, v, dout and document_BT, jitted."""

    def both(q: Any, k: Any, v: Any, dout: Any, document_BT: Any) -> Any:
        out, backward = jax.vjp(lambda *x: attend(*x, document_BT), q, k, v)
        return out, *backward(dout.astype(out.dtype))

    return jax.jit(both)


# ---- inputs ----------------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """q, k, v, the gradient of the output, and the documents' numbers or None."""

    q: Any
    k: Any
    v: Any
    dout: Any
    document_BT: Any


def shapes(case: Row) -> Inputs:
    B, T, H, dtype = case["rows"], case["length"], case["head_dim"], jnp.dtype(case["dtype"])
    q, k = (jax.ShapeDtypeStruct((B, T, heads, H), dtype) for heads in (case["heads"], case["kv_heads"]))
    return Inputs(q, k, k, q, jax.ShapeDtypeStruct((B, T), jnp.int32) if case["documents"] else None)


def draw(case: Row) -> Inputs:
    """On the host: a program for each shape would have to be compiled on a device."""
    random = np.random.default_rng(0)
    numbers = random.standard_normal(NUMBERS, np.float32)

    def some(i: int, shape: Any) -> np.ndarray | None:
        if shape is None:
            return None
        if shape.dtype != jnp.int32:
            return np.resize(np.roll(numbers, i * (NUMBERS // 4)).astype(shape.dtype), shape.shape)
        ends = [random.choice(shape.shape[1] - 1, DOCUMENTS - 1, replace=False) + 1 for _ in range(shape.shape[0])]
        return np.stack([np.isin(np.arange(shape.shape[1]), end).cumsum() for end in ends]).astype(np.int32)

    return Inputs(*(some(i, shape) for i, shape in enumerate(shapes(case))))


def of_one_head(x_BTNH: Any, b: int, k: int, kv_heads: int) -> Any:
    """Of a row, the heads that share one of the keys' (or that one), as a batch of its own."""
    group = x_BTNH.shape[2] // kv_heads
    return x_BTNH[b : b + 1, :, k * group : (k + 1) * group]


# ---- compiled together, measured alone -------------------------------------------------------------------------------


class Job(NamedTuple):
    """A case: what threads do for all cases at once, and what is then measured of its result."""

    case: Row
    prepare: Callable[[], Any]
    measure: Callable[[Any], Row]


def done(jobs: list[Job]) -> Iterator[Row]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        prepared = [pool.submit(job.prepare) for job in jobs]
        wait(prepared)
    for job, ready in zip(jobs, prepared, strict=True):
        yield tried(job.case, lambda job=job, ready=ready: job.measure(ready.result()))


def seconds(run: Callable[[], Any], calls: int) -> float:
    """Of one call: the median of three rounds of `calls` calls, each awaited at its end."""
    jax.block_until_ready(run())
    rounds = []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(calls):
            last = run()
        jax.block_until_ready(last)
        rounds.append((time.perf_counter() - started) / calls)
    return statistics.median(rounds)


# ---- sections --------------------------------------------------------------------------------------------------------


def numerics(smoke: bool) -> Iterator[Row]:
    cases = SECTIONS["numerics"].cases(smoke)
    with ThreadPoolExecutor(1) as one:  # references in turn: each takes gigabytes and all cores
        ahead = {key: one.submit(inputs_and_expected, dict(key)) for key in dict.fromkeys(map(key_of, cases))}

        def prepare(case: Row) -> Any:
            return with_gradients(contestant(case, smoke)).lower(*shapes(case)).compile()

        def measure(case: Row, run: Any) -> Row:
            inputs, expected = ahead[key_of(case)].result()
            found, again = (jax.device_get(run(*inputs)) for _ in range(2))
            row = worst(found, expected, case["kv_heads"])
            same = all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(found, again, strict=True))
            ours = not case["attention"].startswith("cudnn")  # which add up in a fixed order
            return row | {"repeats": bool(same), "ok": row["ok"] and bool(same or not ours)}

        yield from done([Job(case, partial(prepare, case), partial(measure, case)) for case in cases])


def key_of(case: Row) -> tuple:
    """Of what contestants have in common."""
    return tuple((name, value) for name, value in case.items() if name != "attention")


Expected = dict[tuple[int, int], list[np.ndarray]]  # by row and head of keys: out, dq, dk, dv


def inputs_and_expected(case: Row) -> tuple[Inputs, Expected]:
    """What plain jnp makes of the first and the last head, in float32 on the host's CPU."""
    plain = with_gradients(lambda q, k, v, ids: reference.attention(q, k, v, ids if ids is None else (ids, ids))[0])
    inputs, expected = draw(case), {}
    for b, k in {(0, 0), (case["rows"] - 1, case["kv_heads"] - 1)}:
        heads = [np.asarray(of_one_head(x, b, k, case["kv_heads"]), np.float32) for x in inputs[:4]]
        ids = None if inputs.document_BT is None else inputs.document_BT[b : b + 1]
        with jax.default_device(jax.devices("cpu")[0]):
            expected[b, k] = jax.device_get(plain(*heads, ids))
    return inputs, expected


def worst(found: Any, expected: Expected, kv_heads: int) -> Row:
    """The largest error of each, as a share of the largest number that there is; a NaN stays one."""
    errors = dict.fromkeys(("out", "dq", "dk", "dv"), 0.0)
    for (b, k), of_head in expected.items():
        for name, x_BTNH, y in zip(errors, found, of_head, strict=True):
            x = np.asarray(of_one_head(x_BTNH, b, k, kv_heads), np.float32)
            errors[name] = float(np.maximum(errors[name], np.abs(x - y).max() / np.abs(y).max()))
    ok = all(error < ERROR_LIMITS[str(found[0].dtype)] for error in errors.values())
    return {name: round(error, 6) for name, error in errors.items()} | {"ok": ok}


def attention(smoke: bool) -> Iterator[Row]:
    def prepare(case: Row) -> tuple:
        attend, structs = contestant(case, smoke), shapes(case)
        forward = jax.jit(lambda q, k, v, ids: attend(q, k, v, ids))
        both = with_gradients(attend).lower(*structs).compile()
        return forward.lower(*structs[:3], structs.document_BT).compile(), both

    def measure(case: Row, ready: tuple) -> Row:
        forward, both = ready
        inputs = Inputs(*jax.device_put(draw(case)))
        calls = 1 if smoke else 10
        forward_s = seconds(lambda: forward(*inputs[:3], inputs.document_BT), calls)
        both_s = seconds(lambda: both(*inputs), calls)
        row = {"forward_ms": round(forward_s * 1e3, 3), "both_ms": round(both_s * 1e3, 3)}
        # Of the causal half, two products forward and five backward; with documents the fewer pairs that they leave.
        of_pair = 4 * case["heads"] * case["head_dim"] / 1e12
        tflop = of_pair * pairs_seen(inputs.document_BT, case["rows"], case["length"])
        return row | {"forward_tflop_s": round(tflop / forward_s, 1), "both_tflop_s": round(3.5 * tflop / both_s, 1)}

    jobs = [Job(case, partial(prepare, case), partial(measure, case)) for case in SECTIONS["attention"].cases(smoke)]
    for plain in (False, True):  # jnp's takes the longest to compile: what a time limit cuts off
        yield from done([job for job in jobs if (job.case["attention"] == "jnp") == plain])


def pairs_seen(document_BT: Any, rows: int, length: int) -> float:
    """Of a query and a key, in all rows."""
    if document_BT is None:
        return rows * length * length / 2
    return sum(float((np.bincount(row).astype(float) ** 2).sum() / 2) for row in np.asarray(document_BT))


def blocks(smoke: bool) -> Iterator[Row]:
    """One kernel's cut changed at a time, the others as the table has them."""
    B, T, N, H = (1, 64, 1, 64) if smoke else (4, 4096, 16, 128)
    shape = {"rows": B, "length": T, "heads": N, "kv_heads": N, "head_dim": H, "dtype": "bfloat16", "documents": False}

    def prepare(case: Row) -> Any:
        contestant({**shape, **case}, smoke)  # whether it can be here
        sizes = sizes_of(case, smoke, H)
        attend = partial(flash_attention, sizes=sizes, interpret=smoke)
        return with_gradients(attend).lower(*shapes(shape)).compile()

    def measure(both: Any) -> Row:
        return {"both_ms": round(seconds(lambda: both(*inputs), 5) * 1e3, 3)}

    inputs = Inputs(*jax.device_put(draw(shape)))
    cases = SECTIONS["blocks"].cases(smoke)
    for row in done([Job(case, partial(prepare, case), measure) for case in cases]):
        yield row | {"ok": True}  # some do not fit shared memory


def sizes_of(case: Row, smoke: bool, head_dim: int) -> Any:
    """The block sizes with the case's cut of its kernel. ValueError where they cannot be."""
    own = {name: value for name, value in case.items() if name not in ("attention", "kernel")}
    if case["attention"] == "mosaic":
        base, cut = mosaic_block_sizes.block_sizes(head_dim), mosaic_block_sizes.Cut
    else:
        cut = triton_block_sizes.Cut
        base = triton_block_sizes.block_sizes(jax.devices()[0].device_kind, head_dim, 2)
        base = triton_block_sizes.BlockSizes(*[cut(32, 32, 4, 1)] * 3) if smoke else base
    return replace(base, **{case["kernel"]: cut(**own)})
