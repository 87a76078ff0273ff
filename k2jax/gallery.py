"""The prompt gallery: what each checkpoint of a run makes of the same prompts, kept in gallery/ of the run directory.

    python -m k2jax.gallery --workdir=runs/k2
    python -m k2jax.gallery --workdir=runs/k2 --steps=every:10 --prompts=prompts.jsonl

gallery/<step>.json holds the texts by the digest of the checkpoint that they are of. One that is there is never made
again or changed: a second call does what is missing. The prompts are those of the experiment (eval.prompts) and of
PROMPTS below.
"""

import argparse
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from k2jax import files, locks, paths
from k2jax.bucket import BucketPath
from k2jax.data.decoding import text_after
from k2jax.errors import StorageError, run_main
from k2jax.generate import Prompt, encode, open_generator, read_prompts
from k2jax.lease import alone
from k2jax.run import branches

FORMAT = 1
MAX_BYTES = 1 << 28
# Of what a model of this kind reads, a line each. A change makes galleries that cannot be compared: only add.
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was",
    "The theory of evolution by natural selection states that",
    "Question: What is 17 + 26?\nAnswer:",
    "Let x be a real number such that 2x + 3 = 11. Then x =",
    'def fibonacci(n):\n    """Returns the n-th Fibonacci number."""\n',
    "import numpy as np\n\n",
    "The court held that the defendant",
    "Patients with type 2 diabetes are at risk of",
    "Abstract\n\nWe study",
    "== History ==\n",
    "I think that the best way to learn a language is",
)


def main() -> None:
    """The command."""
    args = parse()
    from k2jax.evals.session import select_steps  # after the arguments: --help needs none of it
    from k2jax.parallel import compile_cache
    from k2jax.run.saved import open_step

    def say(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    steps = select_steps(args.workdir, args.steps)
    named = read_prompts(args) if args.prompts else None
    settings = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
    settings |= {"top_k": args.top_k, "top_p": args.top_p}
    compile_cache.use(say)
    made, there = 0, 0
    for step in steps:
        saved = open_step(args.workdir, step)
        prompts = named or [*map(Prompt, dict.fromkeys((*saved.config.eval.prompts, *PROMPTS)))]
        new = add(saved, prompts, settings, say)
        made, there = made + new, there + len(prompts) - new
    place = args.workdir / "gallery"
    say(f"{made} new, {there} kept before: {place}")
    if args.json:
        print(json.dumps({"gallery": str(place), "steps": steps, "new": made, "before": there}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m k2jax.gallery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    branches.add_options(parser)
    add("--steps", default="all", metavar="WHICH", help="all (default), newest, every:10 (every tenth checkpoint, "
        "counted from the run's beginning), or 10,20")  # fmt: skip
    paths.add(parser, "--prompts", metavar="FILE", help="a prompt a line, instead; in a .jsonl file a line is "
        '{"prompt": ..., "suffix": ...}')  # fmt: skip
    add("--max-new-tokens", type=int, default=64, metavar="N", help="of each prompt (default: 64)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default): checkpoints differ by nothing else")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (default: 0, all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that have this "
        "probability together (default: 1, all)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    add("--json", action="store_true", help="print one JSON object at the end")
    args = parser.parse_args()
    args.prompt, args.suffix = [], None
    args.workdir = branches.chosen(args)
    if args.max_new_tokens < 1:
        parser.error("--max-new-tokens must be 1 or more")
    return args


def add(saved: Any, prompts: list[Prompt], settings: dict[str, Any], say: Callable[[str], None]) -> int:
    """Generates what is missing of a step (a SavedStep), and keeps it; returns how many texts that were."""
    path = saved.workdir / "gallery" / f"{saved.step}.json"
    there = {_key(entry) for entry in read(path).get(saved.digest, [])}
    wanted = [entry for entry in _entries(prompts, settings) if _key(entry) not in there]
    if not wanted:
        say(f"step {saved.step}: nothing is missing")
        return 0
    entries = _generated(saved, wanted, settings)
    with _alone(path):
        found = read(path)
        known = {_key(entry) for entry in found.get(saved.digest, [])}
        new = [entry for entry in entries if _key(entry) not in known]  # of another call, meanwhile
        found[saved.digest] = [*found.get(saved.digest, []), *new]
        files.write_text(path, json.dumps({"format": FORMAT, "step": saved.step, "checkpoints": found}) + "\n")
    say(f"step {saved.step}: {len(new)} prompt(s), such as {entries[0]['prompt'][:30]!r}: {entries[0]['text'][:60]!r}")
    return len(new)


def read(path: Path | BucketPath) -> dict[str, list[dict[str, Any]]]:
    """{digest of a checkpoint: its entries} of a step's file. Raises StorageError when it is damaged."""
    if not path.exists():
        return {}
    try:
        values = json.loads(files.read_bytes(path, MAX_BYTES))
        good = values["format"] == FORMAT and str(values["step"]) == path.stem
        found = values["checkpoints"]
        for entries in found.values():
            good = good and all(isinstance(entry["text"], str) and _key(entry) for entry in entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise StorageError(f"{path} is damaged, or of another version: move it away to generate anew")
    return found


def _entries(prompts: list[Prompt], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked; of draws the row's number is a part."""
    drawn = bool(settings["temperature"])
    return [
        {"prompt": prompt.text, "suffix": prompt.suffix, "settings": {**settings, "row": row if drawn else None}}
        for row, prompt in enumerate(prompts)
    ]


def _key(entry: dict[str, Any]) -> str:
    return json.dumps([entry["prompt"], entry["suffix"], entry["settings"]], sort_keys=True)


def _generated(saved: Any, wanted: list[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries with their texts, in one batch each of neighbours."""
    import jax

    import k2jax
    from k2jax.model.sampling import Sampling, check_sampling
    from k2jax.run.commit import git_commit
    from k2jax.run.saved import check_tokenizer
    from k2jax.training.placement import mesh_for

    sampling = Sampling(settings["temperature"], settings["top_k"], settings["top_p"])
    check_sampling(sampling)
    encoder, most = check_tokenizer(saved), settings["max_new_tokens"]
    begin_ids = saved.begin_ids
    ids = [encode(encoder, Prompt(entry["prompt"], entry["suffix"]), "psm", begin_ids) for entry in wanted]
    generator = open_generator(saved, mesh_for(saved.config))
    new: list[list[int]] = []
    for entry, start in zip(wanted, ids, strict=True) if sampling.temperature else ():
        options = {"sampling": sampling, "seed": settings["seed"], "first_row": entry["settings"]["row"]}
        new += generator.generate([start], most, **options)
    if not sampling.temperature:
        new = generator.generate(ids, most, sampling=sampling)
    device = jax.devices()[0]
    about = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"k2jax": k2jax.__version__, "commit": git_commit(), "jax": jax.__version__},
        "devices": {"kind": device.device_kind, "count": jax.device_count()},
    }
    return [
        {
            **entry,
            "text": text_after(encoder.decode, start, tokens),
            "ids": tokens,
            "finish": "length" if len(tokens) == most else "eos",
            **about,
        }
        for entry, start, tokens in zip(wanted, ids, new, strict=True)
    ]


@contextmanager
def _alone(path: Path | BucketPath) -> Iterator[None]:
    """One writer at a time: a training's own and another's may meet."""
    if isinstance(path, BucketPath):
        with alone(path.parent / "lock", f"{path.parent}"):
            yield
        return
    files.make_folder(path.parent)
    with locks.wait(path.parent / "lock", f"host {socket.gethostname()}, pid {os.getpid()}"):
        files.remove_leftovers(path.parent, alone=True)
        yield


if __name__ == "__main__":
    run_main(main, raw=True)
