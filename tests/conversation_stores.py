"""Stores of conversations for tests, written token by token: what the tests of sft stages train on."""

import hashlib
from pathlib import Path

import numpy as np
from conftest import EXPERIMENT as TINY
from conftest import VOCAB_SIZE

from k2jax import config as configuration
from k2jax.data.store import Store
from k2jax.data.store_writer import StoreWriter
from k2jax.data.tokenizer import EOS, load_tokenizer, tokenizer_sha256

T = 64  # of the experiment's rows
OPTIONS = {"tokenizer_sha256": "0" * 64, "eos_id": 0, "vocab_size": VOCAB_SIZE}
OPTIONS |= {"shard_tokens": 4096, "chunk_tokens": 512}

# The tiny experiment of the other tests, but for its name and stages.
EXPERIMENT = TINY.partition("    c.stages")[0].replace('"tiny"', '"tiny-chat"') + '''    c.stages = (
        config.stage(name="text", sequence_length=32, rows_per_step=8, steps_per_chunk=5, chunks=1,
                     lr_peak=1e-2, lr_final=2e-3, warmup_steps=2, mix={{"books": 1, "web": 1}}),
        config.stage(name="chat", kind="sft", sequence_length={length}, rows_per_step=8, steps_per_chunk=5, chunks=3,
                     reset_positions=True, lr_peak=2e-3, lr_final=2e-4, warmup_steps=0,
                     mix={{"talk": 1, "sums": 2}}),
    )
    return c
'''


def write_store(
    path: Path, lengths: list[int], *, seed: int = 0, held_out: float = 0.0, **same: object
) -> Store:
    """Conversations of so many tokens, EOS among them; the last third of each, and some before it, are learned."""
    draw = np.random.default_rng(seed)
    with StoreWriter(path, **OPTIONS | same, masked=True) as writer:
        for i, length in enumerate(lengths):
            tokens = draw.integers(0, VOCAB_SIZE, length)
            mask = (draw.random(length) < 0.2) | (np.arange(length) >= 2 * length // 3)
            id = hashlib.sha256(f"{path.name} {seed} {i}".encode()).hexdigest()
            writer.add(tokens, id=id, source=f"{path.name}.jsonl:{i + 1}", eos=False, mask=mask.astype(np.uint8))
        writer.finish(validation_fraction=held_out)
    return Store.open(path)


def write_pairs(path: Path, lengths: list[tuple[int, int]], *, seed: int = 0, held_out: float = 0.0, **same) -> Store:
    """Pairs of conversations of so many tokens, that begin alike; of each what comes behind that is learned."""
    draw = np.random.default_rng(seed)
    with StoreWriter(path, **OPTIONS | same, masked=True, pairs=True) as writer:
        for i, (chosen, rejected) in enumerate(lengths):
            halves = [draw.integers(0, VOCAB_SIZE, length) for length in (chosen, rejected)]
            alike = min(chosen, rejected) // 2
            halves[1][:alike] = halves[0][:alike]
            masks = [2 * half + (np.arange(len(ids)) >= alike) for half, ids in enumerate(halves)]
            id = hashlib.sha256(f"{path.name} {seed} {i}".encode()).hexdigest()
            mask = np.concatenate(masks).astype(np.uint8)
            writer.add(np.concatenate(halves), id=id, source=f"{path.name}.jsonl:{i + 1}", eos=False, mask=mask)
        writer.finish(validation_fraction=held_out)
    return Store.open(path)


def make_chat(root: Path, text: Path) -> None:
    """A folder as conftest's make_data makes them, with its stores and two of conversations, and tiny.py."""
    root.mkdir(parents=True, exist_ok=True)
    for name in ("books", "web", "tokenizer.json"):
        (root / name).symlink_to(text / name)
    draw = np.random.default_rng(1)
    eos_id = load_tokenizer(root / "tokenizer.json").token_to_id(EOS)
    same = {"tokenizer_sha256": tokenizer_sha256(root / "tokenizer.json"), "eos_id": eos_id, "held_out": 0.1}
    write_store(root / "talk", draw.integers(4, T + 1, 90).tolist(), seed=1, **same)
    write_store(root / "sums", draw.integers(3, 20, 120).tolist(), seed=2, **same)
    (root / "tiny.py").write_text(EXPERIMENT.format(vocab_size=VOCAB_SIZE, root=str(root), length=T))


def make_preferences(root: Path, text: Path) -> None:
    """The same with a store of pairs, on which a second stage is of kind dpo."""
    make_chat(root, text)
    draw = np.random.default_rng(3)
    eos_id = load_tokenizer(root / "tokenizer.json").token_to_id(EOS)
    same = {"tokenizer_sha256": tokenizer_sha256(root / "tokenizer.json"), "eos_id": eos_id, "held_out": 0.1}
    write_pairs(root / "liked", draw.integers(4, T // 2 + 1, (110, 2)).tolist(), seed=5, **same)
    experiment = (root / "tiny.py").read_text().replace('"tiny-chat"', '"tiny-preferences"')
    before, _, behind = experiment.partition('        config.stage(name="chat"')
    row = behind.replace('kind="sft"', 'kind="dpo"').partition("mix=")[0] + 'mix={"liked": 1}),\n    )\n    return c\n'
    (root / "tiny.py").write_text(f'{before}        config.stage(name="prefer"{row}')


def load(root: Path, **overrides: object) -> configuration.ConfigDict:
    """The experiment of `make_chat`, overridden, locked."""
    return configuration.load(str(root / "tiny.py"), [f"{key}={value}" for key, value in overrides.items()])
