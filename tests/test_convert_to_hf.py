"""An export is what transformers loads, bit for bit the checkpoint's, and its certificate finds every wrong layout."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from conftest import REPOSITORY
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from k2jax import config as configuration
from k2jax.data.epochs import new_epoch, write_epoch
from k2jax.data.manifest import sha256_json
from k2jax.data.tokenizer import load_tokenizer, tokenizer_sha256
from k2jax.errors import ConfigError, NumericsError, RunError, StorageError
from k2jax.hf import certificate, families, layout, reference, stream
from k2jax.hf import export as exporting
from k2jax.hf import verify as verifying
from k2jax.hf.export import export
from k2jax.hf.layout import Tensor
from k2jax.hf.safetensors_io import INDEX, read_header
from k2jax.hf.verify import read_certificate, verify
from k2jax.model.decoder import Decoder, Parameter, parameter_table
from k2jax.parallel import sharding
from k2jax.run.checkpoint import Checkpoints
from k2jax.run.drift import config_digest
from k2jax.run.saved import SavedStep, open_array, open_step
from k2jax.run.state import TrainState
from k2jax.train import train
from k2jax.training.placement import place_state

SQUARE = {"vocab_size": 509, "dim": 32, "num_layers": 2, "ffn_dim": 48}
SQUARE |= {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 32}
VARIANTS = {
    "MHA, square": {},
    "GQA, RoPE scaling": {"num_kv_heads": 2, "num_heads": 8, "rope_scaling": LLAMA3},
    "tied, one kv head, head_dim above dim / heads": {"num_kv_heads": 1, "head_dim": 12, "tie_embeddings": True},
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
BIG = 10**9


def write_run(
    workdir: Path, data: Path, *, std: float = 0.2, change: Callable[[dict], None] | None = None, **model: Any
) -> SavedStep:
    """A run with checkpoint 7 of random weights: large ones, so that what is wrong is not lost in rounding."""
    config = configuration.base().unlock()
    config.model.update({**SQUARE, **model})
    config.stages = (configuration.stage(name="only", sequence_length=64, rope_base=500_000.0),)
    config.mesh.fsdp, config.mesh.tensor = -1, 1
    rng = np.random.default_rng(0)
    params = {
        name: (std * rng.standard_normal(p.shape) + (p.std is None)).astype(np.float32)
        for name, p in parameter_table(config.model).items()
    }
    if change:
        change(params)
    mesh = sharding.make_mesh(config.mesh)
    workdir.mkdir()
    shutil.copyfile(data / "tokenizer.json", workdir / "tokenizer.json")
    zero = np.int32(0)
    shardings = place_state(config, TrainState(zero, zero, zero, params, {}, {}), mesh)
    state = TrainState(zero, zero, zero, params, {}, {})
    state = jax.device_put(state, shardings._replace(mu={}, nu={}))
    identity = tokenizer_sha256(workdir / "tokenizer.json")
    values = configuration.to_dict(config)
    epoch = new_epoch([], run="0" * 32, after_step=0, config=values, manifest=None)
    write_epoch(workdir, epoch)
    meta = {"config": values, "stage": 0, "eos_id": 2, "tokenizer_sha256": identity}
    meta |= {"epoch": epoch.name, "config_digest": config_digest(config)}
    with Checkpoints(workdir, [7], log=lambda line: None) as checkpoints:
        checkpoints.save(state, 7, data={"next_step": 8, "order": None}, meta={**meta, "versions": {"k2jax": "0"}})
        checkpoints.wait()
        checkpoints.close()
    return open_step(workdir)


def quiet(num_bytes: int) -> None:
    """No progress bar."""


def decoder_logits(saved: SavedStep, tokens_BT: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    """Of the whole model, as training computes it, from arrays that the test reads itself."""
    params = {name: array.astype(dtype).astype(np.float32) for name, array in our_arrays(saved).items()}
    decoder = Decoder(saved.config.model, params)
    return np.asarray(decoder.logits(decoder(tokens_BT, saved.stage.rope_base)))


def our_arrays(saved: SavedStep) -> dict[str, np.ndarray]:
    names = parameter_table(saved.config.model)
    return {name: open_array(saved, f"params/{name}").read().result() for name in names}


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory: pytest.TempPathFactory) -> SavedStep:
    workdir = tmp_path_factory.mktemp("export") / "trained"
    short = {"stages.0.steps_per_chunk": 2, "stages.0.warmup_steps": 1, "stages.1.steps_per_chunk": 2}
    train(tiny_config(**short, **{"mesh.fsdp": 4, "mesh.tensor": 2, "eval.windows": 1, "eval.new_tokens": 1}), workdir)
    return open_step(workdir)


@pytest.fixture(scope="module")
def square(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> SavedStep:
    """A run whose wq, wk, wv and wo are square matrices."""
    return write_run(tmp_path_factory.mktemp("export") / "square", tiny_data)


@pytest.fixture(scope="module")
def exported(square: SavedStep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `square`, in bfloat16 and two files. Tests copy it before they break it."""
    out = tmp_path_factory.mktemp("export") / "out"
    export(square, out, "bfloat16", 60_000, quiet)
    return out


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_loads_it_and_computes_the_same(variant: str, tiny_data: Path, tmp_path: Path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    saved = write_run(tmp_path / "run", tiny_data, **VARIANTS[variant])
    for dtype in ("float32", "bfloat16"):
        parity = export(saved, tmp_path / dtype, dtype, BIG, quiet).parity
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / dtype, dtype="auto")
        assert type(model).__name__ == "LlamaForCausalLM" and str(model.dtype) == f"torch.{dtype}"
        tokens_BT = np.array(parity["logits"]["tokens"], np.int32)
        with torch.no_grad():
            theirs = model.float()(torch.tensor(tokens_BT)).logits.numpy()
        ours = decoder_logits(saved, tokens_BT, DTYPES[dtype])
        np.testing.assert_allclose(theirs, ours, atol=parity["logits"]["tolerance"])
        np.testing.assert_array_equal(theirs.argmax(axis=-1), parity["logits"]["best_token"])
        best = np.take_along_axis(ours, np.array(parity["logits"]["best_token"])[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(best, parity["logits"]["best_logit"], atol=parity["logits"]["tolerance"])
        sums = np.log(np.exp(ours.astype(np.float64)).sum(axis=-1))
        np.testing.assert_allclose(sums, parity["logits"]["log_sum_exp"], atol=1e-3)


def test_a_trained_run_with_its_tokenizer_and_card(trained: SavedStep, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "new" / "out"
    parity = export(trained, out, "bfloat16", BIG, quiet).parity
    assert verify(trained, out, quiet).largest_difference <= parity["logits"]["tolerance"]
    theirs, ours = transformers.AutoTokenizer.from_pretrained(out), load_tokenizer(trained.tokenizer)
    for text in ("abc de  fgh\n\tab", " leading", "Ünïcödé 漢字 🙂 \u2581 x", "a1b22 c,d!", ""):
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, "no token before or behind"
        assert theirs.decode(ids) == text
    assert (theirs.eos_token, theirs.eos_token_id) == ("</s>", trained.meta["eos_id"]) and theirs.bos_token is None
    assert theirs.pad_token == "<unk>" and theirs.model_max_length == 64
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == trained.meta["eos_id"]
    assert model.config.rope_parameters["rope_theta"] == 500_000.0, "of the stage that the step belongs to"
    card = (out / "README.md").read_text()
    tokens = f"{trained.meta['tokens_seen']:,}"
    for fact in (trained.digest, "| stage1 | books |", "| stage2 | code |", tokens, "8 x cpu"):
        assert fact in card
    assert parity["checkpoint"]["parent"] == trained.meta["parent"] and trained.meta["parent"]["step"] == 4
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_where_llama_has_it(dtype: str, square: SavedStep, tmp_path: Path):
    """Element by element, written without the converter's own reshapes, and what the certificate says of each."""
    parity = export(square, tmp_path / "out", dtype, BIG, quiet).parity
    ours = {name: x.astype(DTYPES[dtype]) for name, x in our_arrays(square).items()}
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    expected = {"model.embed_tokens.weight": ours["embed_VD"], "model.norm.weight": ours["final_norm_D"]}
    expected["lm_head.weight"] = np.stack(list(ours["head_DV"].swapaxes(0, 1)))
    for i in range(2):
        layer = {name.removeprefix("layers."): x[i] for name, x in ours.items() if name.startswith("layers.")}
        p = f"model.layers.{i}."
        expected[f"{p}input_layernorm.weight"] = layer["attention_norm_LD"]
        expected[f"{p}post_attention_layernorm.weight"] = layer["mlp_norm_LD"]
        for role, name in (("q", "wq_LDNH"), ("k", "wk_LDKH"), ("v", "wv_LDKH")):
            rows = [layer[name][:, n, h] for n in range(4) for h in range(8)]
            expected[f"{p}self_attn.{role}_proj.weight"] = np.stack(rows)
        columns = [layer["wo_LNHD"][n, h] for n in range(4) for h in range(8)]
        expected[f"{p}self_attn.o_proj.weight"] = np.stack(columns, axis=1)
        for role, name in (("gate", "w_gate_LDF"), ("up", "w_up_LDF"), ("down", "w_down_LFD")):
            expected[f"{p}mlp.{role}_proj.weight"] = layer[name].T
    assert theirs.keys() == expected.keys() == parity["tensors"].keys()
    for name, value in expected.items():
        assert theirs[name].dtype == DTYPES[dtype]
        np.testing.assert_array_equal(theirs[name], value)
        record = parity["tensors"][name]
        assert record["sha256"] == hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        assert record["norm"] == pytest.approx(np.linalg.norm(value.astype(np.float64)), rel=1e-5)  # sums in float32
        assert record["nonfinite"] == 0 and record["shape"] == list(value.shape)


def test_files_are_cut_at_tensors_and_indexed(exported: Path, square: SavedStep):
    parity, index = read_certificate(exported), json.loads((exported / INDEX).read_text())
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert 2 <= len(files) <= 5
    found = {}
    for name in files:
        assert (exported / name).stat().st_size < 60_000 + 4096
        assert int.from_bytes((exported / name).read_bytes()[:8], "little") % 8 == 0, "data begins at a multiple of 8"
        with safe_open(exported / name, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            found.update(dict.fromkeys(file.keys(), name))
    assert found == index["weight_map"] == {name: r["file"] for name, r in parity["tensors"].items()}
    num_params = sum(x.size for x in our_arrays(square).values())
    assert index["metadata"]["total_size"] == 2 * num_params


def test_pieces_change_nothing(square: SavedStep, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Embedding and head in pieces of rows (509 divides by none), tied or not: the same bytes and logits."""
    tied = write_run(tmp_path / "tied", tiny_data, tie_embeddings=True)
    whole = [export(saved, tmp_path / f"whole{i}", "bfloat16", BIG, quiet) for i, saved in enumerate((square, tied))]
    monkeypatch.setattr(stream, "BLOCK_BYTES", 4 * 32 * 100)
    assert [(p.start, p.stop) for p in stream.blocks(open_array(square, "params/head_DV"), 1)] == [(0, 509)], "a chunk"
    cut = [slice(first, min(first + 100, 509)) for first in range(0, 509, 100)]
    for module in (stream, certificate):
        monkeypatch.setattr(module, "blocks", lambda array, axis: cut)
    for i, saved in enumerate((square, tied)):
        again = export(saved, tmp_path / f"pieces{i}", "bfloat16", BIG, quiet)
        digests = [{name: r["sha256"] for name, r in e.parity["tensors"].items()} for e in (again, whole[i])]
        assert digests[0] == digests[1]
        np.testing.assert_allclose(*(e.parity["logits"]["log_sum_exp"] for e in (again, whole[i])), rtol=1e-5)


def test_blocks_are_whole_chunks():
    def array(shape: tuple[int, int], chunk: tuple[int, int]) -> ts.TensorStore:
        spec = {"driver": "zarr", "kvstore": {"driver": "memory"}, "metadata": {"shape": shape, "chunks": chunk}}
        return ts.open(spec, create=True, dtype=ts.float32).result()

    found = stream.blocks(array((100_000, 4096), (1000, 4096)), 0)
    assert [part.start for part in found] == list(range(0, 100_000, 4000)) and found[-1].stop == 100_000
    found = stream.blocks(array((4096, 32_000), (512, 6000)), 1)
    assert [(part.start, part.stop) for part in found] == [(i, min(i + 6000, 32_000)) for i in range(0, 32_000, 6000)]


def test_rounding_is_numpys():
    """Of every kind of number: denormal ones, halfway cases, too large ones."""
    bits = np.random.default_rng(0).integers(0, 2**32, 1 << 20, dtype=np.uint32)
    bits[:4000] = np.concatenate([np.arange(2000), 0x3F80_8000 + (np.arange(2000) << 15)])
    x = bits.view(np.float32)
    x = x[np.isfinite(x)]
    for dtype in (ml_dtypes.bfloat16, np.float16):
        with np.errstate(over="ignore"):
            expected = x.astype(dtype)
        np.testing.assert_array_equal(stream.rounded(x, np.dtype(dtype)).view(np.uint16), expected.view(np.uint16))
    assert stream.rounded(x, np.dtype(np.float32)) is x


# ---- what is refused: one line, and nothing is left ------------------------------------------------------------------


@contextmanager
def refused(tmp_path: Path, kind: type[RunError], match: str) -> Iterator[None]:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind, match=match) as caught:
        yield
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_is_not_empty_is_refused(square: SavedStep, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    with refused(tmp_path, ConfigError, "not empty"):
        export(square, out, "bfloat16", BIG, quiet)
    assert (out / "mine").read_text() == "kept"
    (out / "mine").unlink()
    export(square, out, "bfloat16", BIG, quiet)  # an empty one is taken
    assert (out / "parity.json").exists()


def test_a_tokenizer_that_is_not_the_runs_is_refused(square: SavedStep, tmp_path: Path):
    run = shutil.copytree(square.workdir, tmp_path / "run")
    text = (run / "tokenizer.json").read_text()
    (run / "tokenizer.json").write_text(text + "\n")
    with refused(tmp_path, ConfigError, "was trained with"):
        export(open_step(run), tmp_path / "out", "bfloat16", BIG, quiet)


def test_a_damaged_checkpoint_is_refused(square: SavedStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = shutil.copytree(square.workdir, tmp_path / "run")
    for path in (run / "checkpoints" / "7").rglob("*"):
        if path.is_file() and path.stat().st_size > 20_000:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    with refused(tmp_path, StorageError, "checkpoint 7"):
        export(open_step(run), tmp_path / "out", "bfloat16", BIG, quiet)
    # A bit that the storage does not notice, in a piece, in a layer, in a norm: the digests do.
    for name, index in (("head_DV", (3, 500)), ("layers.wo_LNHD", (1, 2, 3)), ("final_norm_D", (0,))):
        monkeypatch.setattr(stream, "_digest", flip(name, index, stream._digest))
        with refused(tmp_path, StorageError, f"damaged array.*{name}"):
            export(square, tmp_path / "out", "bfloat16", BIG, quiet)
        monkeypatch.undo()


def flip(name: str, index: tuple[int, ...], digest: Callable) -> Callable:
    def flipped(source: np.ndarray, piece: stream.Piece, shape: tuple[int, ...]) -> int:
        if piece.tensor.array == name and piece.tensor.layer in (None, 1):
            source = source.copy()
            source.view(np.uint32)[index] ^= 1
        return digest(source, piece, shape)

    return flipped


def test_weights_that_are_not_finite_are_refused(tiny_data: Path, tmp_path: Path):
    def spoil(params: dict[str, np.ndarray]) -> None:
        params["layers.w_up_LDF"][1, 3, 4] = np.nan
        params["layers.w_up_LDF"][1, 5, 6] = -np.inf

    saved = write_run(tmp_path / "run", tiny_data, change=spoil)
    with refused(tmp_path, NumericsError, r"not finite.*layers\.1\.mlp\.up_proj\.weight with 2"):
        export(saved, tmp_path / "out", "float32", BIG, quiet)


def test_weights_too_large_for_float16_are_refused(tiny_data: Path, tmp_path: Path):
    def spoil(params: dict[str, np.ndarray]) -> None:
        params["embed_VD"][500, 3] = 70_000.0

    saved = write_run(tmp_path / "run", tiny_data, change=spoil)
    with refused(tmp_path, NumericsError, r"embed_tokens\.weight with 1: .*as bfloat16"):
        export(saved, tmp_path / "out", "float16", BIG, quiet)


def test_a_full_disk_leaves_nothing(square: SavedStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("k2jax.files.os.fsync", full)
    with refused(tmp_path, StorageError, "No space left on device"):
        export(square, tmp_path / "out", "bfloat16", BIG, quiet)


# ---- a wrong conversion ----------------------------------------------------------------------------------------------


def interleaved(x: np.ndarray, heads: int = 4) -> np.ndarray:
    """Rows (out) of q or k as the original LLaMA has them: the pairs of RoPE beside each other."""
    halves = x.reshape(heads, 2, -1, *x.shape[1:])
    return halves.swapaxes(1, 2).reshape(x.shape)


def without_head(o: np.ndarray) -> np.ndarray:
    kept = o.copy()
    kept[:, 8:16] = 0
    return kept


# What each does to a tensor of theirs, by the array that it comes from.
WRONG_TENSORS = {
    "interleaved q and k": (("layers.wq_LDNH", "layers.wk_LDKH"), interleaved),
    "interleaved q": (("layers.wq_LDNH",), interleaved),
    "transposed wo": (("layers.wo_LNHD",), np.transpose),
    "transposed wv": (("layers.wv_LDKH",), np.transpose),
    "dropped head": (("layers.wo_LNHD",), without_head),
}
GATE, UP = "model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"
WRONG_CONFIG = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "head_dim": 4}


def break_mapping(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Puts the mistake into the converter itself, so that certificate and files agree on it."""
    if how in WRONG_TENSORS:
        arrays, wrong = WRONG_TENSORS[how]
        right = Tensor.to_hf
        monkeypatch.setattr(Tensor, "to_hf", lambda t, x: wrong(right(t, x)) if t.array in arrays else right(t, x))
    elif how == "gate and up swapped":
        monkeypatch.setitem(layout.NAMES, "layers.w_gate_LDF", UP)
        monkeypatch.setitem(layout.NAMES, "layers.w_up_LDF", GATE)
    elif how == "layers swapped":
        right_tensor = layout._tensor

        def swapped(array: str, parameter: Parameter, layer: int | None) -> Tensor:
            tensor = right_tensor(array, parameter, layer)
            return tensor if layer is None else tensor._replace(name=layout.NAMES[array].format(1 - layer))

        monkeypatch.setattr(layout, "_tensor", swapped)
    else:
        right_config = families.config_to_hf
        monkeypatch.setattr(exporting, "config_to_hf", lambda *a, **k: wrong_config(right_config(*a, **k), how))
        for module in (exporting, verifying):
            monkeypatch.setattr(module, "check_config", lambda *a: None)


def wrong_config(values: dict[str, Any], key: str) -> dict[str, Any]:
    values = {**values, key: WRONG_CONFIG[key]}
    if key == "rope_theta":
        values["rope_parameters"] = {**values["rope_parameters"], key: WRONG_CONFIG[key]}
    return values


MISTAKES = [*WRONG_TENSORS, "gate and up swapped", "layers swapped", *WRONG_CONFIG]


@pytest.mark.parametrize("how", MISTAKES)
def test_a_wrong_converter_is_found_by_the_logits(
    how: str, square: SavedStep, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    break_mapping(monkeypatch, how)
    with refused(tmp_path, NumericsError, "do not compute what k2jax does"):
        export(square, tmp_path / "out", "bfloat16", BIG, quiet)
    # An export that the same wrong converter would have let through: --verify sees it, too.
    passed = certificate.Comparison(0.0, 1.0, 0.0, 1.0)
    with monkeypatch.context() as blind:
        blind.setattr(certificate, "compare_logits", lambda *a: passed)
        export(square, tmp_path / "out", "bfloat16", BIG, quiet)
    with pytest.raises(NumericsError, match="do not compute what k2jax does"):
        verify(square, tmp_path / "out", quiet)


def test_a_wrong_rope_layout_shows_in_small_weights_too(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At initialisation attention is nearly uniform: the difference is a thousandth of the logits or less."""
    saved = write_run(tmp_path / "run", tiny_data, std=0.02)
    export(saved, tmp_path / "right", "bfloat16", BIG, quiet)
    break_mapping(monkeypatch, "interleaved q and k")
    with refused(tmp_path, NumericsError, "do not compute what k2jax does"):
        export(saved, tmp_path / "out", "bfloat16", BIG, quiet)


@pytest.mark.parametrize("key", WRONG_CONFIG)
def test_a_wrong_config_is_found_by_reading_it_back(key: str, square: SavedStep):
    values = families.config_to_hf(square.config.model, square.stage, dtype="bfloat16", bos_id=None, eos_id=2)
    exporting.check_config(values, square)
    with pytest.raises(ConfigError, match="config.json says"):
        exporting.check_config(wrong_config(values, key), square)


# ---- --verify --------------------------------------------------------------------------------------------------------


def break_files(folder: Path, how: str) -> str:
    """The same mistakes in the files; returns what an error must name."""
    if how in WRONG_CONFIG:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(wrong_config(values, how), indent=2))
        return "config.json"
    p, q = "model.layers.0.", "model.layers.1."
    if how in WRONG_TENSORS:
        roles = {layout.NAMES[array].format(0): WRONG_TENSORS[how][1] for array in WRONG_TENSORS[how][0]}
        return change_tensors(folder, lambda tensors: {name: wrong(tensors[name]) for name, wrong in roles.items()})
    if how == "gate and up swapped":
        gate, up = GATE.format(0), UP.format(0)
        return change_tensors(folder, lambda tensors: {gate: tensors[up], up: tensors[gate]})
    names = [name.removeprefix(p) for name in read_certificate(folder)["tensors"] if name.startswith(p)]
    return change_tensors(folder, lambda t: {a + n: t[b + n] for n in names for a, b in ((p, q), (q, p))})


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> str:
    files = {path: load_file(path) for path in folder.glob("*.safetensors")}
    changed = change({name: x for tensors in files.values() for name, x in tensors.items()})
    for path, tensors in files.items():
        order = sorted(read_header(path).items(), key=lambda item: item[1]["data_offsets"])
        new = {name: np.ascontiguousarray(changed.get(name, tensors[name])) for name, _ in order}
        save_file(new, path, metadata={"format": "pt"})
    return "|".join(changed)


def forge(folder: Path) -> None:
    """Makes the certificate agree with the files again."""
    parity = json.loads((folder / "parity.json").read_text())
    del parity["certificate_sha256"]
    parity["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in parity["files"]}
    for path in folder.glob("*.safetensors"):
        for name, x in load_file(path).items():
            parity["tensors"][name]["sha256"] = hashlib.sha256(x.tobytes()).hexdigest()
    parity["certificate_sha256"] = sha256_json(parity)
    (folder / "parity.json").write_text(json.dumps(parity))


@pytest.mark.fault("S15")
@pytest.mark.parametrize("how", MISTAKES)
def test_broken_files_are_found_and_named(how: str, square: SavedStep, copy: Path):
    """By the certificate; with a forged one by the run; and by the logits, whatever the other two say."""
    named = break_files(copy, how)
    with pytest.raises(StorageError, match=f"({named}) "):
        verify(square, copy, quiet)
    forge(copy)
    by_run = {"rope_theta": "rope_base", "rms_norm_eps": "norm_eps", "head_dim": "head_dim"}
    with pytest.raises(ConfigError, match=f"config.json says {by_run[how]}" if how in by_run else named):
        verify(square, copy, quiet)
    parity = read_certificate(copy)
    tokens_BT = np.array(parity["logits"]["tokens"], np.int32)
    right = decoder_logits(square, tokens_BT, DTYPES["bfloat16"])
    with pytest.raises(NumericsError, match="do not compute what k2jax does"):
        certificate.compare_logits(copy, tokens_BT, right)


def test_a_good_export_is_verified_and_its_card_may_be_edited(square: SavedStep, copy: Path):
    (copy / "README.md").write_text("# mine")
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs")
    seen = []
    found = verify(square, copy, seen.append)
    assert 0 < found.largest_difference <= found.tolerance <= 1e-3 * found.largest_logit
    assert sum(seen) == 3 * sum(x.size * 2 for x in our_arrays(square).values())


def test_files_that_lack_or_are_too_many_are_named(square: SavedStep, copy: Path):
    (copy / "extra.safetensors").write_bytes(b"")
    with pytest.raises(StorageError, match="extra.safetensors is not of this export"):
        verify(square, copy, quiet)
    (copy / "extra.safetensors").unlink()
    last = sorted(copy.glob("*.safetensors"))[-1]
    data = last.read_bytes()
    last.write_bytes(data[:-2])
    with pytest.raises(StorageError, match=f"{last.name} is damaged: its tensors end at byte"):
        verify(square, copy, quiet)
    last.write_bytes(b"\xff" * 4 + data)
    with pytest.raises(StorageError, match=f"{last.name} is damaged: its header has"):
        verify(square, copy, quiet)
    last.unlink()
    with pytest.raises(StorageError, match=f"{last.name} is missing"):
        verify(square, copy, quiet)


def test_another_checkpoint_or_no_certificate_is_named(
    square: SavedStep, trained: SavedStep, copy: Path, tmp_path: Path
):
    with pytest.raises(ConfigError, match=f"digest {square.digest[:16]}"):
        verify(trained, copy, quiet)
    with pytest.raises(ConfigError, match="no export of k2jax"):
        verify(square, tmp_path, quiet)
    text = (copy / "parity.json").read_text()
    (copy / "parity.json").write_text(text.replace('"nonfinite": 0', '"nonfinite": 1', 1))
    with pytest.raises(StorageError, match=r"parity\.json is damaged"):
        verify(square, copy, quiet)


def test_reading_back_knows_nothing_of_our_layout():
    source = Path(reference.__file__).read_text()
    assert "layout" not in source.split('"""')[2] and "k2jax.model" not in source and "import jax" not in source


# ---- the command -----------------------------------------------------------------------------------------------------


def command(*arguments: object) -> subprocess.CompletedProcess:
    tool = [sys.executable, str(REPOSITORY / "tools" / "convert_to_hf.py"), *map(str, arguments)]
    return subprocess.run(tool, capture_output=True, text=True)


def test_the_command(square: SavedStep, tmp_path: Path):
    run, out = ("--workdir", square.workdir), ("--out", tmp_path / "out")
    done = command(*run, *out, "--step", 7, "--dtype", "float16", "--shard-size", "100KB", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["step"] == 7 and result["digest"] == square.digest and not done.stderr
    assert read_certificate(tmp_path / "out")["dtype"] == "float16"
    done = command(*run, *out, "--verify")
    assert done.returncode == 0 and "verified step 7" in done.stdout, done.stderr
    done = command(*run, *out, "--step", 9)
    assert done.returncode == 78 and done.stderr.splitlines()[-1].endswith("it has steps 7")


KILLED = """
import os, signal, sys
from pathlib import Path
from k2jax.hf.export import export
from k2jax.run.saved import open_step
def progress(num_bytes):
    os.kill(os.getpid(), signal.SIGKILL)
export(open_step(sys.argv[1]), Path(sys.argv[2]), "bfloat16", 10**9, progress)
"""


def test_a_killed_conversion_leaves_nothing_that_looks_finished(square: SavedStep, tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    program = [sys.executable, "-c", KILLED, str(square.workdir), str(tmp_path / "out")]
    assert subprocess.run(program, env=environment).returncode == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert left.name.startswith("out.new-") and not (left / "parity.json").exists()
    running = tmp_path / f"{left.name.rpartition('-')[0]}-{os.getppid()}"
    running.mkdir()
    export(square, tmp_path / "out", "bfloat16", BIG, quiet)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "out", running]), "those of live processes are let be"
