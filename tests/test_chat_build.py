"""Conversations from files to stores, by the whole preparation: what is learned, whence it came, what was refused."""

import datetime
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import DIALOGUE, FAMILIES
from ml_collections import ConfigDict
from test_chat import folder_of, runs

pytest.importorskip("datatrove")
pytest.importorskip("transformers")

from k2jax.data.store import Store
from k2jax.data.tokenizer import load_tokenizer
from k2jax.errors import ConfigError
from k2jax.prepare import build, recipe
from k2jax.prepare.chat import show
from k2jax.run import chat_template

FAMILY = FAMILIES["llama-3"]
GOOD = {"messages": DIALOGUE}


def turns(i):
    return [
        {"role": "user", "content": f"Question {i}?"},
        {"role": "assistant", "content": f"It is {i}.", "weight": None},
    ]


def config_of(folder, **subsets):
    c = recipe.base()
    c.tokenizer, c.eos = str(folder / "tokenizer.json"), "<|end_of_text|>"
    c.validation_fraction = 0.1
    for name, subset in subsets.items():
        c.subsets[name] = subset
    recipe.validate(c)
    return c.lock()


def prepared(config, out, **options):
    return build.build(config, out, workers=1, **options)[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a preparation of three forms of conversations beside text, and what build() returned."""
    root = tmp_path_factory.mktemp("chat")
    folder, _ = folder_of(root / "tokenizer", FAMILY)
    lines = [
        GOOD,
        GOOD,
        {"messages": DIALOGUE[:2]},
        *({"messages": turns(i)} for i in range(20)),
        "{",
        GOOD["messages"],
    ]
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (root / "openai.jsonl").write_text(text, encoding="utf-8")
    pq.write_table(pa.table({"messages": [turns(100 + i) for i in range(20)]}), root / "rows.parquet")
    turn = {"timestamp": datetime.datetime(2024, 7, 26), "toxic": False}  # as collected conversations have them
    late = [[{**one, **turn, "content": one["content"] + " late"} for one in turns(i)] for i in range(3)]
    pq.write_table(pa.table({"messages": late}), root / "late.parquet")
    share = [[{"from": "human", "value": f"a {i}"}, {"from": "gpt", "value": "b " * i + "."}] for i in range(12)]
    table = pa.table({"conversations": share, "id": [f"s{i}" for i in range(12)]})
    with (
        pa.OSFile(str(root / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
    (root / "text.txt").write_text("A document of text.\n" * 5)
    config = config_of(
        folder,
        openai=recipe.conversations(f"jsonl:{root}/openai.jsonl", bad_rows="drop", licence="MIT"),
        rows=recipe.conversations(f"parquet:{root}/rows.parquet", tasks=2),
        late=recipe.conversations(f"parquet:{root}/late.parquet"),
        share=recipe.conversations(f"arrow:{root}/*.arrow", max_tokens=26, too_long="drop"),
        text=recipe.subset(f"text:{root}/text.txt"),
    )
    return root, config, prepared(config, root / "out")


def conversations(path):
    """{source: (the document's record, its ids, its mask)} of a store."""
    store = Store.open(path, verify="sha256")
    found = {}
    for i in range(store.num_documents):
        record = store.document(i)
        [ids] = store.read([record["start"]], record["num_tokens"])
        [mask] = store.read_mask([record["start"]], record["num_tokens"])
        found[record["source"]] = record, ids, mask
    return found


def test_stores_hold_each_conversation_once_as_its_template_writes_it(made):
    root, _, data = made
    encoder = load_tokenizer(root / "out" / "tokenizer.json")
    found = conversations(root / "out" / "openai")
    record, ids, mask = found["openai.jsonl:1"]
    assert encoder.decode(ids.tolist()) == FAMILY.text, "and no EOS behind it"
    assert runs(ids.tolist(), mask, encoder) == FAMILY.answers
    assert record["metadata"]["turns"] == 5 and record["metadata"]["licence"] == "MIT"
    assert record["metadata"]["duplicates"]["copies"] == 2 and "openai.jsonl:2" not in found
    _, ids, mask = conversations(root / "out" / "rows")["rows.parquet:3"]
    assert runs(ids.tolist(), mask, encoder) == ("It is 102.<|eot_id|>",), "near copies of one another stay"
    store = Store.open(root / "out" / "openai")
    [span] = store.documents_in(record["start"] + 1, record["start"] + 2)
    assert store.document(span.index)["id"] == record["id"] == store.document(store.find_document(record["id"]))["id"]
    assert (root / "out" / "chat_template.jinja").read_text() == FAMILY.template
    assert not Store.open(root / "out" / "text").masked and Store.open(root / "out" / "text").info["eos_id"]


def test_a_run_on_the_stores_records_their_template(made, tmp_path):
    """From its first stage on them; what it had before, until then."""
    root, _, data = made
    assert data["chat"]["ends"] == ["<|eot_id|>"] and data["chat"]["tokens"]["bos_token"] == "<|begin_of_text|>"
    config = ConfigDict({"data": {"root": str(root / "out")}})
    config.stages = tuple(ConfigDict({"mix": {name: 1}}) for name in ("text", "rows", "text"))
    before = {"sha256": "of the import"}
    first, *later = chat_template.by_stage(config, ["rows", "share"], before)
    assert first is before and later[0] == later[1]
    assert later[0]["template"] == FAMILY.template and later[0]["ends"] == ["<|eot_id|>"]
    assert later[0]["sha256"] == data["chat"]["template_sha256"]
    assert chat_template.by_stage(config, [], None) == [None] * 3
    config.data.root = str(tmp_path)
    assert chat_template.by_stage(config, ["rows"], before) == [before] * 3, "stores without what prepared them"
    for name in ("data.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((root / "out" / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("other")
    with pytest.raises(ConfigError, match=r"its SHA-256 is d9298a10d1b0, the conversations beside"):
        chat_template.by_stage(config, ["rows"], None)


def test_what_is_left_out_and_what_is_learned_is_counted(made):
    root, _, data = made
    counts = data["chat"]["conversations"]
    assert data["subsets"]["openai"]["clean"]["bad"] == {
        "JSON that is no object": 1, "bad JSON": 1, "no answer to learn": 1
    }  # fmt: skip
    assert counts["openai"]["conversations"] == 21 and counts["openai"]["answers"] == 22
    assert counts["rows"]["conversations"] == 20 and counts["openai"]["endless"] == 0
    removed = data["subsets"]["share"]["tokens"]["steps"]["tokens"]["removed"]["too long"]["documents"]
    assert removed > 0 and counts["share"]["conversations"] == 12 - removed
    for name in counts:
        info = Store.open(root / "out" / name).info
        assert (
            info["supervised_tokens"]
            == counts[name]["supervised_tokens"]
            == data["stores"][name]["supervised_tokens"]
        )
        assert info["num_tokens"] == counts[name]["tokens"]
    text = build.describe(data)
    assert "openai: 21 conversations" in text and f"left out of share: {removed} too long" in text
    page = (root / "out" / "card" / "data.md").read_text()
    assert "## Conversations" in page and data["chat"]["template_sha256"] in page
    assert not json.loads((root / "out" / "card" / "data.json").read_bytes())["inconsistencies"]


def test_the_same_bytes_again_and_a_finished_folder_is_known(made, tmp_path):
    root, config, data = made
    again = build.build(config, tmp_path / "again", workers=2)[0]
    assert {name: row["root_digest"] for name, row in again["stores"].items()} == {
        name: row["root_digest"] for name, row in data["stores"].items()
    }
    assert build.build(config, tmp_path / "again") == (again, True)
    (tmp_path / "again" / "chat_template.jinja").write_text("another")
    with pytest.raises(ConfigError, match="chat_template.jinja has digest"):
        build.build(config, tmp_path / "again")


def test_a_recipe_from_before_there_were_conversations_is_known(tmp_path):
    (tmp_path / "a.txt").write_text("Some text of a document. " * 40)
    config = recipe.base()
    config.tokenizer = str(folder_of(tmp_path / "t", FAMILIES["chatml"])[0] / "tokenizer.json")
    config.subsets.text = recipe.subset(f"text:{tmp_path}/a.txt")
    prepared(config, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "data.json").read_text())
    del data["config"]["chat"], data["config"]["subsets"]["text"]["conversations"]
    (tmp_path / "out" / "data.json").write_text(json.dumps(data))
    assert build.build(config, tmp_path / "out")[1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "narrator", "content": "x"}]}, "an unknown role (turn 1 is of 'narrator'"),
        ({"messages": [*DIALOGUE, {"role": "system", "content": "x"}]}, "two system turns (turns 1, 6)"),
        (
            {"messages": [{"role": "user", "content": "\x1b[31m"}, {"role": "assistant", "content": "\t"}]},
            "an empty turn",
        ),
        ({"messages": DIALOGUE[:2]}, "no answer to learn"),
        ({"messages": [{"role": "\x1b[2J", "content": "x"}]}, "an unknown role (turn 1 is of '\\x1b[2J'"),
        ({"text": "x"}, "no conversation"),
    ],
)
def test_a_bad_row_ends_it_with_its_file_and_line(row, said, tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(row) + "\n")
    config = config_of(
        folder_of(tmp_path / "t", FAMILY)[0], chat=recipe.conversations(f"jsonl:{tmp_path}/chat.jsonl")
    )
    with pytest.raises(ConfigError) as error:
        prepared(config, tmp_path / "out")
    line = str(error.value)
    assert line.startswith(f"chat.jsonl:2: {said}") and line.isprintable() and "bad_rows='drop'" in line


def test_a_subset_of_which_nothing_stays_is_an_error(tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps(GOOD) + "\n")
    folder, _ = folder_of(tmp_path / "t", FAMILY)
    short = recipe.conversations(f"jsonl:{tmp_path}/chat.jsonl", max_tokens=3, too_long="drop")
    with pytest.raises(
        ConfigError, match=r"subset chat: no conversation of it has an answer to learn \(1 too long\)"
    ):
        prepared(config_of(folder, chat=short), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"chat\.jsonl:1: too long \(\d+ tokens\)"):
        prepared(
            config_of(folder, chat=recipe.conversations(f"jsonl:{tmp_path}/chat.jsonl", max_tokens=3)), tmp_path / "b"
        )


def test_a_template_that_does_not_fit_leaves_no_folder(tmp_path):
    """The recipe can be corrected and run again."""
    (tmp_path / "chat.jsonl").write_text(json.dumps(GOOD) + "\n")
    folder, _ = folder_of(tmp_path / "t", FAMILY, FAMILY.template + "{{ strftime_now('%Y') }}")
    config = config_of(folder, chat=recipe.conversations(f"jsonl:{tmp_path}/chat.jsonl"))
    with pytest.raises(ConfigError, match="chat.date"):
        prepared(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"too_long": "keep"}, "subsets.chat.too_long='keep': must be one of refuse, drop, cut"),
        ({"answers": "first"}, "subsets.chat.answers='first': must be one of all, last"),
        ({"roles": (("bot", "robot"),)}, "subsets.chat.roles"),
        ({"roles": ("bot",)}, "subsets.chat.roles"),
        ({"nfc": True}, "subsets.chat.nfc=True: is for text, not for conversations"),
        ({"fim_rate": 0.5}, "subsets.chat.fim_rate=0.5: is for text"),
        ({"max_tokens": -1}, "subsets.chat.max_tokens=-1: must not be negative"),
        ({"max_tokens": "8k"}, "subsets.chat.conversations.max_tokens='8k'"),
        ({"source": "text:*.txt"}, "conversations are read from jsonl, parquet, arrow"),
    ],
)
def test_wrong_settings_are_named(options, said, tmp_path):
    folder, _ = folder_of(tmp_path / "t", FAMILY)
    with pytest.raises(ConfigError) as error:
        config_of(folder, chat=recipe.conversations(**{"source": "jsonl:x", **options}))
    assert said in str(error.value)


def test_conversations_need_a_tokenizer():
    config = recipe.base()
    config.subsets.chat = recipe.conversations("jsonl:x")
    with pytest.raises(ConfigError, match="conversations need tokenizer"):
        recipe.validate(config)
    config.chat.date = "today"
    with pytest.raises(ConfigError, match="chat.date='today': must be a day"):
        recipe.validate(config)


def test_a_conversation_is_shown_with_what_is_learned(made):
    """In colour line by line, or in marks; what a terminal would obey is an escape."""
    root, _, data = made
    encoder = load_tokenizer(root / "out" / "tokenizer.json")
    ids = encoder.encode_with_control("<|eot_id|>a\x1b[2J\x9b b\nc naïve")
    mask = np.array([0, 0] + [1] * (len(ids) - 2), np.uint8)
    marked = show.picture(np.array(ids), mask, encoder, colours=False)
    assert marked == "    <|eot_id|>a[[\\u001b[2J\\u009b b\n    c naïve]]"
    green, back = show.COLOURS
    coloured = show.picture(np.array(ids), mask, encoder, colours=True)
    assert coloured == f"    <|eot_id|>a{green}\\u001b[2J\\u009b b{back}\n    {green}c naïve{back}"
    shown = show.examples(root / "out", data, colours=False)
    assert shown.count("what is learned is in [[ ]]") == 4 and "[[It is " in shown and ".<|eot_id|>]]" in shown
