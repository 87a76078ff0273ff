"""A converted SentencePiece model gives the ids of the sentencepiece library, and no document can forge a token."""

import io
import random
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from k2jax.data.tokenizer import K2_SPECIAL_TOKENS, load_tokenizer
from k2jax.errors import ConfigError
from k2jax.prepare.sentencepiece_model import convert, eos_id, k2_tokens, open_tokenizer, parse

sentencepiece = pytest.importorskip("sentencepiece")
LLAMA = {
    "model_type": "bpe",
    "vocab_size": 800,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}
SYMBOLS = ["<mask>", "<mask>x", "\n\n", "\u2581\u2581", "日"]
MODELS = {
    "llama": LLAMA,
    "without bytes": {**LLAMA, "byte_fallback": False, "vocab_size": 500},
    "spaces squeezed": {**LLAMA, "remove_extra_whitespaces": True},
    "no prefix, symbols": {**LLAMA, "add_dummy_prefix": False, "user_defined_symbols": SYMBOLS},
    "charsmap": {**LLAMA, "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "charsmap, spaces kept": {**LLAMA, "normalization_rule_name": "nmt_nfkc_cf"},
}
UNIGRAM = {
    "t5": {"model_type": "unigram", "vocab_size": 600, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "identity": {"model_type": "unigram", "vocab_size": 600, "normalization_rule_name": "identity"},
}
FILES = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
TEXTS = [path.read_bytes().decode() for path in FILES[:60] if 1000 < path.stat().st_size < 40_000]
TEXTS += [path.read_text() for path in sorted(Path(__file__).parent.glob("test_t*.py"))]
UNICODE = ["Größe  naïve \t日本語テキスト\r\n\U0001f469\u200d\U0001f680 ﬁ①\u3000Ω\u2126½"]
UNICODE += ["안녕하세요 हिन्दी עברית العربية\n\n x"]
PARTS = ["</s>", "<s>", "<unk>", "<0x41>", "<mask>", "x", " ", "  ", "\u2581", "a", "the", "\n", "\r\n", "-", "<", "日"]
PARTS += ["\x00", "\x01", "ﬁ", "\u3000", "é", "\ue000", "\ue001", "\ufffd", "    self.x = ", "0", "10", "\n\n"]
texts = st.text(st.characters(exclude_categories=["Cs", "M"])) | st.lists(st.sampled_from(PARTS)).map("".join)


def train(path: Path, **options) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in [*TEXTS[::2], *UNICODE] for line in text.split("\n")),
        model_writer=model,
        minloglevel=3,
        num_threads=1,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


def pair(path: Path):
    """The library's encoding and ours, through the file that training and generation load."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    convert(path).save(str(path.with_suffix(".json")))
    return library, load_tokenizer(path.with_suffix(".json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=MODELS)
def bpe(request, folder):
    return pair(train(folder / f"{request.param}.model", **MODELS[request.param]))


@pytest.fixture(scope="module", params=UNIGRAM)
def unigram(request, folder):
    return pair(train(folder / f"{request.param}.model", **UNIGRAM[request.param]))


@pytest.fixture(scope="module")
def llama(folder):
    return train(folder / "llama.model", **LLAMA)


@pytest.fixture(scope="module")
def llama_pair(llama):
    return pair(llama)


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_files_have_the_librarys_ids_and_come_back_as_from_the_library(bpe):
    library, ours = bpe
    for text in [*TEXTS, *UNICODE]:
        ids = library.encode(text)
        assert encode(ours, text) == ids
        assert library.unk_id() in ids or ours.decode(ids) == library.decode(ids)
    assert ours.get_vocab_size() == len(library)
    ids = range(len(library))
    assert [ours.id_to_token(id) for id in ids] == [library.id_to_piece(id) for id in ids]


@settings(max_examples=300)
@given(texts)
@example("")
@example("   ")
@example("\u2581\u2581 ")
@example("<mask>x<mask> \n\n\n日  </s>")
@example("    ".join("aaaaaaaaaaa"))
def test_any_text_has_the_librarys_ids(bpe, text):
    library, ours = bpe
    assert encode(ours, text) == library.encode(text)


@settings(max_examples=300)
@given(st.text())
def test_any_text_at_all_has_them_without_a_charsmap(llama_pair, text):
    library, ours = llama_pair
    assert encode(ours, text) == library.encode(text)


def test_unigram_differs_only_between_segmentations_that_score_alike(unigram):
    library, ours = unigram
    total = differing = 0
    for text in [*TEXTS, *UNICODE]:
        expected, found = library.encode(text), encode(ours, text)
        total += len(expected)
        differing += sum(a != b for a, b in zip(expected, found, strict=False))
        scores = [sum(map(library.get_score, ids)) for ids in (expected, found)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-6)
        assert len(text) > 200 or library.unk_id() in expected or ours.decode(found) == library.decode(expected)
    assert differing < 1e-3 * total


@settings(max_examples=300)
@given(texts)
@example("</s>x</s> <unk>\ue000<")
def test_unigram_of_any_text_scores_as_the_librarys_and_forges_no_token(unigram, text):
    library, ours = unigram
    expected, found = library.encode(text), encode(ours, text)
    assert sum(map(library.get_score, expected)) == pytest.approx(sum(map(library.get_score, found)), rel=1e-5)
    assert not {ours.token_to_id("</s>"), ours.token_to_id("<pad>"), ours.token_to_id("<s>")} & set(found)


def test_special_tokens_decode_and_a_document_cannot_forge_them(llama):
    tokenizer = k2_tokens(convert(llama))
    ids = encode(tokenizer, "</s><s><fim_prefix>")
    assert not {0, 1, 2, 800} & set(ids) and tokenizer.decode(ids) == "</s><s><fim_prefix>"
    assert tokenizer.decode([*encode(tokenizer, "a"), 2, 800], skip_special_tokens=False) == "a</s><fim_prefix>"


def test_k2s_special_tokens_stand_behind_the_vocabulary(llama):
    tokenizer = k2_tokens(convert(llama))
    assert tokenizer.get_vocab_size() == 818 and tokenizer.id_to_token(2) == "</s>"
    assert [tokenizer.token_to_id(token) for token in K2_SPECIAL_TOKENS] == list(range(800, 818))
    assert k2_tokens(tokenizer).to_str() == tokenizer.to_str()
    for text in TEXTS[:5]:
        assert encode(tokenizer, text) == encode(convert(llama), text)


def test_eos_is_the_one_special_token_that_ends_documents(llama):
    assert eos_id(convert(llama)) == 2
    tokenizer = Tokenizer(models.BPE({"</s>": 0, "a": 1}, []))
    with pytest.raises(ConfigError, match="^tokenizer: none of its special tokens"):
        eos_id(tokenizer)  # "</s>" is an ordinary token of it
    tokenizer.add_special_tokens(["<|endoftext|>"])
    assert eos_id(tokenizer) == 2
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    with pytest.raises(ConfigError, match=r"^tokenizer: <\|endoftext\|> and <eos>"):
        eos_id(tokenizer)


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"model_type": "char"}, "model type char"),
        ({"model_type": "word"}, "model type word"),
        ({**LLAMA, "treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({**LLAMA, "user_defined_symbols": ["<mask>"]}, "user-defined symbols"),
        ({**LLAMA, "control_symbols": ["|"]}, "control piece '|'"),
        ({"model_type": "unigram", "byte_fallback": True, "vocab_size": 700}, "Unigram with byte_fallback"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_equal_is_refused(tmp_path, options, problem):
    path = train(tmp_path / "a.model", **{"vocab_size": 300, "hard_vocab_limit": False, **options})
    with pytest.raises(ConfigError, match=f"^tokenizer {path}: .*{problem}.*cannot be converted exactly") as error:
        convert(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", range(3))
def test_pieces_in_any_order_of_scores_merge_as_in_the_library(llama, tmp_path, seed):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(llama.read_bytes())
    merged = [piece for piece in model.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1]
    scores = [piece.score for piece in merged]
    random.Random(seed).shuffle(scores)
    for piece, score in zip(merged, scores, strict=True):
        piece.score = score
    (tmp_path / "a.model").write_bytes(model.SerializeToString())
    library, ours = pair(tmp_path / "a.model")
    for text in TEXTS[:20]:
        assert encode(ours, text) == library.encode(text)


def test_two_pieces_with_one_score_are_refused(llama, tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(llama.read_bytes())
    model.pieces[270].score = model.pieces[269].score
    (tmp_path / "a.model").write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match="have one score"):
        convert(tmp_path / "a.model")


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, -1, -100])
def test_a_damaged_file_is_one_clear_line(llama, tmp_path, keep):
    path = tmp_path / "a.model"
    path.write_bytes(llama.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=f"^tokenizer {path}: is no SentencePiece model") as error:
        convert(path)
    assert "\n" not in str(error.value)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_model_or_one_clear_line(data):
    with pytest.raises(ConfigError, match="^tokenizer any: is no SentencePiece model"):
        parse(data, "any")


def test_a_recipes_tokenizer_is_either_kind_of_file(llama, llama_pair):
    both = [open_tokenizer(path) for path in (llama, llama.with_suffix(".json"))]
    assert both[0].to_str() == both[1].to_str()
    assert encode(both[1], "</s> a") == llama_pair[0].encode("</s> a")


def test_a_missing_file_and_a_text_are_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.model: cannot be read"):
        convert(tmp_path / "nowhere.model")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ConfigError, match="is no SentencePiece model"):
        convert(tmp_path / "tokenizer.json")


def test_the_library_is_not_needed(llama):
    code = (
        "import sys; from k2jax.prepare.sentencepiece_model import convert; convert(sys.argv[1]);"
        "print(sorted({'sentencepiece', 'google', 'jax', 'tensorflow', 'torch', 'transformers'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code, llama], text=True, capture_output=True, check=True)
    assert answer.stdout == "[]\n"
