"""Reads a folder that somebody else made: JSON and safetensors, as data, whatever they hold.

No code of the folder is run, no file outside of it opened, nothing allocated because a file claims a number: a name
must be plain and its real path lie in the folder, JSON has limits and no key twice, a tensor's bytes must lie in its
file. Errors quote what they found by `repr`, cut short: it goes to a terminal.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from k2jax.errors import ConfigError
from k2jax.hf.safetensors_io import INDEX

SINGLE = "model.safetensors"
FILE_NAME = r"[A-Za-z0-9._-]+"
MAX_JSON_BYTES = 8 << 20  # of a header, index or config.json: 50 times a 405B model's, 0.3 GB as objects at worst
MAX_DEPTH = 32  # of JSON, brackets in strings counted too
MAX_RANK = 8
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}  # opening one runs the code that its author put there


class StoredTensor(NamedTuple):
    """Where a tensor lies; its bytes are known to lie within the file."""

    name: str
    path: Path
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    def open(self) -> np.ndarray:
        """The tensor, memory-mapped; possibly not aligned."""
        return np.memmap(self.path, DTYPES[self.dtype], mode="r", offset=self.offset, shape=self.shape)


# ---- files -----------------------------------------------------------------------------------------------------------


def has(folder: Path, name: str) -> bool:
    """Whether there is anything of that name, a broken link too."""
    return (folder / name).exists() or (folder / name).is_symlink()


def plain_file(folder: Path, name: str) -> Path:
    """The real path of a file of the folder. ConfigError for a name that is not plain, a link out, a device or pipe."""
    if not re.fullmatch(FILE_NAME, name):
        raise ConfigError(f"{folder}: {short(name)} is no plain file name: expected letters, digits, '.', '_' and '-'")
    try:
        path = (folder / name).resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise ConfigError(f"{folder / name} cannot be followed: {error}") from error
    if path.parent != folder.resolve():
        raise ConfigError(
            f"{folder / name} is a link out of its folder, and is not followed: if you made it (or it is a download "
            f"cache), copy the folder with `cp -rL` and name the copy"
        )
    if not path.is_file():
        raise ConfigError(f"{folder / name}: {'not a file' if path.exists() else 'no such file'}")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object in a file of the folder; ConfigError when it is anything else, or has a key twice."""
    path = plain_file(folder, name)
    with path.open("rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ConfigError(f"{folder / name} is larger than {MAX_JSON_BYTES:,} bytes: it is not of a model")
    return _parse(text, str(folder / name))


def _parse(text: bytes, where: str) -> dict[str, Any]:
    brackets = np.zeros(256, np.int8)
    brackets[list(b"[{")], brackets[list(b"]}")] = 1, -1
    if text and np.cumsum(brackets[np.frombuffer(text, np.uint8)], dtype=np.int32).max() > MAX_DEPTH:
        raise ConfigError(f"{where} nests deeper than {MAX_DEPTH} brackets: it is not of a model")
    try:
        values = json.loads(
            text.decode(), object_pairs_hook=_no_key_twice, parse_float=_finite, parse_constant=_finite
        )
    except ValueError as error:
        raise ConfigError(f"{where} cannot be read as JSON: {short(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is not a JSON object: found {short(values)}")
    return values


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {short(twice)} stands twice in one object")
    return values


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)


def short(value: object) -> str:
    """For an error message: no control characters, not long."""
    if isinstance(value, Exception):
        return str(value).partition("\n")[0][:200]
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]} ... ({len(text):,} characters)"


# ---- weights ---------------------------------------------------------------------------------------------------------


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors by its name; no byte of a tensor is read yet.

    Raises ConfigError when there are none, and for an index or header that is not what it should be.
    """
    has_index, has_single = has(folder, INDEX), has(folder, SINGLE)
    if has_index and has_single:
        raise ConfigError(f"{folder} has both {INDEX} and {SINGLE}: move away the one that is not meant")
    if has_single:
        return read_header(plain_file(folder, SINGLE))
    if not has_index:
        raise _no_weights(folder)
    found: dict[str, StoredTensor] = {}
    for file, listed in _files(read_json(folder, INDEX), folder).items():
        header = read_header(plain_file(folder, file))
        odd = sorted(header.keys() ^ listed)  # a tensor in two files is in one that the index does not give for it
        if odd:
            raise ConfigError(
                f"{folder}: {INDEX} and the header of {file} do not list the same tensors: {len(odd)} differ, such as "
                f"{short(odd[0])}, which {'only the file has' if odd[0] in header else 'the file does not have'}"
            )
        found |= header
    return found


def _files(index: dict[str, Any], folder: Path) -> dict[str, set[str]]:
    """{file: names of its tensors}, every name of a file found plain before the first is opened."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{folder / INDEX}: weight_map is {short(weight_map)}, expected tensor names and files")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(FILE_NAME + r"\.safetensors", file):
            raise ConfigError(
                f"{folder / INDEX}: weight_map gives file {short(file)} for {short(name)}: expected the plain name of "
                f"a .safetensors file in the same folder"
            )
        files.setdefault(file, set()).add(name)
    return files


def _no_weights(folder: Path) -> ConfigError:
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
    if pickled:
        return ConfigError(
            f"{folder} has {short(pickled[0])} and no .safetensors: safetensors only, since opening the other runs "
            f"code of its author's: if you trust that, convert it first, in Python: "
            f"transformers.LlamaForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    return ConfigError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """What a safetensors file says of itself, every number checked; ConfigError naming what is wrong."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(size - 8, MAX_JSON_BYTES):
            raise ConfigError(
                f"{path} is no safetensors file, or cut short: a header of {length:,} bytes in a file of {size:,} "
                f"(at most {MAX_JSON_BYTES:,})"
            )
        header = _parse(file.read(length), f"the header of {path}")
    header.pop("__metadata__", None)
    found = {name: _stored(name, entry, path, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for tensor in sorted(found.values(), key=lambda t: (t.offset, t.name)):
        if tensor.offset != end:
            raise ConfigError(f"{path}: {short(tensor.name)} begins at byte {tensor.offset:,}, expected {end:,}")
        end += math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
    if end != size:
        raise ConfigError(f"{path}: its tensors end at byte {end:,}, the file has {size:,}: cut short, or not whole")
    return found


def _stored(name: str, entry: Any, path: Path, data_start: int) -> StoredTensor:
    where = f"{path}: tensor {short(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ConfigError(f"{where} is described by {short(entry)}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConfigError(f"{where} has type {short(dtype)}, only {', '.join(DTYPES)} can be imported")
    if not _are_counts(shape) or len(shape) > MAX_RANK:
        raise ConfigError(f"{where} has shape {short(shape)}, expected a few sizes")
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes:
        raise ConfigError(f"{where}: {dtype} of {short(shape)} has {num_bytes:,} bytes, not those of {short(offsets)}")
    return StoredTensor(name, path, dtype, tuple(shape), data_start + offsets[0])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
