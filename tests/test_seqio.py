"""seqio's tasks and mixtures become stores with their ids, splits and rates; our tokenizer is a vocabulary of seqio."""

import copy
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models

from k2jax.data.manifest import StoreSummary, build_manifest
from k2jax.data.store import Store
from k2jax.data.store_writer import StoreWriter
from k2jax.data.tokenizer import load_tokenizer, train_bpe
from k2jax.errors import ConfigError
from k2jax.prepare import recipe
from k2jax.prepare.tokens import token_sources
from k2jax.prepare.tokens.recipe_tokenizer import open_tokenizer

seqio = pytest.importorskip("seqio")
import sentencepiece  # noqa: E402  (seqio brings both)
import tensorflow as tf  # noqa: E402

from k2jax.prepare.tokens import seqio_bridge  # noqa: E402

REPO = Path(__file__).parent.parent
TEXTS = [" ".join(re.findall(r"\S+", (REPO / name).read_text())) for name in ("setup.py", "Makefile", "pyproject.toml")]
SENTENCES = [sentence for text in TEXTS for sentence in re.findall(r".{20,200}?(?:,| )", text)]
MODULE = '''
import seqio
import tensorflow as tf

from k2jax.prepare.tokens.seqio_bridge import Vocabulary

T5 = seqio.SentencePieceVocabulary("{folder}/t5.model", extra_ids=10)
OURS = Vocabulary("{folder}/tokenizer.json")


@seqio.map_over_dataset(num_seeds=1)
def drop_words(x, seed):
    words = tf.strings.split(x["targets"], " ")
    keep = tf.random.stateless_uniform(tf.shape(words), seed) < 0.5
    return {{**x, "targets": tf.strings.reduce_join(tf.boolean_mask(words, keep), separator=" ")}}


def task(name, vocabulary, files, *steps, keys=("targets",), **feature):
    seqio.TaskRegistry.add(
        name,
        source=seqio.TextLineDataSource({{k: "{folder}/" + v for k, v in files.items()}}),
        preprocessors=[
            lambda ds: ds.map(lambda x: {{key: x for key in keys}}, num_parallel_calls=4),
            *steps,
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
        ],
        output_features={{key: seqio.Feature(vocabulary, **feature) for key in keys}},
    )


TRAIN, BOTH = {{"train": "train_*.txt"}}, {{"train": "train_*.txt", "validation": "valid.txt"}}
task("books.v1", T5, BOTH)
task("Web:2", T5, TRAIN)
task("pairs", T5, BOTH, keys=("inputs", "targets"))
task("More", T5, BOTH)
task("random", T5, TRAIN, drop_words)
task("no_eos", T5, TRAIN, add_eos=False)
task("ours", OURS, BOTH)
task("bytes", seqio.ByteVocabulary(), TRAIN)
task("unused", T5, {{"test": "valid.txt"}})
task("inputs_only", T5, TRAIN, keys=("inputs",))
seqio.MixtureRegistry.add("inner", [("books.v1", 3), ("Web:2", 1)])
seqio.MixtureRegistry.add("mixture", [("inner", 2), ("More", 0.5), ("random", 0), ("unused", 4)])
seqio.MixtureRegistry.add("cannot", [("books.v1", seqio.mixing_rate_num_examples)])
'''


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Three files for training, one for validation, a T5-like model, our tokenizer, and the user's module."""
    path = tmp_path_factory.mktemp("seqio")
    for i in range(3):
        (path / f"train_{i}.txt").write_text("\n".join(SENTENCES[:-20][i::3]) + "\n")
    (path / "valid.txt").write_text("\n".join(SENTENCES[-20:]) + "\n")
    model = io.BytesIO()
    options = {"vocab_size": 300, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 3}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(SENTENCES), model_writer=model, **options)
    (path / "t5.model").write_bytes(model.getvalue())
    (path / "tokenizer.json").write_text(train_bpe(TEXTS, 400).to_str())
    (path / "k2jax_test_tasks.py").write_text(MODULE.format(folder=path))
    sys.path.insert(0, str(path))
    importlib.import_module("k2jax_test_tasks")
    yield path
    sys.path.remove(str(path))
    seqio.TaskRegistry.reset()
    seqio.MixtureRegistry.reset()


@pytest.fixture(scope="module")
def library(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "t5.model"))


def make(tmp_path, name):
    """Runs a mixture's preparation up to the pieces; the recipe and what the pieces of each store hold."""
    config = seqio_bridge.recipe_of_mixture(name, "k2jax_test_tasks")
    tmp_path.mkdir(exist_ok=True)
    tokenizer = tmp_path / "tokenizer.json"
    open_tokenizer(config.tokenizer).save(str(tokenizer))
    stage = token_sources.stage(config, tmp_path, tokenizer)
    for rank in range(stage.tasks):
        stage.function(rank)
    stores = {}
    for path in sorted((tmp_path / "stages/tokens").glob("*/*.parquet")):
        ids, rows = np.fromfile(path.with_suffix(".tokens"), "<u2"), pq.read_table(path).to_pylist()
        splits = np.split(ids, np.cumsum([row["num_tokens"] for row in rows])[:-1])
        stores.setdefault(path.parent.name, []).extend(zip(map(np.ndarray.tolist, splits), rows, strict=True))
    return config, stores


def test_a_mixture_becomes_a_recipe():
    config = seqio_bridge.recipe_of_mixture("mixture", "k2jax_test_tasks")
    assert {name: (one.source, one.tasks, one.repeats) for name, one in config.subsets.items()} == {
        "books-v1": ("seqio:k2jax_test_tasks@books.v1/train,validation", 3, 1.5),
        "web-2": ("seqio:k2jax_test_tasks@Web:2/train", 3, 0.5),
        "more": ("seqio:k2jax_test_tasks@More/train,validation", 3, 0.5),
    }
    recipe.validate(config)
    alone = seqio_bridge.recipe_of_mixture("ours", "k2jax_test_tasks")
    assert [*alone.subsets] == ["ours"] and alone.subsets.ours.repeats == 1


def test_its_documents_are_the_tasks_examples(tmp_path, library):
    config, stores = make(tmp_path, "mixture")
    train = [sentence for i in range(3) for sentence in SENTENCES[:-20][i::3]]
    held_out = [sentence for i in range(3) for sentence in SENTENCES[-20:][i::3]]  # one file, dealt by line
    expected = [[*library.encode(sentence), 1] for sentence in train + held_out]
    assert [ids for ids, _ in stores["books-v1"]] == expected
    assert [ids for ids, _ in stores["web-2"]] == expected[:-20]
    assert [ids for ids, _ in stores["more"]] == expected
    assert stores["books-v1"][0][1]["source"] == "books.v1/train#0.0"
    assert stores["books-v1"][-1][1]["source"].startswith("books.v1/validation#2.")
    summaries = [json.loads(path.read_text()) for path in sorted((tmp_path / "stages/token-sources").iterdir())]
    counts = [one["stores"]["books-v1"] for one in summaries[:3]]
    assert sum(one["held_out_documents"] for one in counts) == 20
    assert sum(one["documents"] for one in counts) == len(train)
    assert sum(one["tokens"] for one in counts) == sum(map(len, expected[:-20]))


def test_the_validation_split_is_held_out_to_the_document(tmp_path):
    config, stores = make(tmp_path, "books.v1")
    summaries = [json.loads(path.read_text()) for path in (tmp_path / "stages/token-sources").iterdir()]
    with StoreWriter(tmp_path / "store", tokenizer_sha256="ab" * 32, vocab_size=310, eos_id=1) as writer:
        for ids, row in stores["books-v1"]:
            writer.add(ids[:-1], id=row["id"], source=row["source"])
        writer.finish(num_train_tokens=sum(one["stores"]["books-v1"]["tokens"] for one in summaries))
    store = Store.open(tmp_path / "store")
    first = store.documents_in(store.num_train_tokens, store.num_train_tokens + 1)[0].index
    assert first == len(SENTENCES) - 20 and store.document(first)["source"].startswith("books.v1/validation")
    assert store.document(first - 1)["source"].startswith("books.v1/train")


def test_the_command_makes_the_stores_of_a_mixture(tmp_path, folder):
    tool = [sys.executable, str(REPO / "tools/prepare_data.py"), "--seqio_mixture=mixture", "--module=k2jax_test_tasks"]
    run = [*tool, f"--out={tmp_path}/out", "--workers=2"]
    first, second = (subprocess.run(run, cwd=folder, capture_output=True, text=True, check=False) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert "finished;" in first.stdout and "left as it is" in second.stdout
    data = json.loads((tmp_path / "out/data.json").read_text())
    assert sorted(data["stores"]) == ["books-v1", "more", "web-2"]
    stores = {name: Store.open(tmp_path / "out" / name, verify="sha256") for name in data["stores"]}
    assert [store.num_documents - store.num_train_documents for store in stores.values()] == [20, 20, 0]
    examples = {name: repeats * stores[name].num_train_documents for name, repeats in data["mix"].items()}
    shares = [examples[name] / sum(examples.values()) for name in ("books-v1", "web-2", "more")]
    assert np.allclose(shares, [0.6, 0.2, 0.2]), "the mixture's rates: of examples, 1.5 to 0.5 to 0.5"
    assert load_tokenizer(tmp_path / "out/tokenizer.json").vocab_size == 310


def test_inputs_come_before_targets(tmp_path):
    pairs, more = make(tmp_path / "a", "pairs")[1]["pairs"], make(tmp_path / "b", "More")[1]["more"]
    assert [ids for ids, _ in pairs] == [ids + ids for ids, _ in more]


def test_random_draws_follow_from_the_seed(tmp_path):
    first, second = (make(tmp_path / name, "random")[1]["random"] for name in "ab")
    assert first == second
    plain = make(tmp_path / "c", "Web:2")[1]["web-2"]
    assert sum(len(ids) for ids, _ in first) < 0.8 * sum(len(ids) for ids, _ in plain)


def test_documents_end_with_eos_if_the_feature_says_so(tmp_path):
    with_eos, without = make(tmp_path / "a", "Web:2")[1]["web-2"], make(tmp_path / "b", "no_eos")[1]["no_eos"]
    assert [ids for ids, _ in with_eos] == [[*ids, 1] for ids, _ in without]


def test_the_tokenizer_of_a_vocabulary_has_its_ids(library):
    tokenizer = open_tokenizer("seqio:k2jax_test_tasks@mixture")
    vocabulary = seqio.get_mixture_or_task("books.v1").output_features["targets"].vocabulary
    assert tokenizer.vocab_size == vocabulary.vocab_size == 310
    for sentence in SENTENCES:
        ids = tokenizer.encode(sentence)
        assert ids == list(vocabulary.encode(sentence)) == vocabulary.encode_tf(sentence).numpy().tolist()
        assert 2 in ids or tokenizer.decode(ids) == vocabulary.decode(ids)
    for id in range(300, 310):
        assert tokenizer.id_to_token(id) == vocabulary.decode([id]).strip()
    assert not set(tokenizer.encode("<extra_id_0></s><pad>")) & {0, 1, *range(300, 310)}


def test_our_vocabulary_in_a_task(tmp_path, folder):
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    config, stores = make(tmp_path, "ours")
    expected = [tokenizer.encode(sentence) for sentence in SENTENCES]
    assert sorted(ids for ids, _ in stores["ours"]) == sorted([*ids, 2] for ids in expected)
    assert (tmp_path / "tokenizer.json").read_text() == tokenizer.to_str()
    task = seqio.get_mixture_or_task("ours")
    converter = seqio.LMFeatureConverter(pack=False)
    padded = seqio.get_dataset("ours", {"targets": 64}, converter, "validation")
    example = next(padded.as_numpy_iterator())
    ids = example["decoder_target_tokens"].tolist()
    assert sum(example["decoder_loss_weights"]) == len([id for id in ids if id])
    text = task.output_features["targets"].vocabulary.decode(ids)
    assert text and SENTENCES[-20].startswith(text)


def test_our_vocabulary_encodes_and_decodes(folder):
    vocabulary = seqio_bridge.Vocabulary(folder / "tokenizer.json")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    text = "Größe \u2581 日本 </s>\n <unk> def"
    ids = vocabulary.encode(text)
    assert ids == tokenizer.encode(text) and not {0, 1, 2} & set(ids)
    assert vocabulary.encode_tf(tf.constant(text)).numpy().tolist() == ids
    assert vocabulary.decode([*ids, 2, 5, 6]) == text
    assert vocabulary.decode_tf(tf.constant([*ids, 2, 70, 71])).numpy().decode() == text
    batch = tf.constant([[*vocabulary.encode("def"), 2, 0, 0][:4], [*vocabulary.encode("x"), 2, 70, 71][:4]])
    assert [one.decode().rstrip() for one in vocabulary.decode_tf(batch).numpy()][1] == "x"
    assert (vocabulary.eos_id, vocabulary.bos_id, vocabulary.unk_id, vocabulary.vocab_size) == (2, 1, 0, 400)
    again = copy.deepcopy(vocabulary)
    assert again == vocabulary and again.encode(text) == ids and hash(again) == hash(vocabulary)
    assert seqio.ByteVocabulary() != vocabulary


@pytest.mark.parametrize("byte_fallback, first", [(False, "<unk>"), (True, "!"), (True, "</s>")])
def test_a_vocabulary_whose_token_0_may_stand_in_a_text_is_refused(tmp_path, byte_fallback, first):
    tokens = dict.fromkeys([first, "<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    model = models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=byte_fallback)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=f"its token 0, '{first}', can stand in a document"):
        seqio_bridge.Vocabulary(tmp_path / "tokenizer.json")


def test_repeats_keep_the_rates_which_count_examples():
    examples, tokens = {"a": 1000, "b": 4000}, {"a": 50_000, "b": 40_000}
    mix = token_sources.mix_of_rates({"a": 3.0, "b": 1.0}, examples, tokens)
    stores = {
        name: StoreSummary(name, "", "ab", 300, 1, tokens[name], tokens[name], examples[name]) for name in examples
    }
    stage = {"name": "s", "sequence_length": 10, "rows_per_step": 100, "steps_per_chunk": 160, "chunks": 1, "mix": mix}
    manifest = build_manifest(stages=[stage], stores=stores, seed=1, label_shift="inside")
    rows = {subset["name"]: subset["rows"] for subset in manifest["stages"][0]["subsets"]}
    read = {name: 10 * rows[name] * examples[name] / tokens[name] for name in rows}  # tokens to examples
    assert read["a"] / read["b"] == pytest.approx(3, rel=1e-3)
    assert sum(mix[name] * tokens[name] for name in mix) == pytest.approx(90_000)
    assert token_sources.mix_of_rates(examples, examples, tokens) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    "name, module, problem",
    [
        ("books.v1", "no_such_module_of_mine", "--module=no_such_module_of_mine: cannot be imported"),
        ("nowhere", "k2jax_test_tasks", "seqio nowhere: not registered: see that module k2jax_test_tasks"),
        ("bytes", "k2jax_test_tasks", "seqio bytes: its vocabulary is a ByteVocabulary"),
        ("unused", "k2jax_test_tasks", "seqio unused: no task of it has a split 'train'"),
        ("inputs_only", "k2jax_test_tasks", "expected 'targets'"),
        ("cannot", "k2jax_test_tasks", "seqio cannot: the rate of its task books.v1 cannot be computed"),
    ],
)
def test_what_cannot_become_stores_is_one_clear_line(name, module, problem):
    with pytest.raises(ConfigError) as error:
        seqio_bridge.recipe_of_mixture(name, module)
    assert problem in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "where, problem",
    [
        ("k2jax_test_tasks@Web:2/validation", "the task has splits train, name one"),
        ("k2jax_test_tasks@mixture/train", "seqio mixture: not registered"),
        ("ours/train", "its vocabulary has EOS 2, the tokenizer 1"),
    ],
)
def test_a_wrong_source_is_one_clear_line(where, problem):
    with pytest.raises(ConfigError, match=problem):
        next(seqio_bridge.read(where, shard=0, num_shards=1, seed=0, eos=1))


def test_tensorflow_is_imported_for_seqio_alone(tmp_path, folder):
    (tmp_path / "a.jsonl").write_text('{"token_ids": [1, 2], "source": "a"}\n')
    code = f"""
import importlib, pathlib, sys
import k2jax
package = pathlib.Path(k2jax.__file__).parent
for path in [*package.glob("prepare/**/*.py"), package / "data/store.py"]:
    if path.stem not in ("__init__", "seqio_bridge"):
        importlib.import_module(".".join(("k2jax", *path.relative_to(package).with_suffix("").parts)))
from dealt import deal
from k2jax.prepare import recipe
from k2jax.prepare.tokens import token_sources
config = recipe.base()
config.subsets.a = recipe.subset("llm360:{tmp_path}/a.jsonl")
config = deal(config, pathlib.Path("{tmp_path}/out"))
token_sources.stage(config, "{tmp_path}/out", "{folder}/tokenizer.json").function(0)
print(sorted({{"tensorflow", "seqio", "sentencepiece", "jax"}} & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO}/tests"}
    answer = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True, env=environment)
    assert answer.stdout == "[]\n"
