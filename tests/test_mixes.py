"""A prepared folder's mix in an experiment, and what is said at once of a mix that does not fit its stores."""

import json
import re
import shutil
from pathlib import Path

import pytest

from k2jax import config as configuration
from k2jax.data.manifest import describe
from k2jax.errors import ConfigError
from k2jax.prepare import build, recipe
from k2jax.run.drift import differences
from k2jax.train import train
from k2jax.training.setup import open_data

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
EXPERIMENT = """
from k2jax import config
def get_config():
    c = config.base()
    c.name, c.data.root, c.data.tokenizer = "own", {root!r}, {root!r} + "/tokenizer.json"
    c.model.update(vocab_size=600, dim=32, num_layers=1, num_heads=8, num_kv_heads=8, head_dim=4, ffn_dim=32)
    c.log.tensorboard = False
    c.eval.windows = 2
    c.stages = (config.stage(sequence_length=16, rows_per_step=8, steps_per_chunk=2, chunks=1, warmup_steps=0,
                             mix={mix}),)
    return c
"""


def make(root: Path, tokenizer: Path) -> None:
    """Text of two subsets, conversations and pairs, prepared: the first holds out some, the others are too small."""
    rows = {
        "web": [{"text": f"web page {i} " * 9 + f"{i * i}"} for i in range(60)],
        "code": [{"text": "a short text for a store of its own"}],
        "talks": [
            {"messages": [{"role": "user", "content": f"is {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
            for i in range(9)
        ],
        "prefs": [{"prompt": f"what is {i}", "chosen": f"it is {i}", "rejected": f"no {i}"} for i in range(9)],
    }
    for name, found in rows.items():
        (root / "made" / name).mkdir(parents=True)
        (root / "made" / name / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (root / "made" / "template.jinja").write_text(TEMPLATE)
    c = recipe.base()
    c.tokenizer, c.chat.template = str(tokenizer), str(root / "made" / "template.jinja")
    c.validation_fraction = 0.1
    c.dedup.near = False
    c.subsets.web = recipe.subset(f"jsonl:{root}/made/web", repeats=1.5)
    c.subsets.code = recipe.subset(f"jsonl:{root}/made/code")
    c.subsets.talks = recipe.conversations(f"jsonl:{root}/made/talks")
    c.subsets.prefs = recipe.conversations(f"jsonl:{root}/made/prefs", pairs=True)
    build.build(c.lock(), root / "data", workers=1)


@pytest.fixture(scope="module")
def prepared(made_once, tiny_data):
    return made_once("own-mixes", lambda root: make(root, tiny_data / "tokenizer.json")) / "data"


@pytest.fixture
def experiment(prepared, tmp_path):
    """`experiment(mix)`: one on that folder whose mix is this expression."""

    def load(mix: str, *overrides: str):
        (tmp_path / "own.py").write_text(EXPERIMENT.format(root=str(prepared), mix=mix))
        return configuration.load(tmp_path / "own.py", overrides)

    return load


def test_the_mix_is_the_recipes_by_the_kind_of_stage(prepared):
    mix = configuration.mix_of(str(prepared))
    assert mix == {"web": 1.5, "code": 1.0, "talks": 1.0, "prefs": 1.0} and type(mix) is dict
    assert configuration.mix_of(str(prepared), "pretrain") == {"web": 1.5, "code": 1.0}
    assert configuration.mix_of(str(prepared), kind="sft") == {"talks": 1.0}
    assert configuration.mix_of(f"file://{prepared}", "dpo") == {"prefs": 1.0}
    with pytest.raises(ConfigError, match="'text'.*kind must be one of pretrain, sft, dpo"):
        configuration.mix_of(str(prepared), "text")


def test_a_later_change_of_the_folders_mix_is_drift_by_name(prepared, tmp_path, experiment, capsys):
    """What a run records are the numbers, not where they came from. Seen red with the mix left out of to_dict."""
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    mix = f"{{k: v for k, v in config.mix_of({str(copy)!r}, 'pretrain').items() if k == 'web'}}"
    before = configuration.to_dict(experiment(mix))
    assert before["stages"][0]["mix"] == {"web": 1.5}
    train(experiment(mix), tmp_path / "run")
    assert "model.vocab_size=600: the tokenizer has 512 ids: the other 88 rows" in capsys.readouterr().out
    data = json.loads((copy / "data.json").read_text())
    data["mix"]["web"] = 2
    (copy / "data.json").write_text(json.dumps(data))
    assert differences(before, configuration.to_dict(experiment(mix))) == {"stages.0.mix.web": (1.5, 2.0)}
    with pytest.raises(ConfigError, match=r"stages\.0\.mix\.web"):
        train(experiment(mix), tmp_path / "run")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: shutil.rmtree(d), "is no folder: prepare it .*--out="),
        (lambda d: (d / "data.json").unlink(), "holds no data.json"),
        (lambda d: ((d / "data.json").unlink(), (d / "data.json").mkdir()), "holds no data.json"),
        (lambda d: ((d / "data.json").unlink(), (d / "stages").mkdir()), "has not finished: run the same command"),
        (lambda d: (d / "data.json").write_text("{"), "data.json is damaged"),
        (lambda d: (d / "data.json").write_text("[]"), "says no mix of stores"),
        (lambda d: (d / "data.json").write_text('{"mix": {"web": 1}, "stores": {}}'), "says no mix.*'web'"),
        (lambda d: edit(d, lambda data: data["mix"].update(web=0)), "repeats of 'web' is 0, expected"),
        (lambda d: edit(d, lambda data: data["mix"].update(web=float("nan"))), "repeats of 'web' is nan"),
        (lambda d: edit(d, lambda data: data["mix"].update(web="2")), "repeats of 'web' is '2'"),
        (lambda d: edit(d, lambda data: data["mix"].clear()), "no store .* none at all"),
    ],
    ids=["gone", "none", "folder", "unfinished", "half", "list", "stores", "zero", "nan", "text", "empty"],
)
def test_a_folder_that_has_no_mix_is_one_line(prepared, tmp_path, damage, said):
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    damage(copy)
    with pytest.raises(ConfigError, match=said) as caught:
        configuration.mix_of(str(copy))
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)


def edit(folder: Path, change) -> None:
    data = json.loads((folder / "data.json").read_text())
    change(data)
    (folder / "data.json").write_text(json.dumps(data))


def test_in_a_bucket(prepared, server):
    """As on TPU VMs, where each host loads the experiment."""
    from k2jax.bucket import at

    folder = f"{server.bucket()}/mine"
    with pytest.raises(ConfigError, match=f"there is no {re.escape(str(folder))}/data.json: copy the whole"):
        configuration.mix_of(str(folder))
    (at(str(folder)) / "data.json").put((prepared / "data.json").read_bytes())
    assert configuration.mix_of(str(folder)) == configuration.mix_of(str(prepared))


# ---- what does not fit is said, and how it is mended ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("mix", "overrides", "said"),
    [
        ("{'web': 1, 'Code': 1}", [], r"'stage1': its mix names store 'Code', which is .*mean 'code'.* code, prefs, "),
        ("{'a': 1, 'b': 1}", [], r"store 'a' \(and 1 more\), which is not in data.root=.*there are code, prefs, talks"),
        ("{'web': 1, 'code': 1}", ["stages.0.sequence_length=5000"],
         r"'code' has [\d,]+ training tokens, 'web' has [\d,]+ training .*for one row of 5,000 and .*out of the mix"),
        ("config.mix_of(c.data.root)", [], r"store 'prefs' holds pairs.*config.mix_of\(FOLDER, 'pretrain'\)"),
        ("{'web': 1}", ["model.vocab_size=511"], "model.vocab_size=511.* ids up to 511: set it to 512 or more"),
        ("{'web': 1}", ["data.root=nowhere"], "data.root=nowhere: no store lies there .*prepare the data"),
    ],
    ids=["close", "others", "long", "pairs", "vocabulary", "root"],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_is_made(experiment, mix, overrides, said):
    with pytest.raises(ConfigError, match=said):
        open_data(experiment(mix, *overrides))


def test_what_will_have_no_validation_loss_and_no_row_is_said_at_both_ends(prepared, experiment):
    """Held out are whole documents: of one document none. Seen red with the share of tokens in their place."""
    found = build.describe(json.loads((prepared / "data.json").read_text()))
    assert "nothing is held out of code, prefs, talks: the last document is larger than validation_fraction=" in found
    mix = "{'web': 1, 'code': 0.0001}"
    lines = describe(open_data(experiment(mix))[1])
    assert "  no row is of code: " in lines and "  no validation loss of code (0 tokens): what is held out" in lines
    assert "no " not in describe(open_data(experiment("{'web': 1}"))[1])


def test_a_held_out_part_shorter_than_a_row_is_said(experiment):
    assert "no validation loss" not in describe(open_data(experiment("{'web': 1}"))[1])
    longer = describe(open_data(experiment("{'web': 1}", "stages.0.sequence_length=500"))[1])
    assert re.search(r"no validation loss of web \(\d+ tokens\): what is held out is shorter than a row of 500", longer)
