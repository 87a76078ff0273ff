"""Tokens a second of greedy generation beside transformers' `generate`: the same weights and prompts, as one JSON line.

    python tools/bench/generate.py [--size=58m|217m] [--rounds=5] [--batches=1,8] [--prompt=64] [--new=128]

Float32 on this machine's CPU, random weights and prompts, no stop at EOS. Each contestant is a process of its own that
waits for its turn; a round gives each of them one turn for each batch size, so that what else this machine does falls
on both alike. Medians over all rounds. Prefill is the time to the first token.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

import numpy as np  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from k2jax import config  # noqa: E402
from k2jax.errors import run_main  # noqa: E402

SIZES = {"58m": (512, 8, 8, 1376), "217m": (1024, 12, 16, 2752)}  # dim, layers, heads, ffn; head dim 64
VOCAB, ROPE_BASE, EOS = 32000, 10_000.0, 2

Generate = Callable[[list[list[int]], int], list[list[int]]]  # (prompts, number of new tokens) -> new tokens


def get_model(size: str) -> ConfigDict:
    m = config.base().model.unlock()
    m.vocab_size, m.head_dim = VOCAB, 64
    m.dim, m.num_layers, m.num_heads, m.ffn_dim = SIZES[size]
    m.num_kv_heads = m.num_heads
    return m.lock()


# ---- the contestants: each a process that answers a line of numbers with the seconds and tokens of a call ----------


def k2jax_generate(m: ConfigDict) -> Generate:
    from functools import partial

    import jax

    from k2jax.model.decoder import init_params
    from k2jax.model.generation import Generator
    from k2jax.parallel import sharding

    mesh = sharding.make_mesh({"replica": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    params = jax.jit(partial(init_params, m, 0))()
    generator = Generator(m, ROPE_BASE, params, mesh, np.float32, eos_id=EOS, keep_params=False)
    return partial(generator.generate, stop_at_eos=False)


def torch_generate(m: ConfigDict) -> Generate:
    from functools import partial

    import jax
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from k2jax.hf import families, layout
    from k2jax.model.decoder import init_params

    stage = config.stage(sequence_length=2048, rope_base=ROPE_BASE)
    values = families.config_to_hf(m, stage, dtype="float32", bos_id=None, eos_id=EOS)
    model = LlamaForCausalLM(LlamaConfig(**values)).train(False)
    params = {name: np.asarray(value) for name, value in jax.jit(partial(init_params, m, 0))().items()}
    weights = {}
    for t in layout.tensors(m):
        ours = params[t.array] if t.layer is None else params[t.array][t.layer]
        weights[t.name] = torch.tensor(np.ascontiguousarray(t.to_hf(ours)))
    model.load_state_dict(weights)
    del params, weights

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options)
        return out[:, ids.shape[1] :].tolist()

    return generate


CONTESTANTS: dict[str, Callable[[ConfigDict], Generate]] = {"k2jax": k2jax_generate, "torch": torch_generate}


def work(name: str, size: str) -> None:
    """A contestant's life. Ends when its input does."""
    generate, draw = CONTESTANTS[name](get_model(size)), np.random.default_rng(0)
    prompts = draw.integers(3, VOCAB, (64, 4096)).tolist()
    for line in sys.stdin:
        rows, length, new_tokens = map(int, line.split())
        started = time.perf_counter()
        tokens = generate([ids[:length] for ids in prompts[:rows]], new_tokens)
        print(json.dumps([time.perf_counter() - started, tokens]), flush=True)


class Contestant:
    """A process that generates when asked."""

    def __init__(self, name: str, size: str):
        command = [sys.executable, __file__, f"--worker={name}", f"--size={size}"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=REPO)

    def turn(self, rows: int, length: int, new_tokens: int) -> tuple[float, list[list[int]]]:
        self.process.stdin.write(f"{rows} {length} {new_tokens}\n")
        self.process.stdin.flush()
        seconds, tokens = json.loads(self.process.stdout.readline())
        return seconds, tokens


# ---- the comparison ------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> dict[str, Any]:
    batches = [int(rows) for rows in args.batches.split(",")]
    contestants = {name: Contestant(name, args.size) for name in CONTESTANTS}
    result: dict[str, Any] = {"size": args.size, "cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)}
    result |= {"prompt_tokens": args.prompt, "new_tokens": args.new, "rounds": args.rounds}
    try:
        for rows in batches:
            # The first call of each is untimed: k2jax compiles in it, torch allocates.
            firsts = {name: c.turn(rows, args.prompt, args.new) for name, c in contestants.items()}
            same = np.mean(np.array(firsts["k2jax"][1]) == np.array(firsts["torch"][1]))
            whole: dict[str, list[float]] = {name: [] for name in contestants}
            prefill: dict[str, list[float]] = {name: [] for name in contestants}
            for _ in range(args.rounds):
                for name, contestant in contestants.items():
                    prefill[name].append(contestant.turn(rows, args.prompt, 1)[0])
                    whole[name].append(contestant.turn(rows, args.prompt, args.new)[0])
            of = f"batch{rows}_"
            speed = {name: rows * args.new / statistics.median(s) for name, s in whole.items()}
            result |= {f"{of}{name}_tokens_per_s": round(value, 1) for name, value in speed.items()}
            result[f"{of}k2jax_over_torch"] = round(speed["k2jax"] / speed["torch"], 3)
            result |= {f"{of}{name}_prefill_s": round(statistics.median(s), 4) for name, s in prefill.items()}
            result[f"{of}k2jax_compile_s"] = round(firsts["k2jax"][0] - min(whole["k2jax"]), 2)
            result |= {f"{of}same_tokens": round(float(same), 4)}
            result |= {f"{of}{name}_s": [round(s, 3) for s in values] for name, values in whole.items()}
    finally:
        for contestant in contestants.values():
            contestant.process.kill()
            contestant.process.wait()
    return result


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="58m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", default="1,8", help="batch sizes")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens generated after each")
    parser.add_argument("--worker", choices=sorted(CONTESTANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.size)
    print(json.dumps(compare(args)))


if __name__ == "__main__":
    run_main(main)
