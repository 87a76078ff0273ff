"""Folders of somebody else's that mean harm: read as data, refused in one line, nothing of theirs run or followed.

The rows of the security matrix: S1 files whose opening runs code, S2 paths, S3 names, S4 sizes, S5 values, S6 code.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from test_convert_from_hf import (
    CONFIG,
    draw_tensors,
    expect_refusal,
    header_of,
    importing,
    make_folder,
    tokenizer,  # noqa: F401
    write_safetensors,
)

from k2jax import config as configuration
from k2jax.errors import NumericsError
from k2jax.hf.untrusted import MAX_JSON_BYTES
from k2jax.run.saved import open_step

INDEX = "model.safetensors.index.json"
Folder = Path


class _Watch:
    """The files that Python opens, as the interpreter's own audit tells them. A hook cannot be taken out again."""

    def __init__(self):
        self.opened: list[str] | None = None
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if event == "open" and self.opened is not None and isinstance(arguments[0], (str, bytes)):
            self.opened.append(os.path.realpath(os.fsdecode(arguments[0])))


WATCH = _Watch()


@pytest.fixture
def opened() -> Iterator[list[str]]:
    WATCH.opened = []
    yield WATCH.opened
    WATCH.opened = None


@pytest.fixture
def folder(tokenizer, tmp_path) -> Folder:  # noqa: F811
    """A good one, for the test to spoil."""
    return make_folder(tmp_path / "hf", tokenizer)


class Payload:
    """Unpickled, it leaves a marker."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


# ---- S1: files whose opening runs code -------------------------------------------------------------------------------


@pytest.mark.fault("S1")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_s1_pickled_weights_are_refused_and_not_opened(folder, tmp_path, opened, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    opened.clear()
    expect_refusal(folder, tmp_path, name, "safetensors only", "save_pretrained")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(draw_tensors(), name)}))
    expect_refusal(folder, tmp_path, "weight_map", name)
    assert str(folder / INDEX) in opened, "the watch sees nothing: this test proves nothing"
    assert not (tmp_path / "marker").exists() and str(folder / name) not in opened
    pickle.loads((folder / name).read_bytes())
    assert (tmp_path / "marker").exists(), "the payload is harmless: this test proves nothing"


@pytest.mark.fault("S1")
def test_s1_beside_safetensors_they_are_left_alone(folder, tmp_path, opened):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    opened.clear()
    importing(folder, tmp_path / "run")
    assert str(folder / "model.safetensors") in opened, "the watch sees nothing: this test proves nothing"
    assert not (tmp_path / "marker").exists() and str(folder / "pytorch_model.bin") not in opened


# ---- S2: paths -------------------------------------------------------------------------------------------------------

FORMS = {
    "parent": "../outside.safetensors",
    "absolute": "{outside}",
    "subfolder": "inside/weights.safetensors",
    "through a subfolder": "inside/../../outside.safetensors",
    "backslash": "..\\outside.safetensors",
    "URL": "file://{outside}",
    "NUL": "weights.safetensors\0",
    "line end": "weights.safetensors\n",
    "nothing": ".safetensors/",
    "no suffix": "weights",
    "no text": ["weights.safetensors"],
    "null": None,
}


@pytest.mark.fault("S2")
@pytest.mark.parametrize("form", FORMS)
def test_s2_the_index_names_only_plain_files(folder, tmp_path, opened, form):
    """What the hostile name leads to is a whole model: followed, the import would succeed.

    Seen red without the pattern of names.
    """
    weights = (folder / "model.safetensors").rename(folder / "weights.safetensors")
    outside = Path(shutil.copy(weights, tmp_path / "outside.safetensors"))
    (folder / "inside").mkdir()
    shutil.copy(weights, folder / "inside")
    shutil.copy(weights, folder / "weights")
    name = FORMS[form]
    name = name.format(outside=outside) if isinstance(name, str) else name
    weight_map = {**dict.fromkeys(draw_tensors(), "weights.safetensors"), "model.norm.weight": name}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    opened.clear()
    expect_refusal(folder, tmp_path, "weight_map gives file", "plain name")
    assert not [path for path in opened if path.endswith(("safetensors", "weights"))], "refused before any is opened"


LINKS = ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json", INDEX, "shard.safetensors"]


@pytest.mark.fault("S2")
@pytest.mark.parametrize("name", LINKS)
def test_s2_links_out_of_the_folder_are_not_followed(folder, tmp_path, opened, name):
    """Seen red without the look at where a link leads."""
    outside = tmp_path / "outside"
    if name in ("generation_config.json", INDEX, "shard.safetensors"):
        weight_map = {"weight_map": dict.fromkeys(draw_tensors(), "shard.safetensors")}
        (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
        (folder / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": None}))
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        (folder / INDEX).write_text(json.dumps(weight_map))
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    expect_refusal(folder, tmp_path, name, "link out of its folder")
    assert str(outside) not in opened


@pytest.mark.fault("S2")
def test_s2_a_link_within_the_folder_is_fine_and_a_circle_is_not(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    importing(folder, tmp_path / "good")
    (folder / "weights").unlink()
    (folder / "weights").symlink_to("model.safetensors")
    expect_refusal(folder, tmp_path, "model.safetensors")


@pytest.mark.fault("S2")
def test_s2_pipes_and_folders_are_no_files(folder, tmp_path):
    """A pipe would be waited on for ever."""
    (folder / "config.json").unlink()
    expect_refusal(folder, tmp_path, "config.json: no such file")
    os.mkfifo(folder / "config.json")
    expect_refusal(folder, tmp_path, "config.json: not a file")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    expect_refusal(folder, tmp_path, "config.json: not a file")


# ---- S3: names -------------------------------------------------------------------------------------------------------


UNKNOWN = ["../../evil", "/etc/passwd", "model.layers.2.input_layernorm.weight", "\x1b[2J\n", ""]


@pytest.mark.fault("S3")
@pytest.mark.parametrize("name", UNKNOWN)
def test_s3_unknown_names_are_refused_and_shown_harmlessly(folder, tmp_path, name):
    tensors = {**draw_tensors(), name: np.zeros(32, np.float32)}
    write_safetensors(folder / "model.safetensors", tensors)
    text = expect_refusal(folder, tmp_path, f"{name!r} is no tensor of it")
    assert text.isprintable()


def test_s3_many_bad_names_make_a_short_error(folder, tmp_path):
    write_safetensors(folder / "model.safetensors", {f"{i}" * 5000: np.zeros(1, np.float32) for i in range(40)})
    assert "problem(s)" in expect_refusal(folder, tmp_path)


@pytest.mark.fault("S3")
def test_s3_duplicates_between_files(tokenizer, tmp_path):  # noqa: F811
    """A tensor that the index gives to the first file lies in the second one, too."""
    folder = make_folder(tmp_path / "hf", tokenizer, files=2)
    tensors = draw_tensors()
    names = list(tensors)
    twice = {name: tensors[name] for name in names[1::2]} | {names[0]: tensors[names[0]]}
    write_safetensors(folder / "model-00002-of-00002.safetensors", twice)
    expect_refusal(folder, tmp_path, "model-00002-of-00002", names[0], "only the file has")
    write_safetensors(folder / "model-00002-of-00002.safetensors", {name: tensors[name] for name in names[3::2]})
    expect_refusal(folder, tmp_path, names[1], "the file does not have")


@pytest.mark.fault("S3")
def test_s3_keys_that_stand_twice(folder, tmp_path):
    """Which of the two counts is the reader's whim: one program would check the first, another load the last.

    Seen red without the look for keys that stand twice.
    """
    tensors = draw_tensors()
    header = json.dumps(header_of(tensors))
    place = json.dumps(header_of(tensors)["model.norm.weight"])
    twice = f'{header[:-1]}, "model.norm.weight": {place}}}'
    assert json.loads(twice) == json.loads(header), "to Python's parser nothing is wrong"
    write_safetensors(folder / "model.safetensors", tensors, twice.encode())
    expect_refusal(folder, tmp_path, "'model.norm.weight' stands twice")
    write_safetensors(folder / "shard.safetensors", tensors)
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text('{"weight_map": {"a": "shard.safetensors", "a": "shard.safetensors"}}')
    expect_refusal(folder, tmp_path, INDEX, "'a' stands twice")
    (folder / "config.json").write_text(json.dumps(CONFIG)[:-1] + ', "model_type": "llama"}')
    expect_refusal(folder, tmp_path, "config.json", "'model_type' stands twice")


def test_s3_an_index_and_a_single_file(folder, tmp_path):
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(draw_tensors(), "model.safetensors")}))
    expect_refusal(folder, tmp_path, "both")


# ---- S4: sizes -------------------------------------------------------------------------------------------------------

HEADERS = {
    "2^40 elements": (lambda e: e | {"shape": [2**40], "data_offsets": [0, 2**42]}, "byte"),
    "sizes that overflow": (lambda e: e | {"shape": [2**32, 2**32]}, "bytes, not those of"),
    "a size of 400 digits": (lambda e: e | {"shape": [10**400]}, "has shape"),
    "negative sizes": (lambda e: e | {"shape": [-1, -32]}, "has shape"),
    "sizes that are flags": (lambda e: e | {"shape": [True, 32]}, "has shape"),
    "sizes that are fractions": (lambda e: e | {"shape": [32.0]}, "has shape"),
    "a million dimensions": (lambda e: e | {"shape": [1] * 10**6}, "has shape"),
    "overlap": (lambda e: e | {"data_offsets": [e["data_offsets"][0] - 4, e["data_offsets"][1] - 4]}, "begins at"),
    "gap": (lambda e: e | {"data_offsets": [e["data_offsets"][0] + 4, e["data_offsets"][1] + 4]}, "begins at"),
    "before the file": (lambda e: e | {"data_offsets": [-128, 0]}, "not those of"),
    "behind the file": (lambda e: e | {"data_offsets": [2**50, 2**50 + 128]}, "begins at"),
    "backwards": (lambda e: e | {"data_offsets": e["data_offsets"][::-1]}, "not those of"),
    "another length": (lambda e: e | {"data_offsets": [0, 64]}, "not those of"),
    "three offsets": (lambda e: e | {"data_offsets": [0, 64, 128]}, "not those of"),
    "another type": (lambda e: e | {"dtype": "F64"}, "'F64'"),
    "a type that is none": (lambda e: e | {"dtype": ["F32"]}, "['F32']"),
    "more keys": (lambda e: e | {"stride": 1}, "expected dtype, shape and data_offsets"),
    "a number": (lambda e: 5, "expected dtype, shape and data_offsets"),
}
FILES = {
    "header longer than the file": (b"\xff" * 7 + b"\x7f" + b"{}", "no safetensors file, or cut short"),
    "header of 100 bytes": (b"\x64" + b"\0" * 7 + b"{}", "no safetensors file, or cut short"),
    "header of 2^40 bytes": ((2**40).to_bytes(8, "little") + b"{}", "no safetensors file, or cut short"),
    "seven bytes": (b"\0" * 7, "no safetensors file, or cut short"),
    "nothing": (b"", "no safetensors file, or cut short"),
    "a list": (b"\2" + b"\0" * 7 + b"[]", "not a JSON object"),
    "no JSON": (b"\2" + b"\0" * 7 + b"{[", "cannot be read as JSON"),
    "no UTF-8": (b"\2" + b"\0" * 7 + b"\xff\xfe", "cannot be read as JSON"),
    "nested deep": ((4000).to_bytes(8, "little") + b"[" * 4000, "nests deeper"),
}
PROGRAM = """
import json, resource, sys
from pathlib import Path
from k2jax.errors import ConfigError
from k2jax.hf.importer import open_source

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
told = {}
for folder in sys.argv[1:]:
    try:
        open_source(Path(folder))
        told[folder] = "taken"
    except ConfigError as error:
        told[folder] = str(error)
[peak] = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(json.dumps([told, int(peak) * 1024]))  # not getrusage's, which begins with the parent's
"""


def spoil(folder: Path, header: dict) -> None:
    write_safetensors(folder / "model.safetensors", draw_tensors(), json.dumps(header).encode())


def sparse(folder: Path) -> None:
    """A consistent file of 4 TB, none of it on the disk."""
    header = header_of(draw_tensors())
    end = max(place["data_offsets"][1] for place in list(header.values())[1:])
    header["more"] = {"dtype": "F32", "shape": [2**40], "data_offsets": [end, end + 2**42]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end + 2**42)


def largest_header(folder: Path, more: int) -> None:
    text = b'{"a": [' + b"[]," * ((MAX_JSON_BYTES - 10) // 3) + b"[]]}"
    (folder / "model.safetensors").write_bytes((len(text) + more).to_bytes(8, "little") + text + b" " * more)


def huge_folders(make) -> dict[Path, str]:
    """Each spoilt in one way, with a word of the error to come."""
    folders = {}
    for kind, (change, word) in HEADERS.items():
        header = header_of(draw_tensors())
        header["model.norm.weight"] = change(header["model.norm.weight"])
        folders[make(kind)] = word
        spoil(list(folders)[-1], header)
    for kind, (data, word) in FILES.items():
        folders[make(kind)] = word
        (list(folders)[-1] / "model.safetensors").write_bytes(data)
    for kind, length in (("cut short", -4), ("more at the end", 4)):
        folders[make(kind)] = "its tensors end at byte"
        file = list(folders)[-1] / "model.safetensors"
        os.truncate(file, file.stat().st_size + length)
    folders[make("sparse")] = "'more' is no tensor"
    sparse(list(folders)[-1])
    for kind, more, word in (("full", 0, "expected dtype, shape"), ("too full", 10, "no safetensors file")):
        folders[make(kind)] = word
        largest_header(list(folders)[-1], more)
    for key, value in (("num_hidden_layers", 2**31 - 1), ("hidden_size", 2**30), ("vocab_size", 2**31 - 1)):
        folders[make(key, **{key: value})] = "num_hidden_layers 2,147,483,647" if "layers" in key else "shape"
    folders[make("digits", vocab_size=10**400)] = "vocab_size is 1000"
    folders[make("large config")] = "larger than"
    (list(folders)[-1] / "config.json").write_text(json.dumps(CONFIG) + " " * MAX_JSON_BYTES)
    folders[make("long", transformers_version="x" * 10**6)] = "taken"
    return folders


@pytest.mark.fault("S4")
def test_s4_no_size_in_a_file_is_believed(tokenizer, tmp_path):  # noqa: F811
    """All of it under an address space of 1 GB more than the imports take, and less than 1 GB resident.

    Seen red without the comparison of bytes with the shape.
    """
    tensors = draw_tensors()

    def make(kind: str, **changes) -> Path:
        return make_folder(tmp_path / kind.replace(" ", "-"), tokenizer, tensors, **changes)

    folders = huge_folders(make)
    command = [sys.executable, "-c", PROGRAM, *map(str, folders)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    told, resident = json.loads(done.stdout)
    for path, word in folders.items():
        text = told[str(path)]
        assert word in text and len(text) < 2000 and text.isprintable(), (path.name, text)
    assert resident < 1e9, f"{resident:,} bytes resident"


# ---- S5: values ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("S5")
def test_s5_weights_that_are_not_finite_are_counted_and_refused(tokenizer, tmp_path):  # noqa: F811
    """Seen red without the refusal."""
    theirs = draw_tensors("BF16")
    theirs["model.layers.1.mlp.up_proj.weight"][3, :2] = np.nan, np.inf
    folder = make_folder(tmp_path / "hf", tokenizer, theirs)
    words = ("1 tensor(s)", "model.layers.1.mlp.up_proj.weight has 2", "--allow-non-finite")
    expect_refusal(folder, tmp_path, *words, error=NumericsError)
    done = importing(folder, tmp_path / "run", allow_nonfinite=True)
    assert {group: sums.num_nonfinite for group, (_, sums) in done.groups.items() if sums.num_nonfinite} == {"up": 2}


# ---- S6: code --------------------------------------------------------------------------------------------------------


@pytest.mark.fault("S6")
def test_s6_code_in_the_folder_is_not_run(folder, tmp_path, opened, monkeypatch):
    """Not even when the folder is the current one."""
    names = ("modeling_llama", "configuration_llama", "tokenization_llama", "conftest", "setup", "__init__", "torch")
    for name in names:
        (folder / f"{name}.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'marker')!r})\n")
    monkeypatch.chdir(folder)
    opened.clear()
    importing(folder, tmp_path / "run")
    assert not (tmp_path / "marker").exists()
    assert not [path for path in opened if path.startswith(str(folder)) and path.endswith(".py")]
    auto_map = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "auto_map": auto_map}))
    shutil.rmtree(tmp_path / "run")
    expect_refusal(folder, tmp_path, "auto_map", "modeling_llama")
    assert not (tmp_path / "marker").exists()


HOSTILE_NAME = '"""\nimport os; os.mkdir("marker") #'


@pytest.mark.fault("S6", "S10")
def test_s6_nothing_of_the_folder_gets_into_the_experiment(folder, tmp_path, monkeypatch):
    """experiment.py is code that a user runs."""
    hostile = folder.rename(tmp_path / HOSTILE_NAME)
    (hostile / "config.json").write_text(json.dumps({**CONFIG, "_name_or_path": HOSTILE_NAME}))
    importing(hostile, tmp_path / "run")
    text = (tmp_path / "run" / "experiment.py").read_text()
    assert "mkdir" in text and "\nimport os" not in text, "as letters of a name at most"
    (tmp_path / "run" / "experiment.py").write_text(text.replace("mix={}", 'mix={"web": 1}'))
    monkeypatch.chdir(tmp_path)
    config = configuration.load(str(tmp_path / "run" / "experiment.py"))
    assert config.model == open_step(tmp_path / "run").config.model
    assert not (tmp_path / "marker").exists()


CONFIGS = {
    "cut off": ('{"model_type": "llama"', "cannot be read as JSON"),
    "a list": ("[1]", "not a JSON object"),
    "empty": ("", "cannot be read as JSON"),
    "not a number": (json.dumps({**CONFIG, "rope_theta": float("nan")}), "NaN is not a finite number"),
    "an infinite number": (json.dumps(CONFIG)[:-1] + ', "attention_dropout": 1e999}', "1e999 is not a finite number"),
    "nested deep": ('{"a": ' * 5000, "nests deeper"),
    "a key that clears the screen": (json.dumps({**CONFIG, "\x1b[2J\n": 1}), "'\\x1b[2J\\n'"),
}


@pytest.mark.fault("S6")
@pytest.mark.parametrize("kind", CONFIGS)
def test_s6_config_json_is_data(folder, tmp_path, kind):
    text, word = CONFIGS[kind]
    (folder / "config.json").write_text(text)
    assert expect_refusal(folder, tmp_path, word).isprintable()
