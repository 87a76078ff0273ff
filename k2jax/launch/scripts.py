"""The shell scripts of a launch: values, quoted, then a file of templates/ as it is. No value enters a line of code."""

from collections.abc import Sequence
from pathlib import Path

from k2jax.errors import ConfigError
from k2jax.launch.hosts import is_default_shape
from k2jax.launch.spec import EXTRAS, NO_COMMIT, Launch, assignments

TEMPLATES = Path(__file__).parent / "templates"
SHELL = "#!/usr/bin/env bash"


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.sh").read_text(encoding="utf-8")


def values(launch: Launch) -> list[str]:
    """What preflight and training need on a host."""
    return [
        *assignments(
            {
                "NAME": launch.name,
                "TOPOLOGY": launch.hosts.topology,
                "HOSTS": launch.hosts.hosts,
                "HOSTS_PER_SLICE": launch.hosts.hosts_per_slice,
                "IS_TPU": int(launch.hosts.is_tpu),
                "CODE": launch.code,
                "PYTHON": launch.python,
                "WORKDIR": launch.workdir,
                "EXTRA": "" if launch.hosts.kind == "cpu" else EXTRAS[launch.hosts.is_tpu],
                "LOCK_DIGEST": launch.lock_digest,
                "PORT": launch.port,
                "MAX_RESTARTS": launch.max_restarts,
                "DELAY_S": launch.delay_s,
                "ARGUMENTS": launch.arguments,
                "EXPECTED": launch.expected(),
            }
        ),
        *(f"export {line}" for line in assignments(launch.environment())),
    ]


def script(launch: Launch, *names: str, first: Sequence[str] = (SHELL,), more: Sequence[str] = ()) -> str:
    """Of these templates, one after the other."""
    head = [*first, *launch.comments(), "", *values(launch), *more, ""]
    return "\n".join(head) + "\n" + "\n".join(template(name) for name in names)


def ssh(launch: Launch) -> dict[str, str]:
    """{file: text}."""
    return {"launch.sh": script(launch, "common", "ssh"), "host.sh": script(launch, "common", "host")}


def slurm(launch: Launch) -> dict[str, str]:
    """{file: text}. ConfigError for TPUs, which Slurm does not give out."""
    hosts = launch.hosts
    if hosts.is_tpu:
        raise ConfigError(f"--on=slurm --topology={hosts.topology}: TPUs are given out by tpu-vm, gke or sky")
    options = {
        "job-name": launch.name,
        "nodes": hosts.hosts,
        "ntasks-per-node": hosts.devices_per_host if hosts.is_gpu else 1,
        **({"gpus-per-node": hosts.devices_per_host} if hosts.is_gpu else {}),
        "time": launch.time_limit,
        "signal": f"B:TERM@{launch.grace_s}",
        "open-mode": "append",
        "output": f"{launch.name}-%j.log",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items()]
    lines += ["#SBATCH --exclusive", "#SBATCH --requeue"]
    srun = ["--gpu-bind=none"] if hosts.is_gpu else []  # each task sees all, and JAX takes its own by number
    first = [SHELL, *lines]
    return {
        "job.sbatch": script(launch, "common", "slurm", first=first, more=assignments({"SRUN": srun})),
        "host.sh": script(launch, "common", "host"),
    }


def tpu_vm(launch: Launch) -> dict[str, str]:
    """{file: text}. ConfigError for what is no TPU VM."""
    hosts = launch.hosts
    if not hosts.is_tpu or not hosts.names.accelerator:
        others = "gke" if hosts.is_tpu else "gke, slurm, sky or ssh"
        raise ConfigError(f"--on=tpu-vm --topology={hosts.topology}: no TPU VM has these: use {others}")
    if launch.commit == NO_COMMIT:
        raise ConfigError("--on=tpu-vm: copies a commit of the repository, and this is no checkout of it: clone it")
    kind = [f"--accelerator-type={hosts.accelerator_type}"]
    if not is_default_shape(hosts):
        kind = [f"--type={hosts.kind}", f"--topology={hosts.shape}"]
    if hosts.slices > 1:
        nodes = [f"{launch.name}-{i}" for i in range(hosts.slices)]
        named = [f"--node-count={hosts.slices}", f"--node-prefix={launch.name}"]
    else:
        nodes, named = [launch.name], [f"--node-id={launch.name}"]
    more = {
        "COMMIT": launch.commit.rstrip("+?"),
        "NODES": nodes,
        "ACCELERATOR": [*kind, f"--runtime-version={hosts.names.runtime}", *named],
    }
    return {
        "launch.sh": script(launch, "common", "tpu_vm", more=assignments(more)),
        "host.sh": script(launch, "common", "host"),
    }
