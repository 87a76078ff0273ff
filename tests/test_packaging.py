"""What an installation brings: few imports, locked versions for every Python, no path of any machine."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import k2jax

REPO = Path(__file__).parent.parent
LOCKED = ("test", "parity", "report", "release", "eval", "tpu", "data", "ray", "sentencepiece", "seqio")
PYTHONS = ("3.11.7", "3.12.1", "3.13.0")


@pytest.fixture(scope="module")
def setup_arguments():
    """What setup.py tells setuptools."""
    found, patch = {}, pytest.MonkeyPatch()
    patch.setattr("setuptools.setup", lambda **arguments: found.update(arguments))
    patch.chdir(REPO)
    runpy.run_path("setup.py")
    patch.undo()
    return found


def lock(python):
    """{name: version} of requirements.lock on Linux with that Python."""
    marker_values = {
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "extra": "",
    }
    pinned = {}
    for line in (REPO / "requirements.lock").read_text().splitlines():
        text = line.partition("#")[0].strip()
        requirement = Requirement(text) if text else None
        if requirement and (requirement.marker is None or requirement.marker.evaluate(marker_values)):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==" and requirement.url is None
            assert requirement.name not in pinned, f"{requirement.name} twice for Python {python}"
            pinned[canonicalize_name(requirement.name)] = specifier.version
    return pinned


def test_importing_k2jax_imports_nothing_heavy():
    code = "import sys; before = set(sys.modules); import k2jax; print(*sorted(set(sys.modules) - before))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True
    )
    assert answer.stdout.split() == ["k2jax"]


@pytest.mark.fault("S14")
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_every_dependency_within_its_bounds(setup_arguments, python):
    extras = setup_arguments["extras_require"]
    pinned = lock(python)
    for text in setup_arguments["install_requires"] + [t for name in LOCKED for t in extras[name]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text
        assert any(s.operator in (">=", "==") for s in requirement.specifier), f"{text} has no lower bound"
        assert any(s.operator in ("<", "==") for s in requirement.specifier), f"{text} has no upper bound"
    assert "setuptools" in pinned, "the Makefile builds with the locked one"


def test_python_3_11_has_the_last_jax_for_it_and_later_ones_a_newer():
    assert lock("3.11.7")["jax"] == "0.10.2"
    assert int(lock("3.12.1")["jax"].split(".")[1]) >= 12


@pytest.mark.fault("S14")
def test_the_lock_holds_released_versions_only_and_no_cuda():
    text = (REPO / "requirements.lock").read_text()
    assert "://" not in text and " @ " not in text and "nvidia" not in text and "--hash" not in text
    versions = [v for python in PYTHONS for v in lock(python).values()]
    assert not [v for v in versions if re.search("[a-z]", re.sub(r"\.post\d+$", "", v))], "a pre-release"


def test_setup_names_the_extras_and_the_python(setup_arguments):
    assert set(setup_arguments["extras_require"]) == {
        "tpu",
        "gpu",
        "hf",
        "wandb",
        "data",
        "langid",
        "ray",
        "eval",
        "sentencepiece",
        "seqio",
        "test",
        "parity",
        "report",
        "release",
    }
    assert setup_arguments["python_requires"] == ">=3.11" and setup_arguments["version"] == k2jax.__version__
    assert all(name.split(".")[0] == "k2jax" for name in setup_arguments["packages"])


def test_no_file_holds_a_path_of_this_machine():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.split("\n")
    paths = {str(REPO), sys.prefix, sys.base_prefix, str(Path.home())}
    needles = [f"{path}/".encode() for path in paths if len(path) > 4]
    found = [
        name
        for name in listed
        if name
        and (REPO / name).is_file()
        and any(needle in (REPO / name).read_bytes() for needle in needles)
    ]
    assert found == []


def test_an_old_python_is_refused_in_one_line(tmp_path):
    venv = tmp_path / "venv"
    answer = subprocess.run(
        ["make", "PYTHON=false", f"VENV={venv}", f"{venv}/bin/pip"],
        cwd=REPO,
        text=True,
        capture_output=True,
        env={**os.environ, "MAKEFLAGS": ""},
    )
    assert answer.returncode != 0 and not venv.exists()
    assert answer.stderr.startswith("error: false is not Python 3.11 or newer")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Made of a copy of the checkout, as pip makes it."""
    if int(version("setuptools").split(".")[0]) < 71:
        pytest.skip("`make test` installs a newer setuptools")
    tmp_path = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(REPO / name, tmp_path)
    for name in ("k2jax", "kernels", "tests", "tools", "experiments"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--wheel-dir",
            "out",
            ".",
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    (found,) = (tmp_path / "out").glob("*.whl")
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    kinds = ("py", "txtpb", "sh", "js", "css", "html", "md")
    modules = {p.relative_to(REPO).as_posix() for kind in kinds for p in (REPO / "k2jax").rglob(f"*.{kind}")}
    for room in ("kernels", "tools"):
        modules |= {f"k2jax/{room}/{path.name}" for path in (REPO / room).glob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == modules
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.processes
def test_an_installation_brings_one_command_with_all_that_there_are(wheel, tmp_path):
    """In a folder that has another k2jax, as a checkout has, it is the installed one. Seen red without -P."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", tmp_path / "site", wheel], check=True, capture_output=True)
    (tmp_path / "here" / "k2jax").mkdir(parents=True)
    (tmp_path / "here" / "k2jax" / "__init__.py").write_text("raise SystemExit('not this one')")

    def k2jax(*arguments, code=0):
        answer = subprocess.run(
            [tmp_path / "site" / "bin" / "k2jax", *arguments],
            cwd=tmp_path / "here", text=True, capture_output=True, env={**os.environ, "PYTHONPATH": tmp_path / "site"},
        )  # fmt: skip
        assert answer.returncode == code, answer.stderr
        return answer.stdout + answer.stderr

    listed = re.findall(r"^  (\w+) ", k2jax(), re.MULTILINE)
    commands = [path.stem for path in (REPO / "k2jax").glob("*.py") if "\ndef main()" in path.read_text()]
    assert sorted(listed) == sorted({*commands, *(path.stem for path in (REPO / "tools").glob("*.py"))} - {"command"})
    assert "usage: prepare_data.py" in k2jax("prepare-data", "--help")
    assert "usage: python -m k2jax.train" in k2jax("train", "--help")
    said = k2jax("prepare_data", "--config=nothing.py", "--out=x", code=78)
    assert said.startswith("error: --config=nothing.py: no such data experiment") and said.count("\n") == 1
    assert "k2jax trian: no such command, did you mean train?" in k2jax("trian", code=78)
    code = "import runpy, sys; runpy.run_module('k2jax.tools.report'); print(sys.path)"
    site = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    path = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=site, capture_output=True, text=True).stdout
    assert f"{tmp_path}/site'" in path and f"{tmp_path}/site/k2jax'" not in path, "its rooms are no packages of all"
