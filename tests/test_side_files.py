"""What stands beside imported weights comes back with an export: chat templates, which token is what, how to sample,
licences; and what it says is done here, too.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from chat_templates import CHATML, DIALOGUE
from conftest import REPOSITORY, Later

from k2jax.bucket import at
from k2jax.errors import ConfigError
from k2jax.evals.subject import Subject
from k2jax.hf import side_files
from k2jax.hf.export import export
from k2jax.hf.importer import import_hf
from k2jax.hf.verify import verify
from k2jax.model.generation import Generator
from k2jax.run.saved import open_step, restore_params
from k2jax.training.placement import mesh_for

transformers = Later("transformers")
LICENCE = "Do as you like, with a naïve © line.\n"


def make_folder(path: Path, tiny_data: Path, *, bos: bool) -> Path:
    """As transformers leaves it, with a chat template, two EOS, settings of sampling and a licence."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(tiny_data / "tokenizer.json"))
    if bos:
        frame = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.post_processor = frame
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
        bos_token="<s>" if bos else None, model_max_length=64, padding_side="left",
    )  # fmt: skip
    fast.chat_template = ("{{ bos_token }}" if bos else "") + CHATML
    fast.save_pretrained(path)
    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64, initializer_range=0.5, bos_token_id=1, eos_token_id=[2, 7], pad_token_id=0,
        )
    )  # fmt: skip
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=[2, 7, 9], pad_token_id=0, temperature=0.6, top_p=0.9, do_sample=True
    )
    model.save_pretrained(path)
    (path / "LICENSE").write_text(LICENCE, encoding="utf-8")
    (path / "USE_POLICY.md").write_text("Be kind.\n")
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no bos"])
def there_and_back(request: Any, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(the folder, the run, what is exported of it)."""
    path = tmp_path_factory.mktemp("side")
    folder = make_folder(path / "hf", tiny_data, bos=request.param)
    import_hf(folder, path / "run", "imported", False)
    export(open_step(path / "run"), path / "out", "float32", 1 << 30, lambda _: None)
    return folder, path / "run", path / "out"


def test_files_beside_the_weights_come_back_as_they_were(there_and_back: tuple[Path, Path, Path]):
    folder, run, out = there_and_back
    names = {path.name for path in folder.iterdir()} - {"config.json", "model.safetensors"}
    assert {"LICENSE", "USE_POLICY.md", "chat_template.jinja", "generation_config.json"} <= names
    for name in names:
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    was, now = (json.loads((path / "config.json").read_text()) for path in (folder, out))
    assert {key: now[key] for key in side_files.IDS} == {key: was[key] for key in side_files.IDS}
    assert now["eos_token_id"] == [2, 7]
    assert set(names) - {"tokenizer.json"} <= open_step(run).imported["side_files"].keys()
    verify(open_step(run), out, lambda _: None)
    card = (out / "README.md").read_text()
    assert "`LICENSE`" in card and "`USE_POLICY.md`" in card and LICENCE not in card
    assert ("tokenizer.json puts `<s>`" in card) == ("<s>" in (folder / "tokenizer_config.json").read_text())


def test_transformers_renders_encodes_and_answers_the_same(there_and_back: tuple[Path, Path, Path]):
    folder, run, out = there_and_back
    answers = []
    for path in (folder, out):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        turns = DIALOGUE[:2]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        plain = tokenizer("abc de", return_tensors="pt")
        greedy = model.generate(**plain, max_new_tokens=24, do_sample=False)[0].tolist()
        settings = model.generation_config.to_diff_dict()
        answers.append((text, ids, greedy, settings, tokenizer.pad_token, tokenizer.padding_side))
    assert answers[0] == answers[1]
    saved = open_step(run)  # and so does k2jax itself: the same tokens before a text, the same that end one
    assert saved.stop_ids == (2, 7, 9)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    begin = saved.begin_ids
    assert begin == tokenizer("abc").input_ids[: len(begin)] and len(begin) == (tokenizer.bos_token is not None)
    prompt = tokenizer("abc de").input_ids
    mesh = mesh_for(saved.config)
    ids = {"eos_id": 2, "stop_ids": saved.stop_ids}
    generator = Generator(
        saved.config.model, saved.stage.rope_base, restore_params(saved, mesh), mesh, jax.numpy.float32, **ids
    )
    new = answers[0][2][len(prompt) :]
    expected = new[:-1] if new[-1] in saved.stop_ids else new
    assert generator.generate([prompt], 24) == [expected]
    assert Subject(saved, mesh, batch_tokens=64, seed=0).generator.stop_ids == saved.stop_ids
    options = ["--prompt=abc de", "--max-new-tokens=24", "--temperature=0", "--json"]
    command = [sys.executable, "-m", "k2jax.generate", f"--workdir={run}", *options]
    told = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=REPOSITORY).stdout)
    assert told["ids"] == expected


def test_each_of_several_tokens_ends_a_text(there_and_back: tuple[Path, Path, Path]):
    _, run, _ = there_and_back
    saved = open_step(run)
    mesh = mesh_for(saved.config)
    parts = saved.config.model, saved.stage.rope_base, restore_params(saved, mesh), mesh, jax.numpy.float32
    prompts = [[5, 6], [30, 31, 32]]
    free = Generator(*parts, eos_id=2).generate(prompts, 12, stop_at_eos=False)
    stop = free[0][3]
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert len(expected[0]) <= 3
    assert Generator(*parts, eos_id=2, stop_ids=(stop,)).generate(prompts, 12) == [
        ids[: ids.index(2)] if 2 in ids else ids for ids in expected
    ]


# ---- what is wrong with them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json cannot be read: found .*, expected a JSON object"),
        ("generation_config.json", b"{", "generation_config.json cannot be read"),
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja cannot be read: 'utf-8' codec"),
        ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json cannot be read"),
        ("LICENSE", b"x" * (side_files.MAX_BYTES + 1), "LICENSE: with the files beside the weights more than"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused(tmp_path: Path, name: str, found: bytes, message: str):
    (tmp_path / name).write_bytes(found)
    with pytest.raises(ConfigError, match=message):
        side_files.read(tmp_path)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path):
    (tmp_path / "secret").write_text("s")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match="link out of its folder"):
        side_files.read(tmp_path / "hf")


def test_only_what_training_changed_is_changed(there_and_back: tuple[Path, Path, Path]):
    """A longer context; and no code of the folder's is named."""
    _, run, _ = there_and_back
    saved = open_step(at(run))
    origin = saved.epochs[0].origin
    said = json.loads(origin["side_files"]["tokenizer_config.json"])
    origin["side_files"]["tokenizer_config.json"] = json.dumps(said | {"auto_map": {"AutoTokenizer": "code.T"}})
    saved.config.stages[0].unlock().sequence_length = 96
    found = json.loads(side_files.of_run(saved)["tokenizer_config.json"])
    assert found == said | {"model_max_length": 96}
