"""The tokenizer gives back every text, keeps K2's layout of ids, and no document can forge a special token."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from k2jax.data import tokenizer as tk
from k2jax.errors import ConfigError

REPO = Path(__file__).parent.parent
# Special tokens all over the text, so that merges would spell them if they could.
TEXTS = [
    f"def f_{i}(x):\n    return x * {i}  # the sum of {i} parts <s>{i}</s></s><fim_prefix><0x41>\n" * 3
    for i in range(200)
]
TEXTS += [" ".join(f"{a}{b}{a}" for a in "abcdefghij" for b in "klmnopqrst"), "é ü 日本"]
TEXTS += ["</s>\n<s>\n<fim_prefix>\n" * 500]
SPECIAL = (*tk.CONTROL_TOKENS, *tk.K2_SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def trained():
    return tk.train_bpe(TEXTS, 512)


@pytest.fixture
def saved(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(trained.to_str(), encoding="utf-8")
    return path


@given(st.text())
@example("\u2581 \u2581\u2581x")
@example("\t\n\r\n  \x0b\x0c\x85\u2028 a  b   ")
@example("\x00\x00a\x00")
@example("\U0001f469\u200d\U0001f680 e\u0301 \ufeff\uffff\U0010ffff")
@example("</s><s><unk><0x41><fim_prefix>")
def test_every_text_comes_back_exactly(trained, text):
    for skip in (True, False):
        assert trained.decode(trained.encode(text), skip_control=skip) == text


def test_ids_have_k2s_layout(trained):
    vocabulary = {trained.id_to_token(id): id for id in range(trained.vocab_size)}
    assert sorted(vocabulary.values()) == list(range(512))
    assert [vocabulary[token] for token in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert [vocabulary[f"<0x{byte:02X}>"] for byte in range(256)] == list(range(3, 259))
    assert [vocabulary[token] for token in tk.K2_SPECIAL_TOKENS] == list(range(512 - 18, 512))
    assert len(tk.K2_SPECIAL_TOKENS) == 18 and tk.K2_SPECIAL_TOKENS[0] == "<fim_prefix>"
    assert trained.token_to_id(tk.EOS) == 2


@given(st.lists(st.sampled_from((*SPECIAL, "<0x41>", " ", "a", "<", "\n")), max_size=8))
def test_a_document_cannot_forge_a_special_token(trained, parts):
    text = "".join(parts)
    ids = trained.encode(text)
    assert not set(ids) & {trained.token_to_id(token) for token in SPECIAL}
    assert trained.token_to_id("<0x41>") not in ids
    assert trained.decode(ids) == text


def test_no_merge_spells_a_special_token_however_often_the_texts_hold_it(trained):
    merges = {"".join(pair) for pair in json.loads(trained.to_str())["model"]["merges"]}
    assert len(merges) > 100 and not merges & {*SPECIAL, *tk.BYTE_TOKENS}


def test_special_tokens_decode_and_are_left_out_on_request(trained):
    ids = [*trained.encode("a b"), 2, trained.token_to_id("<fim_suffix>")]
    assert trained.decode(ids) == "a b</s><fim_suffix>"
    assert trained.decode(ids, skip_control=True) == "a b"


def test_rare_characters_become_bytes_never_unknown(trained):
    assert trained.encode("\U0001f642") == [3 + byte for byte in "\U0001f642".encode()]
    assert 0 not in trained.encode("".join(map(chr, range(0x80, 0xD000, 7))))


def test_digits_stand_alone_and_words_keep_their_space(trained):
    tokens = [trained.id_to_token(id) for id in trained.encode("the 2024 parts")]
    assert tokens[-5:] == ["2", "0", "2", "4", " parts"]


def test_training_is_the_same_in_another_process(trained):
    code = (
        "import sys, json, hashlib; from k2jax.data.tokenizer import train_bpe;"
        "print(hashlib.sha256(train_bpe(json.load(sys.stdin), 512).to_str().encode()).hexdigest())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(TEXTS),
        text=True,
        cwd=REPO,
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert answer.stdout.strip() == hashlib.sha256(trained.to_str().encode()).hexdigest()


def test_a_loaded_tokenizer_encodes_the_same_and_special_tokens_as_text(trained, saved):
    loaded = tk.load_tokenizer(saved)
    expected = [trained.encode(text) for text in TEXTS]
    assert [loaded.encode(text) for text in TEXTS] == loaded.encode_batch(TEXTS) == expected
    assert 2 not in loaded.encode("</s>")
    assert tk.tokenizer_sha256(saved) == hashlib.sha256(saved.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:1000], lambda raw: b"", lambda raw: b"\xff" + raw, lambda raw: b"{}"]
)
def test_a_damaged_file_is_one_clear_line(saved, damage):
    saved.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(ConfigError, match=f"^tokenizer {saved}: cannot be read") as error:
        tk.load_tokenizer(saved)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    for call in (tk.load_tokenizer, tk.tokenizer_sha256):
        with pytest.raises(ConfigError, match="nowhere.json"):
            call(tmp_path / "nowhere.json")


def test_a_vocabulary_that_cannot_be_filled_is_refused():
    with pytest.raises(ConfigError, match="vocab_size=277"):
        tk.train_bpe(TEXTS, 277)
    with pytest.raises(ConfigError, match="vocab_size=5000.*give only"):
        tk.train_bpe(["a short text"], 5000)
    with pytest.raises(ConfigError, match="give only"):
        tk.train_bpe([], 512)
