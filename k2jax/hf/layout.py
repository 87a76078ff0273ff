"""Hugging Face's LLaMA, Qwen3 and ours: which tensor is which, and config.json both ways.

A matrix of ours is (in..., out...), one of theirs (out, in), one tensor a layer. Both turn the pairs (i, i + H/2) in
RoPE (the split-half form), so that no head is permuted. Letters as in model/decoder.py.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from k2jax import config as configuration
from k2jax.errors import ConfigError
from k2jax.hf.untrusted import short
from k2jax.model.decoder import parameter_table

# Their names, by the name in parameter_table; {} is the layer's number.
NAMES = {
    "embed_VD": "model.embed_tokens.weight",
    "layers.attention_norm_LD": "model.layers.{}.input_layernorm.weight",
    "layers.wq_LDNH": "model.layers.{}.self_attn.q_proj.weight",
    "layers.q_norm_LH": "model.layers.{}.self_attn.q_norm.weight",
    "layers.wk_LDKH": "model.layers.{}.self_attn.k_proj.weight",
    "layers.k_norm_LH": "model.layers.{}.self_attn.k_norm.weight",
    "layers.wv_LDKH": "model.layers.{}.self_attn.v_proj.weight",
    "layers.wo_LNHD": "model.layers.{}.self_attn.o_proj.weight",
    "layers.mlp_norm_LD": "model.layers.{}.post_attention_layernorm.weight",
    "layers.w_gate_LDF": "model.layers.{}.mlp.gate_proj.weight",
    "layers.w_up_LDF": "model.layers.{}.mlp.up_proj.weight",
    "layers.w_down_LFD": "model.layers.{}.mlp.down_proj.weight",
    "final_norm_D": "model.norm.weight",
    "head_DV": "lm_head.weight",
}
INPUTS = {"layers.wo_LNHD": 2}  # leading dimensions that a product contracts (after L), where they are not one
AS_THEY_ARE = {"embed_VD"}  # a look-up, and no product


class Tensor(NamedTuple):
    """One tensor of theirs and the array, or the layer of an array, that holds it here."""

    name: str  # theirs
    shape: tuple[int, ...]  # theirs: (out, in) of a matrix
    array: str  # ours, as in parameter_table
    layer: int | None  # the index along L
    our_shape: tuple[int, ...]  # of the layer

    def to_hf(self, ours: np.ndarray) -> np.ndarray:
        """`our_shape` to `shape`; a view, not contiguous in general."""
        if self.array in AS_THEY_ARE or ours.ndim == 1:
            return ours
        return ours.reshape(self.shape[::-1]).T

    def from_hf(self, theirs: np.ndarray) -> np.ndarray:
        """`shape` to `our_shape`: the inverse of `to_hf`."""
        if self.array in AS_THEY_ARE or theirs.ndim == 1:
            return theirs
        return theirs.T.reshape(self.our_shape)


def tensors(m: ConfigDict) -> list[Tensor]:
    """Every tensor of a model, in the order of a forward pass."""
    table = parameter_table(m)
    first = [_tensor("embed_VD", table["embed_VD"].shape, None)]
    layers = [
        _tensor(array, p.shape[1:], layer)
        for layer in range(m.num_layers)
        for array, p in table.items()
        if array.startswith("layers.")
    ]
    last = [_tensor(array, table[array].shape, None) for array in ("final_norm_D", "head_DV") if array in table]
    return [*first, *layers, *last]


def _tensor(array: str, our_shape: tuple[int, ...], layer: int | None) -> Tensor:
    inputs = INPUTS.get(array, 1)
    matrix = (math.prod(our_shape[inputs:]), math.prod(our_shape[:inputs]))
    shape = our_shape if array in AS_THEY_ARE or len(our_shape) == 1 else matrix
    return Tensor(NAMES[array].format(layer), shape, array, layer, our_shape)


# ---- config.json -----------------------------------------------------------------------------------------------------


def config_to_hf(m: ConfigDict, stage: ConfigDict, *, dtype: str, bos_id: int | None, eos_id: int) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM, or with QK-norm of a Qwen3ForCausalLM, which else is the same.

    `stage` gives rope base and context, `dtype` is the weights' ("bfloat16").

    RoPE is written in both spellings: transformers 5 reads `rope_parameters`, older ones and other servers `rope_theta`
    and `rope_scaling`.
    """
    scaling = None
    if m.rope_scaling.factor != 1.0:
        scaling = {
            "rope_type": "llama3",
            "factor": m.rope_scaling.factor,
            "low_freq_factor": m.rope_scaling.low_freq_factor,
            "high_freq_factor": m.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": m.rope_scaling.original_context,
        }
    kind = "qwen3" if m.qk_norm else "llama"
    of_llama, of_qwen3 = {"mlp_bias": False, "pretraining_tp": 1}, {"use_sliding_window": False, "sliding_window": None}
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": m.vocab_size,
        "hidden_size": m.dim,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "head_dim": m.head_dim,
        "intermediate_size": m.ffn_dim,
        "hidden_act": "silu",
        "rms_norm_eps": m.norm_eps,
        "initializer_range": m.init_std,
        "max_position_embeddings": stage.sequence_length,
        "rope_theta": stage.rope_base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": stage.rope_base, **(scaling or {"rope_type": "default"})},
        "attention_bias": False,
        "attention_dropout": 0.0,
        **(of_qwen3 if m.qk_norm else of_llama),
        "tie_word_embeddings": m.tie_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }


CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # by model_type
# Keys of config.json that must have this value, or be absent: anything else is another computation.
REQUIRED = {
    "model_type": tuple(CLASSES),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "rope_interleaved": (False,),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "auto_map": (None,),  # code of the folder's author
}
# Keys that name or tune what a forward pass in inference does not depend on.
IGNORED = {
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id",
    "initializer_range", "pad_token_id", "torch_dtype", "transformers_version", "use_cache", "tokenizer_class",
    "return_dict", "output_hidden_states", "output_attentions", "torchscript", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params",
    "is_llama_config", "max_sequence_length", "transformers.js_config", "unsloth_fixed", "unsloth_version",
    "max_window_layers",
}  # fmt: skip
READ = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", "layer_types",
}  # fmt: skip
ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
}  # fmt: skip


class HfModel(NamedTuple):
    """What config.json says, in our terms."""

    model: ConfigDict  # a whole model section
    rope_base: float
    context: int  # max_position_embeddings


def config_from_hf(values: dict[str, Any]) -> HfModel:
    """Our model section from a config.json; the inverse of `config_to_hf`. Data only: no key names code or a path.

    Raises ConfigError listing every key that is missing, unknown or asks for another computation than
    LLaMA's or Qwen3's.
    """
    problems = _unsupported(values)
    base = configuration.base()
    m = base.model
    try:
        with base.unlocked():
            m.vocab_size, m.dim = _count(values, "vocab_size"), _count(values, "hidden_size")
            m.num_layers, m.num_heads = _count(values, "num_hidden_layers"), _count(values, "num_attention_heads")
            m.qk_norm = values.get("model_type") == "qwen3"  # whose defaults are one model's: no key may lack
            m.num_kv_heads = _count(values, "num_key_value_heads", None if m.qk_norm else m.num_heads)
            m.head_dim = _count(values, "head_dim", None if m.qk_norm else m.dim // m.num_heads)
            m.ffn_dim = _count(values, "intermediate_size")
            m.norm_eps = _number(values, "rms_norm_eps", 1e-6)  # LlamaConfig's default
            m.init_std = _number(values, "initializer_range", 0.02)
            m.tie_embeddings = _flag(values, "tie_word_embeddings")
            context = _count(values, "max_position_embeddings", None if m.qk_norm else 2048)
            rope_base = _read_rope(m, values, context)
        if m.num_heads % m.num_kv_heads or m.head_dim % 2:
            raise ConfigError(f"{m.num_kv_heads} kv heads for {m.num_heads} heads of {m.head_dim}: expected an even "
                              f"head_dim, and num_key_value_heads to divide num_attention_heads")
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(f"config.json is not of a model that k2jax has: {'; '.join(problems)}")
    return HfModel(m, rope_base, context)


def _unsupported(values: dict[str, Any]) -> list[str]:
    problems = []
    kind = values.get("model_type")
    expected = CLASSES.get(kind, CLASSES["llama"]) if isinstance(kind, str) else CLASSES["llama"]
    architectures = values.get("architectures") or [expected]
    if architectures != [expected]:
        problems.append(f"architectures is {short(architectures)}, only {expected} is supported")
    if "model_type" not in values:
        problems.append("model_type is missing, expected 'llama' or 'qwen3'")
    for key, allowed in REQUIRED.items():
        if key in values and values[key] not in allowed:
            problems.append(f"{key} is {short(values[key])}, only {' or '.join(map(repr, allowed))} is supported")
    layers = values.get("layer_types")
    if layers is not None and not (isinstance(layers, list) and all(one == "full_attention" for one in layers)):
        problems.append(f"layer_types is {short(layers)}, only 'full_attention' is supported")
    unknown = ", ".join(map(short, sorted(values.keys() - READ - IGNORED - REQUIRED.keys())[:10]))
    if unknown:
        problems.append(f"unknown key(s) {unknown}: they may change what the model computes")
    return problems


def _read_rope(m: ConfigDict, values: dict[str, Any], context: int) -> float:
    """Sets the scaling and returns the base. transformers 5 has both in `rope_parameters`, older ones in two keys."""
    ropes = [values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key) is not None]
    for rope in ropes:
        if not isinstance(rope, dict) or rope.keys() - ROPE_KEYS:
            raise ConfigError(f"{short(rope)} is none of the ways to scale RoPE that k2jax has: 'default' and 'llama3'")
    bases = {_number(d, "rope_theta") for d in (values, *ropes) if d.get("rope_theta") is not None}
    scalings = {_scaling(m.rope_scaling, rope, context) for rope in ropes}
    if len(bases) > 1 or len(scalings) > 1:
        raise ConfigError("rope_theta, rope_scaling and rope_parameters contradict each other")
    if scalings:
        r, found = m.rope_scaling, scalings.pop()
        r.factor, r.low_freq_factor, r.high_freq_factor, r.original_context = found
    return bases.pop() if bases else 10000.0


def _scaling(off: ConfigDict, rope: dict[str, Any], context: int) -> tuple[float, float, float, int]:
    """(factor, low_freq_factor, high_freq_factor, original_context)."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ConfigError(f"rope_scaling is of type {short(kind)}, only 'default' and 'llama3' are supported")
    if kind == "default":
        return off.factor, off.low_freq_factor, off.high_freq_factor, off.original_context
    factors = [_number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor")]
    if factors[1] >= factors[2]:
        raise ConfigError(f"rope_scaling: low_freq_factor {factors[1]} must be below high_freq_factor {factors[2]}")
    return *factors, _count(rope, "original_max_position_embeddings", context)


def _flag(values: dict[str, Any], key: str) -> bool:
    value = values.get(key)
    if value not in (None, False, True):
        raise ConfigError(f"{key} is {short(value)}, expected true or false")
    return bool(value)


def _count(values: dict[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 2**31:
        raise ConfigError(f"{key} is {short(value)}, expected a positive integer")
    return value


def _number(values: dict[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ConfigError(f"{key} is {short(value)}, expected a positive number")
    return float(value)
