"""Looks at all hosts of a run before it begins: start it on every host at once, as the training itself.

    python -m k2jax.preflight --config=experiments/NAME.py --workdir=DIR [--topology=v5p:8x8x8] [--json]
        [--step-seconds=S] [--config.KEY=VALUE ...]

One line a check: versions, code and configuration; devices; clocks; that the workdir is one folder on all; room and
speed of its disk; an all-reduce of known integers; memory; the loader's speed beside what a step needs. Ends with 0, or
on every host with one line that names the hosts and what is wrong there.
"""

import argparse
import json

from k2jax import config as configuration
from k2jax import paths
from k2jax.errors import ConfigError, RunError, StorageError, run_main
from k2jax.launch.checks import Options, run_checks
from k2jax.launch.hosts import parse
from k2jax.launch.survey import Check
from k2jax.parallel import cluster, sharding


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m k2jax.preflight", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 all is well, 78 something differs or is wrong, 74 storage, 70 device, network or bug.",
    )  # fmt: skip
    paths.add(parser, "--config", required=True, metavar="FILE", help="experiment, as experiments/smoke.py")
    paths.add(parser, "--workdir", buckets=True, required=True, metavar="DIR", help="run directory, of all hosts")
    parser.add_argument("--topology", help="what the hosts should be, as tools/launch.py takes it")
    parser.add_argument("--config-digest", default="", help="that was launched, see launch.json")
    parser.add_argument("--lock-digest", default="", help="of requirements.lock, likewise")
    parser.add_argument("--code-digest", default="", help="of the Python files, likewise")
    parser.add_argument(
        "--step-seconds", type=float, default=0.0, help="of a step (default: by plan.json in the workdir)"
    )
    parser.add_argument(
        "--clock-limit", type=float, default=2.0, metavar="SECONDS", help="between hosts (default: 2)"
    )
    parser.add_argument("--wait", type=float, default=60.0, metavar="SECONDS",
                        help="until the storage shows what another host wrote (default: 60)")  # fmt: skip
    parser.add_argument(
        "--disk-mb", type=int, default=64, metavar="MB", help="written and read by each (default: 64)"
    )
    parser.add_argument(
        "--loader-seconds", type=float, default=3.0, metavar="SECONDS", help="of reading (default: 3)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of lines")
    args, rest = parser.parse_known_args()
    unknown = [text for text in rest if not text.startswith("--config.")]
    if unknown:
        parser.error(
            f"unknown argument {unknown[0]}; keys of the configuration are set as --config.KEY=VALUE"
        )
    config = configuration.load(args.config, [text.removeprefix("--config.") for text in rest])
    options = Options(
        paths.absolute(args.workdir), parse(args.topology) if args.topology else None,
        args.config_digest, args.lock_digest, args.code_digest,
        clock_limit_s=args.clock_limit, wait_s=args.wait, disk_bytes=args.disk_mb * 10**6,
        loader_s=args.loader_seconds, step_s=args.step_seconds,
    )  # fmt: skip
    cluster.initialize()
    config = configuration.settled(config, sharding.platform())
    report(run_checks(config, options, lambda check: None if args.json else show(check)), args.json)


def show(check: Check) -> None:
    if cluster.is_main():
        for line in [check.says] if check.ok else check.lines():
            print(f"{'ok   ' if check.ok else 'WRONG'} {check.name:10} {line}", flush=True)


def report(checks: list[Check], as_json: bool) -> None:
    """Raises the worst of what is wrong, on every process alike, as one line."""
    if as_json and cluster.is_main():
        keys = ("name", "ok", "says", "wrong", "values")
        found = [{key: getattr(check, key) for key in keys} for check in checks]
        print(json.dumps({"ok": all(check.ok for check in checks), "checks": found}), flush=True)
    wrong = [check for check in checks if not check.ok]
    if wrong:
        codes = {code for check in wrong for code, _ in check.wrong.values()}
        kinds = (ConfigError, RunError, StorageError)
        worst = next((kind for kind in kinds if kind.exit_code in codes), ConfigError)
        raise worst(
            "preflight: " + "; ".join(f"{check.name}: {line}" for check in wrong for line in check.lines())
        )


if __name__ == "__main__":
    run_main(main)
