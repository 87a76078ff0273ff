"""Writes the files that launch a run on many hosts, for a person to read and to run; runs nothing itself.

    python tools/launch.py --config=experiments/k2_65b_v5p.py --topology=v5p:8x8x8 --on=tpu-vm --workdir=/mnt/runs/k2
        --out=launch/k2 [--plan=FILE | --no-plan] [--config.KEY=VALUE ...]

--on: tpu-vm (gcloud), gke (JobSet), slurm (sbatch), sky (SkyPilot), ssh (a file of hosts). Topologies are those of
tools/plan.py, and cpu:HOSTSxDEVICES to try a launch without accelerators. Each host runs python -m k2jax.preflight
before the training; what the files say of use, digests, restarts and teardown is at their top.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # a file of a checkout; installed, it is k2jax.tools.NAME
    sys.path.insert(0, str(ROOT))

from k2jax import files, paths  # noqa: E402
from k2jax.errors import ConfigError, run_main  # noqa: E402
from k2jax.plan import topologies  # noqa: E402

KINDS = ("tpu-vm", "gke", "slurm", "sky", "ssh")
# Where the code, and a Python that has its packages, are on the hosts, if nothing else is said.
CODE = {"tpu-vm": "k2jax", "ssh": "k2jax", "sky": "", "gke": "", "slurm": str(ROOT)}
PYTHON = {"gke": "python"}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A command line that is wrong does not exit with 2, which says that the plan does not fit."""
        self.print_usage(sys.stderr)
        self.exit(64, f"error: {message}\n")


def main() -> None:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="Exit codes: 0 written, 2 the plan does not fit (nothing is written), 64 wrong arguments, "
        "74 cannot be written, 78 configuration, 70 a bug.",
    )  # fmt: skip
    paths.add(parser, "--config", required=True, metavar="FILE", help="experiment file, by its path on the hosts too")
    parser.add_argument("--topology", required=True, help="v5p:8x8x8, v5p:8x8x8*2 (two slices), h100:16, cpu:2x4")
    parser.add_argument("--on", required=True, choices=KINDS)
    paths.add(parser, "--workdir", urls=True, required=True, metavar="DIR", help="on the hosts: absolute, shared")
    paths.add(parser, "--out", required=True, metavar="DIR", help="folder for the files; what is there is replaced")
    paths.add(parser, "--plan", metavar="FILE", help="what tools/plan.py --json printed (default: planned now)")
    parser.add_argument("--no-plan", action="store_true", help="plan nothing: it compiles, which may take minutes")
    parser.add_argument("--name", help="of job, pods and TPUs (default: the experiment's)")
    parser.add_argument("--image", default="", help="gke, sky: container image, NAME@sha256:DIGEST")
    parser.add_argument("--claim", default="", metavar="CLAIM:/PATH",
                        help="gke: PersistentVolumeClaim with workdir and data, and where it is mounted")  # fmt: skip
    parser.add_argument("--code", help="where the repository is on the hosts (default: k2jax in the home folder for "
                        "tpu-vm and ssh, this checkout for slurm, the folder of image or task for gke and sky)")
    parser.add_argument("--python", help="there (default: .venv/bin/python, which `install` makes; gke: python)")
    paths.add(parser, "--cache", urls=True, metavar="DIR", help="compiled programs of all hosts (default: their own)")
    parser.add_argument("--port", type=int, default=8476, help="of the coordinator; preflight's is the next one (8476)")
    parser.add_argument("--max-restarts", type=int, default=100, metavar="N", help="in all (default: 100)")
    parser.add_argument("--delay", type=int, default=60, metavar="SECONDS", help="before a restart after 74 (60)")
    parser.add_argument("--time-limit", default="1-00:00:00", help="slurm: of a job, then queued again (a day)")
    parser.add_argument("--grace", type=int, default=600, metavar="SECONDS", help="slurm, gke: for the last save (600)")
    args, rest = parser.parse_known_args()
    unknown = [text for text in rest if not text.startswith("--config.")]
    if unknown:
        parser.error(f"unknown argument {unknown[0]}; keys of the configuration are set as --config.KEY=VALUE")
    topologies.use_tpu_compiler()
    sys.exit(run(args, rest))


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    from k2jax import config as configuration
    from k2jax.launch import manifests, measure, scripts, spec
    from k2jax.launch.hosts import parse
    from k2jax.run.commit import git_commit
    from k2jax.text import redacted

    config = configuration.load(args.config, [text.removeprefix("--config.") for text in overrides])
    hosts = parse(args.topology)
    config = configuration.settled(config, hosts.platform)
    spec.mesh_on(config, hosts.devices, hosts.topology)
    workdir = str(args.workdir)
    if not (workdir.startswith("/") or "://" in workdir):
        raise ConfigError(f"--workdir={workdir}: expected an absolute path on the hosts, which start in other folders")
    commit = git_commit()
    if commit and commit.endswith("+"):
        say(f"warning: commit {commit}: tpu-vm copies what is committed, and preflight there will refuse other code")
    fits, verdict = plan(args, config, hosts)
    say(f"plan: {verdict}")
    if not fits:
        return 2
    options = {"name": args.name or config.name, "code": args.code, "python": args.python, "claim": args.claim}
    arguments = [f"--config={args.config}", f"--workdir={workdir}", *overrides]
    for text in [*arguments, *(value or "" for value in options.values()), str(args.cache or "")]:
        spec.check_text("the command line", text)
    launch = spec.Launch(
        name=spec.dns_label(options["name"]), config=config, arguments=tuple(arguments), workdir=workdir, hosts=hosts,
        verdict=verdict, commit=commit or spec.NO_COMMIT, lock_digest=spec.lock_digest(ROOT / "requirements.lock"),
        code_digest=measure.code_digest(),
        image=spec.check_image(args.image), claim=args.claim,
        code=CODE[args.on] if args.code is None else args.code,
        python=PYTHON.get(args.on, ".venv/bin/python") if args.python is None else args.python,
        cache=str(args.cache or ""), port=args.port, max_restarts=args.max_restarts, delay_s=args.delay,
        time_limit=args.time_limit, grace_s=args.grace,
    )  # fmt: skip
    writers = {"ssh": scripts.ssh, "slurm": scripts.slurm, "tpu-vm": scripts.tpu_vm,
               "gke": manifests.gke, "sky": manifests.sky}  # fmt: skip
    if launch.image and args.on not in ("gke", "sky"):
        raise ConfigError(f"--image: {args.on} starts no containers: leave it out, there is an install from the lock")
    record = json.dumps(redacted(launch.record()), indent=1, sort_keys=True) + "\n"
    for name, text in {**writers[args.on](launch), "launch.json": record}.items():
        files.write_text(args.out / name, text)
        print(args.out / name)
    return 0


def plan(args: argparse.Namespace, config: Any, hosts: Any) -> tuple[bool, str]:
    """Whether it fits, as far as is known, and the verdict in a line."""
    from k2jax.launch.spec import plan_verdict
    from k2jax.plan import estimate

    if args.no_plan or hosts.kind == "cpu":
        return True, "none: " + ("left out by --no-plan" if args.no_plan else "these are no accelerators")
    if args.plan is not None:
        if not args.plan.is_file():
            raise ConfigError(f"--plan={args.plan}: not there: tools/plan.py --json prints one")
        found = files.read_json(args.plan)
    else:
        try:
            found = estimate.plan(config, args.topology, say=say)
        except ConfigError as error:
            return True, f"none: {error}"
    verdict = plan_verdict(found, config, hosts)
    return found["fits"], verdict


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)
