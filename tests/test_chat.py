"""Conversations to ids and loss masks: as transformers renders and tokenizes, only answers learned, nothing guessed."""

import json

import numpy as np
import pytest
import tokenizers
from chat_templates import CHATML, CHATML_BLOCKS, DIALOGUE, FAMILIES, QWEN3
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

pytest.importorskip("datatrove")
transformers = pytest.importorskip("transformers")

from collections import Counter

from k2jax.data.tokenizer import Tokenizer, load_tokenizer
from k2jax.errors import ConfigError
from k2jax.prepare import recipe
from k2jax.prepare.chat import mask, render, rows, template
from k2jax.prepare.chat.template import ChatTemplate
from k2jax.prepare.chat.worker import Renderer
from k2jax.prepare.documents import document
from k2jax.prepare.records import Bad
from k2jax.prepare.tally import Tally

TEXTS = [turn["content"] for turn in DIALOGUE] * 3 + ["user assistant system model [INST] [/INST] <<SYS>> four Four"]


def byte_level(control, bos, trim=False):
    """GPT-2's kind, with BOS by the post-processor as LLaMA-3's file has it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    return finished(made, control, bos, [processors.ByteLevel(trim_offsets=trim)])


def metaspace(control, bos):
    """SentencePiece's kind, as LLaMA-2's: a space before every text, byte tokens for what it lacks, BOS added."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    ascii_alone = ["".join(c for c in text if c.isascii()) for text in TEXTS]
    made.train_from_iterator(
        ascii_alone, trainers.BpeTrainer(vocab_size=360, special_tokens=first, show_progress=False)
    )
    parsed = json.loads(made.to_str())
    parsed["added_tokens"] = parsed["added_tokens"][:3]
    return finished(tokenizers.Tokenizer.from_str(json.dumps(parsed)), control, bos, [])


def finished(made, control, bos, post):
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    if bos:
        frame = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))])
        post = [*post, frame]
    if post:
        made.post_processor = processors.Sequence(post)
    return made


def folder_of(path, family, text=None, made=None):
    """A tokenizer's folder as people have them; returns it and transformers' tokenizer of it."""
    made = made or (metaspace if "<unk>" in family.control else byte_level)(family.control, family.bos)
    path.mkdir(exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    side = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": family.bos, "eos_token": family.eos}
    side["chat_template"] = family.template if text is None else text
    (path / "tokenizer_config.json").write_text(json.dumps(side), encoding="utf-8")
    return path, transformers.AutoTokenizer.from_pretrained(path)


def config_of(folder, **options):
    c = recipe.base()
    c.tokenizer = str(folder / "tokenizer.json")
    c.chat.date = "2024-07-26"
    c.subsets.chat = recipe.conversations("jsonl:chat.jsonl", **options)
    return c


def opened(folder, **options):
    """The recipe's subset, the tokenizer, the template and the names of its control tokens."""
    config = config_of(folder, **options)
    encoder = load_tokenizer(config.tokenizer, config.eos)
    chosen = template.find(config, encoder)
    template.check(chosen, encoder)
    control = tuple(sorted(encoder.id_to_token(id) for id in encoder.control_ids))
    return config.subsets.chat, encoder, chosen, control


def learned_of(turns):
    return [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]


def encode(folder, turns, **options):
    """(ids, mask, counts) of a conversation, by the whole path but the process."""
    subset, encoder, chosen, control = opened(folder, **options)
    text, answers, compared = render.conversation(render.Program(chosen), turns, None, learned_of(turns), list(control))
    metadata = {"answers": answers, "turns": len(turns), "compared": compared, "source": "chat.jsonl:1"}
    counts, tally = Counter(), Tally()
    found = mask.encoded(
        [document(text, **metadata)], encoder, subset.conversations, control=control, tally=tally, counts=counts
    )
    [one] = found
    return one.ids.tolist(), one.mask.tolist(), counts


def runs(ids, learned, encoder):
    """The text of each run of learned tokens."""
    parts = [[]]
    for id, one in zip(ids, learned, strict=True):
        parts[-1].append(id) if one else parts.append([])
    first = encoder.encode("a")  # a text's first token can lose its space in decoding
    return tuple(encoder.decode(first + part)[len(encoder.decode(first)) :] for part in parts if part)


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_templates_give_transformers_ids_and_their_answers(name, tmp_path):
    """Text, ids, BOS once, masks of the answers with the token that ends each, for eight families."""
    family = FAMILIES[name]
    turns = DIALOGUE if family.system else DIALOGUE[1:]
    folder, theirs = folder_of(tmp_path / "t", family)
    ids, learned, counts = encode(folder, turns)
    assert theirs.apply_chat_template(turns, tokenize=False) == family.text
    assert ids == theirs.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert runs(ids, learned, load_tokenizer(folder / "tokenizer.json")) == family.answers
    assert (counts["conversations"], counts["answers"], counts["endless"]) == (1, 2, 0)
    if family.bos and family.text.startswith(family.bos):
        assert ids[0] == theirs.bos_token_id != ids[1], "BOS comes from the template, and not again from the tokenizer"


@pytest.mark.parametrize("made", [byte_level, lambda control, bos: byte_level(control, bos, trim=True)])
def test_generation_blocks_give_transformers_mask(tmp_path, made):
    family = FAMILIES["chatml-blocks"]
    folder, theirs = folder_of(tmp_path / "t", family, made=made(family.control, None))
    ids, learned, counts = encode(folder, DIALOGUE)
    expected = theirs.apply_chat_template(DIALOGUE, return_dict=True, return_assistant_tokens_mask=True)
    assert (ids, learned) == (expected["input_ids"], expected["assistant_masks"])
    assert counts["compared"] == 1, "prefixes said the same"
