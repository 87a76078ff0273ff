"""Seconds from the command to the end of the first step, as one JSON line: the trainer, and PyTorch on the same model.

    python tools/bench/start.py [--rounds=3] [--skip-torch]

A round starts each of them once, in turns, as processes of their own, on the 58M-parameter model of train_step.py:
cold: `python -m k2jax.train`'s work with an empty cache of compiled programs. warm: the same again, the programs there.
torch: transformers' LlamaForCausalLM, eager. Medians; `parts` are those that the trainer itself tells of its launch.
cpu_s is what a process used of all cores up to then, whatever else this machine did: the trainer's up to the end of its
only step and the save of it.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(Path(__file__).parent)]

import train_step  # noqa: E402

from k2jax import config, files  # noqa: E402
from k2jax.errors import run_main  # noqa: E402

EXPERIMENT = """
from train_step import get_config as bench
from k2jax import config

def get_config():
    c = bench()
    c.data.root, c.data.tokenizer = {folder!r}, {folder!r} + "/tokenizer.json"
    stage = dict(sequence_length={sequence}, rows_per_step={rows}, steps_per_chunk=1, chunks=1, warmup_steps=0)
    c.stages = (config.stage(mix={{"synthetic": 1}}, **stage),)
    c.eval.at_checkpoints, c.eval.windows = 0, 1
    return c
"""


def run(command: list[str], environment: dict[str, str], log: Path) -> tuple[float, float]:
    """(seconds, seconds of all cores) of a process that ends well."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("w") as out:
        code = subprocess.call(command, stdout=out, stderr=subprocess.STDOUT, cwd=REPO, env=environment)
    if code:
        raise RuntimeError(f"{command} ended with {code}:\n{log.read_text()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, cpu_s


def start_trainer(folder: Path, cache: Path) -> dict[str, Any]:
    """Its own record of the launch: seconds, parts, programs."""
    workdir = folder / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    paths = os.pathsep.join([str(REPO), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "XDG_CACHE_HOME": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-m", "k2jax.train", f"--config={folder}/experiment.py", f"--workdir={workdir}"]
    _, cpu_s = run(command, environment, folder / "trainer.log")
    record = json.loads((workdir / "environment.json").read_text())["launches"][-1]["first_step"]
    return {**record, "cpu_s": cpu_s}


def start_torch(folder: Path) -> dict[str, Any]:
    seconds, cpu_s = run([sys.executable, __file__, "--worker"], dict(os.environ), folder / "torch.log")
    return {"seconds": seconds, "cpu_s": cpu_s}


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    train_step.write_store(folder)
    sizes = {"folder": str(folder), "sequence": train_step.SEQUENCE, "rows": train_step.ROWS}
    files.write_text(folder / "experiment.py", EXPERIMENT.format(**sizes))
    config.load(folder / "experiment.py", [])
    result: dict[str, Any] = {"cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)}
    found: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": [], "torch": []}
    for number in range(args.rounds):
        cache = folder / f"cache{number}"
        found["cold"].append(start_trainer(folder, cache))
        found["warm"].append(start_trainer(folder, cache))
        if not args.skip_torch:
            found["torch"].append(start_torch(folder))
    for name, records in found.items():
        if not records:
            continue
        result[f"{name}_s"] = [round(record["seconds"], 1) for record in records]
        result[f"{name}_median_s"] = round(statistics.median(record["seconds"] for record in records), 1)
        result[f"{name}_cpu_s"] = round(statistics.median(record["cpu_s"] for record in records), 1)
    for name in ("cold", "warm"):
        parts = [record["parts"] for record in found[name]]
        result[f"{name}_parts_s"] = {p: round(statistics.median(r[p] for r in parts), 2) for p in parts[0]}
        result[f"{name}_programs"] = found[name][0]["programs"]
    return {**result, "load_after": round(os.getloadavg()[0], 2)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-torch", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return next(train_step.torch_steps("fp32"))
    with tempfile.TemporaryDirectory(prefix="k2jax-bench-") as folder:
        print(json.dumps(compare(args, Path(folder))))


if __name__ == "__main__":
    run_main(main)
