"""Generation: the cache changes no token, rows do not feel each other, and the command says what it did."""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from jax._src import test_util as jtu
from test_model import small_model

from k2jax import generate
from k2jax.data.tokenizer import Tokenizer, load_tokenizer
from k2jax.errors import ConfigError
from k2jax.model import generation
from k2jax.model.decoder import Decoder, document_ids, init_params
from k2jax.model.generation import Generator
from k2jax.model.sampling import Sampling, draw
from k2jax.parallel import sharding

EOS = 2
MODELS = {
    "grouped": {},
    "all_heads": {"num_kv_heads": 4},
    "tied": {"tie_embeddings": True, "num_kv_heads": 1},
    "masked": {"mask_documents": True},
    "rope_scaled": {
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 8.0, "original_context": 16}
    },
}
PROMPTS = [[5, 9, 2, 11, 40, 3, 7], [8], [], [3, 3, 2, 17, 30, 31, 32, 33, 34, 35, 36, 6, 2, 12]]
LONG = [[*range(3, 50), EOS, *range(3, 8)], [7] * 30]  # of 53 and 30 tokens
NEW = 9


def one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh({"replica": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


def generator(m, mesh=None) -> Generator:
    mesh = mesh or one_device()
    with jax.set_mesh(mesh):
        params = jax.jit(lambda: init_params(m, seed=3))()
        return Generator(m, 1e4, params, mesh, jnp.dtype("float32"), eos_id=EOS)


def cacheless(m, prompt: list[int], count: int) -> list[int]:
    """The likeliest token again and again, the whole row computed anew each time."""
    decoder, row = Decoder(m, init_params(m, seed=3)), list(prompt) or [EOS]

    @jax.jit
    def scores(tokens, last):
        documents = document_ids(tokens, EOS) if m.mask_documents else None
        return decoder.logits(decoder(tokens, 1e4, documents)[:, last][:, None])[0, 0]

    for _ in range(count):
        padded = jnp.zeros((1, 32), jnp.int32).at[0, : len(row)].set(jnp.array(row))
        row.append(int(scores(padded, len(row) - 1).argmax()))
    return row[-count:]


@pytest.fixture(scope="module")
def grouped() -> Generator:
    return generator(small_model())


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_greedy_tokens_are_those_of_a_cacheless_forward(changes: dict):
    m = small_model(**changes)
    found = generator(m).generate(PROMPTS, NEW, stop_at_eos=False)
    assert found == [cacheless(m, prompt, NEW) for prompt in PROMPTS]


def test_a_long_prompt_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch):
    def run(mask: bool) -> list[list[int]]:
        return generator(small_model(mask_documents=mask)).generate(LONG, NEW, stop_at_eos=False)

    expected = run(False), run(True)
    assert expected[0] != expected[1], "the mask changes nothing: this test proves half"
    monkeypatch.setattr(generation, "PREFILL", 20)
    assert (run(False), run(True)) == expected


@pytest.mark.parametrize("changes", [{}, {"mask_documents": True, "tie_embeddings": True}], ids=["plain", "masked"])
def test_a_sharded_model_gives_the_same_tokens(changes: dict):
    m = small_model(vocab_size=64, num_kv_heads=2, **changes)
    mesh = sharding.make_mesh({"replica": 1, "fsdp": 4, "tensor": 2})
    expected = generator(m).generate(PROMPTS, NEW, stop_at_eos=False)
    sharded = generator(m, mesh)
    assert sharded.generate(PROMPTS, NEW, stop_at_eos=False) == expected
    assert sharded.generate(PROMPTS[:1], NEW, stop_at_eos=False) == expected[:1]
    weights = jax.tree.leaves(sharded.weights)
    assert all(w.sharding.shard_shape(w.shape) != w.shape for w in weights if w.ndim > 1)
    keys, _ = sharded.empty_cache(8, 16)[0]
    assert keys.sharding.shard_shape(keys.shape) == (2, 1, 16, 8)


def test_eos_ends_a_row_and_not_the_others(grouped: Generator):
    whole = grouped.generate(PROMPTS, NEW, stop_at_eos=False)
    eos = whole[1][3]
    stops = Generator(grouped.m, 1e4, init_params(grouped.m, seed=3), one_device(), jnp.float32, eos_id=eos)
    found = stops.generate(PROMPTS[:2], NEW)
    assert found == [row[: row.index(eos)] if eos in row else row for row in whole[:2]]
    assert len(found[1]) <= 3


def test_pieces_join_to_the_whole_and_nothing_recompiles(grouped: Generator):
    expected = grouped.generate(PROMPTS, 20, stop_at_eos=False)
    pieces: list[list[int]] = [[] for _ in PROMPTS]
    calls = []

    def add(row: int, ids: list[int]) -> None:
        calls.append(row)
        pieces[row] += ids

    with jtu.count_jit_and_pmap_lowerings() as lowered:
        found = grouped.generate(PROMPTS, 20, stop_at_eos=False, on_tokens=add)
    assert found == expected == pieces
    assert len(calls) > len(PROMPTS), "all came at once"
    assert lowered() == 0


def test_what_a_row_draws_depends_on_seed_row_and_position_alone(grouped: Generator):
    sampling = Sampling(temperature=1.0)
    found = grouped.generate(PROMPTS, NEW, sampling=sampling, seed=7, stop_at_eos=False)
    assert found == grouped.generate(PROMPTS, NEW, sampling=sampling, seed=7, stop_at_eos=False)
    assert found != grouped.generate(PROMPTS, NEW, sampling=sampling, seed=8, stop_at_eos=False)
    alone = grouped.generate(PROMPTS[3:], NEW, sampling=sampling, seed=7, stop_at_eos=False, first_row=3)
    assert alone == found[3:]


def test_a_row_ends_where_its_listener_says(grouped: Generator):
    whole = grouped.generate(PROMPTS, 20, stop_at_eos=False)
    found = grouped.generate(PROMPTS, 20, stop_at_eos=False, on_tokens=lambda row, ids: row != 2)
    assert found[2] == whole[2] and [found[row] == whole[row][: generation.PIECE] for row in (0, 1, 3)] == [True] * 3


def test_tokens_are_drawn_as_often_as_the_model_says():
    """Chi-square of the pairs of tokens that 2,048 rows draw from one seed."""
    m, rows = small_model(vocab_size=16, num_layers=1), 2048
    found = np.array(generator(m).generate([[5]] * rows, 2, sampling=Sampling(1.0), seed=1, stop_at_eos=False))
    decoder = Decoder(m, init_params(m, seed=3))
    table = jnp.array([[5, token] for token in range(16)])
    p = np.asarray(jax.jit(lambda t: jax.nn.softmax(decoder.logits(decoder(t, 1e4))))(table), np.float64)
    joint = p[0, 0][:, None] * p[:, 1]  # of the two new tokens
    seen = np.zeros((16, 16))
    np.add.at(seen, tuple(found.T), 1)
    enough = joint * rows > 5
    chi_square = ((seen - rows * joint) ** 2 / (rows * joint))[enough].sum()
    assert enough.sum() > 50 and abs(chi_square - enough.sum()) < 4 * np.sqrt(2 * enough.sum())


def test_a_token_that_the_model_lacks_is_an_error(grouped: Generator):
    with pytest.raises(ConfigError, match="token id 61 in a prompt: the model has 61"):
        grouped.generate([[5], [61]], 1)


def test_in_bfloat16_weights_and_cache_are_and_norms_are_not():
    m = small_model()
    half = Generator(m, 1e4, init_params(m, seed=3), one_device(), jnp.bfloat16, eos_id=EOS)
    kinds = {w.dtype for w in jax.tree.leaves(half.weights) if w.ndim > 1} | {half.empty_cache(2, 16)[0][0].dtype}
    assert kinds == {jnp.dtype("bfloat16")}
    assert half.weights["final_norm_D"].dtype == half.weights["layers"][0]["mlp_norm_LD"].dtype == jnp.float32
    assert len(half.generate([[5, 6]], 3, stop_at_eos=False)[0]) == 3


def test_parameters_that_are_given_away_are_freed_on_the_way():
    m = small_model()
    params = init_params(m, seed=3)
    first = params["embed_VD"]
    Generator(m, 1e4, params, one_device(), jnp.float32, eos_id=EOS)
    assert params["embed_VD"] is first
    Generator(m, 1e4, params, one_device(), jnp.float32, eos_id=EOS, keep_params=False)
    assert params == {}


# ---- drawing --------------------------------------------------------------------------------------------------------


def draws(scores: np.ndarray, sampling: Sampling, count: int = 4000) -> np.ndarray:
    uniform = (np.arange(count) + 0.5).astype(np.float32) / count
    rows = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (count, len(scores)))
    return np.bincount(np.asarray(jax.jit(draw)(rows, jnp.asarray(uniform), sampling)), minlength=len(scores)) / count


@pytest.mark.parametrize("top_k", [0, 1, 3])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.05])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_distribution_is_the_one_that_is_asked_for(temperature: float, top_k: int, top_p: float):
    """Temperature, then the k likeliest, then the fewest that have the share: by sorting, in numpy."""
    scores = np.array([0.3, 2.0, -1.0, 1.1, 0.7, -3.0, 1.9])
    p = np.exp(scores / temperature)
    order = np.argsort(-p)
    keep = order[: top_k or len(p)]
    share = np.cumsum(p[keep]) / p[keep].sum()
    keep = keep[: int(np.searchsorted(share, top_p * (1 - 1e-6))) + 1]
    expected = np.zeros(len(p))
    expected[keep] = p[keep] / p[keep].sum()
    found = draws(scores, Sampling(temperature, top_k, top_p))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert not found[expected == 0].any()


def test_temperature_zero_is_greedy():
    assert draws(np.array([0.1, 0.5, 0.4]), Sampling()).tolist() == [0, 1, 0]


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(tiny_run, tmp_path_factory.mktemp("generate") / "run")


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    generate.main()
    return capsys.readouterr().out


def test_command_line_prompts_and_file(run: Path, tmp_path: Path, monkeypatch, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a\u2028bc"}\n{"prompt": "ab", "suffix": "de"}\n', encoding="utf-8")
    options = ("--workdir", run, "--max-new-tokens", 6, "--temperature", 0, "--json")
    out = command(monkeypatch, capsys, *options, "--prompt", "a b c", "--prompts", file)
    results = [json.loads(line) for line in out.splitlines()]
    assert [r["prompt"] for r in results] == ["a b c", "a\u2028bc", "ab"] and results[2]["suffix"] == "de"
    encoder = load_tokenizer(run / "tokenizer.json")
    for r in results:
        assert r["step"] == 25 and r["num_tokens"] == len(r["ids"]) <= 6 and len(r["checkpoint"]) == 64
        assert r["finish"] == ("length" if r["num_tokens"] == 6 else "eos")
        assert r["text"] == encoder.decode(r["ids"])
    apart = command(monkeypatch, capsys, *options, "--prompt", "a b c", "--prompts", file, "--batch-size", 2)
    assert apart == out
    sharded = command(monkeypatch, capsys, *options, "--prompt", "a b c", "--prompts", file, "--mesh", "tensor=4")
    assert sharded == out
    plain = command(monkeypatch, capsys, *options[:-1], "--prompt", "abc", "--step", 20)
    assert plain.startswith("abc|")


def test_one_prompt_streams_to_a_terminal(run: Path, monkeypatch, capsys):
    options = ("--workdir", run, "--max-new-tokens", 40, "--prompt", "abc", "--seed", 4)
    expected = json.loads(command(monkeypatch, capsys, *options, "--json"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert command(monkeypatch, capsys, *options) == expected["text"] + "\n"


def test_the_middle_is_asked_for_by_k2s_tokens(run: Path):
    encoder = load_tokenizer(run / "tokenizer.json")
    prefix, suffix, middle = (encoder.token_to_id(f"<fim_{name}>") for name in ("prefix", "suffix", "middle"))
    before, after = (encoder.encode(text) for text in ("ab", "de"))
    prompt = generate.Prompt("ab", "de")
    assert generate.encode(encoder, prompt, "psm") == [prefix, *before, suffix, *after, middle]
    assert generate.encode(encoder, prompt, "spm") == [prefix, suffix, *after, middle, *before]
    assert generate.encode(encoder, generate.Prompt("<fim_middle>"), "psm") != [middle], "text stays text"


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_a_suffix_continues_the_document_of_the_prompt(run: Path, order: str):
    """A tokenizer such as LLaMA's puts a space before a text: the suffix's indent of four came out as five."""
    library = tokenizers.Tokenizer.from_file(str(run / "tokenizer.json"))
    library.normalizer = tokenizers.normalizers.Prepend(" ")
    encoder = Tokenizer(library.to_str())
    ids = generate.encode(encoder, generate.Prompt("if a:\n", "    b"), order)
    text = encoder.decode(ids)
    for token in generate.FIM:
        text = text.replace(token, "|")
    assert text == ("| if a:\n|    b|" if order == "psm" else "||    b| if a:\n")
    assert encoder.decode(generate.encode(encoder, generate.Prompt("", "    b"), "psm")).count(" ") == 4


def test_characters_are_held_back_until_they_are_whole(run: Path):
    encoder = load_tokenizer(run / "tokenizer.json")
    start, ids = encoder.encode("ab "), encoder.encode("é✓ abc 世")
    assert any("\N{REPLACEMENT CHARACTER}" in encoder.decode(ids[:n]) for n in range(len(ids)))
    told: list[str] = []
    streamer = generate.Streamer(encoder.decode, start, told.append)
    for token in ids:
        streamer.add([token])
    streamer.finish()
    assert "".join(told) == "é✓ abc 世" and "\N{REPLACEMENT CHARACTER}" not in "".join(told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "6", "--prompt", "a"], "no checkpoint of step 6: it has steps 10, 20, 25"),
        (["--prompts", "none.txt"], "cannot be read"),
        (["--prompts", "/dev/null"], "--prompts=/dev/null: holds no prompt"),
        (["--prompt", "a", "--top-p", "0"], "top_p"),
        (["--prompt", "a", "--mesh", "fsdp=2,tenser=2"], "'tenser=2' is not AXIS=SIZE with an axis of replica, stage,"),
        (["--prompt", "a", "--mesh", "tensor=16"], "needs 16 devices, this run has 8"),
        (["--prompt", "a", "--mesh", "fsdp=3"], "not divisible by mesh.fsdp=3"),
    ],
)
def test_bad_input(run: Path, monkeypatch, capsys, arguments: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        command(monkeypatch, capsys, "--workdir", run, *arguments)


def test_another_tokenizer_is_refused(run: Path, monkeypatch, capsys):
    path = run / "tokenizer.json"
    text = path.read_text()
    path.write_text(text + " ")
    with pytest.raises(ConfigError, match="SHA-256"):
        command(monkeypatch, capsys, "--workdir", run, "--prompt", "a")
    path.write_text(text)
