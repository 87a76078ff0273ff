"""Characters that a tokenizer does not know are counted and said; one that drops them without a trace is refused."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

pytest.importorskip("datatrove")

from k2jax.data.tokenizer import load_tokenizer, train_bpe  # noqa: E402
from k2jax.errors import ConfigError  # noqa: E402
from k2jax.prepare import build, recipe  # noqa: E402

ENGLISH = [f"The quick brown fox jumps over the lazy dog, {i} times." for i in range(60)]
RUSSIAN = [f"Съешь же ещё этих мягких французских булок, да выпей чаю {i}." for i in range(40)]


def trained(folder: Path, kind: str) -> Path:
    """Of the English texts."""
    whole = ["</s>", "<unk>"]
    model, trainer = {
        "words": (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(special_tokens=whole)),
        "pairs": (models.BPE(), trainers.BpeTrainer(special_tokens=whole[:1], vocab_size=300)),
        "some pairs": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer(special_tokens=whole, vocab_size=300)),
        "bytes": (models.BPE(), trainers.BpeTrainer(
            special_tokens=whole[:1], vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )),
    }[kind]  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel() if kind == "bytes" else pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(ENGLISH, trainer)
    tokenizer.save(str(folder / f"{kind}.json"))
    return folder / f"{kind}.json"


def prepared(folder: Path, tokenizer: Path, texts: list[str]) -> dict:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    c = recipe.base()
    c.tokenizer, c.validation_fraction, c.dedup.near = str(tokenizer), 0.0, False
    c.subsets.web = recipe.subset(f"jsonl:{folder}/a.jsonl")
    return build.build(c.lock(), folder / "out", workers=1)[0]


@pytest.mark.parametrize("kind", ["words", "some pairs"])
def test_what_is_unknown_is_counted_in_data_card_and_words(tmp_path, kind):
    path = trained(tmp_path, kind)
    data = prepared(tmp_path, path, [*ENGLISH, *RUSSIAN])
    tokenizer = load_tokenizer(path)
    expected = sum(tokenizer.encode(text).count(tokenizer.token_to_id("<unk>")) for text in [*ENGLISH, *RUSSIAN])
    assert data["stores"]["web"]["unknown_tokens"] == expected > len(RUSSIAN)
    assert f"{expected:,} of the tokens of web" in build.describe(data)
    card = (tmp_path / "out" / "card" / "data.md").read_text()
    assert "unknown" in card and f"{expected:,}" in card


def test_a_tokenizer_that_drops_what_it_does_not_know_is_refused_before_the_first_stage(tmp_path):
    with pytest.raises(ConfigError, match=r"pairs.json: drops .*Ж.* whatever else its vocabulary lacks"):
        prepared(tmp_path, trained(tmp_path, "pairs"), ENGLISH)
    assert not (tmp_path / "out").exists()


def test_bytes_know_everything(tmp_path):
    data = prepared(tmp_path, trained(tmp_path, "bytes"), RUSSIAN)
    assert data["stores"]["web"]["unknown_tokens"] == 0 and "lost" not in build.describe(data)
    ours = train_bpe(ENGLISH, 330)
    assert ours.dropped() == "" and ours.unk_id == 0 and 0 not in ours.encode(RUSSIAN[0])


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b'{"text": "caf\xe9 cr\xe8me"}\n' * 9, {}, r'9 not UTF-8; the first: a.jsonl:1: .*encoding="detect"'),
        (b"id,text\n1,abc\n2,def\n", {}, r"3 bad JSON; the first: a.jsonl:1: .*one JSON object a line"),
        (b'{"title": 1.5, "body": "abc"}\n', {"text": "{title}\n{body}"}, r"text is no string; the first: a.jsonl:1"),
    ],
)
def test_where_nothing_can_be_read_it_is_said_where_and_what_may_help(tmp_path, content, options, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    c = recipe.base()
    c.vocab_size, c.subsets.web = 330, recipe.subset(f"jsonl:{tmp_path}/a.jsonl", **options)
    with pytest.raises(ConfigError, match=message):
        build.build(c.lock(), tmp_path / "out", workers=1)
