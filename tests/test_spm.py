"""Stores have SentencePiece's own ids, readers a tokenizer.json with the same, and where they differ all stops."""

import io
import json
import random
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from k2jax.data.tokenizer import K2_SPECIAL_TOKENS, Tokenizer, load_tokenizer
from k2jax.errors import ConfigError
from k2jax.prepare.tokens import spm
from k2jax.prepare.tokens.recipe_tokenizer import k2_tokens, open_tokenizer

sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("transformers")
LLAMA = {
    "model_type": "bpe",
    "vocab_size": 800,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}
SYMBOLS = ["<mask>", "<mask>x", "\n\n", "\u2581\u2581", "日", "7"]
T5 = {"model_type": "unigram", "vocab_size": 600, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
MODELS = {
    "llama": LLAMA,
    "spaces squeezed": {**LLAMA, "remove_extra_whitespaces": True},
    "no prefix, no bytes": {**LLAMA, "add_dummy_prefix": False, "byte_fallback": False, "vocab_size": 500},
    "symbols": {**LLAMA, "user_defined_symbols": SYMBOLS},
    "charsmap": {**LLAMA, "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "t5": T5,
    "t5, symbols": {**T5, "user_defined_symbols": SYMBOLS},
}
FILES = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
TEXTS = [path.read_bytes().decode() for path in FILES[:40] if 1000 < path.stat().st_size < 20_000]
UNICODE = ["Größe  naïve \t日本語テキスト\r\n\U0001f469\u200d\U0001f680 ﬁ①\u3000Ω\u2126½", "안녕하세요 हिन्दी\n\n x"]
PARTS = ["</s>", "<s>", "<unk>", "<pad>", "<0x41>", "<mask>", "x", " ", "  ", "\u2581", "a", "the", "\n", "\r\n", "-"]
PARTS += ["\x00", "é", "\ue000", "    self.x = ", "0", "7", "10", "\n\n", "<", "日"]
texts = st.text(st.characters(exclude_categories=["Cs", "M"]), max_size=30)
texts |= st.lists(st.sampled_from(PARTS), max_size=10).map("".join)


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


def pair(path: Path) -> tuple[spm.Encoder, Tokenizer]:
    """SentencePiece and the tokenizer.json made of the same model, as readers load it."""
    open_tokenizer(path).save(path.with_suffix(".json"))
    tokenizer = load_tokenizer(path.with_suffix(".json"))
    return spm.Encoder(path, tokenizer), tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=MODELS)
def both(request, folder):
    return pair(train(folder / f"{request.param}.model", **MODELS[request.param]))


@pytest.fixture(scope="module")
def llama(folder):
    path = folder / "llama.model"
    return path if path.exists() else train(path, **LLAMA)


@pytest.fixture(scope="module")
def llama_pair(llama):
    return pair(llama)


def library(path: Path):
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def difference(library: spm.Encoder, ours: Tokenizer, pieces: list[str]) -> str:
    """What the check says of a document; empty if both agree."""
    try:
        library.check([ours.encode_pieces(pieces)], [pieces], ["a"])
    except ConfigError as error:
        return str(error)
    return ""


def test_documents_have_one_encoding(both):
    for text in [*TEXTS, *UNICODE]:
        third = len(text) // 3
        for pieces in ([text], [text[:third], text[third : 2 * third], text[2 * third :]]):
            assert not difference(*both, pieces)


@settings(max_examples=100)
@given(texts)
@example("")
@example("   ")
@example("\u2581\u2581 ")
@example("<mask>x<mask> \n\n\n日77  </s>")
@example("    ".join("aaaaaaaaaaa"))
def test_any_text_is_text_to_both(both, text):
    """To SentencePiece itself "<mask>" is its symbol wherever it stands."""
    library, ours = both
    [[ids]] = library.encode_documents([[text]])
    unknown = {id for id in ours.control_ids if ours.id_to_token(id) == "<unk>"}
    assert not (set(ids) - unknown) & ours.control_ids and not (set(ours.encode(text)) - unknown) & ours.control_ids
    assert ours.encode(text) == ids


@settings(max_examples=100)
@given(st.lists(st.text(), max_size=3))
def test_any_document_has_one_encoding_by_a_model_as_llamas(llama, llama_pair, pieces):
    (ours, tokenizer), alone = llama_pair, library(llama)
    assert not difference(ours, tokenizer, pieces)
    assert ours.encode_documents([["".join(pieces)]]) == [[alone.encode("".join(pieces))]]
    if "\u2581" not in "".join(pieces):
        assert tokenizer.decode(sum(tokenizer.encode_pieces(pieces), [])) == "".join(pieces)


def test_continuing_pieces_have_no_space_before_them(llama):
    ours, tokenizer = pair(llama)
    [[first, rest, last]] = ours.encode_documents([["if x:\n", "    return", " y"]])
    assert first == library(llama).encode("if x:\n")
    assert tokenizer.decode([*first, *rest, *last]) == "if x:\n    return y"
    assert tokenizer.id_to_token(rest[0]) == "\u2581" * 4 != library(llama).encode("    return", out_type=str)[0]


def test_where_both_differ_the_document_and_the_remedy_are_told(llama, tmp_path):
    ours, tokenizer = pair(llama)
    file = json.loads(tokenizer.to_str())
    merges = file["model"]["merges"]
    file["model"]["merges"] = [pair for pair in merges if "".join(pair) != "\u2581the"]
    other = Tokenizer(json.dumps(file))
    documents = [["no such word"], ["one,", " and the other"]]
    with pytest.raises(ConfigError, match="^document b.txt: token ") as error:
        ours.check(other.encode_documents(documents), documents, ["a.txt", "b.txt"])
    the = tokenizer.token_to_id("\u2581the")
    for part in ("'and the other'", f"is {the} ('\u2581the') by SentencePiece and ", "a copy of that tokenizer.json"):
        assert part in str(error.value)
    shorter = [[ids[:-1] for ids in one] for one in tokenizer.encode_documents(documents)]
    with pytest.raises(ConfigError, match="by SentencePiece and nothing by the tokenizer.json"):
        ours.check(shorter, documents, ["a.txt", "b.txt"])


def test_k2s_special_tokens_stand_behind_the_vocabulary(llama):
    plain = open_tokenizer(llama)
    tokenizer = k2_tokens(plain)
    assert tokenizer.vocab_size == 818 and (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert [tokenizer.token_to_id(token) for token in K2_SPECIAL_TOKENS] == list(range(800, 818))
    assert k2_tokens(tokenizer).to_str() == tokenizer.to_str()
    ids = tokenizer.encode("</s><s><fim_prefix>")
    assert not {0, 1, 2, 800} & set(ids) and tokenizer.decode(ids) == "</s><s><fim_prefix>"
    assert not difference(spm.Encoder(llama, tokenizer), tokenizer, [*TEXTS[:5], "</s><fim_prefix>"])
    names = [tokenizer.id_to_token(id) for id in range(800)]
    assert names == [library(llama).id_to_piece(id) for id in range(800)]


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"model_type": "char"}, "it is a model of type char"),
        ({"model_type": "word"}, "it is a model of type word"),
        ({**LLAMA, "treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ],
)
def test_what_has_no_equal_is_refused(tmp_path, options, problem):
    path = train(tmp_path / "a.model", **{"vocab_size": 300, "hard_vocab_limit": False, **options})
    with pytest.raises(ConfigError, match=f"^tokenizer {path}: no tokenizer.json can hold it .{problem}") as error:
        open_tokenizer(path)
    assert "\n" not in str(error.value)


def test_pieces_of_one_score_merge_in_another_order_and_are_found(llama, tmp_path):
    """What the file cannot say, the documents show."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(llama.read_bytes())
    merged = [piece for piece in model.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1]
    for piece in merged:
        piece.score = -1.0
    (tmp_path / "a.model").write_bytes(model.SerializeToString())
    both = pair(tmp_path / "a.model")
    assert any(difference(*both, [text]) for text in TEXTS)


def test_pieces_in_any_order_of_scores(llama, tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(llama.read_bytes())
    merged = [piece for piece in model.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1]
    scores = [piece.score for piece in merged]
    random.Random(0).shuffle(scores)
    for piece, score in zip(merged, scores, strict=True):
        piece.score = score
    (tmp_path / "a.model").write_bytes(model.SerializeToString())
    both = pair(tmp_path / "a.model")
    assert not [message for text in TEXTS if (message := difference(*both, [text]))]


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, -1, -100])
def test_a_damaged_file_is_one_clear_line(llama, tmp_path, keep):
    path = tmp_path / "a.model"
    path.write_bytes(llama.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=f"^tokenizer {path}: is no SentencePiece model") as error:
        open_tokenizer(path)
    assert "\n" not in str(error.value)


@settings(max_examples=50)
@given(st.binary(max_size=200))
def test_any_bytes_are_one_clear_line(data):
    with pytest.raises(ConfigError, match="^tokenizer any: is no SentencePiece model"):
        spm.convert(data, "any")


def test_a_missing_file_and_a_text_are_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.model: cannot be read"):
        open_tokenizer(tmp_path / "nowhere.model")
    (tmp_path / "text.model").write_text('{"version": "1.0"}')
    with pytest.raises(ConfigError, match="text.model: is no SentencePiece model"):
        open_tokenizer(tmp_path / "text.model")


def test_the_packages_are_imported_for_a_model_alone(llama):
    code = (
        "import sys; from k2jax.prepare import build; from k2jax.prepare.tokens import recipe_tokenizer as r;"
        "heavy = {'sentencepiece', 'transformers'};"
        "print(sorted(heavy & set(sys.modules))); r.open_tokenizer(sys.argv[1]);"
        "print(sorted({'torch', 'tensorflow', 'jax'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code, llama], text=True, capture_output=True, check=True)
    assert answer.stdout == "[]\n[]\n"


@pytest.mark.parametrize("package", ["sentencepiece", "transformers.convert_slow_tokenizer"])
def test_without_the_packages_the_extra_is_named(llama, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'k2jax\[sentencepiece\]'"):
        open_tokenizer(llama)
