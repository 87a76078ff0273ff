"""An imported folder has the numbers of the harness's own `hf` model on the folder itself, whatever its BOS."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
for needed in ("lm_eval", "torch", "accelerate"):
    pytest.importorskip(needed)

from k2jax.data.tokenizer import load_tokenizer  # noqa: E402
from k2jax.errors import ConfigError  # noqa: E402
from k2jax.evals.harness import CheckpointLM  # noqa: E402
from k2jax.evals.subject import Subject  # noqa: E402
from k2jax.hf import side_files  # noqa: E402
from k2jax.hf.importer import import_hf  # noqa: E402
from k2jax.run.saved import open_step  # noqa: E402
from k2jax.training.placement import mesh_for  # noqa: E402

# What puts a BOS before a text, and what only names one: transformers 5 lets tokenizer.json alone decide.
FRAMES = {
    "none": {"frame": None, "bos_token": None},
    "named": {"frame": None, "bos_token": "<s>"},
    "put": {"frame": "<s> $A", "bos_token": "<s>"},
    "put, not named": {"frame": "<s> $A", "bos_token": None},
}


class Request(NamedTuple):
    args: tuple
    task_name: str = "local"
    doc_id: int = 7


PAIRS = [
    ("", "abc de"), ("", "a"), ("", "<s>abc"), ("", "</s>abc"), ("abc", " de fgh"), ("abc ", "de"), (" \n", "abc"),
    ("<s>abc", " de"), ("x </s> y", " abc"), ("a" * 90, " bc"), ("abc", " <s> d"),
]  # fmt: skip
TEXTS = ["abc de", "a", "<s>abc", "</s>a b", "abcd efgh " * 60, ""]
PROMPTS = ["abc", "<s>abc", "abc de fgh", "ab </s> cd", "abc " * 60]


@pytest.fixture(scope="module", params=FRAMES)
def both(request: Any, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CheckpointLM, Any]:
    """Ours on the import, theirs on the folder."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path, kind = tmp_path_factory.mktemp("parity"), FRAMES[request.param]
    tokenizer = Tokenizer.from_file(str(tiny_data / "tokenizer.json"))
    if kind["frame"]:
        frame = processors.TemplateProcessing(single=kind["frame"], special_tokens=[("<s>", 1)])
        tokenizer.post_processor = frame
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<unk>", bos_token=kind["bos_token"]
    ).save_pretrained(path / "hf")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64, initializer_range=0.5, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    model.save_pretrained(path / "hf")
    import_hf(path / "hf", path / "run", "imported", False)
    saved = open_step(path / "run")
    subject = Subject(saved, mesh_for(saved.config), batch_tokens=1024, seed=1234)
    # Without its cache of logits: with it, two requests of the same several tokens get a wrong sum (lm_eval 0.4.13).
    options = {"device": "cpu", "dtype": "float32", "batch_size": 1, "logits_cache": False}
    hf = HFLM(pretrained=str(path / "hf"), **options)
    return CheckpointLM(subject), hf


def on_mesh(lm: CheckpointLM, ask: Callable[[], Any]) -> Any:
    with jax.set_mesh(lm._subject.mesh):
        return ask()


def test_the_prefix_is_the_harness_own(both: tuple[CheckpointLM, Any]):
    ours, theirs = both
    assert ours.prefix_token_id == theirs.prefix_token_id and ours.eot_token_id == theirs.eot_token_id
    for text in (*TEXTS, *PROMPTS):
        assert ours.tok_encode(text) == theirs.tok_encode(text)


def test_loglikelihoods_are_the_harness_own(both: tuple[CheckpointLM, Any]):
    """Empty contexts among them."""
    ours, theirs = both
    # Where nothing is put before spaces alone, the harness's own model stops with an assertion.
    pairs = PAIRS if ours.tok_encode("") else [pair for pair in PAIRS if pair[0].strip() or not pair[0]]
    requests = [Request(pair) for pair in pairs]
    expected = theirs.loglikelihood([Instance(r) for r in requests], disable_tqdm=True)
    for found, wanted in zip(on_mesh(ours, lambda: ours.loglikelihood(requests)), expected, strict=True):
        assert found == (pytest.approx(wanted[0], abs=1e-4), wanted[1])
    assert len({round(logprob, 3) for logprob, _ in expected}) >= len(pairs) - 1


def test_rolling_loglikelihoods_are_the_harness_own(both: tuple[CheckpointLM, Any]):
    ours, theirs = both
    requests = [Request((text,)) for text in TEXTS]
    expected = theirs.loglikelihood_rolling([Instance(r) for r in requests], disable_tqdm=True)
    found = on_mesh(ours, lambda: ours.loglikelihood_rolling(requests))
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-5)
    assert min(expected) < -1000, "some are of several windows"


def test_generations_are_the_harness_own(both: tuple[CheckpointLM, Any]):
    ours, theirs = both
    requests = [Request((text, {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False})) for text in PROMPTS]
    expected = theirs.generate_until([Instance(r) for r in requests], disable_tqdm=True)
    assert on_mesh(ours, lambda: ours.generate_until(requests)) == expected
    assert len(set(expected)) >= 4


class Instance:
    """A request as the harness has it; its arguments are its own, which its models change."""

    def __init__(self, request: Request):
        self.args = tuple(dict(part) if isinstance(part, dict) else part for part in request.args)


# ---- what has nothing to score ---------------------------------------------------------------------------------------


def test_a_continuation_without_a_token_is_refused_by_name(both: tuple[CheckpointLM, Any]):
    """It would be certain, 0.0, and greedy: the best of all choices, of any model."""
    ours, _ = both
    for context in ("abc", ""):
        with pytest.raises(ConfigError, match="task local, document 7: the continuation '' after .* has no token"):
            ours.loglikelihood([Request(("abc", " d")), Request((context, ""))])


# ---- which token a folder names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config.json": '{"bos_token": "<s>"}'}, 1),
        ({"tokenizer_config.json": '{"bos_token": {"content": "<s>", "special": true}}'}, 1),
        ({"tokenizer_config.json": '{"bos_token": null}', "special_tokens_map.json": '{"bos_token": "<s>"}'}, None),
        ({"special_tokens_map.json": '{"bos_token": "<s>"}'}, 1),
        ({"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}, 1),
        ({"tokenizer_config.json": '{"bos_token": "<not there>"}'}, None),
        ({"tokenizer_config.json": '{"bos_token": 5}'}, None),
        ({"tokenizer_config.json": '{"chat_template": "' + "{" * 90 + '", "bos_token": "<s>"}'}, 1),
    ],
)
def test_a_folder_names_its_bos(files: dict[str, str], expected: int | None, tiny_data: Path, tmp_path: Path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert load_tokenizer(tiny_data / "tokenizer.json").token_to_id("<s>") == 1
    assert side_files.bos_id(side_files.read(tmp_path), tiny_data / "tokenizer.json") == expected


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[1]", '"\\ud800', ""])
def test_a_file_that_is_no_json_is_named(text: str, tmp_path: Path):
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ConfigError, match="tokenizer_config.json cannot be read"):
        side_files.read(tmp_path)
