"""The configuration: how a file and a command line change it, and its checks. Every key: keys.py.

An experiment file starts from `base()` and overrides; the result is locked. `validate()` reports everything that is
wrong at once, before any device is touched; after it no other code checks configuration.
"""

import ast
import importlib.util
import re
import runpy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from k2jax import paths
from k2jax.errors import ConfigError, RunError, in_file
from k2jax.keys import (
    FREE_KEYS,
    GROUPS,
    KINDS,
    ON_HOST,
    OPTIMIZERS,
    PACKED_KINDS,
    PATHS,
    PRODUCTS,
    RANGES,
    REMAT_NAMES,
    SCHEDULES,
    TOO_LONG,
    base,
    closest,
    range_of,
    stage,
)
from k2jax.mixes import mix_of

__all__ = [
    "FREE_KEYS",
    "RANGES",
    "base",
    "described_rate",
    "from_dict",
    "group_factors",
    "load",
    "mix_of",
    "range_of",
    "settled",
    "stage",
    "to_dict",
    "validate",
]


def _inside(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    return (low <= value if interval[0] == "[" else low < value) and value < high  # no range holds its upper end


def load(path: str | Path, overrides: Iterable[str] = ()) -> ConfigDict:
    """The experiment file's `get_config()` with `--config.KEY=VALUE` overrides applied, checked and locked.

    An experiment file is code: loading one runs it.
    """
    if not Path(path).is_file():
        near = sorted(p.name for p in Path(path).parent.glob("*.py")) if Path(path).parent.is_dir() else []
        hint = f"; that folder has {', '.join(near)}" if near else ""
        raise ConfigError(f"--config={path}: no such experiment file{hint}")
    try:
        names = runpy.run_path(str(path))
        if "get_config" not in names:
            raise ConfigError(f"--config={path} does not define get_config(); see experiments/smoke.py")
        config = names["get_config"]()
    except RunError:
        raise
    except Exception as error:  # it is a user's code, which may raise anything
        said = in_file(path, error)
        raise ConfigError(f"--config={path}: {said}{_guess(said)}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={path}: get_config() returned {type(config).__name__}, not what base() made")
    for text in overrides:
        _override(config, text)
    validate(config)
    for key, urls in PATHS.items():
        config.data[key] = str(paths.parse(config.data[key], f"data.{key}", urls=urls))
    return config.lock()


def settled(config: ConfigDict, platform: str) -> ConfigDict:
    """A locked copy where `precision.compute` names a type: what "auto" is on `platform`, JAX's name of the backend.

    It is what a run records, so that it goes on in that type wherever it is resumed, replayed or evaluated.
    """
    config = config.copy_and_resolve_references()
    if config.precision.compute == "auto":
        with config.unlocked():
            config.precision.compute = "float32" if platform == "cpu" else "bfloat16"
    return config.lock()


def described_rate(row: Mapping[str, Any]) -> str:
    """A stage's learning rate for a reader, such as "0.00015 to 1.5e-05, cosine"; `row` may be an older version's."""
    name = row.get("schedule", "cosine")
    return f"{row['lr_peak']:g}, {name}" if name == "constant" else f"{row['lr_peak']:g} to {row['lr_final']:g}, {name}"


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Plain JSON types, tuples as lists: what an epoch and a checkpoint hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, ConfigDict):
            return {key: plain(value[key]) for key in sorted(value)}
        return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value

    return plain(config)


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """The inverse of `to_dict`, for readers of a run directory: data only, no code is run."""
    config = base()

    def fill(target: ConfigDict, source: dict[str, Any], prefix: str) -> None:
        for key, value in source.items():
            if key not in target:
                raise ConfigError(f"saved configuration: unknown key {prefix}{key}: of another version of k2jax")
            if isinstance(target[key], ConfigDict) and prefix + key != "mix":
                fill(target[key], value, f"{prefix}{key}.")
            elif key != "stages":
                target[key] = tuple(value) if isinstance(value, list) else value

    fill(config, values, "")
    config.stages = tuple(stage(**row) for row in values["stages"])
    return config.lock()


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.dim": 8192, "stages.0.name": ...} from nested dictionaries and lists of them."""
    if isinstance(values, (dict, ConfigDict)):
        items = [(str(key), values[key]) for key in values]
    elif isinstance(values, (list, tuple)) and values and isinstance(values[0], (dict, ConfigDict)):
        items = [(str(i), value) for i, value in enumerate(values)]
    else:
        return {prefix: list(values) if isinstance(values, tuple) else values}
    return {k: v for key, value in items for k, v in flatten(value, f"{prefix}.{key}" if prefix else key).items()}


def validate(config: ConfigDict) -> None:
    """Raises ConfigError listing every problem: the key, the value found, what to do."""
    m, problems = config.model, []

    def need(ok: bool, key: str, value: Any, what: str) -> None:
        if not ok:
            problems.append(f"{key}={value!r}: {what}")

    for key, value in flatten(to_dict(config)).items():
        interval = range_of(key)
        need(interval is None or _inside(value, interval), key, value, f"must lie in {interval}")
    _validate_model(need, m)
    for key, urls in PATHS.items():
        try:
            paths.parse(config.data[key], f"data.{key}", urls=urls)
        except ConfigError as error:
            problems.append(str(error))
    floats = ("bfloat16", "float32")
    for key, choices in {"compute": (*floats, "auto"), "logits": floats, "products": PRODUCTS}.items():
        found = config.precision[key]
        need(found in choices, f"precision.{key}", found, f"must be one of {choices}")
    found = config.stability.rollback.how
    need(found in ("defer", "skip"), "stability.rollback.how", found, "must be defer or skip")
    found = config.data.label_shift
    need(found in ("next", "inside"), "data.label_shift", found, "must be next or inside")
    found = config.data.verify
    need(found in ("sizes", "sha256"), "data.verify", found, "must be sizes or sha256")
    _validate_optimizer(need, config)
    axes = [config.mesh[axis] for axis in config.mesh]
    need(
        all(size == -1 or size > 0 for size in axes) and axes.count(-1) <= 1,
        "mesh",
        dict(config.mesh),
        "axis sizes must be positive, at most one may be -1",
    )
    need(len(config.stages) > 0, "stages", (), "the experiment needs at least one row; see config.stage()")
    project = config.log.wandb_project
    has_wandb = not project or importlib.util.find_spec("wandb") is not None
    need(has_wandb, "log.wandb_project", project, "wandb is not installed: pip install 'k2jax[wandb]'")
    for key in ("tpu", "gpu"):
        options = config.compiler[key]
        need(all("=" in o for o in options), f"compiler.{key}", options, "each must be written OPTION=VALUE")
    names = [row.name for row in config.stages]
    need(len(set(names)) == len(names), "stages", names, "each stage needs a name of its own")
    for name in config.allow_drift:
        near = closest(name, flatten(to_dict(config)))
        need(_names_key(name), "allow_drift", name, f"is no key, nor one above keys{near}")
    for i, row in enumerate(config.stages):
        _validate_stage(need, f"stages.{i}.", row, m.sliding_window)
        _validate_packed(need, f"stages.{i}.", row, config)
    if problems:
        raise ConfigError(f"{len(problems)} problem(s) in the configuration: " + "; ".join(problems))


def _names_key(name: str) -> bool:
    """Of an entry of `allow_drift`: whether it is a key that can differ, or above some; a run's, or of its manifest."""
    known = [*flatten(to_dict(base())), *(f"stages.*.{key}" for key in flatten(to_dict(stage()))), "stages.*.mix.*"]
    known += [f"manifest.{key}" for key in ("stores.*", "format", "tokenizer_sha256", "vocab_size", "eos_id")]
    wanted = name.split(".")
    starts = [key.split(".")[: len(wanted)] for key in known if key.count(".") + 1 >= len(wanted)]
    return any(all(w == k or "*" in (w, k) for w, k in zip(wanted, start, strict=True)) for start in starts)


def _validate_model(need: Any, m: ConfigDict) -> None:
    divides = m.num_kv_heads > 0 and m.num_heads % m.num_kv_heads == 0
    need(divides, "model.num_kv_heads", m.num_kv_heads, f"must divide model.num_heads={m.num_heads}")
    need(m.head_dim % 2 == 0, "model.head_dim", m.head_dim, "must be even: RoPE turns pairs")
    choices = ("auto", "jnp", "flash", "cudnn", "mosaic")
    found = m.attention.implementation
    need(found in choices, "model.attention.implementation", found, f"must be one of {choices}")
    names = [name.removesuffix(ON_HOST) for name in m.remat.split("+")]
    known = m.remat in ("none", "dots", "full") or len(set(names) & set(REMAT_NAMES)) == len(names)
    what = f"must be none, dots, full, or names joined by +, each once, {ON_HOST} after any: {', '.join(REMAT_NAMES)}"
    need(known, "model.remat", m.remat, what)
    looped = m.unroll <= 1 or ON_HOST not in m.remat  # libtpu 0.0.42 compiles no other
    need(looped, "model.unroll", m.unroll, f"must be 1 where model.remat={m.remat} keeps arrays by the host")
    need(all(size > 0 for size in m.rings), "model.rings", m.rings, "sizes must be positive")
    apart = not (m.width_base and m.tie_embeddings)  # the head's size and rate are not the embedding's
    need(apart, "model.width_base", m.width_base, "must be 0 (off) where model.tie_embeddings is on")
    need(m.qk_norm or not m.qk_norm_whole, "model.qk_norm_whole", True, "needs model.qk_norm, which is off")


def group_factors(texts: Iterable[str]) -> dict[tuple[str, str], float]:
    """Of `optimizer.groups`: {("embed", "lr"): 0.5} of ("embed.lr=0.5",)."""
    pairs = (text.split("=") for text in texts)
    return {tuple(key.split(".")): float(value) for key, value in pairs}


def _validate_groups(need: Any, config: ConfigDict) -> None:
    absent = {"biases": not config.model.qkv_bias, "head": config.model.tie_embeddings}
    known = [name for name in GROUPS if name not in absent or not absent[name]]
    form = re.compile(rf"({'|'.join(known)})\.(lr|decay)=(\d+(\.\d*)?|\.\d+)(e-?\d+)?")
    keys = [text.partition("=")[0] for text in config.optimizer.groups]
    for text in config.optimizer.groups:
        what = f"must be written GROUP.lr=FACTOR or GROUP.decay=FACTOR, GROUP one of {', '.join(known)}"
        need(form.fullmatch(text), "optimizer.groups", text, what)
        need(keys.count(text.partition("=")[0]) == 1, "optimizer.groups", text, "each may be there once")


def _validate_optimizer(need: Any, config: ConfigDict) -> None:
    _validate_groups(need, config)
    found = config.optimizer.name
    need(found in OPTIMIZERS, "optimizer.name", found, f"must be one of {', '.join(OPTIMIZERS)}")
    found, second = config.optimizer.update_clip, config.optimizer.name == "adamw"
    need(not found or second, "optimizer.update_clip", found, "must be 0 (off) but for adamw: it takes all of nu")
    found = config.data.mask_repeats  # 2 would mask every row that has a token twice in a row
    need(found == 0 or found >= 3, "data.mask_repeats", found, "must be 0 (off), or 3 and more")
    normed = config.model.qk_norm and config.optimizer.qk_clip  # what wq is multiplied by would be divided out again
    need(not normed, "optimizer.qk_clip", config.optimizer.qk_clip, "must be 0 (off) where model.qk_norm is on")
    found = config.optimizer.adagc.ratio  # below 1, limits would shrink without end
    need(found == 0 or found >= 1, "optimizer.adagc.ratio", found, "must be 0 (off), or 1 and more")


def _validate_stage(need: Any, prefix: str, row: ConfigDict, window: int) -> None:
    need(
        not window or row.sequence_length <= window,
        prefix + "sequence_length",
        row.sequence_length,
        f"must be at most model.sliding_window={window}: attention within a window is not computed",
    )
    need(
        row.microbatches > 0 and row.rows_per_step % row.microbatches == 0,
        prefix + "microbatches",
        row.microbatches,
        f"must divide rows_per_step={row.rows_per_step}",
    )
    within = 0 <= row.lr_final <= row.lr_peak
    need(within, prefix + "lr_final", row.lr_final, f"must lie in [0, lr_peak={row.lr_peak}]")
    need(row.schedule in SCHEDULES, prefix + "schedule", row.schedule, f"must be one of {', '.join(SCHEDULES)}")
    need(
        0 <= row.warmup_steps <= row.steps_per_chunk * row.chunks,
        prefix + "warmup_steps",
        row.warmup_steps,
        f"must lie within the stage's {row.steps_per_chunk * row.chunks} steps",
    )
    need(len(row.mix) > 0, prefix + "mix", {}, "names no subset: set {subset: repeats}")
    for name in row.mix:
        plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name) is not None
        what = "a subset's name has only letters, digits, - and _: it is a folder's name"
        need(plain, prefix + "mix", name, what)


def _validate_packed(need: Any, prefix: str, row: ConfigDict, config: ConfigDict) -> None:
    attention = config.model.attention.implementation
    need(row.kind in KINDS, prefix + "kind", row.kind, f"must be one of {', '.join(KINDS)}")
    need(row.too_long in TOO_LONG, prefix + "too_long", row.too_long, f"must be one of {', '.join(TOO_LONG)}")
    usual = {"too_long": "refuse", "reset_positions": False, "beta": 0.1}
    if row.kind in PACKED_KINDS:
        what = f"is 'cudnn', which masks no documents, and rows of kind {row.kind!r} hold several: take 'auto'"
        need(attention != "cudnn", prefix + "kind", row.kind, f"model.attention.implementation {what}")
        del usual["too_long"], usual["reset_positions"]
    if row.kind == "dpo":
        plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", row.name) is not None
        need(plain, prefix + "name", row.name, "names a file of a dpo stage: take letters, digits, - and _")
        need(row.too_long != "cut", prefix + "too_long", row.too_long, "would leave half a pair: take 'drop'")
        for key, value in {"loss.z_loss": config.loss.z_loss, "data.mask_repeats": config.data.mask_repeats}.items():
            need(not value, prefix + "kind", row.kind, f"{key} is {value}, which is of every token's loss: set it to 0")
        del usual["beta"]
    for key, value in usual.items():
        of = "'dpo'" if key == "beta" else "'sft' and 'dpo'"
        need(row[key] == value, prefix + key, row[key], f"is for stages of kind {of}: leave it {value!r}")


def _override(config: ConfigDict, text: str) -> None:
    """Applies one `KEY=VALUE` (without the leading `--config.`)."""
    key, found, value = text.partition("=")
    known = flatten(to_dict(config))
    if not found:
        raise ConfigError(f"--config.{text}: write --config.{key}=VALUE")
    if key not in known:
        raise ConfigError(f"--config.{key}: unknown key{closest(key, known)}")
    *parents, last = key.split(".")
    target: Any = config
    for part in parents:
        target = target[int(part)] if isinstance(target, tuple) else target[part]
    target[last] = _parse(key, value, target[last])


def _parse(key: str, text: str, old: Any) -> Any:
    """`text` as the type of the value that it replaces."""
    if isinstance(old, str):
        return text
    try:
        value = {"true": True, "false": False}.get(text.lower(), None)
        value = ast.literal_eval(text) if value is None else value
    except (ValueError, SyntaxError):
        value = text
    if isinstance(old, tuple) and not isinstance(value, tuple):
        value = tuple(value) if isinstance(value, list) else (value,)
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(old):
        raise ConfigError(f"--config.{key}={text}: expected {type(old).__name__}, such as {old!r}")
    return value


def _guess(message: str) -> str:
    """For an error out of an experiment file: the known key nearest to the one that there is not."""
    quoted = re.search(r"""(?:Attribute|Key)Error: (?:Key )?['"]([^'"]+)['"](?! object)""", message)
    if not quoted or "mean" in message:
        return ""
    return closest(quoted[1], {part for key in flatten(to_dict(base())) for part in key.split(".")})
