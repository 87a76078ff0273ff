"""Says before a run what will come of it: loss, time, energy and cost; kept in its workdir, its digest in the journal.

    python tools/predict.py --config=experiments/k2_7b.py --workdir=DIR --ladder RUN RUN RUN RUN [--plan=plan.json]
        [--watts=W] [--price=USD] [--config.KEY=VALUE ...]
    python tools/predict.py --config=experiments/k2_65b.py --workdir=DIR --law=besiroglu2024

--ladder: finished runs of smaller copies of the experiment, at least four, to which a power law in compute is fitted;
--law: a published law. --plan: what `tools/plan.py --json` printed (default: the workdir's plan.json, where there is
one). Whatever is not known is left out and said. The report shows it beside the outcome.
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # a file of a checkout; installed, it is k2jax.tools.NAME
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k2jax import paths  # noqa: E402
from k2jax.errors import ConfigError, run_main  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paths.add(parser, "--config", required=True, metavar="FILE", help="experiment file")
    paths.add(parser, "--workdir", buckets=True, required=True, metavar="DIR", help="of a run that has not begun")
    laws = parser.add_mutually_exclusive_group(required=True)
    paths.add(laws, "--ladder", nargs="+", metavar="RUN", help="workdirs of finished smaller runs")
    laws.add_argument("--law", help="a published law: hoffmann2022, besiroglu2024")
    paths.add(parser, "--plan", metavar="FILE", help="what tools/plan.py --json printed for this experiment")
    parser.add_argument("--watts", type=float, help="of one chip (default: what its maker states, if so)")
    parser.add_argument("--price", type=float, metavar="USD", help="of one chip for an hour")
    parser.add_argument("--json", action="store_true", help="print the prediction as one JSON object")
    args, rest = parser.parse_known_args()
    unknown = [text for text in rest if not text.startswith("--config.")]
    if unknown:
        parser.error(f"unknown argument {unknown[0]}; keys of the configuration are set as --config.KEY=VALUE")
    run(args, [text.removeprefix("--config.") for text in rest])


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    from k2jax import config as configuration
    from k2jax import files
    from k2jax.plan.predict import predict
    from k2jax.run.prediction import read_prediction, write_prediction

    for name in ("watts", "price"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name}={value}: expected a number above 0")
    plan_file = args.plan or (args.workdir / "plan.json" if (args.workdir / "plan.json").exists() else None)
    found = predict(
        configuration.load(args.config, overrides),
        ladder=args.ladder or (),
        law=args.law,
        plan=files.read_json(plan_file) if plan_file else None,
        watts=args.watts,
        price=args.price,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    digest = write_prediction(args.workdir, found)
    if args.json:
        print(json.dumps(read_prediction(args.workdir)))
        return
    loss = found["loss"]
    band = f" ({loss['band'][0]:.4f} to {loss['band'][1]:.4f})" if loss["band"] else ""
    print(f"loss at the end: {loss['final']:.4f}{band}\n{loss['method']}")
    for key, unit in (("wall_s", "s"), ("chip_hours", "h"), ("energy_kwh", "kWh"), ("cost_usd", "$")):
        print(f"{key}: {'not known' if found[key] is None else f'{found[key]:.6g} {unit}'}")
    print(f"{args.workdir / 'prediction.json'}: digest {digest}, in the journal")


if __name__ == "__main__":
    run_main(main)
