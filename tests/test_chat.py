"""Conversations to ids and loss masks: as transformers renders and tokenizes, only answers learned, nothing guessed."""

import json
from collections import Counter

import numpy as np
import pytest
import tokenizers
from chat_templates import CHATML, CHATML_BLOCKS, DIALOGUE, FAMILIES, QWEN3
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

pytest.importorskip("datatrove")
pytest.importorskip("transformers")

import transformers

from k2jax.chat import fit, render, template
from k2jax.chat.template import ChatTemplate
from k2jax.chat.worker import Renderer
from k2jax.data.records import Bad
from k2jax.data.tokenizer import load_tokenizer
from k2jax.errors import ConfigError
from k2jax.prepare import recipe
from k2jax.prepare.chat import mask, rows
from k2jax.prepare.documents import document
from k2jax.prepare.tally import Tally

TEXTS = [turn["content"] for turn in DIALOGUE] * 3 + ["user assistant system model [INST] [/INST] <<SYS>> four Four"]


def byte_level(control, bos, trim=False):
    """GPT-2's kind, with BOS by the post-processor as LLaMA-3's file has it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
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
    fit.check(chosen, encoder)
    control = tuple(sorted(encoder.id_to_token(id) for id in encoder.control_ids))
    return config.subsets.chat, encoder, chosen, control


def learned_of(turns):
    return [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]


def encode(folder, turns, **options):
    """(ids, mask, counts) of a conversation, by the whole path but the process."""
    subset, encoder, chosen, control = opened(folder, **options)
    text, answers, compared = render.conversation(
        render.Program(chosen), turns, None, learned_of(turns), list(control)
    )
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
        assert ids[0] == theirs.bos_token_id != ids[1], (
            "BOS comes from the template, and not again from the tokenizer"
        )


@pytest.mark.parametrize("made", [byte_level, lambda control, bos: byte_level(control, bos, trim=True)])
def test_generation_blocks_give_transformers_mask(tmp_path, made):
    family = FAMILIES["chatml-blocks"]
    folder, theirs = folder_of(tmp_path / "t", family, made=made(family.control, None))
    ids, learned, counts = encode(folder, DIALOGUE)
    expected = theirs.apply_chat_template(DIALOGUE, return_dict=True, return_assistant_tokens_mask=True)
    assert (ids, learned) == (expected["input_ids"], expected["assistant_masks"])
    assert counts["compared"] == 1, "prefixes said the same"


def test_a_block_and_prefixes_that_differ_are_an_error(tmp_path):
    """A block without the token that ends the turn, or with the header: both are in templates that people share."""
    without_end = CHATML_BLOCKS.replace(
        "m.content + '<|im_end|>' }}{% endgeneration %}", "m.content }}{% endgeneration %}{{- '<|im_end|>' }}"
    )
    with_header = CHATML_BLOCKS.replace("{{- '<|im_start|>' + m.role + '\\n' }}", "").replace(
        "{{- m.content + '<|im_end|>' }}", "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}"
    )
    for text, said in [(without_end, "lack '<|im_end|>"), (with_header, "have '<|im_start|>")]:
        assert text != CHATML_BLOCKS
        folder, theirs = folder_of(tmp_path / said[:4], FAMILIES["chatml-blocks"], text)
        if text == without_end:
            assert theirs.apply_chat_template(DIALOGUE, tokenize=False) == FAMILIES["chatml"].text
        with pytest.raises(render.Refused) as error:
            encode(folder, DIALOGUE)
        assert error.value.reason == "generation blocks that are not the answers" and said in error.value.what


def test_a_template_that_drops_earlier_reasoning_is_refused_but_for_the_last_answer(tmp_path):
    """Its prefixes are no beginnings of the whole: guessing would learn text that is not there."""
    _, encoder, chosen, control = opened(folder_of(tmp_path / "t", FAMILIES["chatml"], QWEN3)[0])
    program = render.Program(chosen)
    turns = [
        {**turn, "content": turn["content"].replace("Four", "<think>\nHm.\n</think>\n\nFour")} for turn in DIALOGUE
    ]
    with pytest.raises(render.Refused) as error:
        render.conversation(program, turns, None, [2, 4], list(control))
    assert "earlier turns otherwise" in error.value.reason and "answers='last'" in error.value.what
    text, [(start, stop)], _ = render.conversation(program, turns, None, [4], list(control))
    assert text[start:stop] == "<think>\n\n</think>\n\nStill\nfour 🙂.<|im_end|>" and "Hm." not in text
    text, [(start, stop)], _ = render.conversation(program, turns[:3], None, [2], list(control))
    assert text[start:stop] == "<think>\nHm.\n</think>\n\nFour.<|im_end|>"


def test_a_header_is_never_learned(tmp_path):
    """A template that knows no generation prompt writes the header with the answer."""
    text = CHATML.replace("{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}", "")
    folder, _ = folder_of(tmp_path / "t", FAMILIES["chatml"], text)
    with pytest.raises(render.Refused, match="without a generation prompt"):
        encode(folder, DIALOGUE)
    folder, _ = folder_of(tmp_path / "u", FAMILIES["chatml"], CHATML.replace("assistant\\n", "model\\n"))
    with pytest.raises(render.Refused, match="does not go on from its prompt"):
        encode(folder, DIALOGUE)


def test_a_turn_that_the_template_leaves_out_is_refused(tmp_path):
    text = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    folder, _ = folder_of(tmp_path / "t", FAMILIES["chatml"], text)
    with pytest.raises(render.Refused) as error:
        encode(folder, DIALOGUE)
    assert error.value.args == ("a turn that the template leaves out", "turn 1, of role system")


def test_tools_and_calls_that_the_template_leaves_out_are_refused(tmp_path):
    """An answer that is a call would else be an empty one: the model would learn to say nothing."""
    _, _, chosen, control = opened(folder_of(tmp_path / "t", FAMILIES["llama-3"])[0])
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    turns, tools = [DIALOGUE[1], call], [{"type": "function", "function": {"name": "add"}}]
    cases = [((turns, None), "turn 2: 'add'"), ((DIALOGUE, tools), "tools: 'add'"), ((DIALOGUE, ["x"]), "tools")]
    for given, what in cases:
        with pytest.raises(render.Refused) as error:
            render.conversation(render.Program(chosen), *given, learned_of(given[0]), list(control))
        assert error.value.reason == "a tool or a call that the template leaves out" and what in error.value.what
    with_calls = chosen.text.replace("m['content'] | trim", "(m['content'] or m.tool_calls | tojson) | trim")
    known = chosen._replace(text=with_calls)
    text, [(start, stop)], _ = render.conversation(render.Program(known), turns, None, [1], list(control))
    assert text[start:stop] == '[{"function": {"name": "add", "arguments": "{}"}}]<|eot_id|>'


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]}
ASKED = [
    {"role": "user", "content": "What is the weather in City23 today? Say Sunny or wet."},
    CALL,
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "Sunny"},
]


@pytest.mark.parametrize("family", ["chatml", "chatml-blocks"])
@pytest.mark.parametrize(
    ("turns", "what"),
    [
        (ASKED, "turn 2: 'weather'"),  # the user's turn has that word
        ([ASKED[0], {"role": "assistant", "content": "<think>\nwhat\n</think>"}], "turn 2, of role assistant"),
    ],
)
def test_an_answer_of_which_the_template_writes_nothing_is_refused(tmp_path, family, turns, what):
    """Seen red: another turn's words passed for those of the answer, and the model learned to say nothing."""
    written = FAMILIES[family].template.replace("m.content", "m.content.split('</think>')[-1]")
    _, _, chosen, control = opened(folder_of(tmp_path / "t", FAMILIES[family], written)[0])
    with pytest.raises(render.Refused) as error:
        render.conversation(render.Program(chosen), turns, None, learned_of(turns), list(control))
    assert "that the template leaves out" in error.value.reason and error.value.what == what


def test_an_answer_that_the_template_writes_elsewhere_is_refused_and_a_short_one_is_learned(tmp_path):
    written = CHATML.replace("m.content", "(m.content if m.role != 'assistant' else '?')")
    _, _, chosen, control = opened(folder_of(tmp_path / "t", FAMILIES["chatml"], written)[0])
    turns = [ASKED[0], ASKED[3]]
    with pytest.raises(render.Refused) as error:
        render.conversation(render.Program(chosen), turns, None, [1], list(control))
    assert error.value.args == ("a turn that the template leaves out", "turn 2, of role assistant")
    program = render.Program(chosen._replace(text=CHATML))
    for said in ("a", "0", "."):
        short = [ASKED[0], {"role": "assistant", "content": said}]
        text, [(start, stop)], _ = render.conversation(program, short, None, [1], list(control))
        assert text[start:stop] == f"{said}<|im_end|>"


def test_a_token_across_the_border_is_learned_and_counted(tmp_path):
    """The header's line feed and the answer's first letter are one token here."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["\nF"] * 9, trainers.BpeTrainer(vocab_size=257, initial_alphabet=alphabet))
    family = FAMILIES["chatml-blocks"]
    folder, theirs = folder_of(tmp_path / "t", family, made=finished(made, family.control, None, []))
    ids, learned, counts = encode(folder, DIALOGUE)
    expected = theirs.apply_chat_template(DIALOGUE, return_dict=True, return_assistant_tokens_mask=True)
    assert (ids, learned) == (expected["input_ids"], expected["assistant_masks"])
    encoder = load_tokenizer(folder / "tokenizer.json")
    assert runs(ids, learned, encoder) == ("\nFour.<|im_end|>", family.answers[1])
    assert counts["joined"] == 1 and "begin within a token" in "".join(mask.notes(counts))


def test_mask_of_tokens_without_characters_and_of_bytes():
    """A token of no width goes with what follows; the bytes of one character are all of that character's."""
    offsets = np.array([[0, 0], [0, 2], [2, 3], [2, 3], [3, 3], [3, 5], [5, 6]])
    assert mask.mask_of(offsets, [[2, 3]]).tolist() == [0, 0, 1, 1, 0, 0, 0]
    assert mask.mask_of(offsets, [[3, 4], [5, 6]]).tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert mask.mask_of(offsets, [[0, 1]]).tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert mask.mask_of(offsets[:0], [[0, 1]]).tolist() == []


def test_a_conversation_that_is_too_long_is_cut_dropped_or_refused(tmp_path):
    folder, _ = folder_of(tmp_path / "t", FAMILIES["llama-3"])
    whole, learned, _ = encode(folder, DIALOGUE)
    first = learned.index(1)
    ids, short, counts = encode(folder, DIALOGUE, max_tokens=first + 2, too_long="cut")
    assert (ids, short, counts["cut"]) == (whole[: first + 2], learned[: first + 2], 1) and sum(short) == 2
    subset, encoder, _, control = opened(folder, max_tokens=first, too_long="cut")
    text = FAMILIES["llama-3"].text
    answers = [[text.index(a), text.index(a) + len(a)] for a in FAMILIES["llama-3"].answers]
    one = document(text, answers=answers, turns=5, compared=False, source="chat.jsonl:7")

    def left(**options):
        tally, chosen = Tally(), recipe.conversations("jsonl:x", **options).conversations
        kept = list(mask.encoded([one], encoder, chosen, control=control, tally=tally, counts=Counter()))
        return len(kept), tally.to_json()["steps"]["tokens"]["removed"]

    with pytest.raises(
        ConfigError, match=r"chat\.jsonl:7: no answer to learn \(of 2 answers all are behind max_tokens\)"
    ):
        left(max_tokens=first, too_long="cut")
    with pytest.raises(ConfigError, match=rf"chat\.jsonl:7: too long \({len(whole)} tokens\): raise max_tokens"):
        left(max_tokens=first)
    assert left(max_tokens=len(whole))[0] == 1
    dropped = {"documents": 1, "bytes": len(text.encode())}
    assert left(max_tokens=first, too_long="drop") == (0, {"too long": dropped})
    assert left(max_tokens=first, too_long="cut", bad_rows="drop") == (0, {"no answer to learn": dropped})


ASK, TELL = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SHARE = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]


@pytest.mark.parametrize(
    ("row", "expected", "learned"),
    [
        ({"messages": [ASK, TELL]}, [ASK, TELL], [1]),
        ({"conversations": SHARE, "id": 3}, [ASK, TELL], [1]),
        ({"conversations": SHARE, "system": "S"}, [{"role": "system", "content": "S"}, ASK, TELL], [2]),
        ({"prompt": "Q", "completion": "A", "system": None}, [ASK, TELL], [1]),
        ({"prompt": [ASK, TELL, ASK], "completion": [TELL]}, [ASK, TELL, ASK, TELL], [3]),
        ({"prompt": "of something else", "messages": [ASK, TELL]}, [ASK, TELL], [1]),
        ({"messages": [ASK, {**TELL, "weight": 0}, ASK, {**TELL, "weight": 1.0}]}, [ASK, TELL, ASK, TELL], [3]),
        ({"messages": [ASK, {**TELL, "tool_calls": None, "name": None}]}, [ASK, TELL], [1]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, TELL]}, [ASK, TELL], [1]),
        ({"messages": [{"role": "developer", "content": "S"}, ASK, TELL]},
         [{"role": "system", "content": "S"}, ASK, TELL], [2]),
    ],
)  # fmt: skip
def test_rows_of_every_form_give_the_same_turns(row, expected, learned):
    chosen = recipe.conversations("jsonl:x")
    assert rows.turns_of(row, chosen, ["</s>"]) == (expected, None, learned)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "no conversation: expected messages, conversations, or prompt and completion, found text"),
        ({"prompt": "a"}, "no conversation"),
        ({"messages": [ASK, TELL], "conversations": SHARE}, "two conversations in one row"),
        ({"messages": "[]"}, "no list of turns: messages is str"),
        ({"prompt": 1, "completion": "a"}, "no list of turns"),
        ({"messages": []}, "no answer to learn: 0 turns"),
        ({"messages": [ASK]}, "no answer to learn: 1 turns"),
        ({"messages": [ASK, {**TELL, "weight": 0}]}, "no answer to learn"),
        ({"messages": [ASK, {**TELL, "weight": 0.5}]}, "a weight that is neither 0 nor 1: 0.5"),
        ({"messages": [ASK, {"role": "narrator", "content": "a"}]}, "an unknown role: turn 2 is of 'narrator'"),
        ({"messages": [ASK, {"content": "a"}]}, "an unknown role: turn 2 is of None"),
        ({"messages": [ASK, {"role": ["a"], "content": "a"}]}, "an unknown role"),
        ({"messages": [{"role": "system", "content": "S"}] * 2 + [ASK, TELL]}, "two system turns: turns 1, 2"),
        ({"system": "S", "messages": [{"role": "system", "content": "S"}, ASK, TELL]}, "two system turns: turns 1, 2"),
        ({"messages": [ASK, {"role": "assistant", "content": " \n"}]}, "an empty turn: turn 2, of role assistant"),
        ({"messages": [{"role": "user"}, TELL]}, "an empty turn: turn 1, of role user"),
        ({"messages": [ASK, "A"]}, "a turn that is no object: turn 2 is str"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, TELL]},
         "content that is no text: turn 1, of role user: a part of type 'image_url'"),
        ({"messages": [ASK, TELL], "images": ["x"]}, "content that is no text: the row has images"),
        ({"messages": [{"role": "user", "content": {"a": 1}}, TELL]}, "text is no string: turn 1, of role user: dict"),
        ({"messages": [{"role": "user", "content": "\ud83d"}, TELL]}, "half a surrogate pair: turn 1"),
        ({"messages": [{"role": "user", "content": "a</s>b"}, TELL]},
         "a control token in a turn: turn 1, of role user, holds '</s>'"),
        ({"messages": [ASK, {**TELL, "reasoning": "a</s>b"}]},
         "a control token in a turn: turn 2, of role assistant, holds '</s>'"),
        ({"messages": [ASK, TELL], "tools": "all"}, "tools that are no list"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_conversation_is_named(row, said):
    found = rows.turns_of(row, recipe.conversations("jsonl:x"), ["</s>"])
    assert isinstance(found, Bad) and f"{found.reason}: {found.what}".startswith(said)


def test_what_a_recipe_allows_beside():
    chosen = recipe.conversations("jsonl:x", roles=(("bot", "assistant"),), answers="last", control_in_turns=True)
    turns = [ASK, {"role": "bot", "content": "a</s>"}, ASK, TELL]
    assert rows.turns_of({"messages": turns}, chosen, ["</s>"]).learned == [3]


@pytest.mark.parametrize(
    ("text", "reason", "what"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
         "the template does not end on it", "0.5 s"),
        ("{{ 'a' * (10 ** 10) }}", "the template fails on it", "MemoryError"),
        ("{{ 10 ** (10 ** 9) }}", "the template does not end on it", "0.5 s"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "the template fails on it", "OverflowError"),
        ("{{ messages | markdown }}", "the template refuses it", "markdown"),
        ("{{ raise_exception('only one turn') }}", "the template refuses it", "only one turn"),
        ("{{ messages[7].content.strip() }}", "the template refuses it", "has no"),
        ("{{ messages[0] + 1 }}", "the template fails on it", "TypeError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the template refuses it", "unsafe"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "the template refuses it", "__class__"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "the template fails on it", "RecursionError"),
        ("{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}{{ messages }}",
         "generation blocks inside each other", ""),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}{{ messages[1].content }}" * 40,
         "longer than max_line_bytes", ""),
    ],
)  # fmt: skip
def test_a_template_is_held_in_its_process(text, reason, what):
    """Whatever it does costs its row alone: the next is rendered. Seen to fail with no limit, by never ending."""
    bad = "{% if messages[0].content == 'bad' %}" + text + "{% endif %}"
    good = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"
    good += "{% if add_generation_prompt %}assistant:{% endif %}"
    chosen = ChatTemplate(bad + good, "t.jinja", {}, "")
    if "generation" in text:
        chosen = chosen._replace(
            text=bad + good.replace("{{ m", "{% generation %}{{ m", 1).replace("}}", "}}{% endgeneration %}", 1)
        )
    with Renderer(chosen, [], most=60, seconds=0.5) as renderer:
        found = renderer([{**ASK, "content": "bad"}, TELL], None, [1])
        assert found["reason"] == reason and what in found["what"], found
        if "generation" not in text and "** 9) }}" not in text:
            assert renderer([ASK, TELL], None, [1])["text"] == "user:Q;assistant:A;"


def test_where_a_template_comes_from(tmp_path):
    """chat_template.jinja, tokenizer_config.json's text or list, a file that the recipe names; one of a name."""
    family = FAMILIES["chatml"]
    folder, _ = folder_of(tmp_path / "t", family)
    config = config_of(folder)
    encoder = load_tokenizer(config.tokenizer)

    def found(name="", file=""):
        config.chat.name, config.chat.template = name, str(file)
        return template.find(config, encoder).text

    assert found() == CHATML
    side = json.loads((folder / "tokenizer_config.json").read_text())
    side["chat_template"] = [{"name": "default", "template": "D"}, {"name": "tools", "template": "T"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(side))
    assert (found(), found("tools")) == ("D", "T")
    with pytest.raises(ConfigError, match="no chat template named 'rag': set chat.name to one of default, tools"):
        found("rag")
    (folder / "chat_template.jinja").write_text("J")
    assert (found(), found("tools")) == ("J", "T")
    (tmp_path / "mine.jinja").write_text("M")
    assert found(file=tmp_path / "mine.jinja") == "M"
    with pytest.raises(ConfigError, match="no such file"):
        found(file=tmp_path / "other.jinja")
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no chat template in chat_template.jinja or tokenizer_config.json"):
        found()
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        found()


@pytest.mark.parametrize(
    ("text", "tokens", "date", "said"),
    [
        ("{{ bos_token }}", {}, "", "writes bos_token, which the tokenizer's side files do not name"),
        (
            "{{ eos_token }}",
            {"eos_token": "<|no|>"},
            "",
            "eos_token is '<|no|>', no control token of the tokenizer but",
        ),
        ("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}", {}, "", "name one, chat.date"),
        ("{% for %}", {}, "", "t.jinja: is no Jinja template (line 1"),
    ],
)
def test_a_template_that_does_not_fit_is_an_error_before_any_row(text, tokens, date, said, tmp_path):
    encoder = load_tokenizer(folder_of(tmp_path / "t", FAMILIES["chatml"])[0] / "tokenizer.json")
    with pytest.raises(ConfigError) as error:
        fit.check(ChatTemplate(text, "t.jinja", tokens, date), encoder)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_day_is_the_recipes():
    chosen = ChatTemplate("{{ strftime_now('%d %b %Y') }}", "t", {}, "2024-07-26")
    assert render.Program(chosen).render([], None) == "26 Jul 2024"


def test_a_templates_tokens_that_the_tokenizer_splits_are_named(tmp_path):
    """ChatML on a tokenizer without its tokens: told before, and its answers are counted as endless."""
    folder, _ = folder_of(tmp_path / "t", FAMILIES["llama-2"], CHATML)
    _, encoder, chosen, _ = opened(folder)
    notes = fit.check(chosen, encoder)
    assert ["'<|im_end|>' of the template" in notes[0], "'<|im_start|>' of the template" in notes[1]] == [True, True]
    assert (
        fit.check(chosen, load_tokenizer(folder_of(tmp_path / "u", FAMILIES["chatml"])[0] / "tokenizer.json"))
        == []
    )
    _, _, counts = encode(folder, DIALOGUE)
    assert counts["endless"] == 2 and "learn to stop" in "".join(mask.notes(counts))


def test_every_character_has_its_token(tmp_path):
    """GPT-2's file trims white space off the places of tokens, which would leave an answer's own unlearned."""
    family = FAMILIES["chatml"]
    folder, _ = folder_of(tmp_path / "t", family, made=byte_level(family.control, None, trim=True))
    text = "<|im_start|>a  b\n\n c 日 <|im_end|>\n"
    [(_, offsets)] = load_tokenizer(folder / "tokenizer.json").encode_rendered([text])
    assert {i for start, stop in offsets for i in range(start, stop)} == set(range(len(text)))


def test_a_template_that_cannot_be_compiled_is_said_for_its_row():
    with Renderer(ChatTemplate("{{ 1 | nothing }}", "t", {}, ""), [], most=9) as renderer:
        found = renderer([ASK, TELL], None, [1])
    assert found["reason"] == "the template cannot be compiled" and "nothing" in found["what"]
