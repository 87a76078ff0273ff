"""seqio tasks and mixtures as sources of stores, and our tokenizer as a seqio vocabulary.

Import it only where it is used: it imports TensorFlow, 6 seconds and 0.8 GB.

    config = recipe_of_mixture("my_mixture", "my.module")   a recipe: a subset for each task
    seqio.Feature(Vocabulary("tokenizer.json"))             in a task of one's own

A source is `seqio:MODULE@TASK/SPLIT` or `seqio:MODULE@TASK/SPLIT,HELD_OUT`: MODULE is imported to register the task,
the documents of split HELD_OUT are the store's held-out end. MODULE@ may be left out if seqio has the task anyhow.
A document is an example: its "inputs", if the task has them, then its "targets", complete and in order, not shuffled.
EOS ends it if the targets' feature says add_eos. What the task draws at random follows from the recipe's seed.
"""

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from ml_collections import ConfigDict

from k2jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_sha256
from k2jax.errors import ConfigError
from k2jax.prepare import recipe
from k2jax.prepare.tokens import spm
from k2jax.prepare.tokens.token_document import TokenDocument, token_document

TRAIN, HELD_OUT = "train", "validation"
MOST_TASKS = 64  # of one subset


class Vocabulary(seqio.Vocabulary):
    """A tokenizer.json as seqio's tasks want it; `eos` as in `load_tokenizer`. Control tokens in a text are plain text.

    seqio pads with id 0, whatever `pad_id` says, and leaves zeros out of the loss. So the vocabulary's token 0 must be
    one that no text has: ConfigError if it is not, as with GPT-2's, where it is "!", or where <unk> may occur.
    """

    def __init__(self, tokenizer_json: str | Path, eos: str = ""):
        super().__init__()
        self.path = str(tokenizer_json)
        self._tokenizer = load_tokenizer(self.path, eos)
        self._eos = self._tokenizer.eos_id
        _check_padding(self._tokenizer, self._eos, self.path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[str, int]:
        return tokenizer_sha256(self.path), self._eos

    @property
    def bos_id(self) -> int | None:
        """That of the token that begins texts, if there is one."""
        return self._tokenizer.bos_id

    @property
    def eos_id(self) -> int:
        """That of the token that ends documents."""
        return self._eos

    @property
    def unk_id(self) -> int | None:
        """That of <unk>, if there is one: what ids beyond the vocabulary decode as."""
        return self._tokenizer.token_to_id("<unk>")

    @property
    def _base_vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def _encode(self, s: str) -> list[int]:
        return self._tokenizer.encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        if len(ids) and not 0 <= min(ids) <= max(ids) < self._base_vocab_size:
            raise ValueError(f"ids {min(ids)} to {max(ids)}: expected 0 to {self._base_vocab_size - 1}")
        return self._tokenizer.decode([int(id) for id in ids], skip_control=True)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: bytes | np.ndarray) -> np.ndarray:  # bytes in a graph, an array outside of one
            return np.array(self._encode((text if isinstance(text, bytes) else text.item()).decode()), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(rows: np.ndarray) -> np.ndarray | bytes:
            texts = [self._decode(row).encode() for row in np.atleast_2d(rows)]
            return np.array(texts, object) if rows.ndim > 1 else texts[0]

        texts = tf.numpy_function(decode, [ids], tf.string)
        texts.set_shape(ids.shape[:-1])
        return texts


def _check_padding(tokenizer: Tokenizer, eos: int, path: str) -> None:
    model, first = json.loads(tokenizer.to_str())["model"], tokenizer.id_to_token(0)
    unknown = 0 in (tokenizer.token_to_id(model.get("unk_token") or "<unk>"), model.get("unk_id"))
    if 0 not in tokenizer.control_ids or eos == 0 or (unknown and not model.get("byte_fallback")):
        raise ConfigError(
            f"tokenizer {path}: its token 0, {first!r}, can stand in a document, and seqio takes 0 for padding, which "
            "it leaves out of the loss: use a tokenizer whose token 0 is <pad>, or an <unk> that never occurs"
        )


def recipe_of_mixture(name: str, module: str) -> ConfigDict:
    """The recipe of a registered task or mixture: a subset for each task that has a split "train" and a rate above 0.

    A split "validation" is held out, exactly; of a task without one `validation_fraction` is. A subset's `repeats` is
    its task's rate: `token_sources.mix_of_rates` makes repeats of them. Raises ConfigError if the module cannot be
    imported, or what it registers cannot become stores.
    """
    provider = _provider(name, module)
    mixed = isinstance(provider, seqio.Mixture)
    made = tokenizer(f"{module}@{name}")  # refuses a vocabulary of another kind now
    config = recipe.base()
    config.eos = made.id_to_token(_features(provider)["targets"].vocabulary.eos_id)
    config.tokenizer = f"seqio:{module}@{name}"
    for task in provider.tasks if mixed else [provider]:
        rate = _rate(provider, task) if mixed else 1.0
        if TRAIN not in task.splits or rate == 0:
            continue  # as in the mixture's own get_dataset
        splits = f"{TRAIN},{HELD_OUT}" if HELD_OUT in task.splits else TRAIN
        number = min(MOST_TASKS, max(1, len(task.source.list_shards(TRAIN))))
        subset = recipe.subset(f"seqio:{module}@{task.name}/{splits}", tasks=number, repeats=rate)
        config.subsets[_subset_name(task.name, config.subsets)] = subset
    if not config.subsets:
        raise ConfigError(f"seqio {name}: no task of it has a split {TRAIN!r} and a rate above 0")
    recipe.validate(config)
    return config.lock()


def tokenizer(where: str) -> Tokenizer:
    """The tokenizer of MODULE@NAME's vocabulary, with the same ids; the extra ids are special tokens.

    Raises ConfigError if the features' vocabularies differ, or are neither SentencePiece's nor of `Vocabulary`.
    """
    module, _, name = where.rpartition("@")
    provider = _provider(name, module)
    features = _features(provider)
    found = [features[key].vocabulary for key in features]
    if any(vocabulary != found[-1] for vocabulary in found):
        raise ConfigError(f"seqio {name}: its inputs and targets have different vocabularies, a store has one")
    if isinstance(found[-1], Vocabulary):
        return load_tokenizer(found[-1].path)
    if not isinstance(found[-1], seqio.SentencePieceVocabulary):
        raise ConfigError(
            f"seqio {name}: its vocabulary is a {type(found[-1]).__name__}: expected a SentencePieceVocabulary, or a "
            "k2jax.prepare.tokens.seqio_bridge.Vocabulary of a tokenizer.json"
        )
    path, count = found[-1].sentencepiece_model_file, found[-1].extra_ids
    model = spm.parse(found[-1].sp_model, path)  # the extra ids are its last pieces
    extra = [piece.piece.removeprefix(spm.SPACE) for piece in model.pieces[len(model.pieces) - count :]]
    del model.pieces[len(model.pieces) - count :]
    converted = spm.convert(model.SerializeToString(), path).with_control_tokens(extra)
    if found[-1].eos_id not in converted.control_ids or converted.vocab_size != found[-1].vocab_size:
        raise ConfigError(
            f"seqio {name}: {path} has EOS {found[-1].eos_id} of {found[-1].vocab_size} ids, of which its "
            f"{converted.vocab_size} pieces make no control token: use another vocabulary"
        )
    return converted


def read(where: str, *, shard: int, num_shards: int, seed: int, eos: int) -> Iterator[TokenDocument]:
    """The examples of a source's shard: of its split, then of the one held out.

    Raises ConfigError if the task is not there or its features are no token ids.
    """
    path, _, splits = where.rpartition("/")
    module, _, name = path.rpartition("@")
    task = _provider(name, module, seqio.TaskRegistry.get)
    features = _features(task)
    if not set(splits.split(",")) <= set(task.splits):
        raise ConfigError(f"source 'seqio:{where}': the task has splits {', '.join(sorted(task.splits))}, name one")
    if features["targets"].vocabulary.eos_id != eos:
        found = features["targets"].vocabulary.eos_id
        raise ConfigError(f"seqio {name}: its vocabulary has EOS {found}, the tokenizer {eos}: use its own tokenizer")
    for held_out, split in enumerate(splits.split(",")):
        for number, example in enumerate(_examples(task, split, shard, num_shards, seed)):
            source = f"{name}/{split}#" + (f"{shard}." if num_shards > 1 else "") + str(number)
            ids = np.concatenate([_ids(example, key, source) for key in features])
            ends = len(ids) > 0 and ids[-1] == eos
            yield token_document(
                ids[:-1] if ends else ids,
                source=source,
                eos=bool(ends or features["targets"].add_eos),
                metadata={"split": split},
                held_out=bool(held_out),
            )


def _examples(task: seqio.Task, split: str, shard: int, num_shards: int, seed: int) -> Iterator[dict[str, Any]]:
    dataset = task.get_dataset(
        sequence_length=None,
        split=split,
        use_cached=task.requires_caching,
        shuffle=False,
        seed=seed,
        shard_info=seqio.ShardInfo(shard, num_shards) if num_shards > 1 else None,
        try_in_mem_cache=False,
    )
    options = tf.data.Options()
    options.deterministic = True
    return dataset.with_options(options).as_numpy_iterator()


def _ids(example: dict[str, Any], key: str, source: str) -> np.ndarray:
    ids = np.asarray(example[key])
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ConfigError(f"seqio {source}: {key!r} is {ids.dtype} of shape {ids.shape}: expected a list of token ids")
    return ids


def _features(provider: seqio.Task | seqio.Mixture) -> dict[str, seqio.Feature]:
    """Inputs, if there are some, and targets, in this order."""
    found = {key: provider.output_features[key] for key in ("inputs", "targets") if key in provider.output_features}
    if "targets" not in found:
        raise ConfigError(f"seqio {provider.name}: has features {sorted(provider.output_features)}, expected 'targets'")
    return found


def _provider(name: str, module: str, get: Callable[[str], Any] = seqio.get_mixture_or_task) -> Any:
    """Imports the module, which registers the task or mixture, and finds it."""
    try:
        if module:
            importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"--module={module}: cannot be imported ({error}): set PYTHONPATH to its folder") from error
    try:
        return get(name)
    except ValueError as error:
        registered = f"module {module} registers it" if module else "a module, named before an @, registers it"
        raise ConfigError(f"seqio {name}: not registered: see that {registered} under this name") from error


def _rate(mixture: seqio.Mixture, task: seqio.Task) -> float:
    try:
        return float(mixture.get_rate(task))
    except Exception as error:  # it may be a function of the user's
        message = (str(error).splitlines() or [""])[0]
        where = f"seqio {mixture.name}: the rate of its task {task.name}"
        raise ConfigError(f"{where} cannot be computed ({message}): give a number") from error


def _subset_name(task: str, taken: ConfigDict) -> str:
    name = re.sub(r"[^a-z0-9_-]+", "-", task.lower()).strip("-_") or "task"
    if name in taken:
        name += "-" + hashlib.sha256(task.encode()).hexdigest()[:8]
    return name
