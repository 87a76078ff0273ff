"""k2jax against transformers' models of every family that it has, through files, both ways: the same logits, the same
greedy text.

transformers writes a folder, k2jax imports it and computes; k2jax exports the run, transformers reads it and computes.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Later
from test_convert_from_hf import importing, one_device_mesh

from k2jax.hf.export import export
from k2jax.model.decoder import Decoder
from k2jax.run.saved import SavedStep, open_step, restore_params

torch, transformers = Later("torch"), Later("transformers")

B, PROMPT, T = 2, 40, 56  # rows, tokens given, tokens with the continuation
# Of 8 frequencies the scaling leaves some, slows some in full, and some in between, within T tokens.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 500_000.0}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
CASES = {
    "MHA": {},
    "GQA": {"num_key_value_heads": 2},
    "one kv head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "rope base 500000": {"rope_parameters": {**PLAIN, "rope_theta": 500_000.0}},
    "LLaMA-3 rope scaling": {"rope_parameters": LLAMA3, "num_key_value_heads": 2},
    "head_dim above dim / heads": {"head_dim": 24},
    "head_dim below dim / heads, GQA": {"head_dim": 6, "num_key_value_heads": 2},
    "odd vocabulary, norm eps": {"vocab_size": 523, "rms_norm_eps": 0.02},
    "all of it": {
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3,
        "head_dim": 20,
        "vocab_size": 541,
        "num_hidden_layers": 3,
    },
}
OTHERS = {"mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {}, "olmo2": {}}  # what they have always


def random_cases(kind: str, count: int = 8) -> dict[str, dict]:
    """Configurations of a family, all of its sizes drawn."""
    draw, cases = np.random.default_rng(sorted(OTHERS).index(kind)), {}
    for number in range(count):
        heads = int(draw.choice([2, 4, 6]))
        sizes = {
            "num_attention_heads": heads,
            "num_key_value_heads": int(draw.choice([n for n in (1, 2, heads) if heads % n == 0])),
            "head_dim": int(draw.choice([10, 16, 20])),
            "hidden_size": int(draw.choice([48, 60, 72])),
            "intermediate_size": int(draw.choice([40, 88])),
            "num_hidden_layers": int(draw.choice([2, 3])),
            "vocab_size": int(draw.choice([512, 523])),
            "tie_word_embeddings": bool(draw.random() < 0.4),
            "rms_norm_eps": float(draw.choice([1e-6, 1e-3])),
            "rope_parameters": [LLAMA3, PLAIN, {**PLAIN, "rope_theta": 1e6}][draw.integers(3)],
        }
        cases[f"{kind} {number}"] = {"model_type": kind, **sizes, **OTHERS[kind]}
    return cases


CASES |= {name: case for kind in OTHERS for name, case in random_cases(kind).items()}
CASES["mistral 7"]["sliding_window"] = T  # which no row reaches beyond
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "rope_parameters": PLAIN,
    "attn_implementation": "eager",
}


class Case(NamedTuple):
    theirs: "transformers.LlamaForCausalLM"
    run: SavedStep
    again: "transformers.LlamaForCausalLM"  # from our export
    tokens: np.ndarray  # (B, T): prompts of PROMPT tokens, and what k2jax goes on with
    logits_BTV: np.ndarray  # of k2jax
    loops: bool  # whether transformers generates, too, which takes as long as all else


def draw_model(changes: dict, seed: int) -> "transformers.LlamaForCausalLM":
    """Large weights, so that mistakes show; norms that are not one and biases that are not zero, which would hide them.
    """
    torch.manual_seed(seed)
    kind = changes.get("model_type", "llama")
    values = {key: value for key, value in {**SIZES, **changes}.items() if key != "model_type"}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **values))
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = 0.3 if name.endswith("bias") else 0.15
            p.copy_(1 + 0.3 * torch.randn_like(p) if "norm" in name else spread * torch.randn_like(p))
    return model.eval()


class Ours:
    """The imported run, as a function from (B, T) tokens to logits that is compiled once."""

    def __init__(self, run: SavedStep):
        self.params = restore_params(run, one_device_mesh())
        self.compiled = jax.jit(lambda params, tokens: self._logits(run, params, tokens))

    @staticmethod
    def _logits(run: SavedStep, params: dict, tokens: jax.Array) -> jax.Array:
        decoder = Decoder(run.config.model, params)
        return decoder.logits(decoder(tokens, run.stage.rope_base))

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(self.compiled(self.params, jnp.asarray(tokens)))

    def greedy(self, tokens: np.ndarray) -> np.ndarray:
        """The prompts gone on with, without a cache: what is behind a position does not reach it."""
        tokens = tokens.copy()
        for at in range(PROMPT, T):
            tokens[:, at] = self(tokens)[:, at - 1].argmax(-1)
        return tokens


# Of 8 draws of a family, 3 with each run of the tests, and all with `make test-slow`.
PARAMS = [
    pytest.param(name, marks=pytest.mark.slow if name[-1] in "23456" and name.split()[0] in OTHERS else ())
    for name in CASES
]


@pytest.fixture(scope="module", params=PARAMS, ids=list(CASES))
def case(request, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder, number = tmp_path_factory.mktemp("parity"), list(CASES).index(request.param)
    theirs = draw_model(CASES[request.param], seed=number)
    theirs.save_pretrained(folder / "hf", max_shard_size="50KB" if number % 2 else "5GB")
    shutil.copy(tiny_data / "tokenizer.json", folder / "hf")
    importing(folder / "hf", folder / "run")
    run = open_step(folder / "run")
    export(run, folder / "export", "float32", 100_000 if number % 2 else 10**9, lambda _: None)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "export", attn_implementation="eager")
    ours = Ours(run)
    tokens = ours.greedy(np.random.default_rng(number).integers(0, theirs.config.vocab_size, (B, T)))
    loops = "model_type" not in CASES[request.param] or request.param.endswith("0")
    return Case(theirs, run, again.eval(), tokens, ours(tokens), loops)


def logits_of(model: "transformers.LlamaForCausalLM", tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens)).logits.numpy()


def greedy_of(model: "transformers.LlamaForCausalLM", tokens: np.ndarray) -> np.ndarray:
    """The prompts gone on with by transformers' own loop and cache."""
    model.generation_config.eos_token_id = None  # the continuation does not end early
    wanted = transformers.GenerationConfig(do_sample=False, max_new_tokens=T - PROMPT, pad_token_id=0)
    prompts = torch.tensor(tokens[:, :PROMPT])
    with torch.no_grad():
        return model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=wanted).numpy()


@pytest.mark.parametrize("direction", ["theirs", "again"], ids=["imported", "exported"])
def test_logits_are_equal(case, direction):
    theirs_BTV = logits_of(getattr(case, direction), case.tokens)
    assert theirs_BTV.std() > 0.5, "logits this small would agree whatever the model"
    largest = np.abs(theirs_BTV - case.logits_BTV).max()
    assert largest < 1e-4, f"largest difference of logits: {largest:.2e}"


@pytest.mark.parametrize("direction", ["theirs", "again"], ids=["imported", "exported"])
def test_greedy_continuations_are_equal(case, direction):
    """Those of one forward pass, token by token, and for some of each family those of the loop. The tokens after each
    of the prompts' are compared, too: a continuation may repeat itself."""
    model = getattr(case, direction)
    best = logits_of(model, case.tokens).argmax(-1)
    assert len(np.unique(best)) > 8, "the same token everywhere proves little"
    np.testing.assert_array_equal(best, case.logits_BTV.argmax(-1))
    np.testing.assert_array_equal(best[:, PROMPT - 1 : -1], case.tokens[:, PROMPT:])
    if case.loops:
        np.testing.assert_array_equal(greedy_of(model, case.tokens), case.tokens)


def test_weights_come_back_bit_for_bit(case):
    first, last = case.theirs.state_dict(), case.again.state_dict()
    assert first.keys() == last.keys()
    for name, value in first.items():
        assert value.numpy().tobytes() == last[name].numpy().tobytes(), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_comes_back_bit_for_bit(tiny_data, tmp_path, dtype):
    model = draw_model(CASES["LLaMA-3 rope scaling"], seed=1).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "hf", max_shard_size="50KB")
    shutil.copy(tiny_data / "tokenizer.json", tmp_path / "hf")
    importing(tmp_path / "hf", tmp_path / "run")
    export(open_step(tmp_path / "run"), tmp_path / "export", dtype, 10**9, lambda _: None)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    assert again.dtype == model.dtype
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.int16), again.state_dict()[name].view(torch.int16)), name
