"""Imports a LLaMA-class model from Hugging Face's format into a run directory.

    tools/convert_from_hf.py --hf models/llama --out runs/llama
    python -m k2jax.generate --workdir runs/llama --prompt "The order of the data is"

Takes the layouts of LLaMA 1, 2 and 3, in safetensors of float32, bfloat16 or float16, with a tokenizer.json. What the
folder holds is read as data, and refused unless it is exactly what its config.json says. The run has the weights as
checkpoint 0, no optimizer state, and an experiment.py to fill in for training on. It is written under another name and
renamed when it is whole. Memory: 2.7 times the model's size in float32 at most.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # it is reading and writing; accelerators are left to who needs them

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from k2jax import paths
from k2jax.errors import run_main


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paths.add(parser, "--hf", required=True, metavar="DIR", help="config.json, weights, tokenizer.json")
    paths.add(parser, "--out", required=True, metavar="WORKDIR", help="the run; new, or empty")
    parser.add_argument("--name", default="", help="of the experiment (default: the folder's)")
    parser.add_argument("--allow-non-finite", action="store_true", help="take weights that are NaN or infinite, too")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()

    from tqdm import tqdm

    from k2jax.hf.importer import describe, import_hf
    from k2jax.model.decoder import num_params

    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        done = import_hf(args.hf, args.out, args.name, args.allow_non_finite, bar.update)
    if not args.json:
        print(describe(done))
        return
    groups = {
        group: {"parameters": count, "norm": math.sqrt(sums.square), "nonfinite": sums.num_nonfinite}
        for group, (count, sums) in done.groups.items()
    }
    result = {
        "workdir": str(done.workdir),
        "step": 0,
        "digest": done.digest,
        "parameters": num_params(done.source.hf.model),
        "dtype": done.source.dtype,
        "groups": groups,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
