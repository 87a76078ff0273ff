"""What stands beside imported weights comes back with an export: chat templates, which token is what, how to sample,
licences; and what it says is done here, too.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import jax
import pytest
from chat_templates import CHATML, DIALOGUE
from conftest import REPOSITORY, Later

from k2jax import config as configuration
from k2jax.bucket import at
from k2jax.chat.template import MORE, ChatTemplate
from k2jax.data.store import Store
from k2jax.data.store_writer import StoreWriter
from k2jax.data.tokenizer import load_tokenizer, tokenizer_sha256
from k2jax.errors import ConfigError, StorageError
from k2jax.evals.subject import Subject
from k2jax.generate import open_generator
from k2jax.hf import card, side_files
from k2jax.hf.export import export, small_files
from k2jax.hf.importer import cached_name, import_hf
from k2jax.hf.verify import verify
from k2jax.model.generation import Generator
from k2jax.run.chat_template import recorded, template_of
from k2jax.run.saved import open_step, restore_params
from k2jax.train import train
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
    import_hf(folder, path / "run", "imported", False, base_model="somebody/model")
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


# ---- after training --------------------------------------------------------------------------------------------------


def experiment(run: Path, data: Path) -> Any:
    """Three chunks of a step each on the run's own model."""
    text = (run / "experiment.py").read_text()
    for before, after in (("rows_per_step=64", "rows_per_step=8"), ("steps_per_chunk=100", "steps_per_chunk=1"),
                          ("chunks=10", "chunks=3"), ("warmup_steps=50", "warmup_steps=0"),
                          ("mix={}", 'mix={"web": 1}'), ('root = "data"', f"root = {str(data)!r}")):  # fmt: skip
        assert before in text, before
        text = text.replace(before, after)
    (run / "experiment.py").write_text(text)
    options = ["stages.0.sequence_length=32", "log.tensorboard=False", "eval.windows=2", "eval.at_checkpoints=0"]
    return configuration.load(str(run / "experiment.py"), [*options, "eval.prompts=()"])


def data_of(folder: Path, tiny_data: Path, path: Path) -> Path:
    """A store with the tokenizer of an imported folder, of the tiny data's ids."""
    there, vocab = Store.open(tiny_data / "web"), 512
    identity = tokenizer_sha256(folder / "tokenizer.json")
    options = {"tokenizer_sha256": identity, "vocab_size": vocab, "shard_tokens": 4096, "chunk_tokens": 512}
    with StoreWriter(path / "web", **options, eos_id=2) as writer:
        for i in range(there.num_documents):
            record = there.document(i)
            [ids] = there.read([record["start"]], record["num_tokens"] - 1)
            writer.add(ids.tolist(), id=record["id"], source=f"{i}")
        writer.finish(validation_fraction=0.1)
    return path


@pytest.fixture(scope="module")
def trained(there_and_back: tuple[Path, Path, Path], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """(the folder, an import that was trained, a fork at step 2 of a fork of it at step 1)."""
    folder, run, _ = there_and_back
    path = tmp_path_factory.mktemp("trained")
    data = data_of(folder, tiny_data, path / "data")
    first = Path(shutil.copytree(run, path / "run"))
    train(experiment(first, data), first)
    for step, name in ((1, "fork"), (2, "fork2")):
        before = first if step == 1 else path / "fork"
        (path / f"{name}-x").mkdir()
        shutil.copyfile(run / "experiment.py", path / f"{name}-x" / "experiment.py")
        shutil.copyfile(run / "tokenizer.json", path / f"{name}-x" / "tokenizer.json")
        train(experiment(path / f"{name}-x", data), path / name, (before, step))
    return folder, first, path / "fork2"


def test_training_and_forks_keep_all_that_an_answer_needs(trained: tuple[Path, Path, Path], tmp_path: Path):
    """And transformers answers from the export as k2jax does from the checkpoint."""
    folder, *runs = trained
    for number, run in enumerate(runs):
        saved, out = open_step(run, (1, 3)[number]), tmp_path / str(number)
        assert saved.meta["chat"] == open_step(runs[0], 0).meta["chat"]
        template = (folder / "chat_template.jinja").read_text()
        assert saved.meta["chat"]["template"] == template == template_of(saved).text
        assert saved.meta["chat"]["sha256"] == hashlib.sha256(template.encode()).hexdigest()
        export(saved, out, "float32", 1 << 30, lambda _: None)
        verify(saved, out, lambda _: None)
        for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
            assert (out / name).read_bytes() == (folder / name).read_bytes(), name
        was, now = (json.loads((path / "config.json").read_text()) for path in (folder, out))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"):
            assert now[key] == was[key], key
        card = (out / "README.md").read_text()
        assert '\nbase_model: "somebody/model"\nbase_model_relation: "finetune"\n' in card
        assert "| Base model | somebody/model |" in card and saved.meta["chat"]["sha256"] in card
        assert ("tokenizer.json puts `<s>`" in card) == ("No token goes before a text" not in card)
        check_answers(saved, out, folder)


def check_answers(saved: Any, out: Path, folder: Path) -> None:
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    encoded = tokenizer.apply_chat_template(
        DIALOGUE[:2], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    prompt = encoded["input_ids"][0].tolist()
    assert prompt == ours.apply_chat_template(DIALOGUE[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="float32")
    new = model.generate(**encoded, max_new_tokens=12, do_sample=False)[0].tolist()[len(prompt) :]
    assert model.generation_config.eos_token_id == [2, 7, 9]
    mesh = mesh_for(saved.config, jax.devices()[:1])
    generator = open_generator(saved, mesh, whole=True)
    expected = generator.generate([prompt], 12)[0]
    assert expected == (new[:-1] if new[-1] in saved.stop_ids else new)


def test_conversations_give_a_run_their_template(trained: tuple[Path, Path, Path], tmp_path: Path):
    """What the stage of such stores records, and what an export then has: also of a run that was not imported."""
    folder, run, _ = trained
    saved, mine = open_step(run), "{{ bos_token }}" + CHATML + "{# mine #}"
    chat = recorded(ChatTemplate(mine, "t", {"bos_token": "<s>", "eos_token": "</s>"}, ""), ["<fim_pad>"])
    learned = saved._replace(meta={**saved.meta, "chat": chat})
    tokenizer = load_tokenizer(saved.tokenizer)
    end = tokenizer.token_to_id("<fim_pad>")
    export(learned, tmp_path / "out", "float32", 1 << 30, lambda _: None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.chat_template == mine
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [2, 7, 9, end] and settings["temperature"] == 0.6

    own = learned._replace(epochs=[epoch._replace(origin=None) for epoch in saved.epochs])
    texts = small_files(own, "float32")
    assert texts["chat_template.jinja"].decode() == mine
    assert json.loads(texts["generation_config.json"]) == {"eos_token_id": [2, end], "pad_token_id": 0}
    said = json.loads(texts["tokenizer_config.json"])
    assert (said["bos_token"], said["eos_token"], said["pad_token"]) == ("<s>", "</s>", "<unk>")


def test_an_import_without_settings_of_generation_keeps_the_list_of_its_config(
    there_and_back: tuple[Path, Path, Path], tmp_path: Path
):
    """transformers reads the list from config.json then; an export's own file must not cut it."""
    _, run, _ = there_and_back
    saved = open_step(run)
    files = saved.epochs[0].origin["side_files"]
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        del files[name]
    found = {name: json.loads(text) for name, text in small_files(saved, "float32").items() if name.endswith("json")}
    assert found["generation_config.json"] == {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0}
    assert found["config.json"]["eos_token_id"] == [2, 7]


def test_pad_is_never_eos():
    """A tokenizer without <unk>: padding with EOS would hide the ends of texts from a loss."""

    class Plain:
        meta: ClassVar = {"eos_id": 5}

        def token_to_id(self, token: str) -> None:
            return None

        def id_to_token(self, id: int) -> str:
            return "<end>"

    assert card.special_tokens(Plain(), Plain()) == {"eos_token": "<end>"}


def test_templates_by_name_come_back_too(there_and_back: tuple[Path, Path, Path], tmp_path: Path):
    folder, _, _ = there_and_back
    shutil.copytree(folder, tmp_path / "hf")
    (tmp_path / "hf" / MORE).mkdir()
    (tmp_path / "hf" / MORE / "tools.jinja").write_text("{{ messages }}")
    import_hf(tmp_path / "hf", tmp_path / "run", "imported", False)
    saved = open_step(tmp_path / "run")
    assert template_of(saved, name="tools").text == "{{ messages }}"
    assert saved.meta["imported"]["files"][f"{MORE}/tools.jinja"]
    with pytest.raises(ConfigError, match="has no chat template named 'rag'"):
        template_of(saved, name="rag")
    export(saved, tmp_path / "out", "float32", 1 << 30, lambda _: None)
    verify(saved, tmp_path / "out", lambda _: None)
    assert (tmp_path / "out" / MORE / "tools.jinja").read_text() == "{{ messages }}"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert set(theirs.chat_template) == {"default", "tools"}
    (tmp_path / "out" / MORE / "other.jinja").touch()
    with pytest.raises(StorageError, match=r"other.jinja is not of this export"):
        verify(saved, tmp_path / "out", lambda _: None)
    (tmp_path / "hf2").mkdir()
    (tmp_path / "hf2" / MORE).symlink_to(tmp_path / "hf" / MORE)
    with pytest.raises(ConfigError, match="link out of its folder"):
        side_files.read(tmp_path / "hf2")


@pytest.mark.parametrize(
    ("place", "given", "expected"),
    [
        ("models--org--a--name/snapshots/abc", "", "org/a--name"),
        ("models--name/snapshots/abc", "", "name"),
        ("models--o--<x>/snapshots/abc", "", None),
        ("plain", "", None),
    ],
)
def test_the_base_model_of_a_cache_is_its_name_on_the_hub(place: str, given: str, expected: str | None, tmp_path: Path):
    (tmp_path / place).mkdir(parents=True)
    assert cached_name(tmp_path / place) == expected


def test_a_base_model_that_is_no_name_is_refused(tmp_path: Path):
    for name in ("a/b/c", "a b", "../x", "/x", "x\n---"):
        with pytest.raises(ConfigError, match="--base-model=.*expected a name on the hub"):
            import_hf(tmp_path, tmp_path / "out", "x", False, base_model=name)
