"""The configuration: unknown keys, wrong types and bad values are refused, all problems at once; drift is named."""

import re
import shutil
from pathlib import Path

import pytest

from k2jax import config as configuration
from k2jax.data.store import Store
from k2jax.data.store_writer import StoreWriter
from k2jax.errors import ConfigError
from k2jax.run import drift
from k2jax.training.setup import open_data

SMOKE = str(Path(__file__).parent.parent / "experiments" / "smoke.py")


def test_the_name_of_eos_must_be_that_of_the_stores(tiny_config):
    tokenizer = tiny_config().data.tokenizer
    assert open_data(tiny_config(**{"data.eos": "</s>"}))[1] == open_data(tiny_config())[1]
    for eos, message in (
        ("<s>", "data.eos='<s>': is token 1, the documents of the stores in .* end with 2"),
        ("<eos>", f"tokenizer {tokenizer}: eos='<eos>' is none of its control tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_data(tiny_config(**{"data.eos": eos}))
    assert drift.config_digest(tiny_config(**{"data.eos": "</s>"})) == drift.config_digest(tiny_config())


def test_a_store_of_conversations_is_no_text_to_train_on(tiny_config, tmp_path: Path):
    root = shutil.copytree(tiny_config().data.root, tmp_path / "data")
    told = Store.open(root / "web").info
    keys = {key: told[key] for key in ("tokenizer_sha256", "vocab_size", "eos_id")}
    with StoreWriter(root / "web", **keys, masked=True, overwrite=True) as writer:
        for i in range(40):
            writer.add([5] * 100, id="0" * 64, source=f"chat:{i}", eos=False, mask=[0] * 50 + [1] * 50)
        writer.finish()
    with pytest.raises(ConfigError, match="store 'web' holds conversations, each by itself.* kind to 'sft'"):
        open_data(tiny_config(**{"data.root": str(root), "data.tokenizer": str(root / "tokenizer.json")}))


def test_overrides_take_the_type_of_what_they_replace():
    c = configuration.load(
        SMOKE,
        [
            "model.dim=64",
            "optimizer.clip_norm=2",
            "model.tie_embeddings=true",
            "name=x=y",
            "stages.1.chunks=7",
            "stages.0.mix.code=2",
            "allow_drift=seed",
            "eval.prompts=('a','b')",
        ],
    )
    assert (c.model.dim, c.optimizer.clip_norm, c.model.tie_embeddings, c.name) == (64, 2.0, True, "x=y")
    assert (c.stages[1].chunks, c.stages[0].mix.code, c.allow_drift, c.eval.prompts) == (
        7,
        2.0,
        ("seed",),
        ("a", "b"),
    )
    assert isinstance(c.optimizer.clip_norm, float)


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.dmi=64", "unknown key; did you mean 'model.dim'"),
        ("stages.0.chunk=2", "did you mean 'stages.0.chunks'"),
        ("stages.9.chunks=2", "unknown key"),
        ("model.dim=wide", "expected int, such as"),
        ("model.dim=1.5", "expected int"),
        ("model.tie_embeddings=3", "expected bool"),
        ("model.dim", "write --config.model.dim=VALUE"),
    ],
)
def test_a_bad_override_is_refused_naming_the_closest_key(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        configuration.load(SMOKE, [override])


@pytest.mark.parametrize(
    "line, message",
    [
        ("c.modle = 3", "did you mean|Did you mean"),
        ("c.model.dims = 3", "did you mean|Did you mean"),
        ("c.optimizer.b1 = 'high'", "TypeError"),
        ("c.stages = (config.stage(chunk=1),)", "unknown key 'chunk'; did you mean 'chunks'"),
        ("c.stages = (config.stage(mix={'a.b': 1}),)", "dot"),
        ("c.stages = (config.stage(mix=[('a', 1)]),)", r"mix=\[\('a', 1\)\]: must be a dict {store: repeats}"),
        ("c.seed = cofig.x", "bad.py: line 4: NameError: name 'cofig' is not defined$"),
        ("import no_such_module", "bad.py: line 4: ModuleNotFoundError: No module named 'no_such_module'$"),
        ("c.seed = 1 / 0", "bad.py: line 4: ZeroDivisionError: division by zero$"),
        ("c.seed = [].itmes", "bad.py: line 4: AttributeError: 'list' object has no attribute 'itmes'$"),
        ("c.seed = (", "bad.py: line 4: SyntaxError: '\\(' was never closed$"),
        ("assert False", "bad.py: line 4: AssertionError$"),
        ("return None", "get_config\\(\\) returned NoneType, not what base\\(\\) made"),
    ],
)
def test_a_bad_experiment_file_is_refused_in_one_line(tmp_path: Path, line: str, message: str):
    path = tmp_path / "bad.py"
    path.write_text(
        f"from k2jax import config\ndef get_config():\n    c = config.base()\n    {line}\n    return c\n"
    )
    with pytest.raises(ConfigError, match=message) as raised:
        configuration.load(str(path))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200 + len(str(path))


def test_a_missing_file_and_a_file_without_get_config_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such experiment file; that folder has .*smoke.py"):
        configuration.load(str(Path(SMOKE).with_name("smok.py")))
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="does not define get_config"):
        configuration.load(str(tmp_path / "empty.py"))


def test_validate_reports_all_problems_at_once():
    overrides = ["model.head_dim=7", "model.num_kv_heads=3", "model.remat=some", "stages.0.microbatches=3"]
    with pytest.raises(ConfigError) as raised:
        configuration.load(SMOKE, overrides)
    for key in (
        "4 problem(s)",
        "model.head_dim=7",
        "model.num_kv_heads=3",
        "model.remat='some'",
        "stages.0.microbatches",
    ):
        assert key in str(raised.value)


@pytest.mark.fault("S7")
@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", "-x", "a\\b", "", "x\n"])
def test_a_subsets_name_is_no_path(tmp_path: Path, name: str):
    """It is that of a store's folder. Seen red without the pattern."""
    path = tmp_path / "experiment.py"
    stage = f"config.stage(mix={{{name!r}: 1}})"
    lines = ("from k2jax import config", "def get_config():", "    c = config.base()", f"    c.stages = ({stage},)")
    path.write_text("\n".join([*lines, "    return c\n"]))
    with pytest.raises(ConfigError, match="a subset's name has only letters, digits, - and _|does not accept dots"):
        configuration.load(str(path))


def test_arrays_that_remat_names_are_known_and_named_once():
    for remat in ("none", "dots", "q", "q@host", "q+k@host+up"):
        assert configuration.load(SMOKE, [f"model.remat={remat}"]).model.remat == remat
    for remat in ("dots@host", "q+q@host", "q@cpu", "q+@host", "q@host@host", "dots+q", ""):
        with pytest.raises(ConfigError, match="model.remat=.*each once, @host after any: q, k, v, attention"):
            configuration.load(SMOKE, [f"model.remat={remat}"])
    with pytest.raises(ConfigError, match="model.unroll=2: must be 1 where model.remat=q@host"):
        configuration.load(SMOKE, ["model.remat=q@host", "model.unroll=2"])


def test_to_dict_and_from_dict_are_inverse():
    c = configuration.load(SMOKE)
    again = configuration.from_dict(configuration.to_dict(c))
    assert configuration.to_dict(again) == configuration.to_dict(c)
    assert again.eval.prompts == c.eval.prompts
    with pytest.raises(ConfigError, match="unknown key model.width"):
        configuration.from_dict({"model": {"width": 3}, "stages": []})


@pytest.mark.parametrize("platform, dtype", [("cpu", "float32"), ("tpu", "bfloat16"), ("gpu", "bfloat16")])
def test_a_settled_configuration_names_the_type_that_auto_is(platform: str, dtype: str):
    config = configuration.load("experiments/smoke.py")
    assert config.precision.compute == "auto"
    settled = configuration.settled(config, platform)
    assert (settled.precision.compute, config.precision.compute, settled.is_locked) == (dtype, "auto", True)
    assert configuration.settled(settled, "tpu").precision.compute == dtype  # wherever it goes on
    other = "bfloat16" if dtype == "float32" else "float32"
    chosen = configuration.load("experiments/smoke.py", [f"precision.compute={other}"])
    assert configuration.settled(chosen, platform).precision.compute == other


def test_drift_names_keys_and_leaves_free_ones_alone():
    old = configuration.to_dict(configuration.load(SMOKE))
    changed = configuration.load(
        SMOKE, ["model.dim=64", "mesh.tensor=2", "data.workers=3", "stages.0.chunks=9"]
    )
    found = drift.differences(old, configuration.to_dict(changed))
    assert found == {"model.dim": (224, 64), "stages.0.chunks": (4, 9)}
    older = configuration.to_dict(configuration.load(SMOKE))
    settled = configuration.to_dict(configuration.settled(configuration.load(SMOKE), "cpu"))
    del older["model"]["qkv_bias"], older["stages"][1]["schedule"], older["mesh"]["stage"]  # not thought of yet
    assert drift.differences(older, old) == {}, "they are what was done before they came"
    other = configuration.load(SMOKE, ["model.qkv_bias=True", "stages.1.schedule=linear"])
    expected = {"model.qkv_bias": (False, True), "stages.1.schedule": ("cosine", "linear")}
    assert drift.differences(older, configuration.to_dict(other)) == expected
    assert old["precision"]["compute"] == "auto" and drift.differences(older, settled) == {}
    assert drift.differences(settled, old) == {"precision.compute": ("float32", "auto")}
    assert drift.not_allowed(found, ("stages",)) == ["model.dim"]
    assert drift.not_allowed(found, ("stages.0.chunks", "model")) == []
    assert drift.not_allowed(found, ("model.di",)) == ["model.dim", "stages.0.chunks"]


def test_what_is_allowed_to_drift_is_named_by_keys():
    """Seen red: a name that is no key allowed nothing and said nothing."""
    good = ["stages", "stages.0.chunks", "stages.7.mix.old", "stages.*.lr_peak", "model", "seed", "manifest.stores.web"]
    assert configuration.load(SMOKE, [f"allow_drift={good!r}"]).allow_drift == tuple(good)
    for wrong, hint in [("stages.0.chunk", "; did you mean 'stages.0.chunks'"), ("model.dim.x", ""), ("", "")]:
        with pytest.raises(ConfigError, match=f"allow_drift='{wrong}': is no key, nor one above keys{re.escape(hint)}"):
            configuration.load(SMOKE, [f"allow_drift={[wrong]!r}"])


def test_the_digest_is_of_what_the_run_computes():
    c = configuration.load(SMOKE)
    same = configuration.load(SMOKE, ["mesh.tensor=2", "log.every_steps=3", "stages.1.microbatches=2"])
    other = configuration.load(SMOKE, ["seed=1"])
    assert drift.config_digest(c) == drift.config_digest(same) != drift.config_digest(other)


def test_every_number_has_a_range_that_holds_its_default():
    c = configuration.base().unlock()
    c.stages = (configuration.stage(mix={"a": 1}),)
    for key, value in configuration.flatten(configuration.to_dict(c)).items():
        if type(value) in (int, float) and not key.startswith("mesh."):
            interval = configuration.range_of(key)
            assert interval and configuration._inside(value, interval), key
    c.model.num_kv_heads = 64
    configuration.validate(c)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.clip_norm=0",  # "off" elsewhere: here every gradient would be multiplied by it
        "optimizer.clip_norm=-1.0",
        "optimizer.b2=1.5",
        "optimizer.b1=1.0",
        "optimizer.max_skips_in_a_row=0",
        "checkpoint.keep_between=-3",
        "data.threads=-1",
        "log.every_steps=0",
        "model.rope_scaling.factor=0.0",
        "stages.0.lr_start=-1e-3",
        "stages.1.rope_base=1.0",
        "stages.0.mix.code=-1.0",
        "optimizer.eps=1e999",
    ],
)
def test_numbers_outside_their_range_are_refused(override: str):
    key = override.split("=")[0]
    with pytest.raises(ConfigError, match=f"{key}=") as raised:
        configuration.load(SMOKE, [override])
    assert f"must lie in {configuration.range_of(key)}" in str(raised.value)
