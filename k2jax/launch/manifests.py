"""The YAML of a launch: a JobSet for GKE, a task for SkyPilot. Dumped from values, so that none can be read as YAML."""

import re
from typing import Any

import yaml

from k2jax.errors import ConfigError
from k2jax.launch.scripts import script
from k2jax.launch.spec import EXTRAS, Launch, assignments, printable

# Of a pod, that JobSet restarts: the others make the Job fail by its podFailurePolicy, and the JobSet with it. 70 is
# among them because pods whose peer was lost end with it; 137 and 143: killed.
RESTARTED = [70, 74, 75, 137, 143]


class Dumper(yaml.SafeDumper):
    """Texts of several lines as they are, where YAML can."""


Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def dump(launch: Launch, how: list[str], *values: Any) -> str:
    body = yaml.dump_all(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=2**20)
    return "\n".join([*launch.comments(), *(f"# {line}" for line in how), ""]) + body


def gke(launch: Launch) -> dict[str, str]:
    """{file: text}. ConfigError without an image, or without what all pods share."""
    hosts, name = launch.hosts, launch.name
    if not launch.image:
        raise ConfigError(
            "--on=gke: needs --image=NAME@sha256:DIGEST, which holds this code and its packages"
        )
    # Pods of one slice are of one node pool.
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "annotations": {**(exclusive if hosts.is_tpu else {}), **_digests(launch)},
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
            "coordinator": {"replicatedJob": "hosts", "jobIndex": 0, "podIndex": 0},
            "failurePolicy": {
                "maxRestarts": launch.max_restarts,
                "rules": [
                    {"name": "stop", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                ],
            },
            "replicatedJobs": [
                {"name": "hosts", "replicas": hosts.slices, "template": {"spec": _job(launch)}}
            ],
        },
    }
    files = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-launch"},
        "data": {"pod.sh": script(launch, "common", "gke")},
    }
    how = [
        "    kubectl apply -f jobset.yaml",
        f"    kubectl logs -f -l jobset.sigs.k8s.io/jobset-name={name} --prefix",
        "    kubectl delete -f jobset.yaml        the teardown; SIGTERM first, so that the run saves",
        "Here 70 restarts too: it is a bug, or what pods end with whose peer was lost; JobSet cannot tell them apart.",
    ]
    return {"jobset.yaml": dump(launch, how, files, jobset)}


def _job(launch: Launch) -> dict[str, Any]:
    """Of one slice: a pod a host."""
    only = {"containerName": "k2jax", "operator": "NotIn", "values": RESTARTED}
    return {
        "backoffLimit": 0,
        "completionMode": "Indexed",
        "completions": launch.hosts.hosts_per_slice,
        "parallelism": launch.hosts.hosts_per_slice,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": only}]},
        "template": {"spec": _pod(launch)},
    }


def _pod(launch: Launch) -> dict[str, Any]:
    hosts, volumes, mounts = launch.hosts, [], []
    claim, _, path = launch.claim.partition(":")
    if launch.claim:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", claim) or not path.startswith("/"):
            raise ConfigError(f"--claim={printable(launch.claim)}: expected CLAIM:/PATH")
        volumes = [{"name": "shared", "persistentVolumeClaim": {"claimName": claim}}]
        mounts = [{"name": "shared", "mountPath": path}]
    elif "://" not in launch.workdir:
        raise ConfigError(
            f"--on=gke --workdir={printable(launch.workdir)}: pods share no folder: name the PersistentVolumeClaim "
            f"that they mount, --claim=CLAIM:/PATH"
        )
    limits, selector, tolerations = {"cpu": str(hosts.devices_per_host)}, {}, []
    if hosts.is_tpu:
        limits = {"google.com/tpu": str(hosts.chips_per_host)}
        selector = {
            "cloud.google.com/gke-tpu-accelerator": hosts.names.gke,
            "cloud.google.com/gke-tpu-topology": hosts.shape,
        }
    elif hosts.is_gpu:
        limits = {"nvidia.com/gpu": str(hosts.chips_per_host)}
        selector = {"cloud.google.com/gke-accelerator": hosts.names.gke}
        tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    container = {
        "name": "k2jax",
        "image": launch.image,
        "command": ["bash", "/launch/pod.sh"],  # no text of a command's: Kubernetes expands $(NAME) in those
        "env": [_label("JOB_INDEX", "jobset.sigs.k8s.io/job-index")],
        "ports": [{"containerPort": port} for port in (launch.port, launch.port + 1)],
        "resources": {"limits": limits},
        "volumeMounts": [
            {"name": "launch", "mountPath": "/launch"},
            {"name": "shm", "mountPath": "/dev/shm"},  # the loader's workers', NCCL's
            *mounts,
        ],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": launch.grace_s,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [container],
        "volumes": [
            {"name": "launch", "configMap": {"name": f"{launch.name}-launch"}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            *volumes,
        ],
    }


def _label(variable: str, label: str) -> dict[str, Any]:
    return {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{label}']"}}}


def _digests(launch: Launch) -> dict[str, str]:
    return {
        "k2jax/commit": launch.commit,
        "k2jax/config-sha256": launch.config_digest,
        "k2jax/lock-sha256": launch.lock_digest,
    }


def sky(launch: Launch) -> dict[str, str]:
    """{file: text}. ConfigError for what SkyPilot cannot start as one task."""
    hosts = launch.hosts
    if hosts.kind == "cpu" or hosts.slices > 1 or (hosts.is_tpu and not hosts.names.accelerator):
        raise ConfigError(
            f"--on=sky --topology={hosts.topology}: SkyPilot has GPUs, and one slice of TPUs up to v6e"
        )
    resources: dict[str, Any] = {"accelerators": f"{hosts.names.accelerator}:{hosts.chips_per_host}"}
    nodes = hosts.hosts
    if hosts.is_tpu:
        resources = {
            "infra": "gcp",
            "accelerators": f"tpu-{hosts.accelerator_type}:1",
            "accelerator_args": {"tpu_vm": True, "runtime_version": hosts.names.runtime},
        }
        nodes = 1  # a slice; what runs, runs on each of its hosts
    if launch.image:
        resources["image_id"] = f"docker:{launch.image}"
    resources["job_recovery"] = {"strategy": "FAILOVER", "recover_on_exit_codes": [74, 75]}
    setup = [
        "set -e",
        *assignments({"LOCK_DIGEST": launch.lock_digest, "EXTRA": EXTRAS[hosts.is_tpu]}),
        'echo "$LOCK_DIGEST  requirements.lock" | sha256sum --check --quiet',
        "python3 -m venv .venv",
        ".venv/bin/python -m pip install -qq --constraint requirements.lock setuptools",
        '.venv/bin/python -m pip install -qq --no-build-isolation --constraint requirements.lock --editable ".$EXTRA"',
        "",
    ]
    task = {
        "name": launch.name,
        "workdir": ".",
        "num_nodes": nodes,
        "resources": resources,
        "setup": "\n".join(setup),
        "run": script(launch, "common", "sky"),
    }
    how = [
        f"In a clean checkout of the commit:  sky jobs launch --name {launch.name} task.yaml",
        f"    sky jobs logs --name {launch.name}; sky jobs cancel --name {launch.name}        the teardown",
        "A lost host is SkyPilot's to replace; of exit codes it restarts after 74 and 75.",
        "Where more than one host trains, add file_mounts for what they share: the workdir.",
    ]
    return {"task.yaml": dump(launch, how, task)}
