"""The export to Hugging Face's format: its speed beside `cp` of what it wrote, and its peak memory.

    python tools/bench/convert.py [--gigabytes 4] [--dtype bfloat16] [--rounds 3] [--folder DIR]

Makes a checkpoint of random parameters as a run saves it, exports it in a process of its own, and copies the exported
files on the same disk; both end when their bytes are on the disk. Prints one JSON line; medians over the rounds.

`weights_s` is the export's streaming: parameters (float32) read, checked, converted, hashed, written and synced;
`whole_s` the whole command, with start-up, certificate and logits by both paths. `ratio` is cp_s / weights_s,
`ratio_read` the same beside a copy of as many bytes as the export reads (the parameters), `ratio_whole` cp_s / whole_s.
"cold": nothing that is read was in the page cache before; "warm": all of it that fits. `limit_bytes`: the largest
matrix (of a layer; float32) + 1 GiB.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from k2jax import config as configuration  # noqa: E402
from k2jax import paths  # noqa: E402
from k2jax.data.tokenizer import EOS, tokenizer_sha256, train_bpe  # noqa: E402
from k2jax.errors import run_main  # noqa: E402
from k2jax.model.decoder import parameter_table  # noqa: E402


def experiment(num_bytes: float) -> ConfigDict:
    """A model of K2's proportions, width 2048, with as many layers as make `num_bytes` of float32 parameters."""
    c = configuration.base().unlock()
    c.model.update(vocab_size=32032, dim=2048, num_heads=16, num_kv_heads=16, head_dim=128, ffn_dim=5504)
    c.stages = (configuration.stage(name="only"),)
    c.model.num_layers = 1
    table = parameter_table(c.model)
    layer = sum(math.prod(p.shape) for name, p in table.items() if name.startswith("layers."))
    rest = sum(math.prod(p.shape) for name, p in table.items() if not name.startswith("layers."))
    c.model.num_layers = max(round((num_bytes / 4 - rest) / layer), 1)
    return c


def make_run(workdir: Path, num_bytes: float) -> None:
    """Checkpoint 1 of random weights, written as the trainer does; in a process that then gives its memory back."""
    import jax

    from k2jax.parallel import sharding
    from k2jax.run.checkpoint import Checkpoints
    from k2jax.run.state import TrainState

    c = experiment(num_bytes)
    workdir.mkdir()
    tokenizer = train_bpe(["some words for a tokenizer that is there " * 5], 290)
    tokenizer.save(str(workdir / "tokenizer.json"))
    mesh = sharding.make_mesh({"replica": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    rng = np.random.default_rng(0)
    params = {}
    for name, p in parameter_table(c.model).items():
        value = rng.standard_normal(p.shape, np.float32)
        value *= np.float32(0.02)
        params[name] = jax.device_put(value, sharding.named(mesh, p.axes))
    zero = jax.device_put(np.int32(0), sharding.named(mesh, ()))
    meta = {"config": configuration.to_dict(c), "stage": 0, "eos_id": tokenizer.token_to_id(EOS)}
    meta |= {"tokenizer_sha256": tokenizer_sha256(workdir / "tokenizer.json"), "versions": {"k2jax": "benchmark"}}
    checkpoints = Checkpoints(workdir, [1], log=lambda line: None)
    checkpoints.save(TrainState(zero, zero, zero, params, {}, {}), 1, data={"next_step": 2}, meta=meta)
    checkpoints.wait()
    checkpoints.close()


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def sync(folder: Path, evict: bool = False) -> None:
    """Files to the disk, and out of the page cache if told."""
    for path in files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        if evict:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def export(workdir: Path, out: Path, dtype: str) -> dict[str, float]:
    """Runs the command; its own times, and the peak of its memory."""
    tool = [sys.executable, str(ROOT / "tools" / "convert_to_hf.py"), "--json", "--dtype", dtype]
    started = time.perf_counter()
    process = subprocess.Popen([*tool, "--workdir", str(workdir), "--out", str(out)], stdout=subprocess.PIPE, text=True)
    result = json.loads(process.stdout.read() or "{}")
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"the export failed: {os.waitstatus_to_exitcode(status)}")
    whole_s, cpu_s = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    peak = usage.ru_maxrss * 1024
    return {"weights_s": result["weights_s"], "whole_s": whole_s, "whole_cpu_s": cpu_s, "peak_rss_bytes": peak}


def copy(source: Path, target: Path) -> dict[str, float]:
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    unsynced_s = time.perf_counter() - started
    sync(target)
    return {"cp_s": time.perf_counter() - started, "cp_unsynced_s": unsynced_s}


def one_round(folder: Path, dtype: str, cold: bool) -> dict[str, float]:
    run, out, again = (folder / name for name in ("run", "out", "copy"))
    sync(run, evict=cold)
    found = export(run, out, dtype)
    sync(out, evict=cold)
    found |= copy(out, again)
    found["written_bytes"] = sum(path.stat().st_size for path in files(out))
    shutil.rmtree(out)
    shutil.rmtree(again)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of parameters; to make them takes 3 times it")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=3)
    paths.add(parser, "--folder", help="where to write; a temporary folder unless told")
    args = parser.parse_args()
    model = experiment(args.gigabytes * 1e9).model
    shapes = [p.shape[1:] if name.startswith("layers.") else p.shape for name, p in parameter_table(model).items()]
    read = 4 * sum(math.prod(p.shape) for p in parameter_table(model).values())
    limit = 4 * max(math.prod(shape) for shape in shapes) + 2**30
    result = {"benchmark": "convert", "dtype": args.dtype, "model_bytes": read, "limit_bytes": limit}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        maker = multiprocessing.get_context("spawn").Process(
            target=make_run, args=(Path(folder) / "run", args.gigabytes * 1e9)
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            sys.exit("the checkpoint could not be made")
        for kind in ("cold", "warm"):
            rounds = [one_round(Path(folder), args.dtype, kind == "cold") for _ in range(args.rounds)]
            found = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
            found["ratio"] = found["cp_s"] / found["weights_s"]
            found["ratio_read"] = found["ratio"] * read / found["written_bytes"]
            found["ratio_whole"] = found["cp_s"] / found["whole_s"]
            found["peak_rss_bytes"] = max(r["peak_rss_bytes"] for r in rounds)
            result[kind] = {key: round(value, 3) for key, value in found.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
