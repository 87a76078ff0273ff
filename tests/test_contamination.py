"""Documents that hold text of an evaluation set are found by their words, and no others."""

import io
import json

import numpy as np
import pytest

pytest.importorskip("datatrove", reason="the extra `data`")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from tokenizers.pre_tokenizers import Split  # noqa: E402

from k2jax.data.tokenizer import train_bpe  # noqa: E402
from k2jax.errors import ConfigError, StorageError  # noqa: E402
from k2jax.prepare import clean, recipe  # noqa: E402
from k2jax.prepare.documents import document  # noqa: E402
from k2jax.prepare.rules import contamination  # noqa: E402
from k2jax.prepare.rules.contamination import Contamination, Tokens, hash_n_grams, hash_words, words_of  # noqa: E402
from k2jax.prepare.tokens.recipe_tokenizer import open_tokenizer  # noqa: E402

QUESTION = "A train leaves the station at noon and travels north at sixty miles an hour; when does it arrive?"
CHOICES = ["At three o'clock in the afternoon of the same day, of course", "Never"]


def config_of(*sources: str, n_grams: int = 13, remove: bool = True):
    config = recipe.base()
    config.contamination.sources = sources
    config.contamination.n_grams = n_grams
    config.contamination.remove = remove
    return config


@pytest.fixture
def sets(tmp_path):
    folder = tmp_path / "evals" / "mmlu"
    folder.mkdir(parents=True)
    records = [{"id": 1, "question": "Short?"}, {"question": QUESTION, "choices": CHOICES, "answer": {"text": "x y"}}]
    (folder / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(pa.table({"story": ["Once there was a miller who had three sons, his mill, a donkey and a cat."]}),
                   tmp_path / "evals" / "s.parquet")  # fmt: skip
    plain = "one two three four five six seven eight nine ten eleven twelve 13 14"
    (tmp_path / "evals" / "plain.txt").write_text(plain)
    return [f"jsonl:{folder}/*.jsonl", f"parquet:{tmp_path}/evals/*.parquet", f"text:{tmp_path}/evals/*.txt"]


def check_of(config, tmp_path) -> Contamination:
    contamination.build(0, config=config.to_dict(), out=tmp_path / "out")
    units = contamination.units_of(config)
    return Contamination(contamination.folder_of(tmp_path / "out"), remove=config.contamination.remove, units=units)


def test_documents_with_a_questions_words_are_found_whatever_their_punctuation(sets, tmp_path):
    check = check_of(config_of(*sets), tmp_path)
    reason = "contaminated by mmlu/test.jsonl"
    for text, expected in (
        (QUESTION, reason),
        ("Before. " + QUESTION.upper().replace(" ", "\n- ") + " And after.", reason),
        (QUESTION.partition(" miles")[0] + " knots, as trains do on that line each day", None),  # 12 words
        (QUESTION.partition(" an hour")[0] + " each day", reason),  # 13
        ("It was at three o'clock, in the afternoon of the same day, of course.", reason),  # all of a short item
        ("It was at three o'clock, in the afternoon of the same day.", None),
        ("Short?", None),
        ("a miller who had three sons, his mill, a donkey and a dog", None),
        ("was a miller who had three sons, his mill, a donkey and a cat", "contaminated by evals/s.parquet"),
        ("ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN ELEVEN TWELVE 13", "contaminated by evals/plain.txt"),
        ("", None),
    ):
        assert check.apply(document(text, source="a")) == expected, text
    report = check.report()
    assert report["documents"] == {"checked": 11, "contaminated": 6}
    assert report["sets"] == {"evals/plain.txt": 1, "evals/s.parquet": 1, "mmlu/test.jsonl": 4}
    assert report["hits"][0] == {
        "id": document(QUESTION).id, "source": "a", "evaluation": "mmlu/test.jsonl:2",
        "n_gram": "a train leaves the station at noon and travels north at sixty miles",
    }  # fmt: skip
    index = json.loads((tmp_path / "out/stages/contamination/items.json").read_text())
    counts = index["sets"].values()
    assert sum(n["items"] for n in counts) == 4 and sum(n["too_short"] for n in counts) == 3  # "Short?", "Never", "x y"


def test_contaminated_documents_may_stay_and_are_marked(sets, tmp_path):
    check = check_of(config_of(*sets, remove=False), tmp_path)
    one = document(QUESTION, source="a")
    assert check.apply(one) is None and one.metadata["contaminated"] == "mmlu/test.jsonl:2"
    assert check.report()["documents"]["contaminated"] == 1


def test_an_evaluation_set_that_cannot_be_read_whole_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": QUESTION}) + "\n{broken\n")
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: bad JSON .*a check that skips"):
        check_of(config_of(f"jsonl:{tmp_path}/a.jsonl"), tmp_path)
    (tmp_path / "b.jsonl").write_text('{"q": "Why?"}\n')
    with pytest.raises(ConfigError, match="no text of 8 words"):
        check_of(config_of(f"jsonl:{tmp_path}/b.jsonl"), tmp_path)
    with pytest.raises(ConfigError, match="no file matches"):
        check_of(config_of(f"jsonl:{tmp_path}/none*.jsonl"), tmp_path)


def test_the_index_is_the_same_twice_and_damage_to_it_is_an_error(sets, tmp_path):
    for out in ("x", "y"):
        check_of(config_of(*sets), tmp_path / out)
    folders = [contamination.folder_of(tmp_path / name / "out") for name in "xy"]
    for name in ("hashes.npy", "items.npy", "items.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    (folders[0] / "hashes.npy").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be read"):
        Contamination(folders[0], remove=True)


@pytest.mark.parametrize(
    "question",
    [
        "水は何度で沸騰しますか。海抜零メートルの場合を答えなさい。",
        "光在真空中的传播速度是多少?请用千米每秒作答。",
        "น้ำเดือดที่กี่องศาเซลเซียสที่ระดับน้ำทะเล",
    ],
    ids=["Japanese", "Chinese", "Thai"],
)
def test_questions_in_scripts_without_spaces_are_looked_for(tmp_path, question):
    """By characters: as words they were one or two, "too short", and nobody was told."""
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "q.jsonl").write_text(json.dumps({"q": question}), encoding="utf-8")
    config = recipe.base()
    config.contamination.sources = (f"jsonl:{tmp_path}/evals/*.jsonl",)
    contamination.build(0, config=config.to_dict(), out=tmp_path / "out")
    check = Contamination(tmp_path / "out/stages/contamination", remove=True)
    assert check.apply(document(f"「{question}」", source="a")) == "contaminated by evals/q.jsonl"
    assert check.apply(document(question[:10] + question[-5:], source="a")) is None


WORDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=12)


@given(WORDS, WORDS, st.integers(1, 4))
def test_hashes_agree_exactly_where_n_grams_do(left, right, n):
    def grams(words):
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    hashed = [hash_n_grams(hash_words(words), n) for words in (left, right)]
    assert len(np.intersect1d(*hashed)) == len(grams(left) & grams(right))
    assert [len(np.unique(one)) for one in hashed] == [len(grams(left)), len(grams(right))]


def test_words():
    expected = ["don", "t", "stop", "\u00e9t\u00e9", "2", "\u65e5", "\u672c"]
    assert words_of("Don't-stop, E\u0301t\u00e9_2!\n\u65e5\u672c") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("भारत की राजधानी?", 3),  # Hindi, with vowels
        ("இந்தியாவின் தலைநகரம்", 2),  # Tamil
        ("مُدَرّس كتاب", 2),  # Arabic, the first word with its vowels
        ("ภาษา", 4),  # Thai, by characters
        ("a\u0301\u0302b", 1),
    ],
)
def test_marks_are_of_the_word_that_they_stand_on(text, expected):
    assert len(words_of(text)) == expected


def test_what_is_not_seen_hides_nothing(sets, tmp_path):
    check = check_of(config_of(*sets), tmp_path)
    for unseen in "\u00ad\u200b\u200c\u200d\u2060\ufe0f\ufeff":
        assert check.apply(document(QUESTION.replace("a", f"a{unseen}"), source="a")), hex(ord(unseen))


def test_a_document_is_counted_for_each_set_that_it_holds_text_of(tmp_path):
    """Also where two sets have the same text: that of one is a copy of another's in many a collection."""
    other = "Once there was a miller who had three sons, his mill, a donkey and a cat."
    for name, texts in {"a": [QUESTION], "b": [other], "copy_of_a": [other[:9], QUESTION]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"q": text}) + "\n" for text in texts))
    check = check_of(config_of(*(f"jsonl:{tmp_path}/{name}.jsonl" for name in ("a", "b", "copy_of_a"))), tmp_path)
    for text in (f"{QUESTION} {other}", QUESTION, f"{other} {QUESTION}", "neither of them is in this one"):
        check.apply(document(text, source="a"))
    folder, report = tmp_path.name, check.report()
    assert report["sets"] == {f"{folder}/a.jsonl": 3, f"{folder}/b.jsonl": 2, f"{folder}/copy_of_a.jsonl": 3}
    assert report["documents"] == {"checked": 4, "contaminated": 3}
    assert report["hits"][0]["evaluation"] == f"{folder}/a.jsonl:1"


def tokenizers_of(folder) -> dict:
    """A byte-level one, whose words begin with their space, and SentencePiece's, whose texts do, too."""
    sentences = [QUESTION, *CHOICES, "His mill, a donkey and a cat had three sons.", "Some other words stand here."]
    train_bpe(sentences * 9, 400).save(folder / "bytes.json")
    model = io.BytesIO()
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 9), model_writer=model, model_type="bpe", vocab_size=400, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=3, num_threads=1,
    )  # fmt: skip
    (folder / "pieces.model").write_bytes(model.getvalue())
    return {path.name: str(path) for path in (folder / "bytes.json", folder / "pieces.model")}


@pytest.mark.parametrize("name", ["bytes.json", "pieces.model"])
def test_n_grams_of_tokens_are_those_that_a_model_sees(sets, tmp_path, name):
    config = config_of(*sets)
    config.contamination.unit, config.tokenizer = "tokens", tokenizers_of(tmp_path)[name]
    recipe.validate(with_subset(config))
    check, tokenizer = check_of(config, tmp_path), open_tokenizer(config.tokenizer)
    ids = tokenizer.encode(QUESTION)
    twelve, thirteen = (tokenizer.decode(ids[:n]) for n in (12, 13))
    assert len(ids) > 20 and QUESTION.startswith(thirteen)
    reason = "contaminated by mmlu/test.jsonl"
    for text, expected in (
        (QUESTION, reason),
        ("Some other words stand here.\n" + QUESTION, reason),
        ("Some other words stand here. " + QUESTION + " Some other words.", reason),
        (thirteen, reason),
        (twelve, None),
        (QUESTION.upper(), None),
        ("Some other words stand here.", None),
        ("", None),
    ):
        assert check.apply(document(text, source="a")) == expected, text
    assert check.report()["hits"][0]["n_gram"] == thirteen
    index = json.loads((tmp_path / "out/stages/contamination/items.json").read_text())
    assert min(index["lengths"]) >= contamination.SHORTEST_TOKENS and max(index["lengths"]) == 13


def test_a_short_item_is_found_whole_whatever_stands_before_it(tmp_path):
    """Its first token is another behind a space than behind a line feed."""
    for name, path in tokenizers_of(tmp_path).items():
        tokenizer = open_tokenizer(path)
        words = "Some other words stand here, his mill, a donkey and a cat had three sons".split()
        item = next(" ".join(words[:n]) for n in range(len(words)) if len(tokenizer.encode(" ".join(words[:n]))) >= 12)
        n = len(tokenizer.encode(item)) + 5
        (tmp_path / "q.jsonl").write_text(json.dumps({"q": item}))
        config = config_of(f"jsonl:{tmp_path}/q.jsonl", n_grams=n)
        config.contamination.unit, config.tokenizer = "tokens", path
        check = check_of(config, tmp_path / f"of {name}")
        for before in ("", "x ", "x\n", "x.\n\n", "- "):
            assert check.apply(document(f"{before}{item}\nand more", source="a")), (name, before)
            assert not check.apply(document(f"{before}{item[2:]}\nand more", source="a"))


def test_a_short_item_is_found_whatever_stands_behind_it(tmp_path):
    """Its last token is another there: as GPT-4's and Llama 3's, this takes line feeds to marks before them."""
    item = "What did the old miller with a mill give to the youngest of his three sons?"
    split = Split(Regex(r" ?\w+| ?[^\s\w]+[\r\n]*|\s+"), "isolated")
    tokenizer = Tokenizer(models.BPE())
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator([f"{item}{end}yes" for end in ENDS] * 9, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "q.jsonl").write_text(json.dumps({"q": item}))
    config = config_of(f"jsonl:{tmp_path}/q.jsonl", n_grams=40)
    config.contamination.unit, config.tokenizer = "tokens", str(tmp_path / "tokenizer.json")
    check = check_of(config, tmp_path)
    for end in ENDS:
        for begin in ("", "1.\n", "Q: "):
            assert check.apply(document(f"{begin}{item}{end}", source="a")), (begin, end)
    assert not check.apply(document(item.replace("three", "four"), source="a"))


ENDS = ("", "\n", "\n\n", " ", '"', '",\n')


def with_subset(config):
    config.subsets.web = recipe.subset("jsonl:x")
    return config


def test_tokens_need_a_tokenizer_that_is_there(sets, tmp_path):
    config = with_subset(config_of(*sets))
    config.contamination.unit = "tokens"
    with pytest.raises(ConfigError, match="contamination.unit='tokens': needs tokenizer"):
        recipe.validate(config)
    config.tokenizer = str(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="none.json"):
        clean.check(config)
    config.contamination.unit = "letters"
    with pytest.raises(ConfigError, match="contamination.unit='letters': must be one of words, tokens"):
        recipe.validate(config)


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4))
def test_hashes_of_ids_agree_exactly_where_n_grams_do(left, right, n):
    hashes = Tokens(None).hashes  # of ids, for which it needs no tokenizer
    found = [hash_n_grams(hashes(ids), n) for ids in (left, right)]
    grams = [{tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)} for ids in (left, right)]
    assert len(np.intersect1d(*found)) == len(grams[0] & grams[1])
