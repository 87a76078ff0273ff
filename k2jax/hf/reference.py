"""The families' forward passes in plain numpy, straight from a Hugging Face folder: what an export is held against.

Written from their definitions with Hugging Face's names, and knows nothing of k2jax's own layout, model or converter:
a mistake there cannot be made here, too. float32; weights are read a block of rows at a time.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

BLOCK_BYTES = 1 << 26  # of a matrix, as float32
EPSILON = 2.0**-23  # relative rounding of float32

Nudge = Callable[[np.ndarray], np.ndarray]


class Logits(NamedTuple):
    """Of rows of tokens, float32 (B, T, V), and how much rounding may have moved them."""

    logits: np.ndarray
    noise: float  # the largest change of a logit when every intermediate result moves by its last bit


class Folder:
    """The files: config.json's values, and matrices by name."""

    def __init__(self, path: Path):
        self.path = path
        self.config: dict[str, Any] = json.loads((path / "config.json").read_bytes())
        index = path / "model.safetensors.index.json"
        self._files = json.loads(index.read_bytes())["weight_map"] if index.exists() else None

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows as float32) of a tensor. The file is mapped anew for each block, so that the pages of a
        whole shard never count as this process's memory."""
        file = self.path / ("model.safetensors" if self._files is None else self._files[name])
        with safe_open(file, "numpy") as opened:
            rows, *rest = opened.get_slice(name).get_shape()
        step = max(BLOCK_BYTES // (4 * math.prod(rest)), 1)
        for first in range(0, rows, step):
            with safe_open(file, "numpy") as opened:
                block = opened.get_slice(name)[first : min(first + step, rows)]
            yield first, block.astype(np.float32)

    def vector(self, name: str) -> np.ndarray:
        return np.concatenate([block for _, block in self.blocks(name)])

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        """x (B, T, in) . W (out, in) transposed -> (B, T, out)."""
        flat = x.reshape(-1, x.shape[-1])
        y = np.concatenate([flat @ block.T for _, block in self.blocks(name)], axis=-1)
        return y.reshape(*x.shape[:-1], -1)

    def lookup(self, name: str, tokens: np.ndarray) -> np.ndarray:
        """Rows of W (V, D) by tokens (B, T)."""
        found = None
        for first, block in self.blocks(name):
            found = np.zeros((*tokens.shape, block.shape[1]), np.float32) if found is None else found
            inside = (tokens >= first) & (tokens < first + len(block))
            found[inside] = block[tokens[inside] - first]
        return found


def numpy_logits(path: Path, tokens: np.ndarray) -> Logits:
    """The logits of `tokens` (B, T) by the files in `path`.

    The rows are computed twice, the second time with every intermediate result off by its last bit up or down at
    random: what that does to the logits is how far apart two right implementations may be for this very model.
    """
    folder = Folder(path)
    c = folder.config
    signs = np.random.default_rng(0)

    def nudge(x: np.ndarray) -> np.ndarray:
        half = len(x) // 2
        off = np.float32(EPSILON) * signs.choice(np.array([-1, 1], np.float32), x[half:].shape)
        x[half:] *= 1 + off
        return x

    x = nudge(folder.lookup("model.embed_tokens.weight", np.concatenate([tokens, tokens])))
    cos, sin = rotary(c, tokens.shape[1])
    for i in range(c["num_hidden_layers"]):
        x = block(folder, f"model.layers.{i}.", x, cos, sin, nudge)
    x = nudge(norm(x, folder.vector("model.norm.weight"), c["rms_norm_eps"]))
    head = "model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"
    logits, nudged = np.split(folder.linear(head, x), 2)
    return Logits(logits, float(np.abs(logits - nudged).max()))


def block(folder: Folder, layer: str, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, nudge: Nudge) -> np.ndarray:
    """One layer of (B, T, D): OLMo-2 norms what attention and MLP give, the others what these take."""

    def normed(x: np.ndarray, name: str) -> np.ndarray:
        return nudge(norm(x, folder.vector(f"{layer}{name}_layernorm.weight"), folder.config["rms_norm_eps"]))

    if folder.config["model_type"] == "olmo2":
        x = x + normed(nudge(attention(folder, f"{layer}self_attn.", x, cos, sin, nudge)), "post_attention")
        return x + normed(nudge(swiglu(folder, f"{layer}mlp.", x, nudge)), "post_feedforward")
    x = x + nudge(attention(folder, f"{layer}self_attn.", normed(x, "input"), cos, sin, nudge))
    return x + nudge(swiglu(folder, f"{layer}mlp.", normed(x, "post_attention"), nudge))


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Root-mean-square norm over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


def attention(
    folder: Folder, prefix: str, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, nudge: Nudge
) -> np.ndarray:
    """Causal attention of (B, T, D), each key and value head serving a group of query heads.

    Qwen2 adds biases to the three, Qwen3 norms each head of queries and keys, OLMo-2 all of them together.
    """
    c = folder.config
    batch, length, _ = x.shape
    head_dim, groups = c["head_dim"], c["num_attention_heads"] // c["num_key_value_heads"]

    def heads(name: str) -> np.ndarray:
        y = nudge(folder.linear(f"{prefix}{name}_proj.weight", x))
        if c["model_type"] == "qwen2":
            y = nudge(y + folder.vector(f"{prefix}{name}_proj.bias"))
        each = y.reshape(batch, length, -1, head_dim)
        if name != "v" and c["model_type"] in ("qwen3", "olmo2"):
            together = each if c["model_type"] == "qwen3" else y
            each = nudge(norm(together, folder.vector(f"{prefix}{name}_norm.weight"), c["rms_norm_eps"]))
        return each.reshape(batch, length, -1, head_dim).transpose(0, 2, 1, 3)

    query, key, value = heads("q"), heads("k"), heads("v")
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    key, value = np.repeat(key, groups, axis=1), np.repeat(value, groups, axis=1)
    scores = query @ key.transpose(0, 1, 3, 2) / np.float32(math.sqrt(head_dim))
    scores = np.where(np.tri(length, dtype=bool), scores, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    mixed = (weights @ value).transpose(0, 2, 1, 3).reshape(batch, length, -1)
    return folder.linear(f"{prefix}o_proj.weight", nudge(mixed))


def swiglu(folder: Folder, prefix: str, x: np.ndarray, nudge: Nudge) -> np.ndarray:
    gate = nudge(folder.linear(f"{prefix}gate_proj.weight", x))
    up = nudge(folder.linear(f"{prefix}up_proj.weight", x))
    return folder.linear(f"{prefix}down_proj.weight", gate / (1 + np.exp(-gate)) * up)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotary position embedding of (B, N, T, H): the first half of a head is turned with the second."""
    first, second = np.split(x, 2, axis=-1)
    return x * cos + np.concatenate([-second, first], axis=-1) * sin


def rotary(c: dict[str, Any], length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (T, H) of config.json's rotary embedding; ValueError when its two spellings differ."""
    rope = c["rope_parameters"]
    older = {"rope_theta": c["rope_theta"], **(c["rope_scaling"] or {"rope_type": "default"})}
    if rope != older:
        raise ValueError(f"config.json's rope_parameters are {rope}, its rope_theta and rope_scaling say {older}")
    frequency = 1.0 / rope["rope_theta"] ** (np.arange(0, c["head_dim"], 2, dtype=np.float64) / c["head_dim"])
    if rope["rope_type"] == "llama3":
        frequency = scale_llama3(frequency, rope)
    angle = np.arange(length)[:, None] * np.concatenate([frequency, frequency])[None, :]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def scale_llama3(frequency: np.ndarray, rope: dict[str, Any]) -> np.ndarray:
    """LLaMA 3.1's frequencies for a longer context: low ones divided, high ones kept, the middle between the two."""
    context = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    wavelength = 2 * np.pi / frequency
    smooth = (context / wavelength - low) / (high - low)
    middle = (1 - smooth) * frequency / factor + smooth * frequency
    is_low, is_high = wavelength > context / low, wavelength < context / high
    return np.where(is_low, frequency / factor, np.where(is_high, frequency, middle))
