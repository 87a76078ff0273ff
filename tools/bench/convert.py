"""Export to Hugging Face's format: speed beside `cp` of the same bytes, and peak memory, as one JSON line.

    python tools/bench/convert.py [--layers 20] [--dtype bfloat16] [--rounds 3] [--folder DIR]

Writes a checkpoint of random weights (dim 2048; 20 layers are 1.14B parameters, 4.6 GB), exports it with
tools/convert_to_hf.py in a process of its own, and copies the export with `cp` in the same round; both are timed until
the bytes are on the disk. Medians over the rounds. The limit of memory is the largest array and 1 GiB.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
os.environ["JAX_PLATFORMS"] = "cpu"


def write_checkpoint(workdir: Path, num_layers: int) -> None:
    """Step 1 of a run: parameters alone, as the trainer's own writer leaves them."""
    import jax
    import jax.numpy as jnp

    from k2jax import config as configuration
    from k2jax import sharding
    from k2jax.checkpoint import Checkpoints
    from k2jax.data.tokenizer import tokenizer_sha256, train_bpe
    from k2jax.model import init_params, num_params, parameter_table
    from k2jax.optimizer import TrainState

    workdir.mkdir()
    train_bpe(["the order of the data is computed, never stored " * 20], 320).save(str(workdir / "tokenizer.json"))
    c = configuration.base().unlock()
    c.model.update(vocab_size=32032, dim=2048, num_layers=num_layers, num_heads=16, num_kv_heads=16, ffn_dim=5504)
    c.stages = (configuration.stage(mix={"random": 1}),)
    mesh = sharding.make_mesh(c.mesh)
    meta = {"config": configuration.to_dict(c), "stage": 0, "eos_id": 2, "versions": {"k2jax": "bench"}}
    meta["tokenizer_sha256"] = tokenizer_sha256(workdir / "tokenizer.json")
    with jax.set_mesh(mesh):
        count = jax.device_put(jnp.int32(1), sharding.named(mesh, ()))
        table = parameter_table(c.model)
        params = {
            name: jax.jit(lambda name=name: init_params(c.model, 0)[name], out_shardings=sharding.named(mesh, p.axes))()
            for name, p in table.items()
        }
        checkpoints = Checkpoints(workdir, [1], log=lambda line: None)
        checkpoints.save(TrainState(count, count, count, params, {}, {}), 1, data={"next_step": 2}, meta=meta)
        checkpoints.wait()
        checkpoints.close()
    largest = max(array.nbytes for array in params.values())
    print(json.dumps({"parameters": num_params(c.model), "largest_array_bytes": largest}))


def export(workdir: Path, out: Path, dtype: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of the command."""
    command = [sys.executable, REPO / "tools" / "convert_to_hf.py"]
    options = ["--workdir", workdir, "--out", out, "--dtype", dtype, "--json"]
    started = time.perf_counter()
    process = subprocess.Popen([*map(str, command), *map(str, options)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise RuntimeError(f"the export ended with {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss * 1024


def copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of `cp`, and with the bytes on the disk."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    copied = time.perf_counter() - started
    subprocess.run(["sync", *sorted(target.iterdir())], check=True)
    return copied, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where to write; a temporary folder unless told")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write_checkpoint(args.write, args.layers)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        workdir, out, copied = folder / "run", folder / "out", folder / "copy"
        writer = [sys.executable, __file__, f"--write={workdir}", f"--layers={args.layers}"]
        about = json.loads(subprocess.run(writer, check=True, capture_output=True, text=True).stdout)
        rounds: dict[str, list[float]] = {"export": [], "cp": [], "cp_sync": [], "rss": []}
        for _ in range(args.rounds):
            seconds, rss = export(workdir, out, args.dtype)
            exported = sum(path.stat().st_size for path in out.iterdir())
            cp, cp_sync = copy(out, copied)
            for key, value in zip(rounds, (seconds, cp, cp_sync, rss), strict=True):
                rounds[key].append(value)
            shutil.rmtree(out)
            shutil.rmtree(copied)
    median = {key: statistics.median(values) for key, values in rounds.items()}
    limit = about["largest_array_bytes"] + 2**30
    print(
        json.dumps(
            {
                "benchmark": "convert",
                "dtype": args.dtype,
                "model_bytes": 4 * about["parameters"],
                "exported_bytes": exported,
                "export_s": round(median["export"], 2),
                "cp_s": round(median["cp"], 2),
                "cp_and_sync_s": round(median["cp_sync"], 2),
                "ratio_to_cp_and_sync": round(median["cp_sync"] / median["export"], 3),
                "ratio_to_cp": round(median["cp"] / median["export"], 3),
                "peak_rss_bytes": int(max(rounds["rss"])),
                "limit_bytes": limit,
                "model_over_limit": round(4 * about["parameters"] / limit, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
