"""Whatever a tokenizer.json has switched on: no text is lost, none becomes a control token, and pieces fit together."""

import copy
import json
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from k2jax.data import tokenizer as tk
from k2jax.errors import ConfigError

WORDS = "def read_file(path):\n    with open(path) as file:\n        return file.read()  # the text of a file\n"
CONTROL = ("<unk>", "<s>", "</s>", "<user>", "<|tool|>", "<mask>")
PARTS = [*CONTROL, "<", "s>", "</", "the", "   ", " ", "\n", "é", "日", "a", "\u2581", "|", "<0x41>"]
texts = st.text(max_size=20) | st.lists(st.sampled_from(PARTS), max_size=8).map("".join)
SPACES = {"Prepend", "Metaspace first", "Metaspace always", "ByteLevel", "none"}


def make(kind: str) -> Tokenizer:
    """A lossless tokenizer by merges, which puts a space before a text in one of the ways that files have."""
    byte_tokens = dict.fromkeys(tk.BYTE_TOKENS)
    vocab = dict.fromkeys(["<unk>", "<s>", "</s>", *byte_tokens, "\u2581", " ", "\n", *"<>/sthea"])
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("t", "h"), ("th", "e"), ("<", "s>"), ("\u2581", "\u2581")]
    space, back = "\u2581", [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "ByteLevel":
        vocab = dict.fromkeys(["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
        merges[-1] = ("\u0120", "\u0120")
    ids = {text: id for id, text in enumerate(vocab | dict.fromkeys(map("".join, merges)))}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    if kind == "Prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    elif kind.startswith("Metaspace"):
        scheme = kind.split()[1]
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    elif kind == "ByteLevel":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=True)])
    if kind == "ByteLevel":
        tokenizer.decoder = decoders.ByteLevel()
    else:
        back = back if kind != "none" else back[1:]
        tokenizer.decoder = decoders.Sequence([*back, *([] if kind == "none" else [decoders.Strip(" ", 1, 0)])])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in CONTROL[:3]])
    tokenizer.add_tokens([AddedToken("<user>", normalized=True), AddedToken("<|tool|>", single_word=True)])
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    return tokenizer


MADE = {kind: tk.Tokenizer(make(kind).to_str()) for kind in sorted(SPACES)}


def changed(kind: str, **parts) -> str:
    return json.dumps({**json.loads(make(kind).to_str()), **parts})


def added(id: int, content: str, special: bool) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, "special": special, **flags}


# ---- nothing is lost -------------------------------------------------------------------------------------------------


def test_truncation_and_padding_of_the_file_do_nothing():
    """As saved by whoever used it for batches of 8: of 90,000 characters 8 tokens were left, or were added."""
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    file = changed("Prepend", truncation=truncation, padding=padding)
    library = Tokenizer.from_str(file)
    assert [len(library.encode(text).ids) for text in (WORDS * 1000, "a")] == [32, 32], "the fault is there to be ended"
    tokenizer, clean = tk.Tokenizer(file), MADE["Prepend"]
    for text in (WORDS * 1000, "a"):
        assert tokenizer.encode(text) == tokenizer.encode_batch([text])[0] == clean.encode(text)
        assert tokenizer.encode_pieces(["", text, text]) == clean.encode_pieces(["", text, text])
        assert tokenizer.encode_with_control(text) == clean.encode_with_control(text)
    assert tokenizer.decode(tokenizer.encode(WORDS * 1000)) == WORDS * 1000
    assert tokenizer.to_str() == file, "the file is what identifies stores"


def test_dropout_of_the_file_does_nothing():
    file = json.loads(make("Prepend").to_str())
    file["model"]["dropout"] = 0.9
    tokenizer = tk.Tokenizer(json.dumps(file))
    for _ in range(5):
        assert tokenizer.encode(WORDS) == MADE["Prepend"].encode(WORDS)
        assert tokenizer.encode_with_control(WORDS) == MADE["Prepend"].encode_with_control(WORDS)


@pytest.mark.parametrize("kind", MADE)
@given(text=texts)
def test_text_is_text(kind, text):
    tokenizer = MADE[kind]
    ids = tokenizer.encode(text)
    assert not set(ids) & tokenizer.control_ids
    if kind == "none" or (kind == "Prepend" and "\u2581" not in text):  # the others lose a space at the start
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text]) == [ids]


@pytest.mark.parametrize("kind", ["Prepend", "none"])
@given(pieces=st.lists(texts.filter(lambda text: "\u2581" not in text), max_size=5))
@example(pieces=["", "    return", " x", ""])
@example(pieces=[" ", " "])
def test_pieces_together_are_the_document(kind, pieces):
    tokenizer = MADE[kind]
    found = tokenizer.encode_pieces(pieces)
    assert len(found) == len(pieces) and tokenizer.decode(sum(found, [])) == "".join(pieces)
    assert not set(sum(found, [])) & tokenizer.control_ids
    begun = next((i for i, text in enumerate(pieces) if text), len(pieces))
    assert found[begun : begun + 1] == [tokenizer.encode(text) for text in pieces[begun : begun + 1]]


@pytest.mark.parametrize("kind", MADE)
def test_only_the_first_piece_has_a_space_before_it(kind):
    """An indent of four spaces that a document is cut at came out as five."""
    tokenizer = MADE[kind]
    [first, rest, last] = tokenizer.encode_pieces(["a", "    a", "a"])
    assert len(first) == (1 if kind == "none" else 2)
    assert tokenizer.decode([*first, *rest]).strip(" ") == "a    a" and last == [first[-1]]
    assert tokenizer.encode("a", continues=True) == last
    documents = [["a", "    a"], [], ["", "a"], ["the"]]
    assert tokenizer.encode_documents(documents) == [tokenizer.encode_pieces(one) for one in documents]
    assert tokenizer.encode_pieces(["", "a"]) == [[], first], "where a prefix is empty, the middle begins the document"


# ---- control tokens --------------------------------------------------------------------------------------------------


def test_a_token_that_the_file_does_not_call_special_is_none_of_a_text():
    tokenizer, library = MADE["Prepend"], make("Prepend")
    library.encode_special_tokens = True
    ids = [library.token_to_id(token) for token in CONTROL]
    text = "".join(f"a {token} b" for token in CONTROL)
    assert set(library.encode(text).ids) & set(ids), "the fault is there to be ended: merges spell </s>, too"
    assert tokenizer.control_ids == set(ids) and not set(tokenizer.encode(text)) & set(ids)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert set(ids) <= set(tokenizer.encode_with_control(" ".join(CONTROL)))
    assert tokenizer.decode(ids[:3]) == "<unk><s></s>" and tokenizer.decode(ids[:3], skip_control=True) == ""
    assert all(token in tokenizer.decode(ids) for token in CONTROL)


def unigram() -> Tokenizer:
    """As T5's files: control tokens are pieces of the model, and likelier than what they are written with."""
    pieces = dict.fromkeys(["<pad>", "</s>", "<unk>"], 0.0) | dict.fromkeys("</>spaderunk \u2581", -2.0)
    tokenizer = Tokenizer(models.Unigram([*pieces.items(), ("<user>", 0.0)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def test_pieces_of_a_unigram_that_are_control_tokens_are_none_of_a_text():
    library = unigram()
    library.add_special_tokens(["<pad>", "</s>"])
    library.add_tokens(["<user>"])
    tokenizer = tk.Tokenizer(library.to_str())
    text = "</s><pad> <user> <unk>"
    library.encode_special_tokens = True
    assert set(library.encode(text).ids) & {0, 1, 2}, "the fault is there to be ended"
    assert tokenizer.control_ids == {0, 1, 2, tokenizer.token_to_id("<user>")}
    assert not set(tokenizer.encode(text)) & tokenizer.control_ids and tokenizer.decode(tokenizer.encode(text)) == text


def test_words_that_are_control_tokens_are_none_of_a_text():
    library = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "a": 2, "<user>": 3}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["</s>"])
    library.add_tokens(["<user>"])
    assert tk.Tokenizer(library.to_str()).encode("a </s> <user> a [UNK]") == [2, 0, 0, 2, 0]
    assert tk.Tokenizer(Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")).to_str()).control_ids == set()


def test_white_space_and_ordinary_vocabulary_stay_reachable():
    """GPT-NeoX writes indents with added tokens; of Gemma's some are ordinary pieces that merges make."""
    library = make("none")
    library.add_tokens([AddedToken("    ", normalized=False), "the", AddedToken("</s>", special=False), "7"])
    tokenizer = tk.Tokenizer(library.to_str())
    ids = [tokenizer.token_to_id(token) for token in ("    ", "the", "7", "a")]
    assert tokenizer.encode("    the7a") == ids
    assert not tokenizer.control_ids & set(ids) and tokenizer.token_to_id("</s>") in tokenizer.control_ids
    library = make("Prepend")
    library.add_tokens([AddedToken("the", normalized=False)])
    made = tk.Tokenizer(library.to_str()).encode("a the </s>a")
    assert made == MADE["Prepend"].encode("a the </s>a"), "by merges: cut out of the text it would get spaces around it"


def test_settings_survive_copies_and_other_processes():
    tokenizer = tk.Tokenizer(changed("Prepend"), eos="<user>")
    expected = tokenizer.encode_pieces(["a</s>", "<user>b"]), tokenizer.eos_id
    for again in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert (again.encode_pieces(["a</s>", "<user>b"]), again.eos_id) == expected
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(tokenizer.encode_pieces, ["a</s>", "<user>b"]).result() == expected[0]


# ---- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "special, named, expected",
    [
        (("</s>",), "", "</s>"),
        (("<|endoftext|>",), "", "<|endoftext|>"),
        (("</s>", "<|endoftext|>"), "<|endoftext|>", "<|endoftext|>"),
        (("</s>", "<|im_end|>"), "<|im_end|>", "<|im_end|>"),
        ((), "", "none of its control tokens can end a document"),
        (("<|im_end|>",), "", "none of its control tokens"),
        (("</s>", "<eos>"), "", "</s> and <eos> of its control tokens"),
        (("</s>",), "<eos>", r"eos='<eos>' is none of its control tokens \(</s>\)"),
        (("</s>",), "a", "eos='a' is none of its control tokens"),
    ],
)
def test_eos_is_named_or_the_one_of_a_well_known_name(tmp_path, special, named, expected):
    library = Tokenizer(models.BPE({"a": 0, "<": 1}, []))
    library.add_special_tokens([*special])
    library.save(str(tmp_path / "t.json"))
    if expected in special:
        tokenizer = tk.load_tokenizer(tmp_path / "t.json", named)
        assert tokenizer.id_to_token(tokenizer.eos_id) == expected
        return
    with pytest.raises(ConfigError, match=f"^tokenizer {tmp_path}/t.json: {expected}") as error:
        _ = tk.load_tokenizer(tmp_path / "t.json", named).eos_id
    assert "\n" not in str(error.value) and (named or "key eos (data.eos in an experiment)" in str(error.value))


def test_readers_that_know_their_eos_need_no_name():
    library = Tokenizer(models.BPE({"a": 0}, []))
    library.add_special_tokens(["</s>", "<eos>"])
    tokenizer = tk.Tokenizer(library.to_str())
    assert tokenizer.decode(tokenizer.encode("a")) == "a" and tokenizer.bos_id is None
    assert MADE["none"].bos_id == 1 and MADE["none"].eos_id == 2


def test_ids_may_have_holes():
    """The library counts entries; a store must hold the largest id."""
    tokenizer = tk.Tokenizer(Tokenizer(models.BPE({"a": 0, "b": 9}, [])).to_str())
    assert tokenizer.vocab_size == 10 and tokenizer.encode("ab") == [0, 9] and tokenizer.id_to_token(4) is None
    with pytest.raises(ConfigError, match="its ids have holes, </s> would not come last"):
        tokenizer.with_control_tokens(["</s>"])


def test_an_added_token_that_the_library_gives_another_id_is_refused():
    with pytest.raises(ConfigError, match="'<x>' has id 900 and is loaded as"):
        tk.Tokenizer(changed("none", added_tokens=[added(900, "<x>", True)]))


def test_control_tokens_come_behind_the_vocabulary():
    tokenizer = MADE["Prepend"].with_control_tokens(["</s>", "<fim_prefix>"])
    assert tokenizer.vocab_size == MADE["Prepend"].vocab_size + 1
    assert tokenizer.token_to_id("<fim_prefix>") == tokenizer.vocab_size - 1 in tokenizer.control_ids
    assert tokenizer.with_control_tokens(["<fim_prefix>"]) is tokenizer


def test_what_puts_a_space_is_found_wherever_it_stands():
    library = make("none")
    library.normalizer = normalizers.Sequence(
        [normalizers.Sequence([normalizers.Prepend("a")]), normalizers.Replace(Regex("q"), "a")]
    )
    tokenizer = tk.Tokenizer(library.to_str())
    [a] = make("none").encode("a").ids
    assert tokenizer.encode_pieces(["q", "q"]) == [[a, a], [a]]
    old = changed("none", pre_tokenizer={"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True})
    assert [len(ids) for ids in tk.Tokenizer(old).encode_pieces(["a", "a"])] == [2, 1]
