"""Families: what config.json may hold and must not, a window that no row reaches, and the same model on every mesh.

That they compute what transformers' classes do: test_hf_parity.py, and gradients in test_model_parity.py.
"""

import json
import runpy
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Later
from test_convert_from_hf import TOOLS, copied, experiment_of, importing
from test_hf_parity import OTHERS, SIZES, draw_model
from test_model import logits_of, small_model
from test_pipeline import run, small

from k2jax import config as configuration
from k2jax.errors import ConfigError, NumericsError
from k2jax.hf import layout
from k2jax.hf.export import check_config, export
from k2jax.hf.families import FAMILIES, HARMLESS, REQUIRED, SWITCHES, config_from_hf, config_to_hf, kind_of
from k2jax.model.attention_logits import attention_logits
from k2jax.model.decoder import init_params, num_params, parameter_table
from k2jax.model.flops import flops_per_token
from k2jax.model.generation import Generator
from k2jax.model.weights import is_matrix
from k2jax.parallel import sharding
from k2jax.run.saved import open_step
from k2jax.train import train
from k2jax.training.optimizer import direction, init_state
from k2jax.training.remedies import qk_clip

transformers = Later("transformers")

KINDS = ("llama", *OTHERS)
EVERYTHING = dict.fromkeys(SWITCHES, True)  # no family's, and each switch's arrays at once
SMALL = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}


def values_of(kind: str, folder: Path, **sizes) -> dict:
    """config.json as transformers' class of that family writes it."""
    transformers.AutoConfig.for_model(kind, **sizes).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


# ---- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_that_a_class_writes_is_known(kind: str, tmp_path: Path):
    """With its defaults, with small sizes, and each key with the value that the class has in memory."""
    found = config_from_hf(values_of(kind, tmp_path))
    assert found.kind == kind and {key for key in SWITCHES if found.model[key]} == FAMILIES[kind].keys.keys()
    assert found.model.num_kv_heads == {"mistral": 8}.get(kind, 32)
    whole = json.loads(json.dumps(transformers.AutoConfig.for_model(kind, **SMALL).to_dict()))
    assert len(whole) > 25 and None in whole.values()
    found = config_from_hf(whole)
    assert (found.model.head_dim, found.context, found.ignored) == (16, 64, {})
    assert found.model == config_from_hf(values_of(kind, tmp_path, **SMALL)).model


@pytest.mark.parametrize("kind", KINDS)
def test_missing_keys_mean_what_they_mean_to_the_class(kind: str, tmp_path: Path):
    """Or are refused by name, where the class has one model's size for them."""
    values = values_of(kind, tmp_path, **SMALL)
    theirs = transformers.AutoConfig.for_model(kind, **SMALL)
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_parameters"):
        less = {name: value for name, value in values.items() if name != key}
        theirs = transformers.AutoConfig.for_model(kind, **{n: v for n, v in less.items() if n != "model_type"})
        try:
            m, rope_base, context = config_from_hf(less)[:3]
        except ConfigError as error:
            assert f"{key} is None" in str(error) and key in ("num_key_value_heads", "head_dim", values_key(key))
            continue
        head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        assert (m.num_kv_heads, m.head_dim, m.norm_eps) == (theirs.num_key_value_heads, head_dim, theirs.rms_norm_eps)
        assert (rope_base, context) == (theirs.rope_parameters["rope_theta"], theirs.max_position_embeddings)


def values_key(key: str) -> str:
    return key if key == "max_position_embeddings" else ""


OLDER = {  # what transformers 4 and others write besides, with their values
    "_attn_implementation_autoset": True, "torch_dtype": "bfloat16", "rope_scaling": None, "use_bfloat16": False,
    "pruned_heads": {}, "is_encoder_decoder": False, "add_cross_attention": False, "temperature": 1.0, "top_k": 50,
    "sliding_window": None, "max_window_layers": 28, "tie_encoder_decoder": False, "auto_map": None, "mlp_bias": False,
    "attention_bias": False, "pretraining_tp": 1, "layer_types": ["full_attention"] * 2, "hidden_act": "silu",
    "head_dim": None, "quantization_config": None, "something_new": None, "unsloth_fixed": True, "rope_theta": 10000.0,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "olmo2"])
def test_harmless_keys_stop_nothing(kind: str, tmp_path: Path):
    plain = {key: value for key, value in SMALL.items() if key != "head_dim"}
    values = values_of(kind, tmp_path, **plain)
    assert config_from_hf({**values, **OLDER}).model == config_from_hf({**values, "sliding_window": None}).model


@pytest.mark.parametrize("key", [*REQUIRED, "layer_types", "rope_scaling", "architectures"])
def test_what_changes_the_numbers_stops_by_name_and_cannot_be_ignored(key: str, tmp_path: Path):
    values = {**values_of("qwen2", tmp_path, **SMALL), key: ["sliding_attention"]}
    for ignore in ([], [key]):
        with pytest.raises(ConfigError, match=r"sliding_attention") as found:
            config_from_hf(values, ignore)
        assert key.replace("rope_scaling", "scale RoPE") in str(found.value) or key == "rope_scaling"
        assert not ignore or f"'{key}' is no unknown key" in str(found.value)


def test_the_lists_of_keys_are_apart():
    assert not HARMLESS & REQUIRED.keys()


@pytest.mark.parametrize(
    ("kind", "keys", "window"),
    [
        ("mistral", {"sliding_window": None}, 0),
        ("mistral", {"sliding_window": 48}, 48),
        ("mistral", {}, 4096),  # the class's
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, 0),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, 0),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, 0),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 63, "max_window_layers": 0}, None),
        ("llama", {"sliding_window": 63}, None),
    ],
)
def test_windows(kind: str, keys: dict, window: int | None, tmp_path: Path):
    values = {**values_of(kind, tmp_path, **SMALL)}
    for key in ("sliding_window", "layer_types"):
        values.pop(key, None)
    if window is None:
        with pytest.raises(ConfigError, match=r"sliding_window is 63, which max_position_embeddings 64 goes beyond"):
            config_from_hf({**values, **keys})
        return
    found = config_from_hf({**values, **keys})
    assert (found.model.sliding_window, found.context, found.rows) == (window, 64, min(window or 64, 64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_comes_back(kind: str, tmp_path: Path):
    found = config_from_hf(values_of(kind, tmp_path, **SMALL, **OTHERS.get(kind, {})))
    stage = configuration.stage(rope_base=found.rope_base, sequence_length=32)
    back = config_to_hf(found.model, stage, dtype="float32", bos_id=None, eos_id=2, context=64, imported=kind)
    assert back["architectures"] == [FAMILIES[kind].architecture] and config_from_hf(back) == found
    theirs = type(transformers.AutoConfig.for_model(kind))(**back)
    assert theirs.max_position_embeddings == 64 and getattr(theirs, "sliding_window", None) is None


def test_a_mix_that_is_no_family_is_not_exported():
    m = small_model(qkv_bias=True, qk_norm=True)
    assert kind_of(m) is None and kind_of(small_model()) == "llama" and kind_of(small_model(), "mistral") == "mistral"
    assert kind_of(small_model(qkv_bias=True), "mistral") == "qwen2"
    with pytest.raises(ConfigError, match=r"model.qkv_bias=True, model.qk_norm=True.*OLMo-2: qk_norm, qk_norm_whole"):
        config_to_hf(m, configuration.stage(), dtype="float32", bos_id=None, eos_id=2)


# ---- through the run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mistral(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral with a window below its context, imported with a key that nobody knows. Read it, or copy it."""
    folder = tmp_path_factory.mktemp("mistral")
    make_mistral(folder / "hf", tiny_data)
    importing(folder / "hf", folder / "run", ignore=["odd"])
    return folder / "run"


def make_mistral(folder: Path, tiny_data: Path) -> None:
    draw_model({"model_type": "mistral", "sliding_window": 48, "num_key_value_heads": 2}, 0).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "odd": {"a": 1}}))
    (folder / "tokenizer.json").write_bytes((tiny_data / "tokenizer.json").read_bytes())


def test_unknown_keys_are_named_to_be_left_out(tiny_data: Path, tmp_path: Path, monkeypatch, capsys):
    make_mistral(tmp_path / "hf", tiny_data)

    def tool(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["convert_from_hf.py", f"--hf={tmp_path / 'hf'}", *arguments])
        runpy.run_path(str(TOOLS / "convert_from_hf.py"))["main"]()
        return capsys.readouterr().out

    with pytest.raises(ConfigError, match=r"unknown key.s. 'odd': {'a': 1}: .*--ignore=KEY"):
        tool(f"--out={tmp_path / 'a'}")
    with pytest.raises(ConfigError, match=r"'ode' is no unknown key .* it has none; did you mean 'odd'"):
        tool(f"--out={tmp_path / 'a'}", "--ignore=ode")
    text = tool(f"--out={tmp_path / 'a'}", "--ignore=odd")
    assert "left out of config.json, as you said, and recorded: 'odd'" in text and "at most 48 tokens" in text
    told = json.loads(tool(f"--out={tmp_path / 'b'}", "--ignore=odd", "--json"))
    assert (told["family"], told["context"], told["rows"], told["ignored"]) == ("mistral", 64, 48, {"odd": {"a": 1}})


def test_training_keeps_family_context_window_and_what_was_left_out(mistral: Path, tiny_data: Path, tmp_path: Path):
    """In a checkpoint that was trained after the import, too."""
    workdir = copied(mistral, tmp_path)
    train(experiment_of(workdir, tiny_data, **{"stages.0.chunks": 1}), workdir)
    for step in (0, 2):
        saved = open_step(workdir, step)
        export(saved, tmp_path / f"{step}", "float32", 10**9, lambda _: None)
        values, parity = (json.loads((tmp_path / f"{step}" / f).read_text()) for f in ("config.json", "parity.json"))
        assert (values["architectures"], values["sliding_window"]) == (["MistralForCausalLM"], 48)
        assert values["max_position_embeddings"] == 64, "rows of 32 were trained on, and the model is for 64"
        assert parity["checkpoint"]["imported"]["ignored"] == {"odd": {"a": 1}}
        card = (tmp_path / f"{step}" / "README.md").read_text()
        assert "Mistral\\: 2 layers" in card and '{"odd": {"a": 1}}' in card and "Imported from | hf" in card
        assert "tags: [k2jax, mistral]" in card
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{step}")


def test_a_context_grows_with_longer_rows(tiny_data: Path, tmp_path: Path):
    draw_model({"max_position_embeddings": 16}, 0).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes((tiny_data / "tokenizer.json").read_bytes())
    importing(tmp_path / "hf", tmp_path / "run")
    train(experiment_of(tmp_path / "run", tiny_data, **{"stages.0.chunks": 1}), tmp_path / "run")
    assert [open_step(tmp_path / "run", step).context for step in (0, 2)] == [16, 32]


def test_no_row_goes_beyond_a_window(mistral: Path, tiny_data: Path, tmp_path: Path):
    workdir = copied(mistral, tmp_path)
    with pytest.raises(ConfigError, match=r"stages.0.sequence_length=64: must be at most model.sliding_window=48"):
        experiment_of(workdir, tiny_data, **{"stages.0.sequence_length": 64})
    m = small_model(sliding_window=16)
    mesh = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
    generator = Generator(m, 1e4, init_params(m, 0), mesh, jnp.float32, eos_id=2)
    assert len(generator.generate([[5] * 10], 6, stop_at_eos=False)[0]) == 6
    with pytest.raises(ConfigError, match=r"are 17 together, beyond model.sliding_window=16"):
        generator.generate([[5] * 10], 7)


def test_keys_of_where_it_ran_are_not_compared(mistral: Path):
    """An export of a run on a pod: rings and a pipeline are nothing of the model."""
    saved = open_step(mistral)
    with saved.config.unlocked():
        saved.config.model.rings, saved.config.model.pipeline.microbatches = (8, 8, 8), 4
    ids = {"dtype": "float32", "bos_id": None, "eos_id": 2}
    check_config(config_to_hf(saved.config.model, saved.stage, context=saved.context, **ids), saved)


@pytest.mark.parametrize(
    ("kind", "swap"),
    [
        ("qwen2", ("layers.bk_LKH", "layers.bv_LKH")),
        ("olmo2", ("layers.attention_out_norm_LD", "layers.mlp_out_norm_LD")),
        ("olmo2", ("layers.q_norm_LNH", "layers.k_norm_LKH")),
    ],
)
def test_tensors_changed_round_are_found_by_the_certificate(kind, swap, tiny_data, tmp_path, monkeypatch):
    draw_model({"model_type": kind}, 0).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes((tiny_data / "tokenizer.json").read_bytes())
    importing(tmp_path / "hf", tmp_path / "run")
    names = [layout.NAMES[array] for array in swap]
    for array, name in zip(swap, reversed(names), strict=True):
        monkeypatch.setitem(layout.NAMES, array, name)
    with pytest.raises(NumericsError, match="do not compute what k2jax does"):
        export(open_step(tmp_path / "run"), tmp_path / "out", "float32", 10**9, lambda _: None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_verifier_knows_every_tensor(kind: str):
    """It has a list of its own, and imports nothing of k2jax."""
    verifier = runpy.run_path(str(TOOLS / "verify_release.py"))
    m = small_model(**FAMILIES[kind].keys)
    arrays = parameter_table(m)
    others = {theirs: one for theirs, one in verifier["OTHERS"].items() if one[0] in arrays}
    found = {}
    for t in layout.tensors(m):
        name = t.name if t.layer is None else t.name.removeprefix(f"model.layers.{t.layer}.")
        found[t.array] = (verifier["TENSORS"] | others)[name]
        vector = not arrays[t.array].is_matrix or t.array in layout.AS_THEY_ARE
        assert found[t.array] == (t.array, 0 if vector else layout.INPUTS.get(t.array, 1))
    assert found.keys() == arrays.keys() and verifier["SUMMED"].items() >= dict(found.values()).items()


# ---- the model -------------------------------------------------------------------------------------------------------


def test_what_is_no_matrix_is_not_decayed_not_cast_and_starts_at_its_rest():
    c = configuration.base().copy_and_resolve_references().unlock()
    c.model = small_model(**EVERYTHING)
    state = init_state(c.model, seed=0)
    zeros = {name: jnp.zeros_like(p) for name, p in state.params.items()}
    c.optimizer.weight_decay = 0.5
    params = {name: jnp.ones_like(p) for name, p in state.params.items()}
    found, _, _ = direction(c, state._replace(params=params), zeros)
    vectors = {name for name in state.params if "norm" in name or "layers.b" in name}
    assert len(vectors) == 8
    for name, p in parameter_table(c.model).items():
        assert p.is_matrix == is_matrix(name) == (name not in vectors), name
        assert float(found[name].max()) == (0.0 if name in vectors else 0.5), name
        if name in vectors:
            assert (np.asarray(state.params[name]) == (1.0 if "norm" in name else 0.0)).all(), name
    plain = small_model()
    assert num_params(c.model) - num_params(plain) == 3 * 8 * 8 + 3 * 6 * 8, "biases of q, k, v; norms of q, k"
    assert flops_per_token(c.model, 64) == flops_per_token(plain, 64)


def changed(c: configuration.ConfigDict) -> configuration.ConfigDict:
    with c.unlocked():
        c.model.update(**EVERYTHING, num_kv_heads=4)
    return c


@pytest.fixture(scope="module")
def one_device() -> tuple[list[dict], dict[str, np.ndarray]]:
    return run(changed(small()), {"fsdp": 1})


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 2, "tensor": 4}, {"replica": 2, "context": 2, "tensor": 2}, {"stage": 2, "fsdp": 2, "tensor": 2}],
    ids=str,
)
def test_losses_and_every_gradient_are_those_of_one_device(sizes: dict[str, int], one_device):
    """QK-norm over heads that tensor splits is the mean over all of them; biases are split like their heads."""
    steps, gradients = run(changed(small()), sizes)
    losses, expected = ([float(metrics["loss"]) for metrics in of] for of in (steps, one_device[0]))
    assert losses[-1] < losses[0] - 0.05, "nothing was learned: the comparison would show nothing"
    np.testing.assert_allclose(losses, expected, rtol=0, atol=2e-5)
    for name, value in one_device[1].items():
        scale = np.abs(value).max()
        assert scale > 0, name
        np.testing.assert_allclose(gradients[name] / scale, value / scale, rtol=0, atol=2e-5, err_msg=name)


def drawn(**changes) -> tuple:
    """Norms that are not one and biases that are not zero."""
    m = small_model(vocab_size=64, **changes)
    draw = np.random.default_rng(0)
    params = jax.jit(partial(init_params, m, seed=2))()
    return m, {
        name: p if parameter_table(m)[name].is_matrix else p + jnp.asarray(draw.normal(0, 0.4, p.shape), p.dtype)
        for name, p in params.items()
    }


@pytest.mark.parametrize("prompts", [[[5, 9, 11, 30], [7, 8]], [[5, 9, 11, 30]]], ids=["two", "one"])
@pytest.mark.parametrize("sizes", [{"fsdp": 1}, {"fsdp": 1, "tensor": 2}], ids=str)
def test_generation_is_the_model_again_and_again(sizes, prompts):
    m, params = drawn(**EVERYTHING)
    mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    new = Generator(m, 1e4, params, mesh, jnp.float32, eos_id=2).generate(prompts, 6, stop_at_eos=False)
    scores_of = jax.jit(partial(logits_of, m))
    for prompt, tokens in zip(prompts, new, strict=True):
        row = np.array([[*prompt, *tokens, *[0] * (6 - len(prompt))]])
        best = np.asarray(scores_of(params, row))[0].argmax(axis=-1)
        assert tokens == best[len(prompt) - 1 :][:6].tolist()


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_qk_clip_holds_logits_of_models_with_biases(kv_heads: int):
    """The biases of a head shrink as its matrix does: its largest logit is the limit then, in the first layer."""
    m, params = drawn(qkv_bias=True, num_kv_heads=kv_heads)
    c = configuration.base().copy_and_resolve_references().unlock()
    c.model = m
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 64, (1, 1, 33)), jnp.int32)
    some = {"rope_base": 1e4, "eos_id": 2, "compute_dtype": jnp.float32}
    before = np.asarray(attention_logits(c, params, tokens, **some))
    c.optimizer.qk_clip = float(np.median(before[0]))
    new, count = qk_clip(c, params, jnp.asarray(before))
    after = np.asarray(attention_logits(c, new, tokens, **some))
    assert 0 < int(count) and (before[0] > c.optimizer.qk_clip).any()
    np.testing.assert_allclose(after[0], np.minimum(before[0], c.optimizer.qk_clip), rtol=1e-4)


def test_a_norm_over_all_heads_needs_qk_norm(tiny_config):
    with pytest.raises(ConfigError, match=r"model.qk_norm_whole=True: needs model.qk_norm"):
        tiny_config(**{"model.qk_norm_whole": True})
