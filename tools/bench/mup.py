"""Coordinate check of muP (model.width_base): how far activations move in the first steps, by the model's width.

    python tools/bench/mup.py [--optimizers=adamw,muon] [--widths=64,128,256,512] [--svg=mup.svg]

A JSON line for each optimizer, width, and muP on or off: the root mean square of what some steps have changed in the
stream after each layer and in the logits, on one batch. With muP it stays as the width grows, without it grows, too
(Tensor Programs V, arXiv:2203.03466, appendix D.1). --svg draws them.
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from k2jax import config as configuration  # noqa: E402
from k2jax import files, paths  # noqa: E402
from k2jax.errors import run_main  # noqa: E402
from k2jax.model.attention import attend_causally  # noqa: E402
from k2jax.model.decoder import Block, Params, rms_norm, rope_table  # noqa: E402
from k2jax.model.weights import LAYERS  # noqa: E402
from k2jax.training.optimizer import first_state  # noqa: E402
from k2jax.training.step import Batch, train_step  # noqa: E402

HEAD, VOCABULARY, ROWS, LENGTH = 16, 64, 8, 32
RATES = {"adamw": 1e-2, "muon": 1e-2, "lion": 3e-3, "adafactor": 1e-2}


def experiment(width: int, base: int, optimizer: str) -> ConfigDict:
    """Two layers of a width; `base` is model.width_base."""
    c = configuration.base().unlock()
    c.model.update(vocab_size=VOCABULARY, dim=width, num_layers=2, head_dim=HEAD, ffn_dim=2 * width, width_base=base)
    c.model.num_heads = c.model.num_kv_heads = width // HEAD
    c.optimizer.name, c.optimizer.weight_decay = optimizer, 0.0
    rate = RATES[optimizer]
    row = {"sequence_length": LENGTH, "rows_per_step": ROWS, "steps_per_chunk": 100, "chunks": 1, "mix": {"all": 1}}
    c.stages = (configuration.stage(**row, lr_peak=rate, lr_final=rate, schedule="constant", warmup_steps=0),)
    configuration.validate(c)
    return c


def activations(m: ConfigDict, params: Params, tokens_BT: jax.Array) -> dict[str, jax.Array]:
    """The stream after each layer, and the logits."""
    x_BTD, rope, found = params["embed_VD"][tokens_BT], rope_table(m, 1e4, tokens_BT.shape[1]), {}
    for number in range(m.num_layers):
        layer = {name.removeprefix(LAYERS): x[number] for name, x in params.items() if name.startswith(LAYERS)}
        x_BTD = found[f"layer {number + 1}"] = Block(m, layer)(x_BTD, rope, attend_causally)
    return found | {"logits": rms_norm(x_BTD, params["final_norm_D"], m.norm_eps) @ params["head_DV"]}


def moved(c: ConfigDict, steps: int) -> dict[str, float]:
    """{activation: root mean square of how much it changed in so many steps on one batch}."""
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.integers(3, VOCABULARY, (1, ROWS, LENGTH + 1)), jnp.int32)
    batch = Batch(tokens, jnp.zeros((1, ROWS), jnp.int32), jnp.zeros((1, ROWS, 8), jnp.uint32))
    arguments = {"config": c, "stage": c.stages[0], "eos_id": 2, "num_subsets": 1, "compute_dtype": jnp.float32}
    step = jax.jit(partial(train_step, first_step=1, num_steps=100, **arguments))
    look = jax.jit(partial(activations, c.model))
    state = jax.jit(partial(first_state, c))()
    before = look(state.params, tokens[0, :, :-1])
    for _ in range(steps):
        state, _ = step(state, batch)
    after = look(state.params, tokens[0, :, :-1])
    return {name: float(jnp.sqrt(jnp.mean(jnp.square(after[name] - x)))) for name, x in before.items()}


def picture(rows: list[dict[str, Any]]) -> str:
    """An SVG: a panel for each optimizer, muP off and on, change over width, both by their logarithms."""
    panels = list(dict.fromkeys((row["optimizer"], row["mup"]) for row in rows))
    widths = sorted({row["width"] for row in rows})
    sizes = [math.log2(value) for row in rows for value in row["moved"].values()]
    low, high, colours = min(sizes), max(sizes), ("#0072b2", "#009e73", "#d55e00")  # told apart by all eyes

    def place(panel: int, width: int, value: float) -> str:
        x = 240 * panel + 50 + 160 * widths.index(width) / max(len(widths) - 1, 1)
        return f"{x:.1f},{200 - 150 * (math.log2(value) - low) / max(high - low, 1e-9):.1f}"

    def text(x: float, y: float, said: str, colour: str = "black") -> str:
        return f'<text x="{x}" y="{y}" fill="{colour}">{said}</text>'

    parts = []
    for number, (optimizer, mup) in enumerate(panels):
        parts.append(text(240 * number + 50, 30, f"{optimizer}, {'muP' if mup else 'without muP'}"))
        parts += [text(float(place(number, w, 1.0).split(",")[0]) - 10, 225, str(w)) for w in widths]
        of_panel = [row for row in rows if (row["optimizer"], row["mup"]) == (optimizer, mup)]
        for name, colour in zip(of_panel[0]["moved"], colours, strict=True):
            points = " ".join(place(number, row["width"], row["moved"][name]) for row in of_panel)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    labels = zip(rows[0]["moved"], colours, strict=True)
    parts += [text(50 + 80 * i, 255, name, colour) for i, (name, colour) in enumerate(labels)]
    parts.append(text(320, 255, f"change, {2**low:.3g} (bottom) to {2**high:.3g} (top); below: width"))
    size = f'width="{max(240 * len(panels) + 20, 680)}" height="270"'
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", default="adamw,muon", help="names with commas between them")
    parser.add_argument("--widths", default="64,128,256,512", help=f"multiples of {HEAD}; the first is muP's base")
    parser.add_argument("--steps", type=int, default=5)
    paths.add(parser, "--svg", metavar="FILE", help="draw them there")
    args = parser.parse_args()
    widths, rows = [int(width) for width in args.widths.split(",")], []
    for optimizer in args.optimizers.split(","):
        for mup in (False, True):
            for width in widths:
                found = moved(experiment(width, widths[0] * mup, optimizer), args.steps)
                row = {"what": "coordinate check", "optimizer": optimizer, "mup": mup, "width": width, "moved": found}
                rows.append(row)
                print(json.dumps(rows[-1]), flush=True)
    if args.svg:
        files.write_text(args.svg, picture(rows))


if __name__ == "__main__":
    run_main(main)
