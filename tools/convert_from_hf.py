"""Imports a model of a family that k2jax has from Hugging Face's format into a run directory.

    tools/convert_from_hf.py --hf models/llama --out runs/llama
    python -m k2jax.generate --workdir runs/llama --prompt "The order of the data is"

Takes LLaMA 1, 2 and 3, Mistral, Qwen2, Qwen3 and OLMo-2 (dense ones), in safetensors of float32, bfloat16 or float16,
with a tokenizer.json. What the folder holds is read as data, and refused unless it is exactly what its config.json
says; a key of that which k2jax does not know is refused, too, until --ignore names it. The run has the weights as
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

if not __package__:  # a file of a checkout; installed, it is k2jax.tools.NAME
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from k2jax import paths
from k2jax.errors import run_main


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paths.add(parser, "--hf", required=True, metavar="DIR", help="config.json, weights, tokenizer.json")
    paths.add(parser, "--out", required=True, metavar="WORKDIR", help="the run; new, or empty")
    parser.add_argument("--name", default="", help="of the experiment (default: the folder's)")
    base = "the model's name on the hub, which cards of what is exported name (default: the cache folder's)"
    parser.add_argument("--base-model", default="", metavar="ORG/NAME", help=base)
    parser.add_argument("--allow-non-finite", action="store_true", help="take weights that are NaN or infinite, too")
    keys = "of config.json, unknown to k2jax, that change nothing of what is computed: left out, and recorded"
    parser.add_argument("--ignore", default="", metavar="KEY[,KEY]", help=keys)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()

    from tqdm import tqdm

    from k2jax.hf.importer import describe, import_hf
    from k2jax.model.decoder import num_params

    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        ignore = [key for key in args.ignore.split(",") if key]
        done = import_hf(args.hf, args.out, args.name, args.allow_non_finite, bar.update, ignore, args.base_model)
    if not args.json:
        print(describe(done))
        return
    groups = {
        group: {"parameters": count, "norm": math.sqrt(sums.square), "nonfinite": sums.num_nonfinite}
        for group, (count, sums) in done.groups.items()
    }
    result = {
        "workdir": str(done.workdir),
        "base_model": done.source.base_model,
        "step": 0,
        "digest": done.digest,
        "parameters": num_params(done.source.hf.model),
        "dtype": done.source.dtype,
        "family": done.source.hf.kind,
        "context": done.source.hf.context,
        "rows": done.source.hf.rows,
        "ignored": done.source.hf.ignored,
        "groups": groups,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
