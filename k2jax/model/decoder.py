"""The model: a dense decoder in LLaMA's layout, with K2's numbers (k2-facts: 65,286,184,960 parameters).

A few keys make Qwen2, Qwen3 and OLMo-2 of it: biases on q, k and v, QK-norm, norms behind attention and MLP.

Axes, the same letters in the whole project: B batch, T query positions, S key positions, D width, F ffn width,
N query heads, K key and value heads, H head dim, V vocabulary, L layers.

`parameter_table` is the one list of parameters: name, shape, logical axes, initialisation. Everything else (optimizer,
checkpoints, sharding) handles parameters as a plain dictionary of that table's names: the layout on disk, too. Layers
are stacked along L and scanned.
"""

import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as kept
from ml_collections import ConfigDict

from k2jax.config import settled
from k2jax.keys import ATTENTION_SUMS, ON_HOST, REMAT_NAMES
from k2jax.model.attention import attend_causally, attend_turned, turns_heads
from k2jax.model.weights import LAYERS, Arrays, are_apart, layers_in_turn, wide
from k2jax.parallel import context, pipeline
from k2jax.parallel.fsdp import Rings, apart, lookup, matmul, matmuls
from k2jax.parallel.sharding import num_stages, platform, shard

Params = dict[str, jax.Array]
Matrices = jax.Array | tuple[jax.Array, ...]
Product = Callable[..., Any]  # x, w, `into`: see `dense`
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q_BTNH, k_BTKH, v_BTKH to (B, T, N, H); or all BTE
CUDNN_FORWARD = "dot_product_attention_fwd"  # JAX's name of cuDNN's attention, with or without _wrapper
LAYOUT_VERSION = 1  # of the names and shapes of parameter_table, recorded in every checkpoint


class Parameter(NamedTuple):
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical, see sharding.RULES
    std: float | None  # of a normal distribution; 0: zeros, of a bias; None: ones, of a norm
    group: str  # for norms by layer group in the metrics

    @property
    def is_matrix(self) -> bool:
        """What products are made of: decayed, and cast to the type that they are computed in. Norms and biases are
        neither."""
        return bool(self.std)


def parameter_table(m: ConfigDict) -> dict[str, Parameter]:
    """Every parameter of the model section `m`: {name: shape, axes, initialisation, group}.

    Initialisation is K2's (Megatron's): normal with std 0.02, and the two matrices that write into the residual
    stream scaled by 1/sqrt(2 L), because 2 L of them add up there; norms start at one, biases at zero. By muP, matrices
    of layers are smaller by the root of how much wider the model is, and the head by all of it. A layer's are in the
    order in which a Block takes them.
    """
    L, D, F, V, H = m.num_layers, m.dim, m.ffn_dim, m.vocab_size, m.head_dim
    N, K = m.num_heads, m.num_kv_heads
    std, of_head = m.init_std * math.sqrt(narrower(m)), m.init_std * narrower(m)
    residual = std / math.sqrt(2 * L)
    table = {
        "embed_VD": Parameter((V, D), ("vocab", "embed"), m.init_std, "embed"),
        "layers.attention_norm_LD": Parameter((L, D), ("layers", "norm"), None, "norms"),
        "layers.wq_LDNH": Parameter((L, D, N, H), ("layers", "embed", "heads", "head_dim"), std, "q"),
        "layers.wk_LDKH": Parameter((L, D, K, H), ("layers", "embed", "kv_heads", "head_dim"), std, "k"),
        "layers.wv_LDKH": Parameter((L, D, K, H), ("layers", "embed", "kv_heads", "head_dim"), std, "v"),
        "layers.bq_LNH": Parameter((L, N, H), ("layers", "heads", "head_dim"), 0.0, "biases"),
        "layers.bk_LKH": Parameter((L, K, H), ("layers", "kv_heads", "head_dim"), 0.0, "biases"),
        "layers.bv_LKH": Parameter((L, K, H), ("layers", "kv_heads", "head_dim"), 0.0, "biases"),
        "layers.q_norm_LH": Parameter((L, H), ("layers", "head_dim"), None, "norms"),
        "layers.k_norm_LH": Parameter((L, H), ("layers", "head_dim"), None, "norms"),
        "layers.q_norm_LNH": Parameter((L, N, H), ("layers", "heads", "head_dim"), None, "norms"),
        "layers.k_norm_LKH": Parameter((L, K, H), ("layers", "kv_heads", "head_dim"), None, "norms"),
        "layers.wo_LNHD": Parameter((L, N, H, D), ("layers", "heads", "head_dim", "embed"), residual, "o"),
        "layers.attention_out_norm_LD": Parameter((L, D), ("layers", "norm"), None, "norms"),
        "layers.mlp_norm_LD": Parameter((L, D), ("layers", "norm"), None, "norms"),
        "layers.w_gate_LDF": Parameter((L, D, F), ("layers", "embed", "ffn"), std, "gate"),
        "layers.w_up_LDF": Parameter((L, D, F), ("layers", "embed", "ffn"), std, "up"),
        "layers.w_down_LFD": Parameter((L, F, D), ("layers", "ffn", "embed"), residual, "down"),
        "layers.mlp_out_norm_LD": Parameter((L, D), ("layers", "norm"), None, "norms"),
        "final_norm_D": Parameter((D,), ("norm",), None, "norms"),
        "head_DV": Parameter((D, V), ("embed", "vocab"), of_head, "head"),
    }
    present = {
        "head_DV": not m.tie_embeddings,
        **dict.fromkeys(("layers.bq_LNH", "layers.bk_LKH", "layers.bv_LKH"), m.qkv_bias),
        **dict.fromkeys(("layers.q_norm_LH", "layers.k_norm_LH"), m.qk_norm and not m.qk_norm_whole),
        **dict.fromkeys(("layers.q_norm_LNH", "layers.k_norm_LKH"), m.qk_norm and m.qk_norm_whole),
        **dict.fromkeys(("layers.attention_norm_LD", "layers.mlp_norm_LD"), not m.reordered_norm),
        **dict.fromkeys(("layers.attention_out_norm_LD", "layers.mlp_out_norm_LD"), m.reordered_norm),
    }
    return {name: p for name, p in table.items() if present.get(name, True)}


def narrower(m: ConfigDict) -> float:
    """The width that muP's settings are for over the model's; 1 where muP is off.

    Tensor Programs V, arXiv:2203.03466, table 3: the scale of the output is in the head's own size and rate, so that a
    model is computed, exported and served like any other. Heads stay as wide as they are, more of them come.
    """
    return m.width_base / m.dim if m.width_base else 1.0


def init_params(m: ConfigDict, seed: int) -> Params:
    """Parameters in float32. Each has a key made of its name, so that one does not depend on what else there is."""

    def draw(name: str, p: Parameter) -> jax.Array:
        if not p.is_matrix:
            return jnp.full(p.shape, 1.0 if p.std is None else 0.0, jnp.float32)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        return p.std * jax.random.normal(key, p.shape, jnp.float32)

    return {name: draw(name, p) for name, p in parameter_table(m).items()}


def num_params(m: ConfigDict) -> int:
    return sum(math.prod(p.shape) for p in parameter_table(m).values())


# ---- the layers ----------------------------------------------------------------------------------------------------


def compute_dtype(config: ConfigDict) -> jnp.dtype:
    """`precision.compute`, "auto" as on this platform."""
    return jnp.dtype(settled(config, platform()).precision.compute)


def rms_norm(x_BTD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm in float32 over the dimensions that the weight has, result in the type of `x`."""
    x32 = x_BTD.astype(jnp.float32)
    over = tuple(range(-weight_D.ndim, 0)) if weight_D.ndim > 1 else -1
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=over, keepdims=True) + eps)
    return (x32 * scale * weight_D.astype(jnp.float32)).astype(x_BTD.dtype)


def rope_table(m: ConfigDict, base: float, num_positions: int) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), float32 of shape (T, H/2). Angles in float32: in bfloat16 they lose far positions (K2 hit this)."""
    frequency = base ** (-jnp.arange(0, m.head_dim, 2, dtype=jnp.float32) / m.head_dim)
    if m.rope_scaling.factor != 1.0:
        frequency = _scale_llama3(frequency, m.rope_scaling)
    angle = jnp.arange(num_positions, dtype=jnp.float32)[:, None] * frequency[None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rope_of(
    m: ConfigDict, base: float, num_positions: int, position_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of rows as the mesh in use has them: (T, H/2), or (B, T, H/2) where each row has its own positions."""
    table = rope_table(m, base, num_positions)
    if position_BT is None:
        return tuple(context.in_order(t, 0) for t in table)
    return tuple(shard(t[position_BT], "x_BTD") for t in table)


def _scale_llama3(frequency: jax.Array, r: ConfigDict) -> jax.Array:
    """LLaMA 3.1's scaling: long wavelengths slowed by `factor`, short ones kept, a linear ramp between the two."""
    turns = r.original_context * frequency / (2 * math.pi)  # full turns within the original context
    ramp = jnp.clip((turns - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor), 0.0, 1.0)
    return frequency * (ramp + (1.0 - ramp) / r.factor)


def apply_rope(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + H/2): the split-half form, as in K2 and in Hugging Face's LLaMA.

    `cos` and `sin` are rows of `rope_table`: (T, H/2) when all rows of `x` have the same positions, else (B, T, H/2).
    """
    cos, sin = (jnp.expand_dims(t.astype(x_BTNH.dtype), (0, -2) if t.ndim == 2 else -2) for t in (cos, sin))
    if platform() == "gpu":  # one pass that reads each half where the other is written, where XLA has three
        x_BTN2J = x_BTNH.reshape(*x_BTNH.shape[:-1], 2, -1)
        cos2, sin2 = jnp.stack([cos, cos], axis=-2), jnp.stack([-sin, sin], axis=-2)
        return (x_BTN2J * cos2 + jnp.flip(x_BTN2J, axis=-2) * sin2).reshape(x_BTNH.shape)
    a, b = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def dense(x: jax.Array, w: Matrices, into: int = 0, rings: Rings = (), products: str = "compute") -> Any:
    """x[B, T, in...] . w[in..., out...] -> [B, T, out...] in the type of `x`, of one weight, or of each of a tuple.

    `into` counts the in-dimensions of a product into the residual stream, whose width D is split over fsdp; 0: out of
    it. `products` as precision.products.
    """
    each = w if isinstance(w, tuple) else (w,)
    found = matmuls(x, each, into, x.dtype, rings, products)
    return found if isinstance(w, tuple) else found[0]


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + swiglu(norm(x)); reordered, the norms are around those two.

    What a model lacks of norms and biases is left out. Each weight is taken once, in the table's order.
    """

    def __init__(self, m: ConfigDict, params: Params):
        self.m, self.names = m, frozenset(parameter_table(m))
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))

    def __call__(
        self,
        x_BTD: jax.Array,
        rope: tuple[jax.Array, jax.Array] | None,
        attend: Attend,
        product: Product = dense,
    ) -> jax.Array:
        """`attend(q, k, v)` decides whom a position sees, `product(x, w)` how w is laid out: training and generation
        differ in nothing else.

        `rope` None: attend turns q and k itself, and takes all heads side by side, E = N H: (B, T, E) for (B, T, N, H).
        """
        whole = rope is None
        y_BTD = self._normed(x_BTD, "attention_norm_LD")
        weights = self.wq_LDNH[...], self.wk_LDKH[...], self.wv_LDKH[...]
        # y[B_data, T, D] . wq[D_fsdp, N_tensor, H] -> q[B_data, T, N_tensor, H]: wq is gathered over fsdp
        q, k, v = product(y_BTD, tuple(w.reshape(w.shape[0], -1) for w in weights) if whole else weights)
        q, k, v = self._biased(q, "bq_LNH"), self._biased(k, "bk_LKH"), self._biased(v, "bv_LKH")
        q, k = self._normed(q, "q_norm_LH"), self._normed(k, "k_norm_LH")
        # mean over [N_tensor, H]: summed over tensor
        q, k = self._normed(q, "q_norm_LNH"), self._normed(k, "k_norm_LKH")
        if not whole:
            q, k, v = apply_rope(apart(q), *rope), apply_rope(apart(k), *rope), apart(v)
        of_q, of_k = ("q_BTE", "q_BTE") if whole else ("q_BTNH", "k_BTKH")
        q, k, v = kept(shard(q, of_q), "q"), kept(shard(k, of_k), "k"), kept(shard(v, of_k), "v")
        a = shard(attend(q, k, v), of_q)
        # a[B_data, T, N_tensor, H] . wo[N_tensor, H, D_fsdp] -> [B_data, T, D]: summed over tensor
        wo = self.wo_LNHD[...]
        y_BTD = product(a, wo.reshape(-1, wo.shape[-1]) if whole else wo, a.ndim - 2)
        y_BTD = self._normed(y_BTD, "attention_out_norm_LD")
        x_BTD = kept(shard(x_BTD + y_BTD, "x_BTD"), "middle")
        y_BTD = self._normed(x_BTD, "mlp_norm_LD")
        gate_BTF, up_BTF = map(apart, product(y_BTD, (self.w_gate_LDF[...], self.w_up_LDF[...])))
        h_BTF = shard(jax.nn.silu(kept(gate_BTF, "gate")) * kept(up_BTF, "up"), "h_BTF")
        y_BTD = self._normed(product(h_BTF, self.w_down_LFD[...], 1), "mlp_out_norm_LD")
        return shard(x_BTD + y_BTD, "x_BTD")

    def _normed(self, x: jax.Array, weight: str) -> jax.Array:
        """RMS-normed where the model has that norm. QK-norm: Henry et al., arXiv:2010.04245, with weights."""
        if LAYERS + weight not in self.names:
            return x
        w = getattr(self, weight)[...]
        return rms_norm(x, w.reshape(-1) if x.ndim == 3 else w, self.m.norm_eps)

    def _biased(self, x: jax.Array, bias: str) -> jax.Array:
        """With the bias added where the model has it: in float32, so that its gradient is summed in that."""
        if LAYERS + bias not in self.names:
            return x
        return (x.astype(jnp.float32) + getattr(self, bias)[...].reshape(x.shape[2:])).astype(x.dtype)


def remat_policy(remat: str) -> Callable:
    """Of a layer's arrays, those named in `model.remat` are kept for its backward pass.

    "attention" keeps its sums as well, on the device in any case: they are small, and a copy to the host that begins
    as a layer ends is waited for. Where the device's memory is the host's, as on CPU, it is all the same.
    """
    if remat == "none":
        return pipeline.keep_computed
    names = list({"dots": REMAT_NAMES, "full": ()}.get(remat, remat.split("+")))
    if "attention" in names or f"attention{ON_HOST}" in names:
        names.append(ATTENTION_SUMS)
    by_name = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[name for name in names if not name.endswith(ON_HOST)],
        names_which_can_be_offloaded=[name.removesuffix(ON_HOST) for name in names if name.endswith(ON_HOST)],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def kept(primitive: Any, *arrays: Any, **options: Any) -> Any:
        """JAX's call of cuDNN names nothing: its output and its sums go by the primitive that makes them."""
        if primitive.name.startswith(CUDNN_FORWARD):
            return "attention" in names
        return by_name(primitive, *arrays, **options)

    return kept


class Decoder(nnx.Module):
    """Tokens to final hidden states; `logits` takes those to the vocabulary."""

    def __init__(
        self, m: ConfigDict, params: Params | Arrays, compute_dtype: jnp.dtype = jnp.float32, products: str = "compute"
    ):
        """`params` as `parameter_table` names them, float32, or as weights.py makes them of those; activations and
        products are in `compute_dtype`, those of layers as `products` (precision.products) says: readers of a model
        compute in full, as those who get it do."""
        self.m, self.compute_dtype, self.products = m, compute_dtype, products
        self.embed_VD = nnx.Param(wide(params["embed_VD"]))
        self.layers = nnx.data({k.removeprefix(LAYERS): x for k, x in params.items() if k.startswith(LAYERS)})
        self.final_norm_D = nnx.Param(params["final_norm_D"])
        self.head_DV = nnx.Param(self.embed_VD[...].T if m.tie_embeddings else wide(params["head_DV"]))

    def __call__(
        self,
        tokens_BT: jax.Array,
        rope_base: float,
        document_BT: jax.Array | None = None,
        position_BT: jax.Array | None = None,
    ) -> jax.Array:
        """(B, T) int32 to hidden states (B, T, D). `document_BT` masks attention to each document; None: to the row.
        `position_BT` are RoPE's; None: those in the row.

        Where devices share rows, all of them are in the order of `context.in_order`.
        """
        rope = rope_of(self.m, rope_base, tokens_BT.shape[1], position_BT)
        rings = tuple(self.m.rings)
        x_BTD = shard(lookup(self.embed_VD[...], tokens_BT, self.compute_dtype, rings), "x_BTD")

        def layer(x_BTD: jax.Array, arrays: Arrays, rope: Any, document_BT: jax.Array | None) -> jax.Array:
            block = Block(self.m, {name: wide(x) for name, x in arrays.items()})
            product = partial(dense, rings=rings, products=self.products)
            if turns_heads(self.m, tokens_BT.shape[1], self.compute_dtype):
                attend = partial(attend_turned, rope=rope, document_BT=document_BT, head_dim=self.m.head_dim)
                return block(x_BTD, None, attend, product)
            attend = partial(
                attend_causally, document_BT=document_BT, implementation=self.m.attention.implementation
            )
            return block(x_BTD, rope, attend, product)

        remat = partial(jax.checkpoint, policy=remat_policy(self.m.remat), prevent_cse=are_apart(self.m))
        one = layer if self.m.remat == "none" else remat(layer)
        if num_stages() > 1:
            x_BTD = pipeline.run_layers(layer, remat, x_BTD, self.layers, rope, document_BT, self.m)
        elif are_apart(self.m):
            for number in range(self.m.num_layers):
                x_BTD = one(x_BTD, {name: x[number] for name, x in self.layers.items()}, rope, document_BT)
        else:
            x_BTD, _ = jax.lax.scan(
                lambda x_BTD, arrays: (one(x_BTD, arrays, rope, document_BT), None),
                x_BTD,
                self.layers,
                unroll=layers_in_turn(self.m),
            )
        x_BTD = shard(x_BTD, "rows_BTD")
        return rms_norm(x_BTD, self.final_norm_D[...], self.m.norm_eps)

    def logits(self, x_BTD: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """Final hidden states to (B, T, V); `dtype` is that of the product's result, its inputs keep theirs."""
        return matmul(x_BTD, self.head_DV[...], 0, dtype, tuple(self.m.rings))


def document_ids(tokens_BT: jax.Array, eos_id: int) -> jax.Array:
    """(B, T) int32: the number of EOS tokens before each position, so that an EOS ends its own document."""
    ends = (tokens_BT == eos_id).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends
