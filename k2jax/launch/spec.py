"""What a launch is, before it is written for one kind of cluster: every value that its files hold."""

import hashlib
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from k2jax.errors import ConfigError
from k2jax.launch.hosts import Hosts
from k2jax.parallel import sharding, xla_options
from k2jax.plan.chips import GIB
from k2jax.run import drift
from k2jax.training.placement import check_mesh

NO_COMMIT = "unknown"
EXTRAS = {True: "[tpu]", False: "[gpu]"}


@dataclass(frozen=True)
class Launch:
    """One experiment on one topology. Texts are as the user gave them, unquoted."""

    name: str  # a DNS label
    config: ConfigDict
    arguments: tuple[str, ...]  # of k2jax.train: --config=..., --workdir=..., --config.KEY=VALUE
    workdir: str
    hosts: Hosts
    verdict: str  # of the plan, or why there is none
    commit: str  # of the code
    lock_digest: str
    code_digest: str  # k2jax/launch/measure.py
    image: str = ""
    code: str = ""  # where the repository is on the hosts
    python: str = ""
    cache: str = ""
    claim: str = ""  # gke: PersistentVolumeClaim:PATH
    port: int = 8476
    max_restarts: int = 100
    delay_s: int = 60
    time_limit: str = "1-00:00:00"  # slurm
    grace_s: int = 600  # between SIGTERM and the end

    def __post_init__(self) -> None:
        for option, value, least, most in (
            ("--port", self.port, 1024, 65534),
            ("--max-restarts", self.max_restarts, 0, 10_000),
            ("--delay", self.delay_s, 0, 86_400),
            ("--grace", self.grace_s, 1, 86_400),
        ):
            if not least <= value <= most:
                raise ConfigError(f"{option}={value}: expected {least} to {most}")
        if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", self.time_limit):
            raise ConfigError(
                f"--time-limit={printable(self.time_limit)}: expected MINUTES, H:MM:SS or D-HH:MM:SS"
            )

    @property
    def config_digest(self) -> str:
        return drift.config_digest(self.config)

    @property
    def mesh(self) -> AbstractMesh:
        return mesh_on(self.config, self.hosts.devices, self.hosts.topology)

    def environment(self) -> dict[str, str]:
        """Of preflight and training, on every host."""
        # Compiled programs are code: never in a run directory, which others may write or be given. The trainer's own
        # folder on each host goes by versions; one that all share goes by the lock.
        found = {"JAX_COMPILATION_CACHE_DIR": f"{self.cache}/lock-{self.lock_digest[:12]}"} if self.cache else {}
        if self.hosts.kind == "cpu":
            flag = f"--xla_force_host_platform_device_count={self.hosts.devices_per_host}"
            found |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
        return found

    def compiler_options(self) -> Sequence[str]:
        """XLA's, which the trainer itself gives to the compiler."""
        compiler, chip = self.config.compiler, self.hosts.chip
        chosen = {"tpu": compiler.tpu, "gpu": compiler.gpu}.get(self.hosts.platform, ())
        kept = xla_options.of_kind(chip.kind if chip else "cpu") if compiler.defaults else {}
        return (*(f"{name}={text}" for name, text in kept.items()), *chosen)

    def expected(self) -> tuple[str, ...]:
        """What preflight holds the hosts against, as its arguments."""
        return (
            f"--topology={self.hosts.topology}",
            f"--config-digest={self.config_digest}",
            f"--lock-digest={self.lock_digest}",
            f"--code-digest={self.code_digest}",
        )

    def record(self) -> dict[str, Any]:
        """For launch.json, and for who wants to know later what was launched."""
        return {
            "name": self.name,
            "experiment": self.config.name,
            "arguments": list(self.arguments),
            "topology": self.hosts.topology,
            "hosts": self.hosts.hosts,
            "devices": self.hosts.devices,
            "mesh": dict(self.mesh.shape),
            "plan": self.verdict,
            "commit": self.commit,
            "config_digest": self.config_digest,
            "lock_digest": self.lock_digest,
            "code_digest": self.code_digest,
            "image": self.image,
            "compiler_options": list(self.compiler_options()),
            "environment": self.environment(),
            "max_restarts": self.max_restarts,
        }

    def comments(self) -> list[str]:
        """What a reviewer wants to see first."""
        mesh = ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1)
        lines = [
            f"{self.config.name} on {self.hosts.describe()}; mesh {mesh or 'of one device'}",
            f"plan: {self.verdict}",
            f"code: commit {self.commit}; sha256 {self.code_digest}; requirements.lock sha256 {self.lock_digest}",
            f"configuration: sha256 {self.config_digest} of the keys that decide what is computed (k2jax/run/drift.py)",
            *([f"image: {self.image}"] if self.image else []),
            *([f"XLA, by the trainer: {' '.join(options)}"] if (options := self.compiler_options()) else []),
            f"exit codes: 75 restarts at once, 74 and a lost host after {self.delay_s} s, at most {self.max_restarts} "
            f"times in all; 65, 70, 78 and others stop",
            "Written by tools/launch.py, which runs nothing: read it, then run it.",
        ]
        return [f"# {printable(line)}" for line in lines]


def mesh_on(config: ConfigDict, devices: int, where: str) -> AbstractMesh:
    """The mesh on so many devices. ConfigError where it does not multiply to them, or a batch or array not divide."""
    sizes = {axis: config.mesh[axis] for axis in sharding.MESH_AXES}
    rest = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: devices // rest if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise ConfigError(
            f"mesh {dict(config.mesh)}: does not multiply to the {devices} device(s) of {where}: set "
            f"{', '.join(f'mesh.{axis}' for axis in sharding.MESH_AXES)} to multiply to it"
        )
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    check_mesh(config, mesh)
    return mesh


def dns_label(name: str) -> str:
    """Of an experiment's name; it names pods, TPUs and folders, with room for their numbers behind it."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    if not label or not label[0].isalpha():
        raise ConfigError(f"--name={printable(name)}: expected a letter first, then letters, digits and -")
    return label


def check_text(option: str, text: str) -> str:
    """ConfigError for what no shell and no YAML can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{option}: {text!r} is not UTF-8: rename it") from None
    if "\0" in text:
        raise ConfigError(f"{option}: {text!r} holds a NUL byte: take it out")
    return text


def check_image(image: str) -> str:
    """ConfigError without a digest: what a tag names may change between two restarts of one run."""
    if image and not re.fullmatch(r"[a-z0-9][a-zA-Z0-9._:/-]*@sha256:[0-9a-f]{64}", image):
        raise ConfigError(
            f"--image={printable(image)}: expected NAME@sha256:DIGEST, since what a tag names may change between two "
            f"restarts: docker buildx imagetools inspect NAME:TAG prints it"
        )
    return image


def lock_digest(path: Path) -> str:
    """Of requirements.lock."""
    if not path.is_file():
        raise ConfigError(f"{path}: not there: run this from a checkout of the repository")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def plan_verdict(plan: dict[str, Any], config: ConfigDict, hosts: Hosts) -> str:
    """One line of what tools/plan.py --json says. ConfigError for a plan of something else."""
    wanted = {
        "experiment": config.name,
        "topology": hosts.topology,
        "stages": [stage.name for stage in config.stages],
        "tokens_per_step": [stage.rows_per_step * stage.sequence_length for stage in config.stages],
    }
    try:
        stages = plan["stages"].values()
        found = {
            "experiment": plan["experiment"],
            "topology": plan["topology"],
            "stages": [stage["stage"] for stage in stages],
            "tokens_per_step": [stage["tokens_per_step"] for stage in stages],
        }
        odd = [key for key in wanted if found[key] != wanted[key]]
        if odd:
            raise ConfigError(
                f"--plan: is of {odd[0]} {found[odd[0]]!r}, this launch has {wanted[odd[0]]!r}: plan it again"
            )
        used = f"{plan['hbm_bytes_per_chip'] / GIB:.1f} of {plan['hbm_limit_bytes'] / GIB:.1f} GiB a chip"
        if not plan["fits"]:
            remedies = [remedy for stage in stages for remedy in stage["remedies"]]
            return f"does NOT fit, {used}: {'; '.join(remedies) or 'no remedy known'}"
        steps = "; ".join(
            f"{stage['stage']} {stage['step_seconds']:.3f} s a step, MFU {stage['mfu_causal']:.1%} causal"
            for stage in stages
        )
        return f"fits, {used}; {steps}; {plan['days']:.1f} days (estimated)"
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--plan: is no output of tools/plan.py --json ({type(error).__name__}: {error})"
        ) from error


def printable(text: str) -> str:
    """On one line, whatever it holds."""
    return text if text.isprintable() else ascii(text)


def assignments(values: dict[str, str | int | Sequence[str]]) -> list[str]:
    """Shell variables, quoted: a sequence becomes an array."""

    def quoted(value: Any) -> str:
        if isinstance(value, (str, int)):
            return shlex.quote(str(value))
        return "(" + " ".join(shlex.quote(item) for item in value) + ")"

    return [f"{name}={quoted(value)}" for name, value in values.items()]
