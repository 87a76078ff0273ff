"""All that only a GPU can tell, in one command of under nine minutes on an H100: a table, and JSON with the same.

    python tools/bench/gpu_suite.py [--sections numerics attention train checkpoint loader] [--out FILE] [--smoke]

numerics: our kernels (flash: Triton's; mosaic: Hopper's) and cuDNN's against kernels/reference.py in float32: the
    largest error of the output and of each gradient, as a share of the largest number there; and whether a second run
    gives the same bits.
attention: ms and TFLOP/s (of the causal half: two products forward, five backward) of flash, mosaic, cudnn and jnp in
    bfloat16, head_dim 128, 16,384 tokens a call.
train: the 1B model of experiments/k2_1b.py on one device: tokens/s and MFU in both conventions, by each attention, on
    one batch that stays on the device; then with batches from the loader, and how long the step waits for them.
checkpoint, loader: the JSON lines of tools/bench/checkpoint.py and loader.py.
blocks: only where asked for: our kernels by their block sizes, for the tables of triton_block_sizes.py and
    mosaic_block_sizes.py.

Each section is a process with a time limit; one that fails is reported, the others go on, and the command then fails.
--out is by default gpu_suite.json in the folder $OUT, or tools/bench/results/DATE_gpu_suite_DEVICE.json. --smoke runs
everything tiny, on a CPU with the kernels interpreted (not mosaic's): whether the suite works, before a GPU is there.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from k2jax import files, paths  # noqa: E402
from k2jax.errors import RunError, run_main  # noqa: E402

Row = dict[str, Any]
LIMITS_S = {"numerics": 110, "attention": 110, "train": 210, "checkpoint": 65, "loader": 40, "blocks": 300}
BENCH = {  # arguments of the commands beside this one: on a GPU, and with --smoke
    "checkpoint": (
        ["--rounds=2", "--dim=1024", "--layers=8"],
        ["--rounds=1", "--dim=64", "--layers=1", "--product=64"],
    ),
    "loader": (
        ["--tokens=50000000", "--steps=200", "--repeats=3"],
        ["--tokens=2000000", "--steps=4", "--repeats=1", "--chunk-tokens=16384"],
    ),
}
ERROR_LIMITS = {"bfloat16": 2**-6, "float32": 1e-4}  # of the largest number: a bit more than rounding (8 and 24 bits)


# ---- the contestants -------------------------------------------------------------------------------------------------


def attentions(smoke: bool) -> dict[str, Callable[..., Any]]:
    """By name: functions of q, k, v and document_BT."""
    from functools import partial

    import jax
    from k2jax.kernels.flash_attention import flash_attention
    from k2jax.kernels.triton_block_sizes import BlockSizes, Cut

    from k2jax.kernels import mosaic_block_sizes

    def cudnn(q: Any, k: Any, v: Any, document_BT: Any) -> Any:
        assert document_BT is None, "cuDNN masks no documents"
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    def jnp(q: Any, k: Any, v: Any, document_BT: Any) -> Any:
        from k2jax.model.attention import attend_causally

        return attend_causally(q, k, v, document_BT, "jnp")

    sizes = BlockSizes(*[Cut(32, 32, 4, 1)] * 3) if smoke else None
    def mosaic(q: Any, k: Any, v: Any, document_BT: Any) -> Any:
        return flash_attention(q, k, v, document_BT, sizes=mosaic_block_sizes.block_sizes(q.shape[3]))

    found = {"flash": partial(flash_attention, sizes=sizes, interpret=smoke), "jnp": jnp}
    if not smoke:
        found["cudnn"] = cudnn
    if on_hopper():
        found["mosaic"] = mosaic
    return found


def on_hopper() -> bool:
    import jax
    from k2jax.kernels.triton_block_sizes import HOPPER

    return any(name in jax.devices()[0].device_kind for name in HOPPER)


def draw(B: int, T: int, N: int, K: int, H: int, dtype: str) -> list[Any]:
    """q, k, v and the gradient of the output."""
    import jax

    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (B, T, n, H), dtype) for key, n in zip(keys, (N, K, K, N), strict=True)]


def with_gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    """(out, dq, dk, dv) of q, k, v, dout and document_BT, compiled."""
    import jax

    def both(q: Any, k: Any, v: Any, dout: Any, document_BT: Any) -> Any:
        out, backward = jax.vjp(lambda *x: attend(*x, document_BT), q, k, v)
        return out, *backward(dout.astype(out.dtype))

    return jax.jit(both)


def seconds(run: Callable[[], Any], calls: int) -> float:
    """Of one call: the median of three rounds of `calls` calls, each awaited at its end."""
    import jax

    jax.block_until_ready(run())
    rounds = []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(calls):
            last = run()
        jax.block_until_ready(last)
        rounds.append((time.perf_counter() - started) / calls)
    return statistics.median(rounds)


def tried(row: Row, measure: Callable[[], Row]) -> Row:
    """The row with what was measured, or with why it was not: whatever XLA, cuDNN or memory says."""
    try:
        return row | measure()
    except Exception as error:
        return row | {"ok": False, "error": f"{type(error).__name__}: {str(error).strip()[:300]}"}


# ---- sections: each yields rows --------------------------------------------------------------------------------------


def numerics(smoke: bool) -> Iterator[Row]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from k2jax.kernels import reference

    cases = [("bfloat16", 2048, 4, 4, 128, False), ("bfloat16", 2048, 4, 2, 128, True)]
    cases += [("bfloat16", 1000, 2, 1, 64, True), ("bfloat16", 1000, 2, 1, 64, False)]
    cases += [("bfloat16", 1024, 2, 2, 256, False), ("float32", 500, 2, 1, 128, True)]
    cases = [("bfloat16", 50, 2, 1, 64, False), ("float32", 50, 2, 1, 64, True)] if smoke else cases
    contestants = attentions(smoke)
    for dtype, T, N, K, H, masked in cases:
        arrays = draw(2, T, N, K, H, dtype)
        ends = np.cumsum(np.random.default_rng(0).random((2, T)) < 8 / T, axis=1)
        ids = jnp.asarray(ends, jnp.int32) if masked else None
        plain = with_gradients(lambda q, k, v, ids: reference.attention(q, k, v, ids if ids is None else (ids, ids))[0])
        expected = [np.asarray(x) for x in plain(*(x.astype(jnp.float32) for x in arrays), ids)]
        case = {"dtype": dtype, "length": T, "heads": f"{N}/{K}", "head_dim": H, "documents": masked}
        for name in contestants:
            if name == "jnp" or (name == "cudnn" and masked) or (name != "flash" and dtype == "float32"):
                continue

            def measure(name: str = name, inputs: Any = (*arrays, ids), expected: Any = expected) -> Row:
                run = with_gradients(contestants[name])
                row = errors(*(jax.device_get(run(*inputs)) for _ in range(2)), expected)
                return row | {"ok": row["ok"] and (row["repeats"] or name == "cudnn")}  # ours add up in a fixed order

            yield tried({"attention": name} | case, measure)


def errors(found: tuple, again: tuple, expected: list) -> Row:
    """Of out, dq, dk and dv, found twice."""
    import numpy as np

    pairs = zip(("out", "dq", "dk", "dv"), found, expected, strict=True)
    row = {name: float(np.abs(np.float32(x) - y).max() / np.abs(y).max()) for name, x, y in pairs}
    same = all((x == y).all() for x, y in zip(found, again, strict=True))
    ok = all(error < ERROR_LIMITS[str(found[0].dtype)] for error in row.values())  # a NaN is not
    return {name: round(error, 6) for name, error in row.items()} | {"repeats": bool(same), "ok": ok}


def attention(smoke: bool) -> Iterator[Row]:
    cases = [(16384 // T, T, 16, 16) for T in (2048, 4096, 8192)] + [(2, 8192, 32, 8)]
    cases, H, calls = ([(1, 64, 2, 1)], 64, 1) if smoke else (cases, 128, 10)
    contestants = attentions(smoke)
    last = contestants.pop("jnp")  # takes the longest to compile: what a time limit cuts off
    turns = [(name, attend, case) for case in cases for name, attend in contestants.items()]
    for name, attend, case in turns + [("jnp", last, case) for case in cases]:
        row = dict(zip(("rows", "length", "heads", "kv_heads"), case, strict=True)) | {"head_dim": H}
        yield tried({"attention": name} | row, lambda attend=attend, case=case: speed(attend, *case, H, calls))


def speed(attend: Callable[..., Any], B: int, T: int, N: int, K: int, H: int, calls: int) -> Row:
    import jax

    *arrays, dout = draw(B, T, N, K, H, "bfloat16")
    forward, both = jax.jit(lambda q, k, v: attend(q, k, v, None)), with_gradients(attend)
    forward_s = seconds(lambda: forward(*arrays), calls)
    both_s = seconds(lambda: both(*arrays, dout, None), calls)
    tflop = 4 * B * N * H * T * T / 2 / 1e12
    row = {"forward_ms": round(forward_s * 1e3, 3), "both_ms": round(both_s * 1e3, 3)}
    return row | {"forward_tflop_s": round(tflop / forward_s, 1), "both_tflop_s": round(3.5 * tflop / both_s, 1)}


def blocks(smoke: bool) -> Iterator[Row]:
    """One kernel's cut changed at a time, the others as the table has them."""
    import jax
    from k2jax.kernels.flash_attention import flash_attention

    B, T, N, H = (1, 64, 1, 64) if smoke else (4, 4096, 16, 128)
    *arrays, dout = draw(B, T, N, N, H, "bfloat16")
    for cut, sizes in cuts(smoke, jax.devices()[0].device_kind, H):

        def measure(sizes: Callable[[], Any] = sizes) -> Row:
            options = {"sizes": sizes(), "interpret": smoke}
            both = with_gradients(lambda q, k, v, ids: flash_attention(q, k, v, ids, **options))
            return {"both_ms": round(seconds(lambda: both(*arrays, dout, None), 5) * 1e3, 3)}

        yield tried(cut, measure) | {"ok": True}  # some do not fit shared memory


def cuts(smoke: bool, kind: str, head_dim: int) -> Iterator[tuple[Row, Callable[[], Any]]]:
    """(what is cut how, the block sizes, ValueError where they cannot be)."""
    from dataclasses import replace
    from functools import partial
    from itertools import product

    from k2jax.kernels import mosaic_block_sizes, triton_block_sizes

    names, Cut = ("queries", "keys", "warps", "stages"), triton_block_sizes.Cut
    base = triton_block_sizes.block_sizes(kind, head_dim, 2)
    if smoke:
        base = triton_block_sizes.BlockSizes(*[Cut(32, 32, 4, 1)] * 3)
    sides, deep = ((32,), (1,)) if smoke else ((64, 128), (2, 3))
    for kernel, cut in product(("forward", "dkv", "dq"), product(sides, sides, (4, 8), deep)):
        row = {"attention": "flash", "kernel": kernel} | dict(zip(names, cut, strict=True))
        yield row, partial(replace, base, **{kernel: Cut(*cut)})
    names, Cut, base = ("queries", "keys", "stages"), mosaic_block_sizes.Cut, mosaic_block_sizes.block_sizes(head_dim)
    for kernel, cut in product(("forward", "dkv", "dq"), product((64, 128), (64, 128), (2, 3))) if on_hopper() else ():
        row = {"attention": "mosaic", "kernel": kernel} | dict(zip(names, cut, strict=True))
        yield row, partial(replace, base, **{kernel: Cut(*cut)})


def train(smoke: bool) -> Iterator[Row]:
    from gpu_suite_training import Training

    training = Training(smoke)
    for implementation in ("jnp",) if smoke else ("cudnn", "flash"):
        yield tried({"attention": implementation}, lambda name=implementation: training.steps(name))
    yield tried({"attention": implementation, "batches": "loader"}, training.fed_by_the_loader)


SECTIONS = {"numerics": numerics, "attention": attention, "train": train, "blocks": blocks}


def work(section: str, smoke: bool) -> None:
    """A section's process: the device, then a JSON line a row. Exits with 1 where a row is not as it should be."""
    import jax

    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__}), flush=True)
    rows = []
    for row in SECTIONS[section](smoke):
        rows.append(row)
        print(json.dumps(row), flush=True)
    sys.exit(not all(row.get("ok", True) for row in rows))


# ---- the suite -------------------------------------------------------------------------------------------------------


def run_section(name: str, smoke: bool) -> Row:
    """What a section's process printed, and how it ended."""
    command = [sys.executable, __file__, f"--worker={name}", *(["--smoke"] if smoke else [])]
    if name in BENCH:
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *BENCH[name][smoke]]
    started, error = time.perf_counter(), None
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        try:
            code = subprocess.run(command, stdout=out, stderr=log, timeout=LIMITS_S[name], cwd=REPO).returncode
        except subprocess.TimeoutExpired:
            code, error = None, f"took more than {LIMITS_S[name]} s"
        lines, logged = ((file.seek(0), file.read().strip().splitlines())[1] for file in (out, log))
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    if code:
        failed = [row for row in rows if not row.get("ok", True)]
        error = f"{len(failed)} of its rows failed" if failed else " | ".join(logged[-3:])[-600:] or f"exit code {code}"
    return {"error": error, "wall_s": round(time.perf_counter() - started, 1), "rows": rows}


def show(name: str, found: Row) -> None:
    """A section as a table."""
    print(f"\n{name}: {found['error'] or 'done'}, {found['wall_s']} s")
    rows = [row for row in found["rows"] if "jax" not in row]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([str(row.get(key, "")) for key in columns] for row in rows)]
    if len(rows) == 1:
        cells = [list(pair) for pair in zip(*cells, strict=True)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))] if rows else []
    for line in cells if rows else []:
        print("", *(cell.ljust(width) for cell, width in zip(line, widths, strict=True)), sep="  ", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = [name for name in LIMITS_S if name != "blocks"]
    parser.add_argument("--sections", nargs="+", choices=LIMITS_S, default=defaults)
    paths.add(parser, "--out")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--worker", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # the sections come one after the other
    if args.worker:
        work(args.worker, args.smoke)
    found = {}
    for name in args.sections:
        found[name] = run_section(name, args.smoke)
        show(name, found[name])
    rows = [row for section in found.values() for row in section["rows"]]
    device = next((row["device"] for row in rows if "device" in row), "unknown")
    date = datetime.date.today().isoformat()
    folder = Path(os.environ["OUT"]) if "OUT" in os.environ else None
    own_name = f"{date}_gpu_suite_{'-'.join(device.split())}.json"
    out = args.out or (folder / "gpu_suite.json" if folder else Path(__file__).parent / "results" / own_name)
    result = {"benchmark": "gpu_suite", "date": date, "device": device, "smoke": args.smoke, "sections": found}
    files.write_json(out, result)
    print(f"\nwrote {out}")
    failed = [name for name, section in found.items() if section["error"]]
    if failed:
        raise RunError(f"failed: {', '.join(failed)}; the others are good")


if __name__ == "__main__":
    run_main(main)
