"""Hugging Face folders become runs: bit for bit, explained, and trained on with; what does not fit is refused."""

import hashlib
import json
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from k2jax import config as configuration
from k2jax.data.epochs import read_epochs
from k2jax.data.journal import read_journal
from k2jax.errors import ConfigError, StorageError
from k2jax.hf import newrun
from k2jax.hf.families import config_from_hf
from k2jax.hf.importer import import_hf
from k2jax.parallel import sharding
from k2jax.run.checkpoint import Checkpoints
from k2jax.run.ledger import Ledger
from k2jax.run.saved import open_step, restore_params
from k2jax.train import train
from k2jax.training.optimizer import init_state
from k2jax.training.placement import make_state, place_state

TOOLS = Path(__file__).parents[1] / "tools"
CODES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
L, D, N, K, H, F, V = 2, 32, 4, 2, 8, 48, 519
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "intermediate_size": F,
    "vocab_size": V,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 20000.0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}

# ---- folders, made without k2jax or transformers ---------------------------------------------------------------------


def draw_tensors(code: str = "F32", config: dict = CONFIG) -> dict[str, np.ndarray]:
    """Random weights by Hugging Face's names, (out, in)."""
    c, draw = config, np.random.default_rng(7)
    D, F, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {at + f"{name}.weight": (D,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {at + "self_attn.q_proj.weight": (q, D), at + "self_attn.o_proj.weight": (D, q)}
        shapes |= {at + f"self_attn.{name}_proj.weight": (kv, D) for name in "kv"}
        shapes |= {at + "mlp.gate_proj.weight": (F, D), at + "mlp.up_proj.weight": (F, D)}
        shapes |= {at + "mlp.down_proj.weight": (D, F)}
    if c.get("tie_word_embeddings"):
        del shapes["lm_head.weight"]
    norm = {name: 1.0 if len(shape) == 1 else 0.0 for name, shape in shapes.items()}
    return {name: draw.normal(norm[name], 0.2, shape).astype(CODES[code]) for name, shape in shapes.items()}


def code_of(array: np.ndarray) -> str:
    return next(code for code, dtype in CODES.items() if array.dtype == dtype)


def header_of(tensors: dict[str, np.ndarray]) -> dict:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, array in tensors.items():
        place = {"dtype": code_of(array), "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        header[name], end = place, end + array.nbytes
    return header


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], header: bytes | None = None) -> None:
    """`header` in the place of the right one, for hostile files. No padding: the data are not aligned."""
    header = json.dumps(header_of(tensors)).encode() if header is None else header
    data = b"".join(array.tobytes() for array in tensors.values())
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def make_folder(
    folder: Path, tokenizer: Path, tensors: dict[str, np.ndarray] | None = None, files: int = 1, **changes
) -> Path:
    """A folder as transformers would leave it; `changes` go into config.json, where None takes a key out."""
    folder.mkdir()
    shutil.copy(tokenizer, folder / "tokenizer.json")
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = draw_tensors(config={**CONFIG, **changes}) if tensors is None else tensors
    if files == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    names, weight_map = list(tensors), {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::files]}
        write_safetensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny_data: Path) -> Path:
    return tiny_data / "tokenizer.json"


def importing(folder: Path, out: Path, **kwargs):
    return import_hf(folder, out, kwargs.pop("name", ""), kwargs.pop("allow_nonfinite", False), **kwargs)


@pytest.fixture(scope="module")
def imported(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on imported weights, which has not begun. Read it, or copy it."""
    folder = tmp_path_factory.mktemp("hf")
    importing(make_folder(folder / "source", tokenizer), folder / "run", name="small")
    return folder / "run"


def test_paths_may_be_relative(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_folder(tmp_path / "source", tokenizer)
    monkeypatch.chdir(tmp_path)
    importing(Path("source"), Path("runs/new"))
    assert open_step(Path("runs/new")).step == 0


def one_device_mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh({"replica": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


def expect_refusal(folder: Path, tmp_path: Path, *words: str, error: type = ConfigError) -> str:
    """One line with these words, and nothing of a run."""
    before = set(tmp_path.iterdir())
    with pytest.raises(error) as found:
        importing(folder, tmp_path / "run")
    text = str(found.value)
    assert all(word in text for word in words) and "\n" not in text and len(text) < 2000, text
    assert set(tmp_path.iterdir()) == before
    return text


# ---- what is imported ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "files"), [("F32", 1), ("BF16", 3), ("F16", 2)])
def test_every_bit_is_where_it_belongs(tokenizer, tmp_path, code, files):
    """float32 holds every bfloat16 and float16 exactly, subnormal numbers too."""
    theirs = draw_tensors(code)
    theirs["model.norm.weight"][:3] = [0.0, -0.0, ml_dtypes.finfo(CODES[code]).smallest_subnormal]
    done = importing(make_folder(tmp_path / "hf", tokenizer, theirs, files), tmp_path / "run")
    saved = open_step(tmp_path / "run")
    params = {name: np.asarray(value) for name, value in restore_params(saved, one_device_mesh()).items()}
    layers = {
        "wq_LDNH": ("self_attn.q_proj", lambda w: w.T.reshape(D, N, H)),
        "wk_LDKH": ("self_attn.k_proj", lambda w: w.T.reshape(D, K, H)),
        "wv_LDKH": ("self_attn.v_proj", lambda w: w.T.reshape(D, K, H)),
        "wo_LNHD": ("self_attn.o_proj", lambda w: w.T.reshape(N, H, D)),
        "w_gate_LDF": ("mlp.gate_proj", np.transpose),
        "w_up_LDF": ("mlp.up_proj", np.transpose),
        "w_down_LFD": ("mlp.down_proj", np.transpose),
        "attention_norm_LD": ("input_layernorm", np.asarray),
        "mlp_norm_LD": ("post_attention_layernorm", np.asarray),
    }
    expected = {"embed_VD": theirs["model.embed_tokens.weight"], "head_DV": theirs["lm_head.weight"].T}
    expected["final_norm_D"] = theirs["model.norm.weight"]
    for name, (key, turn) in layers.items():
        expected["layers." + name] = np.stack([turn(theirs[f"model.layers.{i}.{key}.weight"]) for i in range(L)])
    assert params.keys() == expected.keys()
    for name, value in expected.items():
        exact = value.astype(np.float32)
        assert params[name].tobytes() == exact.tobytes(), name
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    assert done.source.dtype == saved.meta["imported"]["dtype"] == names[code]


def test_the_run_explains_itself(imported: Path):
    source = imported.parent / "source"
    saved = open_step(imported)
    assert (saved.step, saved.meta["parent"], saved.meta["eos_id"]) == (0, None, 2)
    assert (saved.stage.name, saved.stage.rope_base, saved.stage.sequence_length) == ("imported", 20000.0, 64)
    assert saved.config.name == "small" and saved.config.model.vocab_size == V
    of_files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in source.iterdir()}
    assert saved.meta["imported"] == {
        "source": "source",
        "base_model": None,
        "files": of_files,
        "config": json.loads((source / "config.json").read_text()),
        "dtype": "float32",
        "context": 64,
        "ignored": {},
        "bos_id": None,
    }
    assert saved.meta["tokenizer_sha256"] == of_files["tokenizer.json"]
    assert (imported / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not [name for name in saved.meta["arrays"] if name.startswith(("mu", "nu"))], "weights only"
    [epoch] = saved.epochs
    assert epoch.config == saved.meta["config"] and epoch.manifest is None and epoch.origin["kind"] == "import"
    assert len(json.loads((imported / "environment.json").read_text())["launches"]) == 1
    assert {p.name for p in imported.iterdir()} == {
        "checkpoints", "epochs", "environment.json", "experiment.py", "tokenizer.json"
    }  # fmt: skip


def test_the_tool_reports(tokenizer, tmp_path, monkeypatch, capsys):
    theirs = draw_tensors()
    folder = make_folder(tmp_path / "hf", tokenizer, theirs)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["convert_from_hf.py", "--hf", str(folder), *arguments])
        runpy.run_path(str(TOOLS / "convert_from_hf.py"))["main"]()
        return capsys.readouterr().out

    told = json.loads(run("--out", str(tmp_path / "a"), "--json"))
    down = [w.astype(np.float64) for name, w in theirs.items() if "down_proj" in name]
    assert told["groups"]["down"]["norm"] == pytest.approx(np.sqrt(sum((w**2).sum() for w in down)), rel=1e-6)
    assert told["groups"]["down"]["parameters"] == sum(w.size for w in down)
    assert told["parameters"] == sum(w.size for w in theirs.values())
    assert told["digest"] == open_step(tmp_path / "a").digest
    text = run("--out", str(tmp_path / "b"))
    assert f"{told['parameters']:,} parameters" in text and "python -m k2jax.train --config=" in text


def test_values_that_do_not_fit_together_are_told(tokenizer, tmp_path):
    theirs = draw_tensors()
    theirs["model.embed_tokens.weight"] = theirs["model.embed_tokens.weight"][:500]
    del theirs["lm_head.weight"]
    folder = make_folder(tmp_path / "hf", tokenizer, theirs)
    words = ("'lm_head.weight' is missing", "shape [500, 32], expected [519, 32]", "2 problem(s)")
    expect_refusal(folder, tmp_path, *words)


# ---- variants of LLaMA folders ---------------------------------------------------------------------------------------


def tied_folder(tmp_path, tokenizer, change):
    theirs = draw_tensors()
    theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"].copy()
    theirs["lm_head.weight"][5, 5] += change
    return make_folder(tmp_path / "hf", tokenizer, theirs, tie_word_embeddings=True)


def test_a_tied_head_may_be_there_when_it_is_the_embedding(tokenizer, tmp_path):
    importing(tied_folder(tmp_path, tokenizer, 0.0), tmp_path / "run")
    assert "params/head_DV" not in open_step(tmp_path / "run").meta["arrays"]


def test_a_tied_head_of_its_own_is_refused(tokenizer, tmp_path):
    expect_refusal(tied_folder(tmp_path, tokenizer, 0.5), tmp_path, "lm_head.weight is not the embedding")


@pytest.mark.parametrize("base", [20000.0, 10000.0])
def test_rope_tables_of_old_folders_are_checked(tokenizer, tmp_path, base):
    table = (base ** (-np.arange(0, H, 2) / H)).astype(np.float16)
    theirs = {**draw_tensors(), **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": table for i in range(L)}}
    folder = make_folder(tmp_path / "hf", tokenizer, theirs)
    if base == CONFIG["rope_theta"]:
        importing(folder, tmp_path / "run")
    else:
        expect_refusal(folder, tmp_path, "inv_freq", "rope_theta 20000")


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE["original_max_position_embeddings"] = 32


def test_rope_is_read_in_both_spellings():
    old = config_from_hf({**CONFIG, "rope_scaling": ROPE})
    new = {**CONFIG, "rope_parameters": {**ROPE, "rope_theta": 20000.0}, "rope_theta": None}
    assert config_from_hf(new) == old
    assert (old.model.rope_scaling.factor, old.model.rope_scaling.original_context, old.rope_base) == (8.0, 32, 20000.0)
    plain = config_from_hf({**CONFIG, "rope_scaling": None, "rope_theta": None, "num_key_value_heads": None})
    assert (plain.rope_base, plain.model.rope_scaling.factor, plain.model.num_kv_heads) == (10000.0, 1.0, N)


WRONG_CONFIGS = {
    "another architecture": ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
    "gpt2": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "'gpt2'"),
    "another head": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "biases": ({"attention_bias": True}, "attention_bias is True"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "unknown key": ({"window": 4096}, "'window'"),
    "sliding window": ({"sliding_window": 32}, "sliding_window is 32"),
    "missing key": ({"hidden_size": None}, "hidden_size is None"),
    "a size that is none": ({"hidden_size": "32"}, "hidden_size is '32'"),
    "no size": ({"vocab_size": True}, "vocab_size is True"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "odd heads": ({"head_dim": 7}, "even head_dim"),
    "a word for a flag": ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
    "other scaling": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    "unknown scaling": ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
    "scaling that is a list": ({"rope_scaling": [1]}, "[1]"),
    "contradiction": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "contradict"),
    "scaling of nothing": ({"rope_scaling": {**ROPE, "high_freq_factor": 1.0}}, "low_freq_factor"),
    "an eos outside": ({"eos_token_id": V}, "eos_token_id is 519"),
    "no eos": ({"eos_token_id": None}, "eos_token_id is None"),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_other_models_are_refused_saying_what_was_found(tokenizer, tmp_path, name):
    changes, word = WRONG_CONFIGS[name]
    folder = make_folder(tmp_path / "hf", tokenizer, draw_tensors(), **changes)
    expect_refusal(folder, tmp_path, word)


def test_eos_comes_from_config_json_or_generation_config(tokenizer, tmp_path):
    folder = make_folder(tmp_path / "hf", tokenizer, draw_tensors(), eos_token_id=[7, 8])
    importing(folder, tmp_path / "a")
    folder = make_folder(tmp_path / "other", tokenizer, draw_tensors(), eos_token_id=None)
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    importing(folder, tmp_path / "b")
    assert [open_step(tmp_path / run).meta["eos_id"] for run in "ab"] == [7, 9]


def test_a_tokenizer_is_needed_and_must_fit(tokenizer, tmp_path):
    folder = make_folder(tmp_path / "hf", tokenizer)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    expect_refusal(folder, tmp_path, "only a sentencepiece tokenizer.model", "save_pretrained")
    small = draw_tensors(config={**CONFIG, "vocab_size": 511})
    folder = make_folder(tmp_path / "small", tokenizer, small, vocab_size=511)
    expect_refusal(folder, tmp_path, "token ids up to 511", "vocab_size is 511")


# ---- nothing half-written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_nothing_is_left(tokenizer, tmp_path, monkeypatch, error):
    folder = make_folder(tmp_path / "hf", tokenizer)

    def stop(*_: object) -> None:
        raise error

    monkeypatch.setattr(newrun.Checkpoints, "wait", stop)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else StorageError):
        importing(folder, tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_folder_that_is_not_empty_is_refused(imported, tokenizer, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        importing(imported.parent / "source", tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]
    (tmp_path / "run" / "notes.txt").unlink()
    importing(imported.parent / "source", tmp_path / "run")


# ---- training on -----------------------------------------------------------------------------------------------------


def experiment_of(run: Path, data: Path, **overrides: object):
    """experiment.py as a user fills it in."""
    text = (run / "experiment.py").read_text()
    assert "mix={}" in text
    (run / "experiment.py").write_text(text.replace("mix={}", 'mix={"books": 2, "web": 1}'))
    keys = {
        "data.root": data,
        "log.tensorboard": False,
        "eval.windows": 8,
        "stages.0.rows_per_step": 8,
        "stages.0.sequence_length": 32,
        "stages.0.steps_per_chunk": 2,
        "stages.0.chunks": 2,
        "stages.0.warmup_steps": 0,
        **overrides,
    }
    return configuration.load(str(run / "experiment.py"), [f"{key}={value}" for key, value in keys.items()])


def copied(imported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(imported, tmp_path / "run"))


def test_training_goes_on_from_the_imported_weights(imported, tiny_data, tmp_path, capsys):
    """At a learning rate of zero the weights stay, bit for bit, and the moments fill; all of it in the chain."""
    run = copied(imported, tmp_path)
    still = {"stages.0.lr_peak": 0.0, "stages.0.lr_final": 0.0, "checkpoint.keep_between": 0}
    config = experiment_of(run, tiny_data, **still)
    train(config, run)
    assert "starting at step 1 from imported weights" in capsys.readouterr().out
    steps = {step: open_step(run, step) for step in (0, 2, 4)}
    first, params = steps[0].meta["digests"], [k for k in steps[0].meta["digests"] if k.startswith("params/")]
    assert len(params) == 12 and all(steps[4].meta["digests"][name] == first[name] for name in params)
    assert all(steps[4].meta["digests"][name.replace("params", "mu")] for name in params)
    assert steps[2].meta["parent"] == {"step": 0, "digest": steps[0].digest}
    ledger = Ledger(run / "ledger", None)
    ledger.verify()
    found = [(r["first_step"], r["last_step"], r["checkpoint"]) for r in ledger.records()]
    assert found == [(1, 0, steps[0].digest), (1, 2, steps[2].digest), (3, 4, steps[4].digest)]
    assert read_journal(run / "journal.jsonl") == []
    train(config, run)
    assert "resuming after step 4 of 4" in capsys.readouterr().out


def test_a_first_checkpoint_that_is_damaged_falls_back_to_the_import(imported, tiny_data, tmp_path, capsys):
    run = copied(imported, tmp_path)
    config = experiment_of(run, tiny_data, **{"stages.0.chunks": 1})
    train(config, run)
    expected = open_step(run, 2).meta["digests"]
    (run / "checkpoints" / "2" / "meta" / "meta.json").write_text("{}")
    train(config, run)
    assert "starting at step 1 from imported weights" in capsys.readouterr().out
    assert open_step(run, 2).meta["digests"] == expected
    Ledger(run / "ledger", None).verify()


def test_an_unfilled_experiment_says_what_to_fill_in(imported, tmp_path):
    with pytest.raises(ConfigError, match="mix.*names no subset"):
        configuration.load(str(copied(imported, tmp_path) / "experiment.py"))


def test_only_the_model_must_be_the_imported_one(imported, tiny_data, tmp_path):
    """Another model is refused; another rope base is a stage's own affair, on the record."""
    run = copied(imported, tmp_path)
    config = experiment_of(run, tiny_data, **{"stages.0.chunks": 1, "stages.0.rope_base": 500_000.0})
    wrong = config.copy_and_resolve_references().unlock()
    wrong.model.norm_eps = 1e-6
    with pytest.raises(ConfigError, match=r"imported.*model\.norm_eps: 1e-05 -> 1e-06"):
        train(wrong, run)
    wrong.allow_drift = ("model",)
    wrong.model.ffn_dim = 56
    with pytest.raises(ConfigError, match="w_down_LFD"):
        train(wrong, run)
    assert len(read_epochs(run)) == 1
    train(config, run)
    _, epoch = read_epochs(run)
    assert epoch.changes == {"stages.0.rope_base": [20000.0, 500000.0]} and epoch.after_step == 0


def test_other_tokens_than_the_imported_are_refused(tokenizer, tiny_data, tmp_path):
    """The stores end documents with 2; and they were made with another tokenizer than this one."""
    folder = make_folder(tmp_path / "hf", tokenizer, draw_tensors(), eos_token_id=7)
    (folder / "tokenizer.json").write_text(tokenizer.read_text() + "\n")
    importing(folder, tmp_path / "run")
    config = experiment_of(tmp_path / "run", tiny_data, **{"data.tokenizer": tokenizer})
    with pytest.raises(ConfigError, match=r"2 key\(s\) differ: manifest.eos_id: 7 -> 2; manifest.tokenizer_sha256"):
        train(config, tmp_path / "run")


def test_imported_weights_that_are_gone_or_damaged_stop_the_run(imported, tiny_data, tmp_path):
    """A run never starts from scratch in silence."""
    run = copied(imported, tmp_path)
    config = experiment_of(run, tiny_data)
    (run / "checkpoints" / "0" / "meta" / "meta.json").write_text("{}")
    with pytest.raises(StorageError, match=r"none of 1 checkpoint\(s\) .* checkpoint 0"):
        train(config, run)
    shutil.rmtree(run / "checkpoints" / "0")
    with pytest.raises(StorageError, match="holds an import, and none is there"):
        train(config, run)


def test_moments_are_zero_only_when_there_are_none_at_all(tiny_config, tmp_path):
    config = tiny_config()
    mesh = sharding.make_mesh(config.mesh)
    shapes = jax.eval_shape(partial(init_state, config.model, config.seed))
    with jax.set_mesh(mesh):
        shardings = place_state(config, shapes, mesh)
        state = make_state(config, shardings)
        kinds = {"none": {"mu": {}, "nu": {}}, "no nu": {"nu": {}}}
        kinds["one missing"] = {"mu": {k: v for k, v in state.mu.items() if k != "embed_VD"}}
        kinds["no head"] = {"mu": {}, "nu": {}}
        kinds["no head"]["params"] = {k: v for k, v in state.params.items() if k != "head_DV"}
        for name, changes in kinds.items():
            with Checkpoints(tmp_path / name, [1], log=lambda _: None) as checkpoints:
                checkpoints.save(state._replace(**changes), 1, data={}, meta={})
                checkpoints.wait()
            if name != "none":
                with pytest.raises(ConfigError, match="absent"):
                    checkpoints.restore(1, shardings, shapes)
                continue
            restored = checkpoints.restore(1, shardings, shapes)
            assert all(not x.any() for x in jax.tree.leaves((restored.mu, restored.nu)))
            same = jax.tree.map(lambda a, b: (a == b).all() and a.sharding == b.sharding, restored, state)
            assert all(jax.tree.leaves(same))
