"""Keeps the code as style.md wants it. A limit changes only here, in a commit that says why."""

import ast
import graphlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import NOT_THERE
from thorough import STAY

from k2jax import config as configuration

ROOT = Path(__file__).parent.parent
CODE = sorted([*ROOT.glob("k2jax/**/*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("kernels/**/*.py")])
EXPERIMENTS = sorted(ROOT.glob("experiments/**/*.py"))
TOP_LEVEL = {
    "k2jax",
    "experiments",
    "kernels",
    "tests",
    "tools",
    "setup.py",
    "README.md",
    "Makefile",
    "LICENSE",
}
TOP_LEVEL |= {"pyproject.toml", "requirements.lock"}
FILE_LINES, FUNCTION_LINES, NESTING = 350, 60, 4
LONG_FILES = {
    "k2jax/parallel/cluster.py": 370,  # all that processes say to one another, in one place
    "k2jax/prepare/recipe.py": 370,  # every key of a data experiment, and what is wrong with its value
    "tools/verify_release.py": 1860,  # for strangers: one file, and all of it a second time (formats, order, arrays)
}
LONG_FUNCTIONS = {
    "k2jax/train.py:train_on": 120,  # the loop reads top to bottom in one place
    "k2jax/keys.py:base": 140,  # one line a key, of which there may be 150 with the stages'
    "k2jax/prepare/recipe.py:subset": 90,  # two lines a key: its default, and what it means
}
FORBIDDEN = r"\bpickle\b|\beval\(|\bexec\(|yaml\.load\(|shell=True|trust_remote_code|torch\.load|except:"
FORBIDDEN += r"|\ballow_pickle=True|\b(tarfile|zipfile)\b|unpack_archive|extractall"  # S8: nothing is unpacked

# What puts a file in its place or on the disk: k2jax/files.py's alone, but for these.
OF_THE_SYSTEM = {"replace", "rename", "renames", "move", "fsync", "fdatasync"}
OF_A_PATH = {"rename", "write_text", "write_bytes"}
OTHERS_THAT_DO = {
    "k2jax/hf/safetensors_io.py": {"fdatasync"},  # begins early what files.whole_folder does in the end
    "k2jax/run/lineage.py": {"rename"},  # moves a step or a part away; undone by a power cut, it is decided again
    "k2jax/run/ledger.py": {"fsync"},  # of rows, before the checkpoint that closes over them
    "tools/bench/convert.py": {"fsync"},  # measures it
    "tools/bench/scale.py": {"fsync"},  # counts without it
}


# The rooms, each importing only from itself and from those named here, of which every one stands further up.
COMMON = {"text", "output", "errors", "stopping", "bucket", "transfer", "locks", "files", "paths", "lease"}
COMMON |= {"upload", "keys", "mixes", "config", "k2", "kernels", "__init__"}
RUN = {"data", "chat", "parallel", "stability", "model", "run", "training"}
MAY_IMPORT = {
    "__init__": set(),
    "text": set(),
    "output": {"text"},
    "errors": {"output", "text"},
    "stopping": set(),
    "locks": {"errors"},
    "kernels": set(),
    "bucket": {"errors"},
    "paths": {"errors", "text", "bucket"},
    "transfer": {"errors", "bucket"},
    "files": {"errors", "bucket", "transfer"},
    "lease": {"errors", "files", "bucket"},
    "upload": {"errors", "bucket", "transfer", "lease"},
    "keys": {"errors"},
    "mixes": {"errors", "paths", "files", "keys"},
    "config": {"errors", "paths", "keys", "mixes"},
    "k2": {"config"},
    "data": COMMON,
    "chat": COMMON | {"data"},
    "prepare": COMMON | {"data", "chat"},
    "parallel": COMMON,
    "stability": COMMON | {"data"},
    "model": COMMON | {"parallel"},
    "run": COMMON | {"data", "chat", "parallel", "stability", "model"},
    "training": COMMON | RUN,
    "evals": COMMON | RUN,
    "hf": COMMON | RUN,
    "conversation": COMMON | RUN,
    "plan": COMMON | RUN,
    "release": COMMON | RUN | {"hf", "evals", "report"},
    "launch": COMMON | RUN | {"plan"},
    "preflight": COMMON | RUN | {"launch"},
    "generate": COMMON | RUN | {"conversation"},
    "ending": COMMON | RUN,
    "evaluate": COMMON | RUN | {"evals"},
    "rerun": COMMON | RUN,
    "replay": COMMON | RUN | {"rerun"},
    "trials": COMMON | RUN | {"rerun"},
    "doctor": COMMON | RUN | {"rerun", "trials"},
    "spikes": COMMON | RUN | {"doctor"},
    "train": COMMON | RUN | {"ending", "spikes"},
    "goodput": COMMON | RUN,
    "gallery": COMMON | RUN | {"generate", "evals"},
    "report": COMMON | RUN | {"evals"},
    "costs": COMMON | RUN,
    "command": {"errors"},
    "experiments": {"config", "k2", "prepare"},
}


@cache
def source(path: Path) -> str:
    return path.read_text()


@cache
def parsed(path: Path) -> ast.Module:
    """Once for all tests: two hundred files are most of the work here."""
    return ast.parse(source(path))


@cache
def imports(path: Path) -> set[str]:
    """The modules of k2jax that a file of the repository imports, anywhere in it: "data/store"."""
    return imported_by(parsed(path))


def imported_by(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for parts in (name.split(".") for name in names if name.split(".")[0] == "k2jax"):
            while parts[1:] and not _is_module("/".join(parts[1:])):
                parts.pop()  # a name in a module
            found.add("/".join(parts[1:]) or "__init__")
    return found


@cache
def _is_module(name: str) -> bool:
    folder = ROOT if name.startswith("kernels/") else ROOT / "k2jax"
    return (folder / f"{name}.py").is_file() or (folder / name).is_dir()


def module(path: Path) -> str:
    """The name of a file as `imports` gives it."""
    inside = path.relative_to(ROOT).with_suffix("").as_posix()
    return inside.removeprefix("k2jax/").removesuffix("/__init__")


def wrong_imports(name: str, imported: set[str]) -> list[str]:
    """Those that a file of this name may not import: of a room further down or beside its own."""
    room = name.split("/")[0]
    if room == "tools":
        return []
    allowed = MAY_IMPORT[room] | {room}
    return sorted(other for other in imported if other.split("/")[0] not in allowed)


def writes(tree: ast.AST) -> set[str]:
    """What of the above a file uses. `path.replace(other)` is a path's, `text.replace(old, new)` is none."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil"):
            found |= OF_THE_SYSTEM & {alias.name for alias in node.names}
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("os", "shutil"):
            found |= OF_THE_SYSTEM & {node.attr}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, of_path = node.func.attr, ast.unparse(node.func.value) != "files"
            found |= OF_A_PATH & {name} if of_path else set()
            found |= {name} if name == "replace" and len(node.args) == 1 and not node.keywords else set()
    return found


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def depth(node: ast.AST, level: int = 0) -> int:
    """How many blocks (if, for, while, with, try) stand inside each other; an elif is no deeper than its if."""
    level += isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try))
    inner = [level]
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        inner.append(0 if isinstance(child, ast.FunctionDef) else depth(child, level - is_elif))
    return max(inner)


@pytest.mark.fault("S1", "S8")
@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short_and_its_functions_too(path: Path):
    """Seen red with an import of pickle, and of tarfile."""
    text, tree, name = source(path), parsed(path), str(path.relative_to(ROOT))
    assert len(text.splitlines()) <= LONG_FILES.get(name, FILE_LINES)
    assert ast.get_docstring(tree) or not text.strip(), "a module says in its first line what it is for"
    for function in functions(tree):
        length, limit = (
            function.end_lineno - function.lineno + 1,
            LONG_FUNCTIONS.get(f"{name}:{function.name}", FUNCTION_LINES),
        )
        assert length <= limit, f"{function.name} has {length} lines, at most {limit}"
        nesting = max([depth(child) for child in function.body] or [0])
        assert nesting <= NESTING, f"{function.name} nests {nesting} deep"
    found = re.search(FORBIDDEN, text)
    assert not found, f"forbidden: {found.group()}"


def test_the_loop_stays_readable():
    tree = parsed(ROOT / "k2jax" / "train.py")
    [train] = [function for function in functions(tree) if function.name == "train_on"]
    [loop] = [node for node in ast.walk(train) if isinstance(node, ast.For)]
    assert loop.end_lineno - loop.lineno + 1 <= 45
    assert len(source(ROOT / "k2jax" / "train.py").splitlines()) <= 300


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_signatures_are_typed(path: Path):
    for function in functions(parsed(path)):
        arguments = [
            a for a in [*function.args.args, *function.args.kwonlyargs] if a.arg not in ("self", "cls")
        ]
        untyped = [a.arg for a in arguments if a.annotation is None]
        assert function.name.startswith("_") or not untyped, f"{function.name}: {untyped} without a type"


def test_every_config_key_is_read_and_has_a_meaning():
    keys = configuration.flatten(configuration.to_dict(configuration.base()))
    stage_keys = configuration.flatten(configuration.to_dict(configuration.stage()))
    assert 40 <= len(keys) + len(stage_keys) <= 150
    code = "".join(source(path) for path in CODE if path.name != "keys.py")
    for key in [*keys, *stage_keys]:
        last = key.split(".")[-1]
        assert re.search(rf"(\.|\[\")({last})\b", code), f"{key} is read nowhere"


def test_configuration_has_no_hidden_defaults():
    for path in CODE:
        found = re.search(r"\b(c|config|stage|cfg|m)\.get\(", source(path))
        assert not found, f"{path}: {found.group()}: a default belongs in config.base()"


def test_the_data_side_never_imports_jax():
    for path in [*ROOT.glob("k2jax/data/*.py"), *ROOT.glob("k2jax/prepare/**/*.py")]:
        assert not re.search(r"^\s*(import|from) (jax|flax)", source(path), re.M), path


@pytest.mark.parametrize("path", [*CODE, *EXPERIMENTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_from_rooms_before_them(path: Path):
    wrong = wrong_imports(module(path), imports(path))
    assert not wrong, f"{module(path)} imports {', '.join(wrong)}: move what it needs to where both may see it"


def test_a_planted_import_the_wrong_way_is_seen():
    for name, line, wrong in [
        ("run/saved", "from k2jax.training.step import Batch", ["training/step"]),
        ("model/generation", "def f():\n    from k2jax.run import saved, digest", ["run/digest", "run/saved"]),
        ("data/store", "import k2jax.parallel.sharding", ["parallel/sharding"]),
        ("evals/session", "from k2jax.hf import card\nfrom k2jax.data import order", ["hf/card"]),
        ("training/step", "from k2jax.train import train", ["train"]),
        ("prepare/dedup/near", "from k2jax.prepare.dedup import exact\nfrom k2jax import files, k2", []),
    ]:
        assert wrong_imports(name, imported_by(ast.parse(line))) == wrong


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_written_in_one_way(path: Path):
    name = str(path.relative_to(ROOT))
    found = set() if name == "k2jax/files.py" else writes(parsed(path))
    assert found == OTHERS_THAT_DO.get(name, set()), "k2jax/files.py has it: whole or not at all, and on the disk"


def test_another_way_of_writing_is_seen():
    for line, found in [
        ("import os\nos.replace(a, b)", {"replace"}),
        ("from os import fsync as sync, path", {"fsync"}),
        ("pool.submit(os.fdatasync, 3)", {"fdatasync"}),
        ("path.with_suffix('.tmp').replace(path)", {"replace"}),
        ("(folder / 'x').write_text('y')", {"write_text"}),
        ("'a'.replace('b', 'c'); files.write_text(a, b); replace(config, x=1); os.path.join(a)", set()),
    ]:
        assert writes(ast.parse(line)) == found


def test_no_two_files_import_each_other():
    graph = {module(path): imports(path) - {"__init__"} for path in CODE}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"these import each other: {' <- '.join(error.args[1])}")


def test_only_the_control_plane_asks_which_process_this_is():
    """What one process decides alone makes the others wait for ever."""
    for path in CODE:
        if module(path) not in ("parallel/cluster", "parallel/place"):
            found = re.search(r"jax\.process_(index|count)|multihost_utils|jax\.distributed\b", path.read_text())
            assert not found, f"{path.relative_to(ROOT)}: {found.group()}: that is parallel/cluster.py's"


def test_the_top_level_is_the_agreed_one():
    """Of what git knows: a stray file of the developer's own is nobody's business."""
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    top = {line.split("/")[0] for line in git.stdout.splitlines()}
    extra = {name for name in top - TOP_LEVEL if not name.startswith(".")}
    assert not extra, f"not agreed at the top level: {extra}"


@pytest.mark.parametrize("folder", ["tools", "tools/bench", "tests"])
def test_no_script_hides_a_module_of_python(folder: str):
    """A folder whose file is run, or that tests put on PYTHONPATH, comes before Python's own: its encodings, too."""
    ours = {path.stem for path in (ROOT / folder).glob("*.py")}
    assert not ours & sys.stdlib_module_names


def test_tests_whose_cases_are_chosen_are_there(request: pytest.FixtureRequest):
    for test in STAY:
        path, _, name = test.partition("::")
        assert f"\ndef {name}(" in (ROOT / path).read_text(), test
    assert not request.config.stash[NOT_THERE], "tests/thorough.py names cases that their tests do not have"


def test_files_that_are_named_are_there():
    """In the README, and in what the code says of other files."""
    for path in [ROOT / "README.md", *CODE, *EXPERIMENTS]:
        for name in re.findall(r"(?<![\w/])((?:k2jax|kernels|tests|tools|experiments)/[\w/]+\.py)\b", source(path)):
            assert "NAME" in name or (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"
