"""All that only a GPU can tell, in one command of under nine minutes on an H100: a table, and JSON with the same.

    python tools/bench/gpu_suite.py [--sections train peer ...] [--minutes 9] [--out FILE] [--smoke]

train: the 1B model of experiments/k2_1b.py on one device: tokens/s and MFU in both conventions, by each attention, on
    one batch that stays on the device; with batches from the loader, and how long the step waits for them; with
    compiler.deterministic off. Its memory by part, as the compiler planned it, beside the device's peak.
peer: PyTorch with transformers on the same model and as many tokens, and the ratio of the two: gpu_suite_peer.py.
bits: two launches of a small experiment and a killed and resumed one, their ledgers compared: gpu_suite_bits.py.
profile: the device's time in a step of `train`, by kind of kernel: gpu_suite_profile.py.
attention: ms and TFLOP/s (of the causal half: two products forward, five backward) of flash, mosaic, cudnn and jnp in
    bfloat16, head_dim 128, 16,384 tokens a call, with documents and without. mosaic_ahead: with Cut.ahead.
numerics: our kernels (flash: Triton's; mosaic: Hopper's) and cuDNN's against kernels/reference.py in float32: the
    largest error of the output and of each gradient, as a share of the largest number there, in the first and the last
    head; and whether a second run gives the same bits.
checkpoint, loader: the JSON lines of tools/bench/checkpoint.py and loader.py.
blocks: only where asked for: our kernels by their block sizes, for the tables of triton_block_sizes.py and
    mosaic_block_sizes.py.

Each section is a process with a time limit, in the order above; one that fails is reported, the others go on, and the
command then fails. What compiles in one comes out of a cache in the next. A section begins with what is left of
--minutes; each case that was not come to is a row that says so (gpu_suite_cases.py lists them).
--out is by default gpu_suite.json in the folder $OUT, or tools/bench/results/DATE_gpu_suite_DEVICE.json. --smoke runs
everything tiny, on a CPU with the kernels interpreted (not mosaic's): whether the suite works, before a GPU is there.
"""

import argparse
import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from gpu_suite_cases import SECTIONS, Row, without_a_row  # noqa: E402

from k2jax import files, paths  # noqa: E402
from k2jax.errors import RunError, run_main  # noqa: E402

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
ROOMS = {"numerics": "attention", "attention": "attention", "blocks": "attention", "train": "training"}
ROOMS |= {"profile": "training", "peer": "peer", "bits": "bits"}  # gpu_suite_ROOM.py, which has a function of that name
WORTH_S = 10  # with less left, a section does not begin: it would not have imported JAX
NOT_OF_JAX = ("peer", "bits")  # their processes must leave the device to others


def work(section: str, smoke: bool) -> None:
    """A section's process: the device, then a JSON line a row. Exits with 1 where a row is not as it should be."""
    rows = []
    if section not in NOT_OF_JAX:
        import jax

        print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__}), flush=True)
    for row in getattr(importlib.import_module(f"gpu_suite_{ROOMS[section]}"), section)(smoke):
        rows.append(row)
        print(json.dumps(row), flush=True)
    sys.exit(not all(row.get("ok", True) for row in rows))


# ---- the suite -------------------------------------------------------------------------------------------------------


def environment(smoke: bool, cache: str) -> dict[str, str]:
    """Of all sections: what compiles for one is in the cache for the next, as is what was tuned."""
    own = os.environ | ({"JAX_PLATFORMS": "cpu"} if smoke else {})
    if own.get("JAX_PLATFORMS"):
        own["JAX_PLATFORMS"] = ",".join(dict.fromkeys([*own["JAX_PLATFORMS"].split(","), "cpu"]))  # numerics' reference
    shared = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    shared["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    shared["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.92"  # the sections come one after the other
    return shared | own


def run_section(name: str, smoke: bool, left_s: float, own: dict[str, str]) -> Row:
    """What a section's process printed, how it ended, and a row for each case that it has none of."""
    limit_s = min(SECTIONS[name].limit_s, left_s)
    if limit_s < WORTH_S:
        error = f"not begun: {max(left_s, 0):.0f} s were left"
        return {"error": error, "wall_s": 0.0, "rows": _absent(name, smoke, [], error)}
    command = [sys.executable, __file__, f"--worker={name}", *(["--smoke"] if smoke else [])]
    if name in BENCH:
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *BENCH[name][smoke]]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        code, error = _ended(command, limit_s, stdout=out, stderr=log, cwd=REPO, env=own)
        lines, logged = ((file.seek(0), file.read().strip().splitlines())[1] for file in (out, log))
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    rows = [{"benchmark": name} | row for row in rows] if name in BENCH else rows
    if code:
        failed = [row for row in rows if not row.get("ok", True)]
        error = f"{len(failed)} of its rows failed" if failed else " | ".join(logged[-3:])[-600:] or f"exit code {code}"
    rows += _absent(name, smoke, rows, error or "the section has no such row")
    if any("not run" in row for row in rows):
        error = error or "some of its cases were not run"
    return {"error": error, "wall_s": round(time.perf_counter() - started, 1), "rows": rows}


def _absent(name: str, smoke: bool, rows: list[Row], why: str) -> list[Row]:
    return [case | {"ok": False, "not run": why} for case in without_a_row(name, smoke, rows)]


def _ended(command: list[str], limit_s: float, **options: object) -> tuple[int | None, str | None]:
    """(exit code, None), or (None, why) where it was ended with all that it had started."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        return process.wait(limit_s), None
    except subprocess.TimeoutExpired:
        return None, f"took more than {limit_s:.3g} s"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


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


def run_all(names: list[str], smoke: bool, minutes: float) -> dict[str, Row]:
    """By section, in the order of SECTIONS."""
    deadline, found = time.monotonic() + 60 * minutes, {}
    with tempfile.TemporaryDirectory() as cache:
        own = environment(smoke, cache)
        for name in [name for name in SECTIONS if name in names]:
            found[name] = run_section(name, smoke, deadline - time.monotonic(), own)
            if name == "peer" and "train" in found:
                from gpu_suite_peer import compared

                found[name]["rows"] = [compared(row, found["train"]["rows"]) for row in found[name]["rows"]]
            show(name, found[name])
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = [name for name in SECTIONS if name != "blocks"]
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=defaults)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all sections together")
    paths.add(parser, "--out")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--worker", choices=ROOMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.smoke)
    started = time.perf_counter()
    found = run_all(args.sections, args.smoke, args.minutes)
    rows = [row for section in found.values() for row in section["rows"]]
    device = next((row["device"] for row in rows if "device" in row), "unknown")
    date = datetime.date.today().isoformat()
    folder = Path(os.environ["OUT"]) if "OUT" in os.environ else None
    own_name = f"{date}_gpu_suite_{'-'.join(device.split())}.json"
    out = args.out or (folder / "gpu_suite.json" if folder else Path(__file__).parent / "results" / own_name)
    result = {"benchmark": "gpu_suite", "date": date, "device": device, "smoke": args.smoke}
    files.write_json(out, result | {"wall_s": round(time.perf_counter() - started, 1), "sections": found})
    print(f"\nwrote {out}")
    failed = [name for name, section in found.items() if section["error"]]
    if failed:
        raise RunError(f"failed: {', '.join(failed)}; the others are good")


if __name__ == "__main__":
    run_main(main)
