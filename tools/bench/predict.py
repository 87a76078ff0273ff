"""Prediction against outcome on this machine: a ladder of smaller copies of the smoke run, its final loss, as a line.

    python tools/bench/predict.py --out=DIR [--data=data/smoke] [--run=runs/smoke]

Trains four copies of experiments/smoke.py of smaller widths with as many tokens a parameter, predicts the smoke run by
them, and compares it with the run that is there (`make train`). Ten minutes on two cores.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from k2jax import config as configuration  # noqa: E402
from k2jax import paths  # noqa: E402
from k2jax.errors import run_main  # noqa: E402
from k2jax.plan import scaling  # noqa: E402
from k2jax.plan.predict import predict  # noqa: E402

WIDTHS, WHOLE = (96, 128, 160, 192), 224


def of_width(width: int, data: Path) -> list[str]:
    """Keys of a copy of that width, with as many tokens a parameter as the whole."""
    model = {"dim": width, "num_heads": width // 32, "num_kv_heads": width // 32, "ffn_dim": round(width * 592 / 224)}
    keys = [f"model.{key}={value}" for key, value in model.items()]
    keys += [f"data.root={data}", f"data.tokenizer={data / 'tokenizer.json'}"]
    sizes = [scaling.size_of(configuration.load(REPO / "experiments/smoke.py", k)).params for k in (keys, [])]
    share = sizes[0] / sizes[1]
    steps = {"0.steps_per_chunk": 60, "0.warmup_steps": 20, "1.steps_per_chunk": 30}
    return [*keys, *(f"stages.{key}={round(value * share)}" for key, value in steps.items())]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paths.add(parser, "--out", required=True, metavar="DIR", help="folder for the ladder's runs")
    paths.add(parser, "--data", default=str(REPO / "data/smoke"), metavar="DIR", help="the smoke run's stores")
    paths.add(parser, "--run", default=str(REPO / "runs/smoke"), metavar="DIR", help="the smoke run")
    args = parser.parse_args()
    ladder = []
    for width in WIDTHS:
        ladder.append(args.out.absolute() / f"width{width}")
        keys = [f"--config.{key}" for key in (*of_width(width, args.data.absolute()), "eval.prompts=()")]
        line = ["-m", "k2jax.train", "--config=experiments/smoke.py", f"--workdir={ladder[-1]}", *keys]
        if not (ladder[-1] / "validation.json").exists():
            subprocess.run([sys.executable, *line], check=True, cwd=REPO, stdout=sys.stderr)
    config = configuration.load(REPO / "experiments/smoke.py", of_width(WHOLE, args.data.absolute()))
    loss = predict(config, ladder=ladder, say=lambda line: print(line, file=sys.stderr))["loss"]
    actual = scaling.read_rung(args.run).loss
    told = {"predicted": loss["final"], "band": loss["band"], "actual": actual, "off": loss["final"] / actual - 1}
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), **told, "ladder": loss["ladder"], "method": loss["method"]}))


if __name__ == "__main__":
    run_main(main)
