"""The model families of Hugging Face that k2jax has, each some keys of one decoder, and config.json both ways.

A config.json is held against what its family's class computes: what asks for another computation is refused by name,
what a forward pass does not depend on is let be, and a key that nobody here knows must be named to be left out.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from k2jax.errors import ConfigError
from k2jax.hf.untrusted import short
from k2jax.keys import base, closest


class Family(NamedTuple):
    """Of a model_type. `keys` are those of our model section that it has on, `off` those of a config.json that it
    writes and has off, `means` what its class takes where a key of the file is missing."""

    title: str
    architecture: str
    keys: dict[str, bool]
    off: dict[str, Any]
    means: dict[str, Any]


OF_LLAMA = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "num_key_value_heads": None, "head_dim": None}
OF_QWEN = {"use_sliding_window": False, "sliding_window": None}
# A missing key that is not in `means` is one model's size in the class: no reader should guess it.
FAMILIES = {
    "llama": Family(
        "LLaMA", "LlamaForCausalLM", {}, {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}, OF_LLAMA
    ),
    "mistral": Family(
        "Mistral", "MistralForCausalLM", {}, {}, {"rms_norm_eps": 1e-6, "head_dim": None, "sliding_window": 4096}
    ),
    "qwen2": Family("Qwen2", "Qwen2ForCausalLM", {"qkv_bias": True}, OF_QWEN, {"rms_norm_eps": 1e-6, "head_dim": None}),
    "qwen3": Family(
        "Qwen3", "Qwen3ForCausalLM", {"qk_norm": True}, {"attention_bias": False, **OF_QWEN}, {"rms_norm_eps": 1e-6}
    ),
    "olmo2": Family(
        "OLMo-2",
        "Olmo2ForCausalLM",
        {"qk_norm": True, "qk_norm_whole": True, "reordered_norm": True},
        {"attention_bias": False},
        {**OF_LLAMA, "rms_norm_eps": 1e-5},
    ),
}
SWITCHES = ("qkv_bias", "qk_norm", "qk_norm_whole", "reordered_norm")  # of the model section: what families differ in

# Keys of config.json that must have one of these values, or be missing: anything else is another computation.
REQUIRED = {
    "hidden_act": ("silu", "swish"),
    "quantization_config": (None,),
    "auto_map": (None, {}),  # code of the folder's author
    "pretraining_tp": (1, None),
    "pruned_heads": ({}, None),
    **dict.fromkeys(
        """attention_bias mlp_bias bias rope_interleaved add_cross_attention is_encoder_decoder alibi
        use_qk_norm qk_layernorm use_logn_attn use_dynamic_ntk use_mrope""".split(),
        (False, None),
    ),
    **dict.fromkeys(
        "partial_rotary_factor logit_scale logits_scaling embedding_multiplier residual_multiplier".split(), (1, None)
    ),
    **dict.fromkeys(
        """attention_multiplier attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar clip_qkv
        attention_chunk_size no_rope_layers scale_emb scale_depth num_experts num_local_experts n_routed_experts
        moe_intermediate_size dual_chunk_attention_config""".split(),
        (None,),
    ),
}
# Keys that name, describe or tune what a forward pass in inference does not depend on; a null says nothing, either.
HARMLESS = set(
    """_name_or_path name_or_path architectures transformers_version torch_dtype dtype use_bfloat16 torchscript
    model_type use_cache return_dict return_dict_in_generate output_hidden_states output_attentions output_scores
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _flash_attn_2_enabled use_flash_attn initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop
    attn_pdrop bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id begin_suppress_tokens suppress_tokens bad_words_ids tokenizer_class prefix id2label label2id
    num_labels problem_type finetuning_task task_specific_params is_decoder cross_attention_hidden_size
    tie_encoder_decoder tf_legacy_loss remove_invalid_values chunk_size_feed_forward is_llama_config
    max_sequence_length model_max_length transformers.js_config unsloth_fixed unsloth_version max_window_layers
    do_sample temperature top_k top_p typical_p repetition_penalty length_penalty diversity_penalty early_stopping
    num_beams num_beam_groups num_return_sequences max_length min_length max_new_tokens no_repeat_ngram_size
    encoder_no_repeat_ngram_size exponential_decay_length_penalty cache_implementation neftune_noise_alpha""".split()
)
READ = set(
    """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
    rms_norm_eps max_position_embeddings rope_theta rope_scaling rope_parameters tie_word_embeddings layer_types
    sliding_window use_sliding_window""".split()
)
ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "partial_rotary_factor",
}  # fmt: skip


class HfModel(NamedTuple):
    """What config.json says, in our terms."""

    model: ConfigDict  # a whole model section
    rope_base: float
    context: int  # max_position_embeddings
    kind: str  # model_type
    ignored: dict[str, Any]  # keys that nobody here knows, with their values, left out because the caller named them

    @property
    def rows(self) -> int:
        """The longest row that is computed as its maker's is."""
        return min(self.context, self.model.sliding_window or self.context)


# ---- ours to theirs --------------------------------------------------------------------------------------------------


def kind_of(m: ConfigDict, imported: str | None = None) -> str | None:
    """The model_type that computes what the model section says, None where there is none. Several may, as LLaMA and
    Mistral: then it is `imported`, that of the folder which the run began with, if it is one of them."""
    switches = {key: m[key] for key in SWITCHES}
    fitting = [
        kind
        for kind, family in FAMILIES.items()
        if switches == dict.fromkeys(SWITCHES, False) | family.keys and (kind == "mistral" or not m.sliding_window)
    ]
    return imported if imported in fitting else fitting[0] if fitting else None


def title_of(m: ConfigDict, imported: str | None = None) -> str:
    """For people."""
    kind = kind_of(m, imported)
    return FAMILIES[kind].title if kind else "decoder"


def config_to_hf(
    m: ConfigDict,
    stage: ConfigDict,
    *,
    dtype: str,
    bos_id: int | None,
    eos_id: int,
    context: int | None = None,
    imported: str | None = None,
) -> dict[str, Any]:
    """config.json of the family that the model section is of; ConfigError where it is of none.

    Args:
        stage: gives rope base and, where `context` is None, max_position_embeddings.
        dtype: the weights' ("bfloat16").
        imported: the model_type of the folder that the run began with.

    RoPE is written in both spellings: transformers 5 reads `rope_parameters`, older ones and other servers `rope_theta`
    and `rope_scaling`.
    """
    kind = kind_of(m, imported)
    if kind is None:
        raise _of_none(m)
    scaling = None
    if m.rope_scaling.factor != 1.0:
        scaling = {
            "rope_type": "llama3",
            "factor": m.rope_scaling.factor,
            "low_freq_factor": m.rope_scaling.low_freq_factor,
            "high_freq_factor": m.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": m.rope_scaling.original_context,
        }
    return {
        "architectures": [FAMILIES[kind].architecture],
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
        "max_position_embeddings": context or stage.sequence_length,
        "rope_theta": stage.rope_base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": stage.rope_base, **(scaling or {"rope_type": "default"})},
        "attention_dropout": 0.0,
        **({"sliding_window": m.sliding_window or None} if kind == "mistral" else {}),
        **FAMILIES[kind].off,
        "tie_word_embeddings": m.tie_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }


def _of_none(m: ConfigDict) -> ConfigError:
    found = ", ".join(f"model.{key}={m[key]}" for key in (*SWITCHES, "sliding_window"))
    known = "; ".join(f"{family.title}: {', '.join(family.keys) or 'none of them'}" for family in FAMILIES.values())
    return ConfigError(f"{found}: no model of Hugging Face's is computed so, and k2jax writes these: {known}")


# ---- theirs to ours --------------------------------------------------------------------------------------------------


def config_from_hf(values: dict[str, Any], ignore: Collection[str] = ()) -> HfModel:
    """Our model section from a config.json; the inverse of `config_to_hf`. Data only: no key names code or a path.

    `ignore` names keys that are known neither to change what is computed nor to be harmless, and are left out. Raises
    ConfigError listing every key that is missing, unknown or asks for another computation than its family's here.
    """
    kind = values.get("model_type")
    family = FAMILIES.get(kind if isinstance(kind, str) else "")
    if not family:
        raise ConfigError(
            f"config.json is not of a model that k2jax has: model_type is "
            f"{short(kind) if 'model_type' in values else 'missing'}, supported are {', '.join(FAMILIES)}"
        )
    problems, ignored = _unsupported(values, family, ignore)
    m = base().model
    context = rope_base = 0
    try:
        with m.unlocked():
            context = _read_sizes(m, values, family)
            m.update(family.keys)
            rope_base = _read_rope(m, values, context)
            m.sliding_window = _read_window(values, kind, m.num_layers, context)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(f"config.json is not of a model that k2jax has: {'; '.join(problems)}")
    return HfModel(m, rope_base, context, kind, ignored)


def _unsupported(values: dict[str, Any], family: Family, ignore: Collection[str]) -> tuple[list[str], dict[str, Any]]:
    """(problems, {key: value} of what `ignore` names and may be left out)."""
    problems = []
    architectures = values.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        problems.append(f"architectures is {short(architectures)}, only {family.architecture} is supported")
    for key, allowed in REQUIRED.items():
        if key in values and values[key] not in allowed:
            problems.append(f"{key} is {short(values[key])}, only {' or '.join(map(repr, allowed))} is supported")
    layers = values.get("layer_types")
    if layers is not None and not (isinstance(layers, list) and all(one == "full_attention" for one in layers)):
        problems.append(f"layer_types is {short(layers)}, only a list of 'full_attention' is supported")
    known = READ | HARMLESS | REQUIRED.keys()
    unknown = {key: value for key, value in values.items() if key not in known and value is not None}
    for key in sorted(set(ignore) - unknown.keys()):
        why = "it is read, or known" if key in known & values.keys() else f"it has none{closest(key, unknown)}"
        problems.append(f"{short(key)} is no unknown key of it that could be ignored: {why}")
    left = {key: unknown[key] for key in sorted(unknown.keys() - set(ignore))}
    if left:
        shown = ", ".join(f"{short(key)}: {short(value)}" for key, value in list(left.items())[:10])
        problems.append(
            f"unknown key(s) {shown}: they may change what the model computes: name those that do not with "
            f"--ignore=KEY[,KEY], which the run records"
        )
    return problems, {key: unknown[key] for key in sorted(unknown.keys() & set(ignore))}


def _read_sizes(m: ConfigDict, values: dict[str, Any], family: Family) -> int:
    """Sets what is no switch; returns max_position_embeddings."""
    m.vocab_size, m.dim = _count(values, "vocab_size"), _count(values, "hidden_size")
    m.num_layers, m.num_heads = _count(values, "num_hidden_layers"), _count(values, "num_attention_heads")
    shared = family.means | ({"num_key_value_heads": None} if "num_key_value_heads" in values else {})
    m.num_kv_heads = _count(values, "num_key_value_heads", m.num_heads if "num_key_value_heads" in shared else None)
    m.head_dim = _count(values, "head_dim", m.dim // m.num_heads if "head_dim" in shared else None)
    m.ffn_dim = _count(values, "intermediate_size")
    m.norm_eps = _number(values, "rms_norm_eps", family.means["rms_norm_eps"])
    m.init_std = _number(values, "initializer_range", 0.02)
    m.tie_embeddings = _flag(values, "tie_word_embeddings")
    if m.num_heads % m.num_kv_heads or m.head_dim % 2:
        raise ConfigError(
            f"{m.num_kv_heads} kv heads for {m.num_heads} heads of {m.head_dim}: expected an even head_dim, and "
            f"num_key_value_heads to divide num_attention_heads"
        )
    return _count(values, "max_position_embeddings", family.means.get("max_position_embeddings"))


def _read_window(values: dict[str, Any], kind: str, layers: int, context: int) -> int:
    """`model.sliding_window`: Mistral's, which bounds our rows; 0 where none is reached. ConfigError for another's."""
    window = values.get("sliding_window", FAMILIES[kind].means.get("sliding_window"))
    window = None if window is None else _count(values, "sliding_window", window)
    if kind == "mistral" or window is None:
        return window or 0
    on, first = kind not in ("qwen2", "qwen3") or _flag(values, "use_sliding_window"), values.get("max_window_layers")
    if on and window < context and values.get("layer_types") is None and not (type(first) is int and first >= layers):
        raise ConfigError(
            f"sliding_window is {window}, which max_position_embeddings {context} goes beyond: supported are null, and "
            f"{context} and more"
        )
    return 0


def _read_rope(m: ConfigDict, values: dict[str, Any], context: int) -> float:
    """Sets the scaling and returns the base. transformers 5 has both in `rope_parameters`, older ones in two keys."""
    ropes = [values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key) is not None]
    for rope in ropes:
        if not isinstance(rope, dict) or {key for key, value in rope.items() if value is not None} - ROPE_KEYS:
            raise ConfigError(f"{short(rope)} is none of the ways to scale RoPE that k2jax has: 'default' and 'llama3'")
        if rope.get("partial_rotary_factor") not in (None, 1):
            raise ConfigError(f"partial_rotary_factor is {short(rope['partial_rotary_factor'])}, only 1 is supported")
    bases = {_number(d, "rope_theta") for d in (values, *ropes) if d.get("rope_theta") is not None}
    scalings = {_scaling(m.rope_scaling, rope, context) for rope in ropes}
    if len(bases) > 1 or len(scalings) > 1:
        raise ConfigError("rope_theta, rope_scaling and rope_parameters contradict each other")
    if scalings:
        r, found = m.rope_scaling, scalings.pop()
        r.factor, r.low_freq_factor, r.high_freq_factor, r.original_context = found
    return bases.pop() if bases else 10000.0


def _scaling(off: ConfigDict, rope: Mapping[str, Any], context: int) -> tuple[float, float, float, int]:
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


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key)
    if value not in (None, False, True):
        raise ConfigError(f"{key} is {short(value)}, expected true or false")
    return bool(value)


def _count(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 2**31:
        raise ConfigError(f"{key} is {short(value)}, expected a positive integer")
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ConfigError(f"{key} is {short(value)}, expected a positive number")
    return float(value)
