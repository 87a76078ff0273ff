"""The lm-evaluation-harness on a checkpoint gives the numbers of the harness's own `hf` model on the same weights.

Tasks and data are local files: nothing is downloaded.
"""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
pytest.importorskip("lm_eval")

from k2jax.errors import ConfigError  # noqa: E402
from k2jax.evals import folder, harness, scoring, suites, tasks  # noqa: E402
from k2jax.evals.scoring import Row, Scorer, make_batches  # noqa: E402
from k2jax.evals.session import Session, Wanted  # noqa: E402
from k2jax.evals.subject import Subject  # noqa: E402
from k2jax.hf.families import config_to_hf  # noqa: E402
from k2jax.hf.layout import tensors  # noqa: E402
from k2jax.model import generation  # noqa: E402
from k2jax.model.decoder import Decoder, init_params, parameter_table  # noqa: E402
from k2jax.model.generation import Sampling  # noqa: E402
from k2jax.parallel.sharding import MESH_AXES, named  # noqa: E402
from k2jax.run.saved import SavedStep, open_array, open_step  # noqa: E402
from k2jax.train import train  # noqa: E402
from k2jax.training.placement import mesh_for  # noqa: E402

TASKS = {
    # Choices of several tokens; some questions are longer than the context, some empty.
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: "{{delimiter}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    # Choices of one token each, after the same context; examples before the question where asked for.
    "letters": """
output_type: multiple_choice
fewshot_split: train
doc_to_text: "{{question}}"
doc_to_choice: ["a", "b", "c", "d"]
doc_to_target: "{{answer % 4}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    # The harness's own model has nothing to go on from an empty text.
    "answers": """
output_type: generate_until
doc_to_text: "a{{question}}"
doc_to_target: "{{word}}"
generation_kwargs: {until: ["ab", "\\n\\n"], max_gen_toks: 20, do_sample: false}
filter_list: [{name: first, filter: [{function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
COMMON = """
task: local_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl, train: {folder}/train.jsonl}}}}
test_split: test
metadata: {{version: 1.5}}
"""
GROUP = """
group: local_all
task: [local_choices, local_letters]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 2}
"""


def make_tasks(folder: Path) -> Path:
    """Task files and their data: words of the tiny corpora's kind, and what usually goes wrong."""
    draw = random.Random(7)

    def words(least: int, most: int) -> str:
        return " ".join(
            "".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(draw.randint(least, most))
        )

    odd = ["", "a", "ends with spaces   ", "é世界 \u00a0", "x </s> y", "</s>starts", "<fim_prefix>a", "a\n\n"]
    docs = [
        {
            "question": odd[i] if i < len(odd) else words(1, 60),
            "choices": [words(1, 6), words(1, 2), odd[i % 6 + 2], words(1, 9) + "\n"],
            "answer": draw.randrange(4),
            "text": odd[i % 6 + 2] if i < 8 else words(1, 150),
            "word": words(1, 1),
            "delimiter": " ",
        }
        for i in range(24)
    ]
    for name, part in (("test", docs), ("train", [{**d, "question": words(1, 3)} for d in docs * 2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in part))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name, folder=folder) + text)
    (folder / "all.yaml").write_text(GROUP)
    return folder


def hf_folder(saved: SavedStep, folder: Path) -> Path:
    """The checkpoint as transformers writes it, made here with transformers itself."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    m, eos_id = saved.config.model, saved.meta["eos_id"]
    values = config_to_hf(m, saved.stage, dtype="float32", bos_id=None, eos_id=eos_id)
    model = LlamaForCausalLM(LlamaConfig(**values))
    arrays = {t.array: np.asarray(open_array(saved, f"params/{t.array}").read().result()) for t in tensors(m)}
    weights = {t.name: t.to_hf(arrays[t.array] if t.layer is None else arrays[t.array][t.layer]) for t in tensors(m)}
    model.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in weights.items()}, strict=True)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(saved.tokenizer), eos_token="</s>", unk_token="<unk>", pad_token="<unk>", bos_token=None
    ).save_pretrained(folder)
    return folder


class Both(NamedTuple):
    ours: dict[str, Any]
    theirs: dict[str, Any]

    def samples(self, task: str) -> list[tuple[dict, dict]]:
        return list(zip(self.ours["samples"][task], self.theirs["samples"][task], strict=True))


@pytest.fixture(scope="module")
def workdir(tiny_config: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("harness") / "run"
    c = tiny_config(**{"model.num_kv_heads": 4, "model.init_std": 0.5, "mesh.tensor": 2, "mesh.fsdp": 4})
    for stage in c.stages:  # one step that changes next to nothing: what is likely depends on the context
        with stage.unlocked():
            stage.update(steps_per_chunk=1, chunks=1, warmup_steps=0, lr_peak=1e-9, lr_final=1e-9)
    train(c, path)
    return path


@pytest.fixture(scope="module")
def subject(workdir: Path) -> Subject:
    saved = open_step(workdir)
    return Subject(saved, mesh_for(saved.config), batch_tokens=1024, seed=1234)


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def hf(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    folder = hf_folder(subject.saved, tmp_path_factory.mktemp("hf"))
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)


def theirs(task: tasks.HarnessTask) -> dict[str, Any]:
    """The task loaded once more, for the harness's own model."""
    again = tasks.HarnessTask(task._manager, task.name, num_fewshot=task._num_fewshot, limit=task._limit)
    again._begin()
    return again._loaded


def evaluate_both(subject: Subject, hf: Any, task_dir: Path, name: str, **options: Any) -> Both:
    """One task through `HarnessTask`, with our model and with theirs in its place."""
    task = tasks.HarnessTask(tasks.open_manager([name], task_dir), name, **options)
    found = []

    def capture(lm: Any, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        found.append(real(lm, *arguments, **keywords))
        found.append(real(hf, theirs(task), **keywords))
        return found[0]

    real, tasks.evaluate = tasks.evaluate, capture
    try:
        with jax.set_mesh(subject.mesh):
            task.evaluate(subject)
    finally:
        tasks.evaluate = real
    return Both(*found)


# ---- the adapter's numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shots"), [("local_choices", None), ("local_letters", 0), ("local_letters", 3)])
def test_multiple_choice_agrees_with_the_hf_model(subject: Subject, hf: Any, task_dir: Path, name: str, shots: Any):
    both = evaluate_both(subject, hf, task_dir, name, num_fewshot=shots)
    compared = 0
    for ours, theirs in both.samples(name):
        assert ours["arguments"] == theirs["arguments"]
        for [(logprob, greedy)], [(their_logprob, their_greedy)] in zip(ours["resps"], theirs["resps"], strict=True):
            assert logprob == pytest.approx(their_logprob, abs=1e-3) and greedy == their_greedy
            compared += 1
        assert (ours["acc"], ours["acc_norm"]) == (theirs["acc"], theirs["acc_norm"])
    assert compared == 24 * 4
    keys = ("acc,none", "acc_norm,none", "acc_stderr,none")
    assert [both.ours["results"][name][k] for k in keys] == [both.theirs["results"][name][k] for k in keys]


def test_perplexity_agrees_with_the_hf_model(subject: Subject, hf: Any, task_dir: Path):
    both = evaluate_both(subject, hf, task_dir, "local_texts")
    lengths = []
    for ours, theirs in both.samples("local_texts"):
        [[mine]], [[hers]] = ours["resps"], theirs["resps"]
        assert mine == pytest.approx(hers, abs=1e-3)
        lengths.append(-mine)
    assert max(lengths) > 64 * 4  # some are longer than the context: several windows
    mine, hers = (r["results"]["local_texts"] for r in both)
    for key in ("word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"):
        assert mine[key] == pytest.approx(hers[key], rel=1e-4)


def test_generations_agree_with_the_hf_model(subject: Subject, hf: Any, task_dir: Path):
    both = evaluate_both(subject, hf, task_dir, "local_answers")
    texts = []
    for ours, theirs in both.samples("local_answers"):
        assert ours["resps"] == theirs["resps"] and ours["exact_match"] == theirs["exact_match"]
        texts.append(ours["resps"][0][0])
    assert len(set(texts)) > 8 and not any("ab" in text for text in texts)
    results = [r["results"]["local_answers"]["exact_match,first"] for r in both]
    assert results[0] == results[1]


def test_a_context_of_spaces_alone_has_the_prefix_before_it(subject: Subject):
    """The harness's own model stops with an assertion there."""
    lm = harness.CheckpointLM(subject)
    with jax.set_mesh(subject.mesh):
        [spaces, plain] = lm._loglikelihood_tokens([(None, [], [5, 6]), (None, [lm.eot_token_id], [5, 6])])
    assert spaces == plain


def test_a_continuation_that_its_context_swallows_is_scored(subject: Subject):
    """"a" and "b" that make one token "ab" left nothing to score: 0.0, and greedy, of any model."""
    lm = harness.CheckpointLM(subject)
    merges = json.loads(subject.saved.tokenizer.read_text())["model"]["merges"]
    pairs = [pair for pair in merges if len(lm.tok_encode("".join(pair))) == 1 and pair[0].strip()]
    assert len(pairs) > 100 and not lm.tok_encode("".join(pairs[0]))[1:], "the fault is there to be ended"
    with jax.set_mesh(subject.mesh):
        found = lm.loglikelihood([Request(tuple(pair)) for pair in pairs])
        expected = lm._loglikelihood_tokens([(None, *map(lm.tok_encode, pair)) for pair in pairs])
        [prefix] = lm.loglikelihood([Request(("", "</s>"))])
        assert prefix == lm._loglikelihood_tokens([(None, [lm.prefix_token_id], [lm.eot_token_id])])[0] != (0.0, True)
    assert found == expected and all(logprob < 0 for logprob, _ in found)
    assert lm._encode_pair("a ", "b") == harness.TemplateLM._encode_pair(lm, "a ", "b"), "others are as they were"


def test_choices_of_one_token_share_one_row(subject: Subject, monkeypatch: pytest.MonkeyPatch):
    given: list[Row] = []
    scorer = lambda rows, progress: given.extend(rows) or subject.scorer(rows, progress)  # noqa: E731
    stand_in = Subject(subject.saved, subject.mesh, batch_tokens=1024, seed=0)
    stand_in.__dict__["scorer"] = scorer
    with jax.set_mesh(subject.mesh):
        apart = harness.CheckpointLM(subject)._loglikelihood_tokens([(None, [7, 8], [9])])
        together = harness.CheckpointLM(stand_in)._loglikelihood_tokens(
            [(None, [7, 8], [t]) for t in (3, 9, 11)] + [(None, [7], [8, 9])]
        )
    assert [row.tokens for row in given] == [(7, 8)] and len(given[0].wanted) == 5
    assert together[1] == apart[0]


def test_what_is_too_long_loses_its_beginning_and_what_cannot_fit_is_refused(subject: Subject):
    lm = harness.CheckpointLM(subject)
    tokens, wanted = lm._row(list(range(100, 200)), [1, 2, 3])
    assert tokens == (*range(138, 200), 1, 2) and wanted == [(61, 1), (62, 2), (63, 3)]
    assert lm._row([9], list(range(64)))[0] == (9, *range(63))
    with pytest.raises(ConfigError, match="continuation has 65 tokens, the model's context is 64"):
        lm._row([9], list(range(65)))


# ---- scoring ---------------------------------------------------------------------------------------------------------


def make_rows(count: int, seed: int = 0) -> list[Row]:
    draw = random.Random(seed)
    rows = []
    for length in [draw.randint(1, 200) for _ in range(count)]:
        tokens = tuple(draw.randrange(512) for _ in range(length))
        places = sorted(draw.sample(range(length), draw.randint(1, min(length, 70))))
        rows.append(Row(tokens, [(place, draw.randrange(512)) for place in places]))
    return rows


MESHES = [((1, 1, 1, 1, 1), 256), ((1, 1, 4, 1, 2), 2048), ((2, 1, 2, 1, 2), 100_000)]


@pytest.mark.parametrize(("sizes", "batch_tokens"), MESHES)
def test_scores_are_those_of_a_plain_forward_pass_on_any_mesh(tiny_config: Callable, sizes: tuple, batch_tokens: int):
    m = tiny_config().model
    params = {name: 8 * x if x.ndim > 1 else x for name, x in init_params(m, 0).items()}  # far from uniform
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes), MESH_AXES)
    table = parameter_table(m)
    placed = {name: jax.device_put(x, named(mesh, table[name].axes)) for name, x in params.items()}
    rows, done = make_rows(9), []
    with jax.set_mesh(mesh):
        scorer = Scorer(m, 10000.0, placed, mesh, np.float32, eos_id=2, batch_tokens=batch_tokens)
        found = scorer(rows, done.append)
    assert sum(done) == 9
    decoder = Decoder(m, params)
    for row, scores in zip(rows, found, strict=True):
        padded = np.zeros((1, 256), np.int32)
        padded[0, : len(row.tokens)] = row.tokens
        logprobs = np.asarray(jax.nn.log_softmax(decoder.logits(decoder(padded, 10000.0))))[0]
        places, targets = np.transpose(row.wanted)
        np.testing.assert_allclose(scores.logprobs, logprobs[places, targets], atol=2e-4)
        assert scores.is_greedy.tolist() == (logprobs[places].argmax(axis=1) == targets).tolist()


def test_batches_keep_to_the_budget_and_few_shapes_compile():
    rows = make_rows(300)
    batches = list(make_batches(rows, 4096, 4))
    assert sorted(i for b in batches for i in b.indices) == list(range(300))
    assert all(b.tokens_BT.size <= 4096 and len(b.tokens_BT) % 4 == 0 for b in batches)
    assert len({(b.tokens_BT.shape, b.positions_BC.shape) for b in batches}) <= 9
    for b in batches:
        for at, i in enumerate(b.indices):
            assert b.tokens_BT[at, : len(rows[i].tokens)].tolist() == list(rows[i].tokens)
            n = len(rows[i].wanted)
            assert list(zip(b.positions_BC[at, :n], b.targets_BC[at, :n], strict=True)) == rows[i].wanted


def test_logits_exist_for_a_block_of_positions_at_a_time(tiny_config: Callable, monkeypatch: pytest.MonkeyPatch):
    m = tiny_config().model
    monkeypatch.setattr(scoring, "LOGIT_POSITIONS", 64)
    shapes = [np.zeros((8, 256), np.int32), *np.zeros((2, 8, 64), np.int32)]
    run = partial(scoring._score, FrozenConfigDict(m), 1e4, np.dtype(np.float32), 2)
    text = str(jax.make_jaxpr(run)(init_params(m, 0), *shapes))
    assert "f32[8,8,512]" in text and "f32[8,64,512]" not in text and "f32[8,256,512]" not in text
    assert [x.shape for x in jax.eval_shape(run, init_params(m, 0), *shapes)] == [(8, 64), (8, 64)]


# ---- generation ------------------------------------------------------------------------------------------------------


def test_wishes_are_honoured_or_refused():
    def wish(**arguments: Any) -> harness.Wish:
        return harness.wish_of(arguments, "</s>")

    assert wish(until="\n") == harness.Wish(["\n", "</s>"], 256, Sampling())
    assert wish(until=["a", "b"], max_gen_toks=7, temperature=0.7, do_sample=False).sampling == Sampling()
    assert wish(max_gen_toks=7).new_tokens == wish(max_new_tokens=7).new_tokens == 7
    sampled = Sampling(temperature=0.5, top_k=4, top_p=0.9)
    assert wish(temperature=0.5, top_k=4, top_p=0.9, do_sample=True).sampling == sampled
    assert wish(temperature=0.5).sampling.temperature == 0.5
    for arguments, what in (({"num_beams": 4}, "num_beams"), ({"repetition_penalty": 1.1}, "repetition_penalty")):
        with pytest.raises(ConfigError, match=f"generates with {what}, which k2jax does not"):
            wish(**arguments)


class Request(NamedTuple):
    args: tuple


def test_samples_of_one_prompt_differ_and_come_again_with_the_same_seed(subject: Subject):
    request = Request(("abc", {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 8}))
    with jax.set_mesh(subject.mesh):
        lm = harness.CheckpointLM(subject)
        first, again = lm.generate_until([request] * 6), lm.generate_until([request] * 6)
    assert first == again and len(set(first)) > 3


def test_generation_ends_when_every_text_has_met_its_end(subject: Subject, monkeypatch: pytest.MonkeyPatch):
    lm, calls = harness.CheckpointLM(subject), []
    decode = generation.decode
    monkeypatch.setattr(generation, "decode", lambda *a: calls.append(1) or decode(*a))

    def texts(until: list[str]) -> list[str]:
        calls.clear()
        kwargs = {"until": until, "max_gen_toks": 40}
        return lm.generate_until([Request((text, kwargs)) for text in ("abc", "bcd e", "d")])

    with jax.set_mesh(subject.mesh):
        whole = texts([])
        assert len(calls) == 40 // generation.PIECE
        cut = texts(list("abcdefgh "))
    assert len(calls) == 1 and all(b.startswith(a) for a, b in zip(cut, whole, strict=True)) and cut != whole


def test_more_new_tokens_than_the_context_has_are_refused(subject: Subject):
    with pytest.raises(ConfigError, match="asks for 64 new tokens, the model's context is 64"):
        harness.CheckpointLM(subject).generate_until([Request(("a", {"until": [], "max_gen_toks": 64}))])


# ---- the command -----------------------------------------------------------------------------------------------------


def session(workdir: Path, task_dir: Path, *names: str, **changes: Any) -> Session:
    base = Wanted(workdir, "newest", names, str(task_dir), None, None, None, None, 8, False, 1024, 1234)
    lines: list[str] = []
    found = Session(base._replace(**changes), lines.append)
    found.lines = lines
    return found


def test_tasks_and_groups_are_stored_once(workdir: Path, task_dir: Path, tmp_path: Path):
    changed = Path(shutil.copytree(task_dir, tmp_path / "changed"))
    first = session(workdir, task_dir, "local_letters", "local_all", num_fewshot=2, limit=10)
    first.run()
    letters, group = first.results
    assert letters["version"] == 1.5 and letters["settings"]["num_fewshot"] == 2 and letters["settings"]["limit"] == 10
    assert letters["harness"]["version"] == tasks.VERSION and letters["harness"]["n-shot"] == {"local_letters": 2}
    assert 0 <= letters["metrics"]["acc,none"] <= 1 and letters["metrics"]["acc_stderr,none"] > 0
    assert group["metrics"]["acc,none"] == pytest.approx(
        np.mean([group["harness"]["results"][f"local_{n}"]["acc,none"] for n in ("choices", "letters")])
    )
    samples = (workdir / "evals/2" / letters["samples"]["file"]).read_text().splitlines()
    assert len(samples) == 10 and json.loads(samples[3])["arguments"][0][0].count("\n\n") == 2
    again = session(workdir, task_dir, "local_letters", "local_all", num_fewshot=2, limit=10)
    again.run()
    assert again.num_new == 0 and again.results == first.results
    # A prompt changed, the version not: another evaluation. The folder alone makes no difference.
    moved = session(workdir, changed, "local_letters", num_fewshot=2, limit=10)
    assert moved.evaluations[0].settings(open_step(workdir))["num_fewshot"] == 2
    (changed / "letters.yaml").write_text((changed / "letters.yaml").read_text().replace("{{question}}", "{{word}}"))
    other = session(workdir, changed, "local_letters", num_fewshot=2, limit=10)
    other.run()
    assert other.num_new == 1 and len({r["samples"]["sha256"] for r in (letters, *other.results)}) == 2


def test_an_imported_model_is_evaluated_as_the_one_that_it_came_from(
    workdir: Path, hf: Any, task_dir: Path, tmp_path: Path
):
    from k2jax.hf.importer import import_hf

    import_hf(Path(hf.pretrained), tmp_path / "imported", "imported", False)
    runs = [session(path, task_dir, "local_letters", "local_texts") for path in (workdir, tmp_path / "imported")]
    for run in runs:
        run.run()
    ours, imported = (run.results for run in runs)
    assert [r["step"] for r in ours + imported] == [2, 2, 0, 0]
    for a, b in zip(ours, imported, strict=True):
        numbers = [key for key, value in a["metrics"].items() if isinstance(value, float) and "stderr" not in key]
        assert numbers and all(a["metrics"][key] == pytest.approx(b["metrics"][key], rel=1e-4) for key in numbers)


def test_harness_tasks_need_no_torch(workdir: Path, task_dir: Path, monkeypatch: pytest.MonkeyPatch):
    class Refuse:
        def find_spec(self, name: str, *_: Any) -> None:
            assert name != "torch", "torch is imported"

    monkeypatch.delitem(sys.modules, "torch", raising=False)  # datasets asks whether it is there
    monkeypatch.setattr(sys, "meta_path", [Refuse(), *sys.meta_path])
    s = session(workdir, task_dir, "local_letters", "local_texts", limit=3)
    s.run()
    assert s.num_new == 2


def test_bad_names_and_missing_data_are_one_clear_line(workdir: Path, task_dir: Path, tmp_path: Path):
    for name, near in (("hellaswg", "hellaswag"), ("validaton", "validation")):
        with pytest.raises(ConfigError, match=f"no task '{name}' in lm_eval [0-9.]*; did you mean {near}"):
            tasks.open_manager(["hellaswag", name], None)
    with pytest.raises(ConfigError, match="no task 'local_al' in .* did you mean local_all"):
        tasks.check_names(["local_al"], tasks.TaskManager(include_path=str(task_dir), include_defaults=False), task_dir)
    with pytest.raises(ConfigError, match="--task-dir=.*nowhere: no such folder"):
        session(workdir, tmp_path / "nowhere", "local_all")
    text = (task_dir / "letters.yaml").read_text().replace("test.jsonl", "gone.jsonl").replace("local_", "lost_")
    (tmp_path / "lost.yaml").write_text(text)
    with pytest.raises(ConfigError, match="task lost_letters: cannot be loaded: FileNotFoundError") as error:
        session(workdir, tmp_path, "lost_letters").run()
    assert "\n" not in str(error.value)


# ---- K2's suite ------------------------------------------------------------------------------------------------------


def test_every_task_and_metric_of_the_suite_is_the_installed_harness_own():
    """By its task files, without data."""
    manager = tasks.open_manager([m.task for m in suites.SUITE], None)
    for name in manager.all_tasks:
        folder.check_group(manager.task_index, name)
    code = {m.name for m in suites.SUITE if tasks.HarnessTask(manager, m.task).unsafe}
    assert code == {m.name for m in suites.SUITE if m.name.startswith(("HumanEval", "MBPP"))}
    for m in suites.SUITE:
        metric, _, name = m.key.partition(",")
        own = manager.task_index[m.task].cfg
        leaves = tasks.task_configs(manager, m.task).values()
        assert len(leaves) == {"mmlu": 57, "bbh": 27}.get(m.task, 1), m.task
        for leaf in leaves:
            filters = [f["name"] for f in leaf.get("filter_list", [{"name": "none"}])]
            metrics = [str(entry["metric"]) for entry in leaf["metric_list"]]
            if m.pass_at is None:
                wanted = "pass_at_k" if metric == "pass@1" else metric  # one function, and k
                assert any(found.split(".")[-1] == wanted for found in metrics), (m, metrics)
                assert name in filters, (m, filters)
            assert m.num_fewshot == 0 or leaf.get("num_fewshot") != 0, f"{m}: the harness would give no examples"
        if own.get("group"):
            assert [entry["metric"] for entry in own["aggregate_metric_list"]] == [metric]


def local_suite(folder: Path, task_dir: Path) -> None:
    """Tasks of the suite's names and metrics on local data: all but the questions."""
    for m in suites.SUITE:
        metric, _, name = m.key.partition(",")
        text = COMMON.format(name="x", folder=task_dir).replace("local_x", m.task)
        if m.task in ("humaneval", "mbpp"):
            metric = "!function checks.pass_at_k" if m.task == "humaneval" else "!function checks.pass_at_1"
            text += TASKS["answers"].split("filter_list")[0] + "unsafe_code: true\n"
            if m.task == "humaneval":
                every = "[{function: custom, filter_fn: !function checks.all}]"
                text += f"filter_list: [{{name: create_test, filter: {every}}}]\n"
            text += f"metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]\n"
        elif metric == "exact_match":
            text += TASKS["answers"].replace("name: first", f"name: {name}")
        elif m.task == "crows_pairs_english":
            text += TASKS["letters"].split("metric_list")[0] + "process_results: !function checks.stereotype\n"
            text += "metric_list: [{metric: pct_stereotype, aggregation: mean, higher_is_better: false}]\n"
        else:
            text += TASKS["letters"]
        (folder / f"{m.task}.yaml").write_text(text)
    (folder / "checks.py").write_text(
        "def all(resps, docs):\n    return resps\n\n"
        "def pass_at_k(references, predictions):\n    return {'pass@1': 0.5}\n\n"
        "def pass_at_1(references, predictions):\n    return 0.25\n\n"
        "def stereotype(doc, results):\n    return {'pct_stereotype': float(results[0][0] > results[1][0])}\n"
    )


class FakeCodeEval:
    """In the place of Hugging Face's metric, which is downloaded and runs code."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def compute(self, references: list[str], predictions: list[list[str]], k: list[int]) -> tuple[dict, None]:
        [samples] = predictions
        self.asked.append((len(samples), len(set(samples))))
        return {f"pass@{k[0]}": 0.75}, None


def test_the_suite_runs_and_runs_code_only_when_told(
    workdir: Path, task_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    local_suite(tmp_path, task_dir)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    safe = session(workdir, tmp_path, "k2", limit=2)
    assert [s["task"] for s in safe.skipped] == ["HumanEval p@1", "HumanEval p@10", "MBPP p@1", "MBPP p@10"]
    assert "--allow-code-execution" in safe.skipped[0]["reason"]
    safe.run()
    table = {line.name: line for line in safe.tables[2]}
    assert len(table) == 23 and table["average of 18"].ours >= 0 and table["HumanEval p@1"].ours is None
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    fake = FakeCodeEval()
    monkeypatch.setattr(tasks, "_code_eval", lambda: fake)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")  # to be put back after the test
    told = session(workdir, tmp_path, "k2", limit=2, allow_code=True)
    told.run()
    assert told.num_new == 4 and not told.skipped
    table = {line.name: line.ours for line in told.tables[2]}
    assert [table[f"{n} p@{k}"] for n in ("HumanEval", "MBPP") for k in (1, 10)] == [50.0, 75.0, 25.0, 75.0]
    assert len(fake.asked) == 4 and all(count == 20 and kinds > 1 for count, kinds in fake.asked)
    assert [line for line in told.lines if line.startswith("MMLU")][0].split()[2:4] == ["62.6", "64.8"]
