"""A folder in Hugging Face's format, of a family in families.py, to a run that trains, generates and evaluates.

The folder is somebody else's: `untrusted.py` reads it, config.json decides every shape, and nothing is allocated before
the files are found to hold exactly those. The run's checkpoint 0 holds the parameters and no optimizer state.

Memory: weights are memory-mapped and stacked one array at a time, but Orbax takes all parameters at once, and holds
them encoded until it is done: 2.7 times the model's float32 size at most (measured).
"""

import re
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from k2jax.data.tokenizer import load_tokenizer
from k2jax.errors import ConfigError, NumericsError
from k2jax.hf import side_files
from k2jax.hf.export import new_folder
from k2jax.hf.families import FAMILIES, HfModel, config_from_hf
from k2jax.hf.layout import NAMES, Tensor, tensors
from k2jax.hf.newrun import Source, write_run
from k2jax.hf.safetensors_io import INDEX, sha256_of
from k2jax.hf.stream import sum_of_squares
from k2jax.hf.untrusted import StoredTensor, has, plain_file, read_json, read_weights, short
from k2jax.model.decoder import num_params, parameter_table
from k2jax.parallel import sharding

ROWS = 256  # of a tensor of theirs, copied at a time: five times as fast as a whole transposition
MAX_TOKENIZER_BYTES = 128 << 20
HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?"
TABLES = "model.layers.{}.self_attn.rotary_emb.inv_freq"  # LLaMA-1's folders hold RoPE's frequencies, too


class Sums(NamedTuple):
    """Of a tensor's values, or of several tensors'."""

    square: float  # of the L2 norm
    num_nonfinite: int


class Imported(NamedTuple):
    """What came of it."""

    workdir: Path
    source: Source
    digest: str  # of the checkpoint
    groups: dict[str, tuple[int, Sums]]  # {group of parameter_table: (parameters, sums)}


def import_hf(
    folder: Path,
    out: Path,
    name: str,
    allow_nonfinite: bool,
    progress: Callable[[int], None] = lambda _: None,
    ignore: Collection[str] = (),
    base_model: str = "",
) -> Imported:
    """Makes the run directory `out`; `progress` is told of the bytes read, `ignore` as of config_from_hf.

    `base_model` is the folder's name on the hub (default: that of the hub's cache, if the folder is in it).

    Raises ConfigError for a folder that is not what it should be, or `out` not empty; NumericsError for values that are
    not finite and not allowed. In every case nothing is left of `out`.
    """
    name = name or re.sub(r"[^A-Za-z0-9._-]", "-", folder.resolve().name)
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise ConfigError(f"--name={short(name)}: expected letters, digits, '.', '_' and '-'")
    if not re.fullmatch(HUB_NAME, base_model or "a"):
        raise ConfigError(f"--base-model={short(base_model)}: expected a name on the hub, ORGANISATION/NAME")
    source = open_source(folder, ignore)._replace(base_model=base_model or cached_name(folder))
    with new_folder(out) as run:
        with ThreadPoolExecutor(1) as pool:
            hashes = pool.submit(hash_files, source)  # beside the conversion
            params, sums = load_params(source, progress)
            if not allow_nonfinite:
                refuse_nonfinite(sums)
            files = hashes.result()
        meta = write_run(run, source, params, files, name)
    return Imported(out, source, meta["digest"], group_sums(source.hf.model, sums))


def cached_name(folder: Path) -> str | None:
    """Of a folder in the hub's cache, .../models--ORGANISATION--NAME/snapshots/COMMIT, the name on the hub."""
    found = re.fullmatch(r"models--(.+)", folder.resolve().parent.parent.name)
    name = found.group(1).replace("--", "/", 1) if found else ""
    return name if re.fullmatch(HUB_NAME, name) else None


# ---- what the folder says of itself ----------------------------------------------------------------------------------


def open_source(folder: Path, ignore: Collection[str] = ()) -> Source:
    """The folder, with everything but the weights' values checked. Raises ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"--hf={folder}: no such folder")
    config = read_json(folder, "config.json")
    hf = config_from_hf(config, ignore)
    weights = read_weights(folder)
    check_tensors(hf, weights)
    tokenizer = check_tokenizer(folder, hf.model.vocab_size)
    eos_id = read_eos_id(folder, config, hf.model.vocab_size)
    return Source(folder, config, hf, weights, eos_id, tokenizer, side_files.read(folder))


def check_tensors(hf: HfModel, weights: dict[str, StoredTensor]) -> None:
    """Raises ConfigError, listing them, unless the tensors are those of the model, each of its shape."""
    m = hf.model
    if len(weights) < m.num_layers:  # before there is a list as long as config.json wishes
        raise ConfigError(f"config.json says num_hidden_layers {m.num_layers:,}, the files hold {len(weights)} tensors")
    expected = {t.name: t.shape for t in tensors(m)}
    optional = {TABLES.format(layer): (m.head_dim // 2,) for layer in range(m.num_layers)}
    if m.tie_embeddings:
        optional[NAMES["head_DV"]] = expected[NAMES["embed_VD"]]
    shapes = {**optional, **expected}
    problems = [f"{short(name)} is missing" for name in expected if name not in weights]
    problems += [f"{short(name)} is no tensor of it" for name in sorted(weights.keys() - shapes.keys())]
    problems += [
        f"{name} has shape {list(stored.shape)}, expected {list(shapes[name])}"
        for name, stored in weights.items()
        if name in shapes and stored.shape != shapes[name]
    ]
    if problems:
        raise ConfigError(
            f"the weights are not those of the model in config.json, {len(problems)} problem(s): "
            f"{'; '.join(problems[:8])}{'; ...' if len(problems) > 8 else ''}"
        )
    for name in weights.keys() & optional.keys():
        check_optional(hf, name, weights)


def check_optional(hf: HfModel, name: str, weights: dict[str, StoredTensor]) -> None:
    """A tensor that follows from others is left out; ConfigError when it does not follow."""
    found = weights[name].open()
    if name != NAMES["head_DV"]:
        frequencies = hf.rope_base ** (-np.arange(0, hf.model.head_dim, 2) / hf.model.head_dim)
        agrees = np.allclose(found.astype(np.float32), frequencies, rtol=1e-2, atol=0)
        other = f"what rope_theta {hf.rope_base:g} gives"
    else:
        embedding = weights[NAMES["embed_VD"]].open()
        rows = range(0, len(found), ROWS)
        agrees = all(np.array_equal(found[r : r + ROWS], embedding[r : r + ROWS], equal_nan=True) for r in rows)
        other = "the embedding, and config.json says that they are tied"
    if not agrees:
        raise ConfigError(f"{name} is not {other}: one of the two is wrong")


def read_eos_id(folder: Path, values: dict[str, Any], vocab_size: int) -> int:
    """From config.json's values, else generation_config.json; the first of a list. Raises ConfigError."""
    found = values.get("eos_token_id")
    if found is None and has(folder, "generation_config.json"):
        found = read_json(folder, "generation_config.json").get("eos_token_id")
    eos_id = found[0] if isinstance(found, list) and found else found
    if type(eos_id) is not int or not 0 <= eos_id < vocab_size:
        raise ConfigError(
            f"{folder}: eos_token_id is {short(found)} in config.json or generation_config.json, expected one of the "
            f"{vocab_size} token ids: write the id of the token that ends a document into config.json"
        )
    return eos_id


def check_tokenizer(folder: Path, vocab_size: int) -> Path:
    """The real path of tokenizer.json, which is loaded once. Raises ConfigError when it does not fit the model."""
    if not has(folder, "tokenizer.json"):
        only = "only a sentencepiece tokenizer.model, " if has(folder, "tokenizer.model") else ""
        raise ConfigError(
            f"{folder} has {only}no tokenizer.json: make one, in Python: "
            f"transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    path = plain_file(folder, "tokenizer.json")
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_TOKENIZER_BYTES:,} bytes: it is no tokenizer of such a model")
    largest = load_tokenizer(path).vocab_size - 1
    if largest >= vocab_size:
        raise ConfigError(
            f"{path} has token ids up to {largest}, the model's vocab_size is {vocab_size}: it is another model's"
        )
    return path


def hash_files(source: Source) -> dict[str, str]:
    """{file name: SHA-256} of every file that the import reads."""
    names = {stored.path.name for stored in source.weights.values()}
    small = ("config.json", "tokenizer.json", INDEX, *source.side_files)
    names |= {name for name in small if "/" in name or has(source.folder, name)}
    return {name: sha256_of(side_files.path_of(source.folder, name)) for name in sorted(names)}


# ---- the weights -----------------------------------------------------------------------------------------------------


def load_params(
    source: Source, progress: Callable[[int], None]
) -> tuple[dict[str, jax.Array], dict[str, tuple[str, Sums]]]:
    """Parameters in our layout, float32, on one CPU device; and {tensor: (array, sums)}."""
    m = source.hf.model
    mesh = sharding.make_mesh({"replica": 1, "fsdp": 1, "tensor": 1}, jax.devices("cpu")[:1])
    by_array: dict[str, list[Tensor]] = {}
    for tensor in tensors(m):
        by_array.setdefault(tensor.array, []).append(tensor)
    params, sums = {}, {}
    for array, p in parameter_table(m).items():
        ours = np.empty(p.shape, np.float32)
        for tensor in by_array[array]:
            part = ours if tensor.layer is None else ours[tensor.layer]
            sums[tensor.name] = array, fill(part, source.weights[tensor.name].open(), tensor, progress)
        params[array] = jax.device_put(ours, NamedSharding(mesh, PartitionSpec()))
    return params, sums


def fill(ours: np.ndarray, stored: np.ndarray, tensor: Tensor, progress: Callable[[int], None]) -> Sums:
    """Copies one tensor into its place, exactly: float32 holds every float16 and bfloat16."""
    theirs = tensor.to_hf(ours)  # a view of it
    assert np.shares_memory(theirs, ours)
    square, num_nonfinite = 0.0, 0
    for first in range(0, len(stored), ROWS):
        part = np.asarray(stored[first : first + ROWS]).astype(np.float32)
        theirs[first : first + ROWS] = part
        part_square = sum_of_squares(part)
        if not np.isfinite(part_square):
            num_nonfinite += part.size - int(np.count_nonzero(np.isfinite(part)))
        square += part_square
        progress(stored[first : first + ROWS].nbytes)
    return Sums(square, num_nonfinite)


def refuse_nonfinite(sums: dict[str, tuple[str, Sums]]) -> None:
    bad = [f"{name} has {s.num_nonfinite:,}" for name, (_, s) in sums.items() if s.num_nonfinite]
    if bad:
        raise NumericsError(
            f"{len(bad)} tensor(s) have values that are not finite: {', '.join(bad[:8])}{', ...' if bad[8:] else ''}: "
            f"look for another copy of the model, or take them as they are with --allow-non-finite"
        )


def group_sums(m: ConfigDict, sums: dict[str, tuple[str, Sums]]) -> dict[str, tuple[int, Sums]]:
    """By layer group, as the metrics have them: {group: (parameters, sums)}."""
    table, groups = parameter_table(m), {}
    for p in table.values():
        count, _ = groups.get(p.group, (0, None))
        found = [s for array, s in sums.values() if table[array].group == p.group]
        total = Sums(sum(s.square for s in found), sum(s.num_nonfinite for s in found))
        groups[p.group] = count + int(np.prod(p.shape)), total
    return groups


# ---- the report -----------------------------------------------------------------------------------------------------


def describe(imported: Imported) -> str:
    """For a person: what was imported, and what to do next."""
    m, source, out = imported.source.hf.model, imported.source, imported.workdir
    lines = [
        f"imported {source.folder}: {FAMILIES[source.hf.kind].title}, {num_params(m):,} parameters ({source.dtype}), "
        f"{m.num_layers} layers, vocabulary {m.vocab_size:,}, context {source.hf.context:,}, rope base "
        f"{source.hf.rope_base:g}",
        f"{'group':<12}{'parameters':>18}{'norm':>14}{'not finite':>14}",
    ]
    if source.hf.rows < source.hf.context:
        rows = f"rows of at most {source.hf.rows:,} tokens: no row reaches beyond its sliding window"
        lines.insert(1, f"the run is for {rows}")
    if source.hf.ignored:
        keys = ", ".join(map(short, source.hf.ignored))
        lines.insert(1, f"left out of config.json, as you said, and recorded: {keys}")
    for group, (count, sums) in imported.groups.items():
        lines.append(f"{group:<12}{count:>18,}{sums.square**0.5:>14.6g}{sums.num_nonfinite:>14,}")
    return "\n".join(
        [
            *lines,
            f"the run: {out}, checkpoint 0, digest {imported.digest}",
            f"next: python -m k2jax.generate --workdir={out} --prompt=TEXT",
            f"      fill in {out / 'experiment.py'}, then",
            f"      python -m k2jax.train --config={out / 'experiment.py'} --workdir={out}",
        ]
    )
