"""k2jax.model against transformers' models of its families: the same logits and gradients.

From the same weights, in float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Later
from test_model import logits_of, small_model

from k2jax import config
from k2jax.hf.families import FAMILIES, kind_of
from k2jax.model.decoder import init_params
from k2jax.training.step import loss_sums

torch, transformers = Later("torch"), Later("transformers")

EOS = 2
B, T = 2, 48
# Scaling that reaches into T tokens: of head dim 16, two frequencies are kept, three slowed in full, three in between.
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 8.0, "original_context": 64}

CASES = {
    "K2's layout": {},
    "grouped queries, rope base 500000": {"num_kv_heads": 2, "rope_base": 500_000.0},
    "one kv head, head dim apart from dim / heads": {"num_kv_heads": 1, "head_dim": 24},
    "tied embeddings, norm eps": {"tie_embeddings": True, "norm_eps": 1e-2},
    "LLaMA-3 rope scaling": {"rope_base": 500_000.0, "rope_scaling": LLAMA3, "num_kv_heads": 2},
    "biases: Qwen2": {"qkv_bias": True, "num_kv_heads": 2},
    "norms behind: OLMo-2": {**FAMILIES["olmo2"].keys, "num_kv_heads": 2, "norm_eps": 1e-3},
    "QK-norm: Qwen3": {"qk_norm": True, "num_kv_heads": 2, "head_dim": 24, "norm_eps": 1e-3},
}


def draw_tokens() -> np.ndarray:
    tokens = np.random.default_rng(0).integers(3, 97, (B, T + 1))
    tokens[0, [9, 30]] = tokens[1, [20, 21, T - 1]] = EOS
    return tokens


class Pair:
    """One random model as k2jax and as transformers see it."""

    def __init__(self, rope_base: float = 10_000.0, **changes):
        sizes = {
            "vocab_size": 97,
            "dim": 64,
            "num_heads": 4,
            "num_kv_heads": 4,
            "head_dim": 16,
            "ffn_dim": 88,
        }
        self.m, self.rope_base = small_model(**{**sizes, **changes}), rope_base
        draw = np.random.default_rng(1)
        # Norm weights and biases are drawn too: as initialised, they would hide a mistake.
        self.params = {
            name: p + jnp.asarray(draw.normal(0, 0.3, p.shape), jnp.float32) if "norm" in name or ".b" in name else p
            for name, p in jax.jit(partial(init_params, self.m, seed=3))().items()
        }
        self.kind = kind_of(self.m)
        self.torch_model = getattr(transformers, FAMILIES[self.kind].architecture)(self._torch_config()).float()
        self.torch_model.load_state_dict(self.to_torch(self.params), strict=True)

    def _torch_config(self):
        m, r = self.m, self.m.rope_scaling
        rope = {"rope_type": "default", "rope_theta": self.rope_base}
        if r.factor != 1.0:
            rope |= {"rope_type": "llama3", "factor": r.factor}
            rope |= {"low_freq_factor": r.low_freq_factor, "high_freq_factor": r.high_freq_factor}
            rope["original_max_position_embeddings"] = r.original_context
        return transformers.AutoConfig.for_model(
            self.kind,
            vocab_size=m.vocab_size,
            hidden_size=m.dim,
            intermediate_size=m.ffn_dim,
            num_hidden_layers=m.num_layers,
            num_attention_heads=m.num_heads,
            num_key_value_heads=m.num_kv_heads,
            head_dim=m.head_dim,
            rms_norm_eps=m.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=m.tie_embeddings,
            attn_implementation="eager",
            use_cache=False,
        )

    def to_torch(self, arrays: dict) -> dict:
        """Parameters or gradients of ours, by transformers' names and in its shapes (out, in)."""
        a = {name: np.array(value) for name, value in arrays.items()}
        out = {"model.embed_tokens.weight": a["embed_VD"], "model.norm.weight": a["final_norm_D"]}
        out["lm_head.weight"] = a["embed_VD"] if self.m.tie_embeddings else a["head_DV"].T
        for i in range(self.m.num_layers):
            layer = f"model.layers.{i}."
            for ours, theirs in (("wq_LDNH", "q"), ("wk_LDKH", "k"), ("wv_LDKH", "v")):
                w = a["layers." + ours][i]
                out[f"{layer}self_attn.{theirs}_proj.weight"] = w.reshape(self.m.dim, -1).T
            out[layer + "self_attn.o_proj.weight"] = a["layers.wo_LNHD"][i].reshape(-1, self.m.dim).T
            for ours, theirs in (("w_gate_LDF", "gate"), ("w_up_LDF", "up"), ("w_down_LFD", "down")):
                out[f"{layer}mlp.{theirs}_proj.weight"] = a["layers." + ours][i].T
            norms = {"self_attn.q_norm": "q_norm_LH", "self_attn.k_norm": "k_norm_LH"} if self.kind == "qwen3" else {}
            norms |= {"input_layernorm": "attention_norm_LD", "post_attention_layernorm": "mlp_norm_LD"}
            if self.kind == "olmo2":
                norms = {"self_attn.q_norm": "q_norm_LNH", "self_attn.k_norm": "k_norm_LKH"}
                norms["post_attention_layernorm"] = "attention_out_norm_LD"
                norms["post_feedforward_layernorm"] = "mlp_out_norm_LD"
            out |= {f"{layer}{theirs}.weight": a[f"layers.{ours}"][i].reshape(-1) for theirs, ours in norms.items()}
            for name, heads in (("q", "N"), ("k", "K"), ("v", "K")) if self.kind == "qwen2" else ():
                out[f"{layer}self_attn.{name}_proj.bias"] = a[f"layers.b{name}_L{heads}H"][i].reshape(-1)
        return {name: torch.tensor(np.ascontiguousarray(value)) for name, value in out.items()}

    def our_logits(self, inputs, documents=None):
        run = jax.jit(partial(logits_of, self.m, rope_base=self.rope_base))
        return run(self.params, jnp.asarray(inputs), documents=documents)

    def our_loss(self, params, tokens, masked=False):
        """(mean loss, its parts) by the function that training differentiates."""
        c = config.base().unlock()
        c.model = small_model(**{**self.m, "mask_documents": masked})
        stage = config.stage(rope_base=self.rope_base)
        arguments = {"config": c, "stage": stage, "eos_id": EOS, "num_subsets": 1}
        subset = jnp.zeros(len(tokens), jnp.int32)
        loss, sums = loss_sums(params, tokens, subset, **arguments, compute_dtype=jnp.float32)
        return loss / sums.targets, sums


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request):
    return Pair(**CASES[request.param])


def test_logits_are_transformers(pair):
    inputs = draw_tokens()[:, :-1]
    ours = np.asarray(pair.our_logits(inputs))
    with torch.no_grad():
        theirs = pair.torch_model(input_ids=torch.tensor(inputs)).logits.numpy()
    assert theirs.std() > 0.5, "logits this small would agree whatever the model"
    largest = np.abs(ours - theirs).max()
    assert largest < 1e-4, f"largest difference of logits: {largest:.2e}"


def test_gradients_of_all_parameters_are_transformers(pair):
    tokens = draw_tokens()
    gradient = jax.jit(jax.value_and_grad(pair.our_loss, has_aux=True))
    (ours, _), grads = gradient(pair.params, jnp.asarray(tokens))
    logits = pair.torch_model(input_ids=torch.tensor(tokens[:, :-1])).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(tokens[:, 1:]).flatten())
    pair.torch_model.zero_grad()
    loss.backward()
    assert abs(float(ours) - loss.item()) < 1e-5
    expected = {name: p.grad.numpy() for name, p in pair.torch_model.named_parameters()}
    found = pair.to_torch(grads)
    if pair.m.tie_embeddings:
        del found["lm_head.weight"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest, scale = np.abs(found[name].numpy() - value).max(), np.abs(value).max()
        message = f"{name}: largest difference of gradients {largest:.2e}, largest gradient {scale:.2e}"
        assert scale > 1e-4 and largest < 1e-5 and largest < 1e-4 * scale, message


def test_masked_documents_are_transformers_on_each_document_alone():
    """Logits, loss and gradients of packed rows under the mask, against one forward pass a document.

    A document keeps its positions in the row, which rope, being relative, does not see.
    """
    pair, tokens = Pair(**CASES["LLaMA-3 rope scaling"]), draw_tokens()
    inputs = tokens[:, :-1]
    documents = np.cumsum(inputs == EOS, axis=1) - (inputs == EOS)
    assert [row.max() for row in documents] == [2, 2], "rows of several documents are wanted"
    ours = pair.our_logits(inputs, jnp.asarray(documents))
    loss, targets, largest = torch.zeros(()), 0, 0.0
    for row, ours_TV, document in zip(tokens, np.asarray(ours), documents, strict=True):
        for number in range(document.max() + 1):
            (at,) = np.nonzero(document == number)
            logits = pair.torch_model(input_ids=torch.tensor(row[None, at])).logits[0]
            largest = max(largest, np.abs(ours_TV[at] - logits.detach().numpy()).max())
            scored = torch.tensor(row[at] != EOS)
            nats = torch.nn.functional.cross_entropy(logits, torch.tensor(row[at + 1]), reduction="none")
            loss, targets = loss + nats[scored].sum(), targets + int(scored.sum())
    assert largest < 1e-4, f"largest difference of logits: {largest:.2e}"

    gradient = jax.jit(jax.value_and_grad(partial(pair.our_loss, masked=True), has_aux=True))
    (our_loss, sums), grads = gradient(pair.params, jnp.asarray(tokens))
    assert int(sums.targets) == targets == B * T - 5
    assert abs(float(our_loss) - loss.item() / targets) < 1e-5
    pair.torch_model.zero_grad()
    (loss / targets).backward()
    found = pair.to_torch(grads)
    for name, p in pair.torch_model.named_parameters():
        largest, scale = np.abs(found[name].numpy() - p.grad.numpy()).max(), np.abs(p.grad.numpy()).max()
        assert largest < min(1e-5, 1e-4 * scale), f"{name}: largest difference of gradients {largest:.2e}"
    packed = float(jax.jit(pair.our_loss)(pair.params, jnp.asarray(tokens))[0])
    assert abs(packed - float(our_loss)) > 1e-3, "the mask changes nothing: this test proves nothing"
