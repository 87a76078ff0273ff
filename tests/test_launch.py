"""What tools/launch.py writes: the golden texts, what shells and YAML make of it, and values that want to be code.

faults/test_launch.py runs the files. The golden texts hold the templates by name; UPDATE_GOLDEN=1 writes them.
"""

import dataclasses
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from test_experiments import check_golden

from k2jax import config as configuration
from k2jax.errors import ConfigError, run_main
from k2jax.launch import manifests, scripts, spec
from k2jax.launch.hosts import parse
from k2jax.plan.chips import GIB

GOLDEN = Path(__file__).parent / "golden" / "launch"
IMAGE = "registry.example/k2@sha256:" + "0123456789abcdef" * 4
WRITERS = {
    "ssh": scripts.ssh,
    "slurm": scripts.slurm,
    "tpu-vm": scripts.tpu_vm,
    "gke": manifests.gke,
    "sky": manifests.sky,
}
CASES = {
    "tpu-vm": ("v5p:2x2x2*2", {}),
    "gke": ("v5p:2x2x2*2", {"image": IMAGE, "claim": "shared:/mnt/shared", "python": "python"}),
    "slurm": ("h100:16", {"code": "/shared/k2jax"}),
    "sky": ("h100:16", {"image": IMAGE}),
    "ssh": ("cpu:2x8", {"code": "k2jax"}),
}


def make(topology: str, **options: Any) -> spec.Launch:
    config = configuration.base().unlock()
    config.name = options.pop("config_name", "K2_test")
    config.mesh.replica = 2
    config.compiler.tpu = ("xla_of_tpus=true",)
    config.compiler.gpu = ("xla_of_gpus=true",)
    config.stages = (configuration.stage(rows_per_step=2048, mix={"a": 1}),)
    arguments = ("--config=experiments/k2.py", "--workdir=/mnt/shared/run")
    launch = {
        "name": "k2-test",
        "config": config.lock(),
        "arguments": arguments,
        "workdir": "/mnt/shared/run",
        "hosts": parse(topology),
        "verdict": "fits, 79.2 of 95.7 GiB a chip; stage1 10.500 s a step, MFU 67.9% causal; 43.0 days (estimated)",
        "commit": "c" * 40,
        "lock_digest": "1" * 64,
        "code_digest": "2" * 64,
        "python": ".venv/bin/python",
    }
    return spec.Launch(**{**launch, **options})


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest) -> tuple[str, spec.Launch, dict[str, str]]:
    topology, options = CASES[request.param]
    launch = make(topology, **options)
    return request.param, launch, WRITERS[request.param](launch)


def without_templates(text: str) -> str:
    """With the name of each template in its place, as it stands or indented in YAML."""
    for path in sorted(scripts.TEMPLATES.glob("*.sh")):
        for indent in ("", "  ", "    "):
            body = textwrap.indent(path.read_text(), indent)
            text = text.replace(body, f"{indent}<templates/{path.name}>\n")
    return text


def test_the_golden_texts(written):
    """Less the digest of the configuration, which follows from keys of config.py that are none of a launch's."""
    kind, launch, files = written
    GOLDEN.mkdir(exist_ok=True)
    for name, text in files.items():
        text = without_templates(text).replace(launch.config_digest, "<config_digest>")
        assert text.count("<templates/") == 2 and len(text.splitlines()) < 150
        check_golden(GOLDEN / f"{kind}-{name}", text)


def test_a_shell_can_read_it(written, tmp_path):
    kind, _, files = written
    found = [text for name, text in files.items() if not name.endswith(".yaml")]
    for name, text in files.items():
        if name.endswith(".yaml"):
            found += [text for text in strings(list(yaml.safe_load_all(text))) if "\n" in text]
    assert len(found) == 2 if kind != "gke" else 1, "of sky: setup and run"
    for i, text in enumerate(found):
        (tmp_path / f"{i}.sh").write_text(text)
        checked = subprocess.run(["bash", "-n", tmp_path / f"{i}.sh"], capture_output=True, text=True)
        assert checked.returncode == 0 and not checked.stderr, checked.stderr


def strings(value: Any) -> list[str]:
    if isinstance(value, (dict, list)):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in strings(item)]
    return [value] if isinstance(value, str) else []


def test_each_file_says_what_is_launched(written):
    kind, launch, files = written
    for text in files.values():
        for part in (launch.config_digest, launch.lock_digest, launch.commit, launch.verdict, launch.hosts.topology):
            assert part in text
        flag = "xla_of_tpus=true" if launch.hosts.is_tpu else "xla_of_gpus=true"
        assert (flag in text) == (launch.hosts.kind != "cpu")
        assert not launch.image or launch.image in text
        assert "/mnt/shared/run/compiled/lock-111111111111" in text, "the cache"
        assert "k2jax.preflight" in text or kind in ("ssh", "slurm", "tpu-vm")
    record = launch.record()
    assert json.loads(json.dumps(record)) == record and record["mesh"]["replica"] == 2


# ---- YAML, by the fields that its readers document -------------------------------------------------------------------

NUMBER, TEXT, YES = int, str, bool
CONTAINER = {
    "name": TEXT,
    "image": TEXT,
    "command": [TEXT],
    "env": [{"name": TEXT, "valueFrom": {"fieldRef": {"fieldPath": TEXT}}}],
    "ports": [{"containerPort": NUMBER}],
    "resources": {"limits": {"google.com/tpu": TEXT, "nvidia.com/gpu": TEXT, "cpu": TEXT}},
    "volumeMounts": [{"name": TEXT, "mountPath": TEXT}],
}
POD = {
    "restartPolicy": {"Never"},  # as podFailurePolicy needs
    "terminationGracePeriodSeconds": NUMBER,
    "nodeSelector": {
        "cloud.google.com/gke-tpu-accelerator": TEXT,
        "cloud.google.com/gke-tpu-topology": TEXT,
        "cloud.google.com/gke-accelerator": TEXT,
    },
    "tolerations": [{"key": TEXT, "operator": {"Exists", "Equal"}, "effect": {"NoSchedule"}}],
    "containers": [CONTAINER],
    "volumes": [
        {
            "name": TEXT,
            "configMap": {"name": TEXT},
            "emptyDir": {"medium": {"Memory"}},
            "persistentVolumeClaim": {"claimName": TEXT},
        }
    ],
}
EXIT_CODES = {"containerName": TEXT, "operator": {"In", "NotIn"}, "values": [NUMBER]}
JOB = {
    "backoffLimit": NUMBER,
    "completionMode": {"Indexed"},
    "completions": NUMBER,
    "parallelism": NUMBER,
    "podFailurePolicy": {"rules": [{"action": {"FailJob", "Ignore", "Count"}, "onExitCodes": EXIT_CODES}]},
    "template": {"spec": POD},
}
ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {"name": TEXT, "annotations": dict},
    "spec": {
        "network": {"enableDNSHostnames": YES, "subdomain": TEXT, "publishNotReadyAddresses": YES},
        "coordinator": {"replicatedJob": TEXT, "jobIndex": NUMBER, "podIndex": NUMBER},
        "failurePolicy": {
            "maxRestarts": NUMBER,
            "rules": [{"name": TEXT, "action": ACTIONS, "onJobFailureReasons": [TEXT]}],
        },
        "replicatedJobs": [{"name": TEXT, "replicas": NUMBER, "template": {"spec": JOB}}],
    },
}
CONFIG_MAP = {"apiVersion": {"v1"}, "kind": {"ConfigMap"}, "metadata": {"name": TEXT}, "data": {"pod.sh": TEXT}}
TASK = {
    "name": TEXT,
    "workdir": TEXT,
    "num_nodes": NUMBER,
    "resources": {
        "infra": TEXT,
        "accelerators": TEXT,
        "accelerator_args": {"tpu_vm": YES, "runtime_version": TEXT},
        "image_id": TEXT,
        "job_recovery": {"strategy": TEXT, "recover_on_exit_codes": [NUMBER]},
    },
    "setup": TEXT,
    "run": TEXT,
}


def check_fields(value: Any, schema: Any, where: str = "") -> None:
    """A set is a choice, a dictionary's keys are those that may stand there, a list's one schema is of each item."""
    if isinstance(schema, set):
        assert value in schema, (where, value)
    elif isinstance(schema, dict):
        assert isinstance(value, dict) and value.keys() <= schema.keys(), (where, value)
        for key in value:
            check_fields(value[key], schema[key], f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), (where, value)
        for i, item in enumerate(value):
            check_fields(item, schema[0], f"{where}[{i}]")
    else:
        assert type(value) is schema, (where, value)


@pytest.mark.parametrize("topology", ["v5p:2x2x2*2", "v6e:2x4", "tpu7x:2x2x2", "h100:16", "cpu:2x8"])
def test_the_fields_of_a_jobset(topology):
    launch = make(topology, **CASES["gke"][1])
    files, jobset = yaml.safe_load_all(manifests.gke(launch)["jobset.yaml"])
    check_fields(files, CONFIG_MAP)
    check_fields(jobset, JOBSET)
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert replicated["replicas"] * job["completions"] == launch.hosts.hosts
    assert job["completions"] == job["parallelism"] and job["backoffLimit"] == 0
    [limit] = pod["containers"][0]["resources"]["limits"].values()
    assert int(limit) == launch.hosts.chips_per_host
    [rule] = job["podFailurePolicy"]["rules"]
    restarted = rule["onExitCodes"]["values"]
    assert restarted == sorted(set(restarted)) and {74, 75} <= set(restarted) and not {0, 65, 78} & set(restarted)
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    # The name by which all find the first pod: <jobset>-<replicated job>-<job>-<pod>.<subdomain>.
    assert '"$NAME-hosts-0-0.$NAME:$PORT"' in files["data"]["pod.sh"] and "\nNAME=k2-test\n" in files["data"]["pod.sh"]
    assert (replicated["name"], jobset["spec"]["network"]["subdomain"]) == ("hosts", jobset["metadata"]["name"])


@pytest.mark.parametrize(
    ("topology", "accelerators", "nodes"),
    [("h100:16", "H100:8", 2), ("a100:4", "A100-80GB:4", 1), ("v5p:8x8x8", "tpu-v5p-1024:1", 1)],
)
def test_the_fields_of_a_task_of_skypilot(topology, accelerators, nodes):
    task = yaml.safe_load(manifests.sky(make(topology))["task.yaml"])
    check_fields(task, TASK)
    assert (task["resources"]["accelerators"], task["num_nodes"]) == (accelerators, nodes)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [74, 75]


def test_a_field_that_nobody_documents_is_seen():
    for value in ({"backofLimit": 0}, {"backoffLimit": "0"}, {"completionMode": "indexed"}, {"template": []}):
        with pytest.raises(AssertionError):
            check_fields(value, JOB)


# ---- values that want to be code -------------------------------------------------------------------------------------

HOSTILE = [
    "a b",
    "it's \"quoted\" and \\",
    "$(touch pwned) `touch pwned` ${HOME} $HOME $$ $((1+1))",
    "x; touch pwned & touch pwned || touch pwned\ntouch pwned\n",
    "'; touch pwned; '",
    '"\n- touch pwned: {{x}} # no comment\n---\n',
    "tab\t bell\a next line\x85 separator\u2028 trailing ",
    "!history !! %s {a,b} *[?] ~ ~root",
    "日本語 \U0001f600",
]


def run_host(script: str, folder: Path, *arguments: str, **environment: str) -> list[list[str]]:
    """The command lines that a script gives to PYTHON; nothing else may come of it."""
    folder.mkdir()
    (folder / "host.sh").write_text(script)
    subprocess.run(
        ["bash", "host.sh", *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "TOLD": str(folder / "told"), **environment},
        check=True,
        capture_output=True,
        timeout=60,
    )
    told = [json.loads(line) for line in (folder / "told").read_text().splitlines()]
    assert {path.name for path in folder.rglob("*")} == {"host.sh", "told"}, "something was run"
    return told


@pytest.fixture
def python(tmp_path) -> Path:
    """Notes its command line."""
    path = tmp_path / "bin of $HOME" / "python"
    path.parent.mkdir()
    note = "import json, os, sys\nopen(os.environ['TOLD'], 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
    path.write_text(f"#!{sys.executable}\n{note}")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("kind", CASES)
def test_hostile_values_come_through_unharmed_and_run_nothing(kind, python, tmp_path):
    topology, options = CASES[kind]
    values = tuple(f"--config.name={text}" for text in HOSTILE)
    name = "named\n touch pwned"
    launch = make(topology, **{**options, "config_name": name, "arguments": values, "code": "", "python": str(python)})
    launch = dataclasses.replace(launch, cache="/c $(touch pwned)\n", verdict="fits\ntouch pwned; $(touch pwned)")
    files = WRITERS[kind](launch)
    if kind in ("ssh", "slurm", "tpu-vm"):
        for what in ("preflight", "train"):
            [told] = run_host(files["host.sh"], tmp_path / what, what)
            assert told[:2] == ["-m", f"k2jax.{what}"] and told[2 : 2 + len(values)] == list(values)
        (tmp_path / "launch.sh").write_text(files.get("launch.sh") or files["job.sbatch"])
        head = (tmp_path / "launch.sh").read_text().split("say()")[0]
        (tmp_path / "head").mkdir()
        subprocess.run(["bash", "-c", head], cwd=tmp_path / "head", check=True, capture_output=True)
        assert not list((tmp_path / "head").iterdir())
        return
    *_, last = yaml.safe_load_all(next(iter(files.values())))
    text = last["run"] if kind == "sky" else next(yaml.safe_load_all(files["jobset.yaml"]))["data"]["pod.sh"]
    place = {"JOB_INDEX": "1", "JOB_COMPLETION_INDEX": "0", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    place |= {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"}
    getent = python.parent / "getent"
    getent.write_text("#!/bin/sh\n")
    getent.chmod(0o755)
    told = run_host(text, tmp_path / "pod", **place, PATH=f"{python.parent}:{os.environ['PATH']}")
    assert [line[1] for line in told] == ["k2jax.preflight", "k2jax.train"]
    assert all(line[2 : 2 + len(values)] == list(values) for line in told)


def test_what_no_file_can_hold_is_refused():
    for text, message in [("a\udcff", "is not UTF-8"), ("a\0b", "holds a NUL byte")]:
        with pytest.raises(ConfigError, match=message):
            spec.check_text("--workdir", text)


# ---- exit codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [
        ("0 0", "done 0"),
        ("75 75", "again 75"),
        ("143 75", "again 143"),
        ("74 70 70", "later 74"),
        ("70 255", "later 255"),
        ("137 70", "later 137"),
        ("75 74", "later 74"),
        ("74 75", "later 74"),
        ("70 70", "stop 70"),
        ("0 70", "stop 70"),
        ("75 70", "again 75"),
        ("65 70", "stop 65"),
        ("78 74 65", "stop 78"),
        ("74 65 78", "stop 78"),
        ("134", "stop 134"),
        ("74 3", "stop 3"),
        ("3 74", "stop 3"),
    ],
)
def test_what_exit_codes_mean_to_the_run(codes, verdict):
    common = scripts.template("common")
    found = subprocess.run(["bash", "-c", f"{common}\nverdict {codes}"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == verdict


# ---- names and checks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "hosts", "devices", "accelerator_type"),
    [
        ("v5p:8x8x8", 128, 512, "v5p-1024"),
        ("v5p:8x8x8*2", 256, 1024, "v5p-1024"),
        ("v5p:2x2x1", 1, 4, "v5p-8"),
        ("v4:4x4x4", 16, 64, "v4-128"),
        ("v5e:1x1", 1, 1, "v5litepod-1"),
        ("v5e:2x4", 1, 8, "v5litepod-8"),
        ("v5e:4x4", 4, 16, "v5litepod-16"),
        ("v6e:16x16", 64, 256, "v6e-256"),
        ("tpu7x:4x4x4", 16, 128, None),
        ("h100:8", 1, 8, None),
        ("h100:3", 1, 3, None),
        ("a100:64", 8, 64, None),
        ("cpu:3x2", 3, 6, None),
    ],
)
def test_hosts_of_a_topology(topology, hosts, devices, accelerator_type):
    found = parse(topology)
    assert (found.hosts, found.devices) == (hosts, devices)
    assert not accelerator_type or found.accelerator_type == accelerator_type


@pytest.mark.parametrize(
    "topology",
    ["b200:8", "v5p", "v5p:8x8", "v5p:0x2x2", "v5p:3x3x3", "v5e:3x3", "v6e:4x4x4", "v5p:2x2x2*0", "h100:12", "h100:0",
     "h100:8x60", "cpu:2", "cpu:0x1", "v5p:8x8x8\n", "v5p:٨x8x8"],
)  # fmt: skip
def test_a_name_of_no_hosts_is_refused(topology):
    with pytest.raises(ConfigError, match="^--topology="):
        parse(topology)


def test_a_slice_of_an_unusual_shape_is_named_by_it():
    text = scripts.tpu_vm(make("v5p:4x4x16"))["launch.sh"]
    assert "--type=v5p --topology=4x4x16" in text and "accelerator-type" not in text.split("say()")[0]
    assert "--accelerator-type=v5p-64" in scripts.tpu_vm(make("v5p:2x4x4"))["launch.sh"]


@pytest.mark.parametrize(
    ("kind", "topology", "options", "message"),
    [
        ("slurm", "v5p:2x2x2", {}, "TPUs are given out by"),
        ("tpu-vm", "h100:16", {}, "no TPU VM has these"),
        ("tpu-vm", "tpu7x:2x2x2", {}, "use gke"),
        ("tpu-vm", "v5p:2x2x2", {"commit": spec.NO_COMMIT}, "no checkout"),
        ("gke", "v5p:2x2x2", {}, "needs --image"),
        ("gke", "v5p:2x2x2", {"image": IMAGE}, "pods share no folder"),
        ("gke", "v5p:2x2x2", {"image": IMAGE, "claim": "a"}, "expected CLAIM:/PATH"),
        ("sky", "v5p:2x2x2*2", {}, "one slice of TPUs"),
        ("ssh", "cpu:1x1", {}, "does not multiply to the 1 device"),
        ("ssh", "cpu:2x8", {"port": 80}, "--port=80"),
        ("slurm", "h100:16", {"time_limit": "1:00\n#SBATCH --wrap=x"}, "--time-limit="),
    ],
)
def test_what_cannot_be_launched_is_refused(kind, topology, options, message):
    with pytest.raises(ConfigError, match=message):
        WRITERS[kind](make(topology, **options))


@pytest.mark.parametrize("image", ["k2:latest", "k2", "k2@sha256:12", IMAGE + "\nx", IMAGE.replace("k2", "$(x)")])
def test_an_image_without_a_digest_is_refused(image):
    with pytest.raises(ConfigError, match="expected NAME@sha256:DIGEST"):
        spec.check_image(image)
    assert spec.check_image(IMAGE) == IMAGE


def test_names_are_labels():
    assert [spec.dns_label(name) for name in ("K2_65B v5p", "a" * 60, "a--b_")] == ["k2-65b-v5p", "a" * 40, "a-b"]
    for name in ("", "65b", "___"):
        with pytest.raises(ConfigError, match="--name="):
            spec.dns_label(name)


# ---- the command -----------------------------------------------------------------------------------------------------


def plan_of(fits: bool, **changes: Any) -> dict[str, Any]:
    stage = {"stage": "stage1", "tokens_per_step": 256, "step_seconds": 10.5 if fits else None, "mfu_causal": 0.679}
    stage |= {"remedies": [] if fits else ["more chips"]}
    other = {**stage, "stage": "stage2", "tokens_per_step": 512}
    found = {"experiment": "tiny", "topology": "h100:8", "stages": {"stage1": stage, "stage2": other}, "fits": fits}
    return found | {"hbm_bytes_per_chip": 40 * GIB, "hbm_limit_bytes": 80 * GIB, "days": 43.0} | changes


@pytest.fixture
def launch(tiny_data, tmp_path, monkeypatch, capsys):
    """`launch(*arguments)`: (exit code, stderr) of tools/launch.py for the tiny experiment, into tmp_path/out."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(sys, "path", list(sys.path))
    main = runpy.run_path(str(REPOSITORY / "tools" / "launch.py"))["main"]

    def run(*arguments: str, topology: str = "h100:8", on: str = "ssh") -> tuple[int, str]:
        given = [f"--config={tiny_data / 'tiny.py'}", f"--topology={topology}", f"--on={on}"]
        given += [f"--out={tmp_path / 'out'}"]
        workdir = [] if any(text.startswith("--workdir") for text in arguments) else ["--workdir=/runs/tiny"]
        monkeypatch.setattr(sys, "argv", ["tools/launch.py", *given, *workdir, *arguments])
        with pytest.raises(SystemExit) as end:
            run_main(main)
        return end.value.code or 0, capsys.readouterr().err

    return run


def test_the_plan_is_in_the_files(launch, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(plan_of(True)))
    code, error = launch(f"--plan={tmp_path / 'plan.json'}", "--config.seed=3")
    assert code == 0, error
    told = json.loads((tmp_path / "out" / "launch.json").read_text())
    assert told["plan"].startswith("fits, 40.0 of 80.0 GiB a chip; stage1 10.500 s a step, MFU 67.9% causal; stage2")
    assert told["plan"] in (tmp_path / "out" / "host.sh").read_text()
    assert told["arguments"][1:] == ["--workdir=/runs/tiny", "--config.seed=3"]
    assert re.fullmatch("[0-9a-f]{64}", told["lock_digest"]) and (told["hosts"], told["devices"]) == (1, 8)


@pytest.mark.parametrize(
    ("plan", "code", "message"),
    [
        (plan_of(False), 2, "does NOT fit, 40.0 of 80.0 GiB a chip: more chips; more chips"),
        (plan_of(True, topology="h100:16"), 78, "is of topology 'h100:16', this launch has 'h100:8'"),
        (plan_of(True, experiment="k2"), 78, "is of experiment 'k2'"),
        ({"fits": True}, 78, "is no output of tools/plan.py --json"),
        ([], 78, "is no output of tools/plan.py --json"),
    ],
)
def test_a_plan_that_does_not_fit_or_is_of_something_else_writes_nothing(launch, tmp_path, plan, code, message):
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    found, error = launch(f"--plan={tmp_path / 'plan.json'}")
    assert found == code and message in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--workdir=runs/x"], 78, "expected an absolute path on the hosts"),
        (["--image=" + IMAGE], 78, "ssh starts no containers"),
        (["--config.sed=3"], 78, "--config.sed: unknown key"),
        (["--confg.seed=3"], 64, "unknown argument --confg.seed=3"),
        (["--config.mesh.fsdp=3"], 78, "does not multiply to the 8 device"),
        (["--delay=-1"], 78, "--delay=-1"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(launch, tmp_path, arguments, code, message):
    found, error = launch("--no-plan", *arguments)
    assert found == code and message in error.splitlines()[-1] and not (tmp_path / "out").exists()


def test_templates_are_shell_without_values():
    """They hold no place for a value: those come before them, quoted."""
    for path in scripts.TEMPLATES.glob("*.sh"):
        assert not re.search(r"@[A-Z_]+@|\{\{|%\(", path.read_text()), path
    assert shutil.which("bash")


# ---- TPU VMs, with a stand-in for gcloud and for the training --------------------------------------------------------


@pytest.fixture
def pod(tmp_path) -> tuple[Path, Any]:
    """Two slices of two workers; a training ends with the next of the codes in its worker's file."""
    slices = [tmp_path / "tpus" / f"k2-test-{i}" for i in (0, 1)]
    for worker in [folder / str(i) for folder in slices for i in (0, 1)]:
        worker.mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\necho "$2" >> ran; [ "$2" = k2jax.train ] || exit 0\n'
        'echo trains; code=$(head -1 ~/codes); sed -i 1d ~/codes; exit "$code"\n'
    )
    python.chmod(0o755)
    for name, text in scripts.tpu_vm(make("v5p:2x2x2*2", code="k2jax", python=str(python), delay_s=0)).items():
        (tmp_path / name).write_text(text)

    def run(command: str, codes: dict[str, str] | None = None) -> tuple[int, str]:
        for folder in slices:
            for worker in folder.iterdir():
                (worker / "k2jax").mkdir(exist_ok=True)
                found = (codes or {}).get(f"{folder.name[-1]}{worker.name}", (codes or {}).get("all", ""))
                (worker / "codes").write_text(found.replace(" ", "\n") + "\n")
        there = {"STAND_IN_STATE": str(tmp_path / "tpus"), "ZONE": "z", "PROJECT": "p", "POLL_S": "0.2"}
        path = f"{Path(__file__).parent / 'faults' / 'bin'}:{os.environ['PATH']}"
        ended = subprocess.run(
            ["bash", tmp_path / "launch.sh", command], env={**os.environ, **there, "PATH": path},
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        return ended.returncode, ended.stdout + ended.stderr

    for worker in [folder / str(i) for folder in slices for i in (0, 1)]:
        (worker / ".k2jax-launch" / "k2-test").mkdir(parents=True)
        shutil.copy(tmp_path / "host.sh", worker / ".k2jax-launch" / "k2-test")
    return tmp_path / "tpus", run


@pytest.mark.processes
def test_a_pod_is_restarted_as_the_codes_of_all_workers_say(pod):
    state, run = pod
    code, told = run("run", {"all": "75 70 0", "10": "75 74 0"})
    assert code == 0, told
    assert re.findall("exit codes (.*)", told) == ["75 75 75 75: again", "70 70 74 70: later", "0 0 0 0: done"]
    ran = (state / "k2-test-1" / "1" / "k2jax" / "ran").read_text().split()
    assert ran == ["k2jax.preflight", "k2jax.train"] * 3
    assert "trains" in run("logs")[1]

    code, told = run("run", {"all": "70", "01": "78"})
    assert code == 78 and "exit codes 70 78 70 70: stop" in told


def test_what_a_pod_is_told(pod):
    state, run = pod
    assert run("create")[0] == 0 and run("teardown")[0] == 0 and run("nonsense")[0] == 64
    create, *_, delete = [line for line in (state / "calls").read_text().splitlines() if "describe" not in line]
    assert create == (
        "compute tpus queued-resources create k2-test --zone=z --project=p --accelerator-type=v5p-16 "
        "--runtime-version=v2-alpha-tpuv5 --node-count=2 --node-prefix=k2-test"
    )
    assert delete == "compute tpus queued-resources delete k2-test --zone=z --project=p --force --quiet"
