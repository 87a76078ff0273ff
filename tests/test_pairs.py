"""Preference pairs from rows to stores: halves as conversations alone, learned behind what both ask, no guesses."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import DIALOGUE, FAMILIES
from test_chat import ASK, SHARE, TELL, byte_level, config_of, encode, finished, folder_of, opened, runs
from tokenizers import Tokenizer, models, normalizers

pytest.importorskip("datatrove")
pytest.importorskip("transformers")

from k2jax.chat import template
from k2jax.data.records import Bad
from k2jax.data.store import Store
from k2jax.data.tokenizer import load_tokenizer
from k2jax.errors import ConfigError
from k2jax.prepare import build, recipe
from k2jax.prepare.chat import mask, show
from k2jax.prepare.chat.pairs import pair_of
from k2jax.prepare.chat.texts import rendering
from k2jax.prepare.documents import document
from k2jax.prepare.tally import Tally

SYSTEM, OTHER = {"role": "system", "content": "S"}, {"role": "assistant", "content": "B"}
PAIRS = recipe.conversations("jsonl:x", pairs=True)
FAMILY = FAMILIES["llama-3"]


def found_in(row, subset=PAIRS):
    return pair_of(row, subset, ["</s>"])


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"chosen": [ASK, TELL], "rejected": [ASK, OTHER]}, [ASK]),
        ({"chosen": [SYSTEM, ASK, TELL], "rejected": [SYSTEM, ASK, OTHER], "score": 1}, [SYSTEM, ASK]),
        ({"chosen": [ASK, TELL], "rejected": [ASK, OTHER], "system": "S"}, [SYSTEM, ASK]),
        ({"chosen": SHARE, "rejected": [*SHARE[:1], {"from": "gpt", "value": "B"}]}, [ASK]),
        ({"chosen": [ASK, TELL, ASK, TELL], "rejected": [ASK, TELL, ASK, OTHER]}, [ASK, TELL, ASK]),
        # UltraFeedback's columns: the prompt is there once more, and the chosen conversation
        ({"prompt": "Q", "messages": [ASK, TELL], "chosen": [ASK, TELL], "rejected": [ASK, OTHER]}, [ASK]),
        ({"prompt": " Q\n", "chosen": [SYSTEM, ASK, TELL], "rejected": [SYSTEM, ASK, OTHER]}, [SYSTEM, ASK]),
        ({"prompt": [TELL, ASK], "chosen": [TELL, ASK, TELL], "rejected": [TELL, ASK, OTHER]}, [TELL, ASK]),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, [ASK]),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "system": "S", "messages": None}, [SYSTEM, ASK]),
        ({"prompt": "Q", "chosen": [TELL], "rejected": [OTHER]}, [ASK]),
        ({"prompt": [SYSTEM, ASK], "chosen": [TELL], "rejected": [OTHER]}, [SYSTEM, ASK]),
        ({"prompt": [ASK], "chosen": "A", "rejected": "B"}, [ASK]),
        ({"prompt": [{**ASK, "content": "A"}], "chosen": "A", "rejected": "B"}, [{**ASK, "content": "A"}]),
        ({"prompt": "", "chosen": [ASK, TELL], "rejected": [ASK, OTHER]}, [ASK]),
        ({"prompt": [], "chosen": [ASK, {**TELL, "name": None}], "rejected": [ASK, OTHER]}, [ASK]),
    ],
)  # fmt: skip
def test_rows_of_every_form_give_two_conversations(row, asked):
    for one, answer in zip(found_in(row), (TELL, OTHER), strict=True):
        assert one == ([*asked, answer], None, [len(asked)])


def test_answers_behind_what_both_ask_are_learned():
    """All of them, the last, or those that weigh; before it none, though the prompt holds answers."""
    more = [ASK, TELL, ASK]
    row = {"chosen": [*more, TELL, ASK, OTHER], "rejected": [*more, OTHER]}
    assert [one.learned for one in found_in(row)] == [[3, 5], [3]]
    last = recipe.conversations("jsonl:x", pairs=True, answers="last")
    assert [one.learned for one in found_in(row, last)] == [[5], [3]]
    row["chosen"] = [*more, TELL, ASK, {**OTHER, "weight": 0}]
    assert [one.learned for one in found_in(row)] == [[3], [3]]
    assert all("weight" not in turn for one in found_in(row) for turn in one.turns)
    row = {"prompt": [ASK], "chosen": [TELL, ASK, TELL], "rejected": [TELL, ASK, OTHER], "tools": [{"name": "f"}]}
    assert [one.learned for one in found_in(row)] == [[1, 3], [1, 3]], "a prompt says where answers begin"
    assert [one.tools for one in found_in(row)] == [[{"name": "f"}]] * 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [ASK, TELL]}, "no pair: expected chosen and rejected, found messages; chosen is missing"),
        ({"prompt": "Q", "chosen": "A", "rejected": None}, "no pair: expected chosen and rejected, found prompt, chos"),
        ({"chosen": [ASK, TELL], "rejected": [ASK, TELL]}, "chosen and rejected are the same: 2 turns"),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "chosen and rejected are the same: 2 turns"),
        ({"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}, "no prompt: chosen"),
        ({"chosen": [TELL], "rejected": [OTHER]}, "no prompt: chosen and rejected differ from their first turn on"),
        ({"system": "S", "chosen": [TELL], "rejected": [OTHER]}, "no prompt: chosen and rejected differ"),
        ({"chosen": [ASK, TELL], "rejected": [{**ASK, "content": "q"}, OTHER]}, "no prompt: chosen and rejected diff"),
        ({"chosen": [ASK, TELL, ASK, TELL], "rejected": [ASK, TELL, {**ASK, "content": "q"}, TELL]},
         "halves that ask for different things: chosen: turn 3, of role user"),
        ({"chosen": [ASK, TELL], "rejected": [ASK, TELL, ASK, OTHER]}, "no answer to learn: chosen ends with turn 2"),
        ({"chosen": [ASK, TELL], "rejected": [ASK]}, "no answer to learn: rejected ends with turn 1"),
        ({"chosen": [ASK, TELL], "rejected": []}, "no answer to learn: rejected has no turn"),
        ({"chosen": [ASK, TELL], "rejected": "B"}, "a pair of two forms"),
        ({"prompt": "Q", "chosen": [TELL], "rejected": [ASK, OTHER]}, "a prompt that is not in its conversations"),
        ({"prompt": "P", "chosen": [ASK, TELL], "rejected": [ASK, OTHER]}, "a prompt that is not in its conversations"),
        ({"prompt": [SYSTEM], "chosen": [ASK, TELL], "rejected": [ASK, OTHER]}, "a prompt that is not in its conver"),
        ({"prompt": "Q", "chosen": TELL, "rejected": OTHER}, "no list of turns: chosen is dict"),
        ({"prompt": "Q" * 40, "chosen": "Q" * 40 + "A", "rejected": "\n" + "Q" * 40 + "B"}, "answers that begin with"),
        ({"prompt": 7, "chosen": "A", "rejected": "B"}, "no list of turns: prompt is int"),
        ({"prompt": "Q", "chosen": "A", "rejected": " "}, "an empty turn: rejected: turn 1, of role assistant"),
        ({"prompt": " ", "chosen": "A", "rejected": "B"}, "an empty turn: prompt: turn 1, of role user"),
        ({"prompt": "", "chosen": "A", "rejected": "B"}, "no prompt: chosen and rejected are texts"),
        ({"prompt": "Q", "chosen": "", "rejected": "B"}, "an empty turn: chosen: turn 1, of role assistant"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B</s>"}, "a control token in a turn: rejected: turn 2, of role"),
        ({"prompt": "Q</s>", "chosen": "A", "rejected": "B"}, "a control token in a turn: chosen: turn 1, of role"),
        ({"chosen": [ASK, TELL], "rejected": [ASK, {"role": "bot", "content": "B"}]}, "an unknown role: rejected: tur"),
        ({"system": "S", "chosen": [SYSTEM, ASK, TELL], "rejected": [SYSTEM, ASK, OTHER]}, "two system turns: chosen:"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "images": ["x"]}, "content that is no text: chosen: the row"),
        ({"prompt": "Q", "chosen": [{**TELL, "weight": 0}], "rejected": [OTHER]}, "no answer to learn: chosen: 2 tur"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_pair_is_named(row, said):
    found = found_in(row)
    assert isinstance(found, Bad) and f"{found.reason}: {found.what}".startswith(said), found


def pair_in_tokens(folder, row, **options):
    """(ids, mask, counts, document) of a row, by the whole path of a preparation, its process too."""
    subset, encoder, chosen, control = opened(folder, pairs=True, **options)
    template.save(folder / "saved.json", chosen, encoder)
    with rendering(folder / "saved.json", subset) as render:
        found = render(row, subset)
    assert not isinstance(found, Bad), found
    one, counts = document(found[0], **found[1], source="pairs.jsonl:1"), Counter()
    made = mask.encoded([one], encoder, subset.conversations, control=control, tally=Tally(), counts=counts)
    [(_, ids, learned)] = made
    return ids.tolist(), learned.tolist(), counts, one


@pytest.mark.parametrize("name", FAMILIES)
def test_halves_are_what_conversations_alone_are(name, tmp_path):
    """Ids as transformers has them, BOS in both; of eight families. Seen red with offsets of the halves not shifted."""
    family, turns = FAMILIES[name], DIALOGUE if FAMILIES[name].system else DIALOGUE[1:]
    folder, theirs = folder_of(tmp_path / "t", family)
    worse = [*turns[:-1], {**turns[-1], "content": "Five 日?"}]
    ids, learned, counts, one = pair_in_tokens(folder, {"chosen": turns, "rejected": worse})
    expected = [theirs.apply_chat_template(half, tokenize=True, return_dict=False) for half in (turns, worse)]
    border = len(expected[0])
    assert ids == expected[0] + expected[1]
    assert [value >= mask.REJECTED for value in learned] == [False] * border + [True] * len(expected[1])
    flags, encoder = [value & 1 for value in learned], load_tokenizer(folder / "tokenizer.json")
    assert runs(ids[:border], flags[:border], encoder) == family.answers[1:]
    both = [encode(folder, half) for half in (turns, worse)]
    for part, (_, alone, _) in zip((flags[:border], flags[border:]), both, strict=True):
        end = alone.index(0, alone.index(1))  # of the earlier answer, which both halves hold
        assert part == [0] * end + alone[end:] and sum(part)
    assert (counts["pairs"], counts["conversations"], counts["turns"]) == (1, 2, 2 * len(turns))
    assert (counts["answers"], counts["supervised_tokens"], counts["tokens"]) == (2, sum(flags), len(ids))
    assert counts["endless"] == 0 and counts["joined"] == sum(alone["joined"] for _, _, alone in both)
    assert one.text == "".join(theirs.apply_chat_template(half, tokenize=False) for half in (turns, worse))


def test_a_pair_that_is_too_long_is_refused_or_dropped(tmp_path):
    """By the tokens of both halves together."""
    folder, _ = folder_of(tmp_path / "t", FAMILY)
    row = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    size = len(pair_in_tokens(folder, row)[0])
    assert len(pair_in_tokens(folder, row, max_tokens=size)[0]) == size
    with pytest.raises(ConfigError, match=r"pairs\.jsonl:1: too long .*, or set too_long to drop$"):
        pair_in_tokens(folder, row, max_tokens=size - 1)
    with pytest.raises(ValueError, match="not enough values"):
        pair_in_tokens(folder, row, max_tokens=size - 1, too_long="drop")
    config = config_of(folder, pairs=True, too_long="cut")
    with pytest.raises(ConfigError, match="subsets.chat.too_long='cut': a pair cannot be cut"):
        recipe.validate(config)


def test_halves_that_are_the_same_once_rendered_or_tokenized_are_named(tmp_path):
    """LLaMA-3's template trims white space; a tokenizer may fold letters."""
    folder, _ = folder_of(tmp_path / "t", FAMILY)
    subset, encoder, chosen, _ = opened(folder, pairs=True)
    template.save(folder / "saved.json", chosen, encoder)
    with rendering(folder / "saved.json", subset) as render:
        found = render({"prompt": "Q", "chosen": "A", "rejected": "A \n"}, subset)
        assert found == Bad("chosen and rejected are the same", "once rendered")
        long = {"prompt": "Q", "chosen": "A", "rejected": "B" * 10}
        short = recipe.conversations("jsonl:x", pairs=True, max_line_bytes=9)
        assert render(long, short).reason == "longer than max_line_bytes"
    made = byte_level(FAMILY.control, None)
    made.normalizer = normalizers.Lowercase()
    folder, _ = folder_of(tmp_path / "u", FAMILY, made=made)
    with pytest.raises(ConfigError, match=r"pairs.jsonl:1: chosen and rejected are the same \(once tokenized\)"):
        pair_in_tokens(folder, {"prompt": "Q", "chosen": "A", "rejected": "a"})


def test_a_half_whose_only_learned_token_is_its_first_is_named(tmp_path):
    """Nothing predicts it. Seen red with `half.any()`."""
    made = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))  # text between control: one token
    folder, _ = folder_of(tmp_path / "t", FAMILIES["tulu"], made=finished(made, ("<|endoftext|>",), None, []))
    encoder, counts = load_tokenizer(folder / "tokenizer.json"), Counter()
    end = len("ab<|endoftext|>")
    at = {"control": (), "tally": Tally(), "counts": counts}
    good = document("ab<|endoftext|>cd<|endoftext|><|endoftext|>", border=end, answers=[[1, end], [end + 1, 2 * end]],
                    turns=2, compared=0, source="p.jsonl:1")  # fmt: skip
    [made] = mask.encoded([good], encoder, PAIRS.conversations, **at)
    assert made.mask.tolist() == [1, 1, 3, 3, 2] and counts["pairs"] == 1
    for text, border, name in (("ab<|endoftext|>cd", end, "rejected"), ("abcd<|endoftext|>", 2, "chosen")):
        one = document(text, border=border, answers=[[0, border], [border, border + 2]], turns=2, compared=0,
                           source="p:2")  # fmt: skip
        with pytest.raises(ConfigError, match=f"p:2: no answer to learn .{name} has none behind its first token"):
            list(mask.encoded([one], encoder, PAIRS.conversations, **at))
    assert counts["pairs"] == 1


# ---- the whole preparation -------------------------------------------------------------------------------------------


def pair(i, answer="yes"):
    """UltraFeedback's columns."""
    asked = [{"role": "user", "content": f"Is it {i}?"}]
    chosen, rejected = ([*asked, {"role": "assistant", "content": f"{word} {i}."}] for word in (answer, "no"))
    row = {"prompt": f"Is it {i}?", "prompt_id": str(i), "chosen": chosen, "rejected": rejected, "messages": chosen}
    return {**row, "score_chosen": 7.0, "score_rejected": 7.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a preparation of pairs in two forms beside conversations, its recipe, and what build() returned."""
    root = tmp_path_factory.mktemp("pairs")
    folder, _ = folder_of(root / "tokenizer", FAMILY)
    lines = [pair(0), pair(0), {**pair(1), "score_chosen": None}, pair(2, "no"), {"messages": DIALOGUE}]
    lines += [pair(3, "maybe " * 99), *(pair(i) for i in range(4, 24)), {"chosen": "a", "rejected": "b"}]
    (root / "lists.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    texts = [{"prompt": f"prompt {i}", "chosen": f"chosen {i}", "rejected": f"rejected {i}"} for i in range(30)]
    pq.write_table(pa.Table.from_pylist([{**row, "system": "S"} for row in texts]), root / "texts.parquet")
    pq.write_table(pa.Table.from_pylist([pair(i) for i in range(9)]), root / "sft.parquet")
    config = config_of(folder)
    del config.subsets.chat
    some = {"pairs": True, "upsample": ((2, 3),)}
    config.subsets.lists = recipe.conversations(
        f"jsonl:{root}/lists.jsonl", **some, bad_rows="drop", max_tokens=120, too_long="drop"
    )
    config.subsets.texts = recipe.conversations(f"parquet:{root}/texts.parquet", pairs=True, tasks=2)
    config.subsets.sft = recipe.conversations(f"parquet:{root}/sft.parquet")
    config.validation_fraction = 0.2
    recipe.validate(config)
    config.lock()
    return root, config, build.build(config, root / "out", workers=1, keep_stages=True)[0]


def test_stores_of_pairs_hold_both_halves(made):
    root, _, data = made
    encoder, texts = load_tokenizer(root / "out" / "tokenizer.json"), []
    for name, documents in (("lists", 21), ("lists-x3", 1), ("texts", 30)):
        store = Store.open(root / "out" / name, verify="sha256")
        assert store.pairs and store.info["pairs"] and store.num_documents == documents
        assert documents == 1 or 0 < store.num_train_documents < documents
        for i in range(documents):
            record = store.document(i)
            [ids], [learned] = (read([record["start"]], record["num_tokens"]) for read in (store.read, store.read_mask))
            halves = [ids[learned < 2], ids[learned >= 2]]
            assert {half[0] for half in halves} == {encoder.token_to_id("<|begin_of_text|>")}
            learned_of = [runs(half, learned[learned // 2 == j] & 1, encoder) for j, half in enumerate(halves)]
            texts.append((record["source"], *map(encoder.decode, (half.tolist() for half in halves)), *learned_of))
            assert record["metadata"]["turns"] == (6 if name == "texts" else 4) and "border" not in record["metadata"]
    by_source = {source: rest for source, *rest in texts}
    head = "<|begin_of_text|>{}<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    head += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    said = head.format("<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>", "prompt 4")
    ends = "chosen 4<|eot_id|>", "rejected 4<|eot_id|>"
    assert by_source["texts.parquet:5"] == [said + ends[0], said + ends[1], (ends[0],), (ends[1],)]
    ends = "yes 1.<|eot_id|>", "no 1.<|eot_id|>"
    said = head.format("", "Is it 1?")
    assert by_source["lists.jsonl:3"] == [said + ends[0], said + ends[1], (ends[0],), (ends[1],)]
    assert "lists.jsonl:1" in by_source and "lists.jsonl:2" not in by_source
    assert not Store.open(root / "out" / "sft").pairs and Store.open(root / "out" / "sft").masked


def test_what_is_left_out_of_pairs_is_counted_and_shown(made):
    root, _, data = made
    counts = data["chat"]["conversations"]
    bad = {"chosen and rejected are the same": 1, "no pair": 1, "no prompt": 1}
    assert data["subsets"]["lists"]["clean"]["bad"] == bad
    assert data["subsets"]["lists"]["tokens"]["steps"]["tokens"]["removed"]["too long"]["documents"] == 1
    assert (counts["lists"]["pairs"], counts["lists"]["conversations"], counts["lists"]["answers"]) == (22, 44, 44)
    assert (counts["sft"]["pairs"], counts["sft"]["conversations"]) == (0, 9)
    for name, stores in (("lists", ("lists", "lists-x3")), ("texts", ("texts",)), ("sft", ("sft",))):
        infos = [Store.open(root / "out" / store).info for store in stores]
        assert counts[name]["supervised_tokens"] == sum(info["supervised_tokens"] for info in infos)
        assert counts[name]["tokens"] == sum(info["num_tokens"] for info in infos)
    text = build.describe(data)
    assert "lists: 22 pairs, 44 conversations, 88 turns, 44 answers" in text and "sft: 9 conversations" in text
    page = (root / "out" / "card" / "data.md").read_text()
    assert "| pairs |" in page and "A preference pair is two conversations" in page
    card = json.loads((root / "out" / "card" / "data.json").read_bytes())
    samples = [one["text"] for one in card["samples"]["kept"] if one["subset"] == "texts"]
    assert not card["inconsistencies"] and len(samples) == 3
    assert all(text.startswith("chosen: <|beg") and "\nrejected: <|begin_of_text|>" in text for text in samples)
    shown = show.examples(root / "out", data, colours=False).splitlines()
    both = [[f"{name}, chosen", f"{name}, rejected"] for name in ("lists", "lists-x3", "texts")]
    heads = [line.partition(":")[0] for line in shown if "what is learned is" in line]
    assert heads == [*both[0], *both[1], "sft", *both[2]]
    assert sum("[[rejected " in line for line in shown) == 1 and not any("[[<|" in line for line in shown)


def test_the_same_bytes_again_and_a_recipe_from_before_there_were_pairs(made, tmp_path):
    root, config, data = made
    digests = {name: row["root_digest"] for name, row in data["stores"].items()}
    again = build.build(config, tmp_path / "again", workers=1)[0]
    assert {name: row["root_digest"] for name, row in again["stores"].items()} == digests
    path = tmp_path / "again" / "data.json"
    older = json.loads(path.read_text())
    for name in ("lists", "texts"):
        del older["config"]["subsets"][name], older["stores"][name], older["subsets"][name], older["mix"][name]
    del older["config"]["subsets"]["sft"]["conversations"]["pairs"], older["chat"]["conversations"]["sft"]["pairs"]
    del older["stores"]["lists-x3"]
    path.write_text(json.dumps(older))
    config = config.copy_and_resolve_references()
    with config.unlocked():
        del config.subsets.lists, config.subsets.texts
    found, was_there = build.build(config, tmp_path / "again")
    assert was_there and "sft: 9 conversations, 18 turns" in build.describe(found)
    with config.unlocked():
        config.subsets.sft.conversations.pairs = True
    with pytest.raises(ConfigError, match="was made by another recipe"):
        build.build(config, tmp_path / "again")


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"messages": DIALOGUE}, {"pairs": True}, "chat.jsonl:2: no pair (expected chosen and rejected, found mess"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, {}, "chat.jsonl:1: no conversation (expected messages"),
        ({"prompt": "Q", "chosen": "A", "rejected": "<|eot_id|>"}, {"pairs": True}, "chat.jsonl:2: a control token"),
    ],
)  # fmt: skip
def test_a_row_of_the_other_form_ends_it_with_its_file_and_line(row, options, said, tmp_path):
    good = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    (tmp_path / "chat.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    config = config_of(folder_of(tmp_path / "t", FAMILY)[0])
    config.subsets.chat = recipe.conversations(f"jsonl:{tmp_path}/chat.jsonl", **options)
    with pytest.raises(ConfigError) as error:
        build.build(config.lock(), tmp_path / "out", workers=1)
    assert str(error.value).startswith(said) and ("pairs=True" in str(error.value)) == (not options)
