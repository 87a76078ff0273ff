"""Exports a checkpoint of a run to Hugging Face's format, or checks an export.

    tools/convert_to_hf.py --workdir runs/k2 --step 1000 --out exports/k2-1000
    tools/convert_to_hf.py --workdir runs/k2 --out exports/k2-1000 --verify

The folder is what transformers' AutoModelForCausalLM.from_pretrained and servers load, with a model card and a
certificate, parity.json: SHA-256, norm and number of non-finite values of each tensor, and the logits that they must
give. It is written under another name and renamed when everything agrees. Memory: a few matrices, whatever the model.

--verify checks the files against the certificate, both against the run, and the logits again.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # it is reading and writing; accelerators are left to who needs them
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"  # a product that waits would hold its weights

import argparse
import json
import re
import sys
import time
from pathlib import Path

if not __package__:  # a file of a checkout; installed, it is k2jax.tools.NAME
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from k2jax import paths
from k2jax.bucket import BucketPath
from k2jax.errors import run_main
from k2jax.parallel.host_memory import keep_freed_memory
from k2jax.run import branches
from k2jax.upload import local_copy  # noqa: E402

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """Bytes of "5GB", "500MB" or a plain number."""
    found = re.fullmatch(r"(\d+)\s*([KMG]B|)", text.strip().upper())
    if not found or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 5GB, 500MB or a number of bytes")
    return int(found[1]) * UNITS[found[2]]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    branches.add_options(parser)
    parser.add_argument("--step", type=int, help="a checkpoint (default: the newest; with --verify the export's)")
    paths.add(parser, "--out", buckets=True, required=True, metavar="DIR", help="the export; new, or empty")
    kinds = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=kinds, default="bfloat16", help="of the weights (default: bfloat16)")
    parser.add_argument("--shard-size", type=size, default="5GB", help="of a file, at most (default: 5GB)")
    branches.add_weights(parser)
    parser.add_argument("--verify", action="store_true", help="check the export in --out, write nothing")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    args.workdir = branches.chosen(args)
    keep_freed_memory()  # before the imports below, some of which start threads
    started = time.perf_counter()
    if args.verify and isinstance(args.out, BucketPath):
        with local_copy(args.out) as copy:
            return convert(args, copy, started)
    convert(args, args.out, started)


def convert(args: argparse.Namespace, out: Path | BucketPath, started: float) -> None:
    """Exports to `out`, or verifies what is there, and prints what that gave."""
    from tqdm import tqdm

    from k2jax.hf.export import export
    from k2jax.hf.safetensors_io import DTYPES
    from k2jax.hf.verify import read_certificate, verify
    from k2jax.model.decoder import num_params
    from k2jax.run.saved import open_step

    exported = read_certificate(out)["checkpoint"] if args.verify else {}
    step = exported.get("step") if args.step is None else args.step
    saved = open_step(args.workdir, step, exported.get("weights", "params") if args.verify else args.weights)
    passes = 3 if args.verify else 1
    total = num_params(saved.config.model) * DTYPES[args.dtype].itemsize * passes
    with tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        if args.verify:
            result = verify(saved, out, bar.update)._asdict()
        else:
            done = export(saved, out, args.dtype, args.shard_size, bar.update)
            keys = ("largest_difference", "tolerance", "noise", "largest_logit")
            result = {**{key: done.parity["logits"][key] for key in keys}, "weights_s": round(done.weights_s, 3)}
    result = {"step": saved.step, "digest": saved.digest, "out": str(args.out), **result}
    if args.json:
        print(json.dumps({**result, "seconds": round(time.perf_counter() - started, 3)}))
        return
    print(
        f"{'verified' if args.verify else 'exported'} step {saved.step} {'in' if args.verify else 'to'} {args.out}: "
        f"logits differ by {result['largest_difference']:.2g} at most, rounding explains {result['tolerance']:.2g}"
    )


if __name__ == "__main__":
    run_main(main)
