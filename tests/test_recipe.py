"""A data experiment is checked whole before anything is done, and what is wrong is named."""

import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from k2jax import k2
from k2jax.errors import ConfigError
from k2jax.prepare import recipe
from k2jax.prepare.recipe import Task, base, subset

REPO = Path(__file__).parent.parent
SHIPPED = sorted(path.stem for path in (REPO / "experiments/data").glob("*.py"))


@pytest.mark.fault("S7")
def test_all_problems_of_a_recipe_are_named_at_once():
    c = base()
    c.subsets["Bad/Name"] = subset("python:code", max_bytes=-1)
    c.subsets.a = subset("pytho:code", filters=("gopher",), upsample=((2, 3), (2, 1)))
    c.subsets.b = subset("text:", fim_rate=1.5, languages=("en",))
    c.subsets.c = subset("megatron:x.bin", tasks=-1, repeats=0)
    c.vocab_size, c.validation_fraction, c.dedup.unit, c.dedup.bands = 5, 1.5, "letters", 0
    c.contamination.sources, c.eos = ("s3:x",), "<eos>"
    with pytest.raises(ConfigError) as error:
        recipe.validate(c)
    for part in (
        "17 problem", "eos='<eos>': goes with tokenizer",
        "vocab_size=5", "validation_fraction=1.5", "Bad/Name", "pytho:code", "max_bytes=-1",
        "dedup.unit='letters'", "dedup.bands=0", "'s3:x' is no", "['gopher'] unknown", "a.upsample", "b.source='text:'",
        "b.fim_rate=1.5", "needs language_model", "c.tasks=-1", "c.repeats=0", "c: a source of tokens needs tokenizer",
    ):  # fmt: skip
        assert part in str(error.value), part
    by_hand = ConfigDict({"vocab_sise": 320, "seed": "one", "validation_fraction": 0, "subsets": {}, "dedup": {}})
    expected = "vocab_sise, did you mean 'vocab_size'.*dedup.bands is missing.*seed='one'.*tokenizer_bytes is mi"
    with pytest.raises(ConfigError, match=expected):
        recipe.validate(by_hand)


def test_two_subsets_cannot_share_a_store():
    c = base()
    c.subsets.code = subset("text:a", fim_rate=0.5, fim_stores=True)
    c.subsets.web = subset("text:b", upsample=((2, 3),))
    recipe.validate(c)
    c.subsets["code-fim"], c.subsets["web-x3"] = subset("text:c"), subset("text:d")
    with pytest.raises(ConfigError, match="2 problem.*code-fim.*subsets.code, too: rename.*web-x3.*subsets.web, too"):
        recipe.validate(c)


@pytest.mark.parametrize("name", ["card", "stages"])
def test_no_store_has_the_place_of_what_else_is_in_the_folder(name):
    c = base()
    c.subsets[name] = subset("text:a")
    with pytest.raises(ConfigError, match=f"subsets.{name}: its store would be OUT/{name}, where .* give it another"):
        recipe.validate(c)


BASE = "from k2jax.prepare.recipe import base, subset\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "does not define get_config"),
        ("def get_config(:", "SyntaxError"),
        (BASE + "def get_config():\n    c = base(); c.vocab_sise = 3", "vocab_sise"),
        (BASE + "def get_config():\n    c = base(); c.dedup.band = 3", "band"),
        (BASE + "def get_config():\n    return subset('a', max_size=3)", "max_size"),
        (BASE + "get_config = base", "subsets: empty"),
        ("def get_config():\n    pass", "returned NoneType"),
        ("import no_such_module", "wrong.py: line 1: ModuleNotFoundError: No module named 'no_such_module'$"),
        (BASE + "def get_config():\n    return bse()", "wrong.py: line 3: NameError: name 'bse' is not defined"),
        (
            BASE + "def get_config():\n    c = base(); c.valdation_fraction = 1",
            'line 3: .*"valdation_fraction" does not exist .* Did you mean "validation_fraction"',
        ),
        (
            BASE + "def get_config():\n    c = base(); c.subsets.a = 'python:code'; return c",
            "subsets.a='python:code': must be made by subset",
        ),
    ],
)
def test_a_wrong_data_experiment_is_one_line(tmp_path, text, message):
    (tmp_path / "wrong.py").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        recipe.load_config(str(tmp_path / "wrong.py"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 + len(str(tmp_path))
    with pytest.raises(ConfigError, match="no such data experiment"):
        recipe.load_config(str(tmp_path / "missing.py"))


def test_tasks_are_those_of_text_or_of_tokens_in_the_order_of_names():
    c = base()
    c.tokenizer = "t.json"
    c.subsets.web = subset("warc:x/*.gz", tasks=2)
    c.subsets.books = subset("jsonl:x/*.gz", tasks=1)
    c.subsets.k2 = subset("llm360:x/*.jsonl", tasks=2)
    assert recipe.tasks(c) == [Task("books", 0, 1), Task("web", 0, 2), Task("web", 1, 2)]
    assert recipe.tasks(c, tokens=True) == [Task("k2", 0, 2), Task("k2", 1, 2)]
    assert [recipe.task(c, rank) for rank in range(3)] == recipe.tasks(c)
    assert [recipe.task(c, rank, tokens=True) for rank in range(2)] == recipe.tasks(c, tokens=True)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_valid(name):
    config = recipe.load_config(str(REPO / f"experiments/data/{name}.py"))
    assert config.subsets and (REPO / f"experiments/data/{name}.py").read_text().count("\n") <= 80


@pytest.mark.parametrize(("stage", "mix"), [(1, k2.STAGE1_MIX), (2, k2.STAGE2_MIX)])
def test_k2s_recipes_make_the_stores_that_k2s_experiments_name_with_their_repeats(stage, mix):
    config = recipe.load_config(str(REPO / f"experiments/data/k2_stage{stage}.py"))
    stores = {}
    for name in config.subsets:
        stores |= {store: config.subsets[name].repeats * n for store, n in recipe.factors_of(config, name).items()}
    assert stores == mix


def test_txt360_has_its_published_numbers():
    config = recipe.load_config(str(REPO / "experiments/data/txt360.py"))
    d = config.dedup
    assert (d.unit, d.n_grams, d.bands, d.hashes_per_band, d.exact) == ("characters", 13, 9, 13, True)
    web = config.subsets["common-crawl"]
    assert (web.language_threshold, len(config.subsets), web.nfc, web.pii) == (0.65, 15, True, recipe.PII)
    assert all(chosen.priority < web.priority for name, chosen in config.subsets.items() if name != "common-crawl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": float("inf")}, "repeats=inf: must be above 0, and finite"),
        ({"repeats": float("nan")}, "repeats=nan: must be above 0, and finite"),
        ({"upsample": (2, 3)}, "upsample=(2, 3): must be rising pairs"),
        ({"upsample": (("a", "b"),)}, "must be rising pairs"),
        ({"upsample": ((2, 3), (2, 4))}, "must be rising pairs"),
        ({"tasks": "4"}, "tasks='4': must be a whole number, such as 0"),
        ({"quality_threshold": "0.5"}, "quality_threshold='0.5': must be a number or None"),
        ({"languages": "en"}, "languages='en': must be a tuple, such as ('x',)"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(options, message):
    c = recipe.base()
    c.subsets.web = recipe.subset("jsonl:x", **options)
    with pytest.raises(ConfigError, match=re.escape(message)):
        recipe.validate(c)
