"""Compiles an experiment's training step for hardware that is not here: does it fit, how fast will it run.

    python tools/plan.py --config=experiments/k2_65b.py --topology=v5p:8x8x8 [--stage=stage1] [--json]
        [--workdir=DIR] [--config.KEY=VALUE ...]
    python tools/plan.py --config=experiments/k2_7b.py --topology=v6e:8x8 --search --pipeline 1 2
        --microbatches 2 4 --remat full q+k+v q+k+v@host+up@host

Topologies: TPU slices as v5p:8x8x8, v6e:16x16, v5e:4x8, tpu7x:4x4x4, two of them as v5p:8x8x8*2 (extra `tpu`); h100:8,
a100:64 (extra `gpu`).
The memory is the compiler's. The time is an estimate: on TPU from the compiler's cycles, on GPU from peaks, with
collectives by a model of the links (k2jax/plan/). --workdir keeps the plan in a run directory, where the trainer prints
it beside what it measures. Remat policies are values of model.remat: a name with @host is kept in the host's memory.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

if not __package__:  # a file of a checkout; installed, it is k2jax.tools.NAME
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k2jax import files, paths  # noqa: E402
from k2jax.errors import run_main  # noqa: E402
from k2jax.plan import topologies  # noqa: E402


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A command line that is wrong does not exit with 2, which says that a case does not fit."""
        self.print_usage(sys.stderr)
        self.exit(64, f"error: {message}\n")


def main() -> None:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 fits, 2 does not fit, 64 wrong arguments, 78 configuration, 70 a bug.",
    )  # fmt: skip
    paths.add(parser, "--config", required=True, metavar="FILE", help="experiment file")
    parser.add_argument("--topology", required=True, help="such as v5p:8x8x8, v6e:16x16*2, h100:8")
    parser.add_argument("--stage", help="name of the one stage to plan (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a table")
    paths.add(parser, "--workdir", buckets=True, metavar="DIR", help="run directory to keep the plan in, as plan.json")
    parser.add_argument("--storage", type=_rate, default=25.0, metavar="GB/S", help="that checkpoints are written and "
                        "read with, all hosts together (default: 25, what Cloud Storage gives unasked)")  # fmt: skip
    parser.add_argument("--host-storage", type=_rate, default=1.0, metavar="GB/S", help="the same, by one host "
                        "(default: 1)")  # fmt: skip
    parser.add_argument("--search", action="store_true", help="try meshes, microbatches and remat; rank what fits")
    parser.add_argument("--fsdp", type=int, nargs="+", metavar="N", help="of --search: sizes of fsdp to try")
    parser.add_argument("--tensor", type=int, nargs="+", default=[1], metavar="N", help="of --search (default: 1)")
    parser.add_argument("--context", type=int, nargs="+", default=[1], metavar="N", help="of --search (default: 1)")
    parser.add_argument("--pipeline", type=int, nargs="+", default=[1], metavar="N",
                        help="of --search: sizes of the mesh axis stage (default: 1)")  # fmt: skip
    parser.add_argument("--pipeline-microbatches", type=int, nargs="+", metavar="N",
                        help="of --search (default: the experiment's, made a multiple of the stages)")  # fmt: skip
    parser.add_argument(
        "--microbatches", type=int, nargs="+", metavar="N", help="of --search (default: the experiment's)"
    )
    parser.add_argument("--remat", nargs="+", metavar="POLICY", help="of --search (default: the experiment's)")
    args, rest = parser.parse_known_args()
    unknown = [text for text in rest if not text.startswith("--config.")]
    if unknown:
        parser.error(f"unknown argument {unknown[0]}; keys of the configuration are set as --config.KEY=VALUE")
    topologies.use_tpu_compiler()
    fits = run(args, [text.removeprefix("--config.") for text in rest])
    sys.exit(0 if fits else 2)


def run(args: argparse.Namespace, overrides: list[str]) -> bool:
    from k2jax import config as configuration
    from k2jax.plan import estimate, saving, show

    config = configuration.load(args.config, overrides)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if args.search:
        from k2jax.plan.search import search

        axes = ("fsdp", "tensor", "context", "pipeline", "pipeline_microbatches", "microbatches", "remat")
        bounds = {axis: getattr(args, axis) for axis in axes}
        tried = search(config, args.topology, args.stage, bounds, say)
        print(json.dumps(tried) if args.json else show.ranking(tried))
        return any(case["fits"] for case in tried)
    storage = saving.Storage(args.storage * 1e9, args.host_storage * 1e9)
    found: dict[str, Any] = estimate.plan(config, args.topology, args.stage, say, storage)
    if args.workdir is not None:
        files.write_json(args.workdir / "plan.json", found, sort_keys=True, end="")
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(found) if args.json else show.table(found))
    return found["fits"]


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


if __name__ == "__main__":
    run_main(main)
