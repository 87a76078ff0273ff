"""The configuration: every key with its unit and meaning, how a file and a command line change it, and its checks.

`base()` is the whole list of keys. An experiment file starts from it and overrides; the result is locked, so a key
that is not listed here is an error wherever it is written. `validate()` reports everything that is wrong at once,
before any device is touched; after it no other code checks configuration.
"""

import ast
import difflib
import importlib.util
import re
import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from k2jax import paths
from k2jax.errors import ConfigError

# Arrays of a layer that `model.remat` may keep; "attention" is its output, "middle" the stream between its two halves.
REMAT_NAMES = ("q", "k", "v", "attention", "middle", "gate", "up")
PATHS = {"root": True, "tokenizer": False}  # keys of `data` that are paths, and whether they may be URLs
ON_HOST = "@host"  # after a name, as in q+k+up@host: that one is kept in the host's memory


# fmt: off
def base() -> ConfigDict:
    """Every key with its default. Experiment files only override these."""
    c = ConfigDict()
    c.name = "base"                       # of the experiment, for logs
    c.seed = 22238                        # of the parameters and of the data order (K2's own)
    c.allow_drift = ()                    # keys that may differ from the run in the workdir, e.g. ("stages",)

    c.model = ConfigDict()
    c.model.vocab_size = 32032            # V: rows of the embedding and of the head
    c.model.dim = 8192                    # D: width of the residual stream
    c.model.num_layers = 80               # L
    c.model.num_heads = 64                # N: query heads
    c.model.num_kv_heads = 64             # K: key and value heads; fewer than N is grouped-query attention
    c.model.head_dim = 128                # H
    c.model.ffn_dim = 22016               # F: hidden width of the SwiGLU
    c.model.norm_eps = 1e-5               # of RMSNorm
    c.model.init_std = 0.02               # of every matrix; residual outputs are scaled down (decoder.py, INIT)
    c.model.tie_embeddings = False        # True: the head is the embedding transposed
    c.model.mask_documents = False        # True: attention and loss stop at document ends (K2: packed, unmasked)
    c.model.remat = "none"                # kept for backward: "none" all, "full" layer inputs, or "dots", q+k+up@host
    c.model.rings = ()                    # sizes that gathers over mesh.fsdp go by, such as (8, 8, 8) on v5p:8x8x8
    c.model.unroll = 1                    # layers in one turn of the scan over layers: more compile slower, run faster
    c.model.attention = ConfigDict()
    c.model.attention.implementation = "auto" # "jnp", "flash" (TPU, GPU), "cudnn" (GPU), "mosaic" (H100): attention.py
    c.model.pipeline = ConfigDict()       # where mesh.stage > 1
    c.model.pipeline.microbatches = 8     # that each of gradient accumulation's is cut into; a multiple of mesh.stage
    c.model.pipeline.repeats = 1          # times that each passes all stages: the bubble shrinks, more is sent
    c.model.rope_scaling = ConfigDict()   # LLaMA-3 style; factor 1.0 is off
    c.model.rope_scaling.factor = 1.0     # by how much low frequencies are slowed
    c.model.rope_scaling.low_freq_factor = 1.0 # wavelengths above original_context / this are scaled in full
    c.model.rope_scaling.high_freq_factor = 4.0 # wavelengths below original_context / this are left alone
    c.model.rope_scaling.original_context = 8192 # tokens: the length that the model was trained at before

    c.precision = ConfigDict()
    c.precision.compute = "auto"          # of matrix products: "bfloat16", "float32"; "auto": float32 on CPU only
    c.precision.logits = "float32"        # of the head's product, of its result: the loss is float32

    c.loss = ConfigDict()
    c.loss.block = 256                    # positions of a row whose logits a device holds at a time
    c.loss.z_loss = 0.0                   # times log(softmax's denominator)^2, added to a target's loss; PaLM: 1e-4

    c.stages = ()                         # the run, a row a stage: see `stage()`

    c.optimizer = ConfigDict()            # AdamW; fp32 master parameters and moments
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.1        # on matrices and embeddings, not on norms
    c.optimizer.clip_norm = 1.0           # global gradient norm
    c.optimizer.max_skips_in_a_row = 3    # non-finite steps that stop the run (exit code 65)

    c.compiler = ConfigDict()             # XLA's options, as ("xla_tpu_enable_async_collective_fusion=true",)
    c.compiler.tpu = ()                   # on TPUs; an option that the installed compiler does not know is an error
    c.compiler.gpu = ()                   # on GPUs

    c.mesh = ConfigDict()                 # product = number of devices; -1 (one axis only) takes what is left
    c.mesh.replica = 1                    # data parallel across slices (DCN); parameters are copied
    c.mesh.stage = 1                      # pipeline: layers split
    c.mesh.fsdp = -1                      # data parallel with sharded parameters
    c.mesh.context = 1                    # positions of a row split: ring attention
    c.mesh.tensor = 1                     # heads, ffn and vocabulary split

    c.data = ConfigDict()
    c.data.root = "data/k2"               # folder or gs:// s3:// URL: a store for each subset, by name
    c.data.tokenizer = "data/k2/tokenizer.json" # its SHA-256 must be the stores'
    c.data.eos = ""                       # of its control tokens, the one that ends documents; "": the stores'
    c.data.label_shift = "next"           # "next": windows of T+1 tokens; "inside": K2's own, one target a row lost
    c.data.verify = "sizes"               # at start: "sizes" of the stores' files, or "sha256" of their bytes
    c.data.threads = 2                    # that read ahead in each process
    c.data.workers = 0                    # worker processes that read ahead; never change what is read
    c.data.prefetch = 4                   # batches read ahead

    c.checkpoint = ConfigDict()           # one a chunk always, kept for ever
    c.checkpoint.every_steps = 0          # more of them, every so many steps; 0: none
    c.checkpoint.keep_between = 2         # how many of those are kept
    c.checkpoint.max_launches = 20        # without a new checkpoint, one after the other; 0: no limit
    c.checkpoint.moments_every = 1        # Adam's moments: kept of every so many chunks, and of the newest two

    c.watchdog = ConfigDict()             # seconds that a process may be at one thing, else it ends with 70; 0: any
    c.watchdog.start = 14400              # data and run are opened, and hashed where data.verify says so
    c.watchdog.restore = 7200             # of a checkpoint
    c.watchdog.data = 1800                # the next batch, and once a stage its compiled step
    c.watchdog.step = 1800                # until the step before it is done
    c.watchdog.save = 7200                # until a save has begun, and with it the one before ended
    c.watchdog.evaluate = 14400           # what ends a run

    c.eval = ConfigDict()                 # on held-out windows, after the last step
    c.eval.windows = 64                   # windows per subset at most
    c.eval.prompts = ()                   # texts to go on from, printed at the end
    c.eval.new_tokens = 48                # sampled after each prompt

    c.log = ConfigDict()
    c.log.tensorboard = True              # event files in workdir/tensorboard
    c.log.wandb_project = ""              # Weights & Biases project; "" is off. The key is read from the environment
    c.log.every_steps = 10                # steps between printed lines
    return c.lock()
# fmt: on


# fmt: off
def stage(**overrides: Any) -> ConfigDict:
    """One row of the stage table; every key with its default."""
    s = ConfigDict()
    s.name = "stage1"
    s.sequence_length = 2048              # T: tokens a row
    s.rows_per_step = 2040                # global batch, rows
    s.microbatches = 1                    # gradient accumulation: the batch is cut into this many
    s.steps_per_chunk = 941               # one chunk of data = one checkpoint = this many steps
    s.chunks = 360                        # in the stage
    s.rope_base = 10000.0
    s.lr_peak = 1.5e-4
    s.lr_final = 1.5e-5                   # reached at the stage's last step, along a cosine
    s.warmup_steps = 2000                 # linear from `lr_start`
    s.lr_start = 0.0
    s.mix = ConfigDict()                  # {subset: repeats}: weight of each of its windows; epochs result
    s.lock()
    for key, value in overrides.items():
        if key not in s:
            raise ConfigError(f"stage(): unknown key {key!r}{_closest(key, s.keys())}")
        if key == "mix":
            s.mix = ConfigDict({name: float(repeats) for name, repeats in value.items()})
        else:
            s[key] = value
    return s.lock()
# fmt: on


# Of every number but the mesh's sizes, in mathematics' notation: "[0, 1)" holds 0, and 1 not. None holds NaN.
RANGES = {
    "[1, inf)": """model.vocab_size model.dim model.num_layers model.num_heads model.num_kv_heads model.head_dim
        model.ffn_dim model.unroll model.pipeline.microbatches model.pipeline.repeats model.rope_scaling.factor
        loss.block optimizer.max_skips_in_a_row data.threads data.prefetch eval.windows eval.new_tokens log.every_steps
        stages.*.sequence_length stages.*.rows_per_step stages.*.microbatches stages.*.steps_per_chunk
        stages.*.chunks checkpoint.moments_every""",
    "[0, inf)": """loss.z_loss optimizer.weight_decay data.workers checkpoint.every_steps checkpoint.keep_between
        checkpoint.max_launches watchdog.start watchdog.restore watchdog.data watchdog.step watchdog.save
        watchdog.evaluate stages.*.lr_peak stages.*.lr_final stages.*.lr_start stages.*.warmup_steps""",
    # A clip_norm of 0, which elsewhere is "off", would multiply gradients by it: 1e9 clips nothing.
    "(0, inf)": """optimizer.clip_norm optimizer.eps model.norm_eps model.init_std model.rope_scaling.low_freq_factor
        model.rope_scaling.high_freq_factor model.rope_scaling.original_context stages.*.mix.*""",
    "(1, inf)": "stages.*.rope_base",
    "[0, 1)": "optimizer.b1 optimizer.b2",
    "[0, 4294967296)": "seed",
}
_RANGE_OF = {key: interval for interval, keys in RANGES.items() for key in keys.split()}


# Keys, or all keys below one, that a resumed run may change freely: they change where and how fast it runs, never what
# it computes (beyond the order of floating-point sums). All else is drift. data.eos must be the stores' in any case.
FREE_KEYS = tuple(
    """mesh log watchdog checkpoint eval allow_drift data.root data.tokenizer data.eos data.verify data.threads
    data.workers data.prefetch compiler model.remat model.rings model.unroll model.attention model.pipeline loss.block
    stages.*.microbatches""".split()
)


def range_of(key: str) -> str | None:
    """That of RANGES, of "stages.0.chunks" as of "stages.*.chunks"; None for what is no number, and for mesh sizes."""
    return _RANGE_OF.get(re.sub(r"(?<=\.mix\.).*|(?<=^stages\.)\d+", "*", key))


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
    except (AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        first_line = str(error.args[0] if error.args else error).strip().splitlines()[0]
        raise ConfigError(
            f"--config={path}: {type(error).__name__}: {first_line}{_guess(first_line)}"
        ) from error
    for text in overrides:
        _override(config, text)
    validate(config)
    for key, urls in PATHS.items():
        config.data[key] = str(paths.parse(config.data[key], f"data.{key}", urls=urls))
    return config.lock()


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
    looped = m.unroll == 1 or ON_HOST not in m.remat  # libtpu 0.0.42 compiles no other
    need(looped, "model.unroll", m.unroll, f"must be 1 where model.remat={m.remat} keeps arrays by the host")
    need(all(size > 0 for size in m.rings), "model.rings", m.rings, "sizes must be positive")
    for key, urls in PATHS.items():
        try:
            paths.parse(config.data[key], f"data.{key}", urls=urls)
        except ConfigError as error:
            problems.append(str(error))
    for key in ("compute", "logits"):
        choices = ("bfloat16", "float32") + (("auto",) if key == "compute" else ())
        found = config.precision[key]
        need(found in choices, f"precision.{key}", found, f"must be one of {choices}")
    found = config.data.label_shift
    need(found in ("next", "inside"), "data.label_shift", found, "must be next or inside")
    found = config.data.verify
    need(found in ("sizes", "sha256"), "data.verify", found, "must be sizes or sha256")
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
    for key, options in config.compiler.items():
        need(all("=" in o for o in options), f"compiler.{key}", options, "each must be written OPTION=VALUE")
    names = [row.name for row in config.stages]
    need(len(set(names)) == len(names), "stages", names, "each stage needs a name of its own")
    for i, row in enumerate(config.stages):
        _validate_stage(need, f"stages.{i}.", row)
    if problems:
        raise ConfigError(f"{len(problems)} problem(s) in the configuration: " + "; ".join(problems))


def _validate_stage(need: Any, prefix: str, row: ConfigDict) -> None:
    need(
        row.microbatches > 0 and row.rows_per_step % row.microbatches == 0,
        prefix + "microbatches",
        row.microbatches,
        f"must divide rows_per_step={row.rows_per_step}",
    )
    within = 0 <= row.lr_final <= row.lr_peak
    need(within, prefix + "lr_final", row.lr_final, f"must lie in [0, lr_peak={row.lr_peak}]")
    need(
        0 <= row.warmup_steps <= row.steps_per_chunk * row.chunks,
        prefix + "warmup_steps",
        row.warmup_steps,
        f"must lie within the stage's {row.steps_per_chunk * row.chunks} steps",
    )
    need(len(row.mix) > 0, prefix + "mix", {}, "names no subset: set {subset: repeats}")
    for name in row.mix:
        plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name) is not None
        need(
            plain,
            prefix + "mix",
            name,
            "a subset's name has only letters, digits, - and _: it is a folder's name",
        )


def _override(config: ConfigDict, text: str) -> None:
    """Applies one `KEY=VALUE` (without the leading `--config.`)."""
    key, found, value = text.partition("=")
    known = flatten(to_dict(config))
    if not found:
        raise ConfigError(f"--config.{text}: write --config.{key}=VALUE")
    if key not in known:
        raise ConfigError(f"--config.{key}: unknown key{_closest(key, known)}")
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


def _closest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _guess(message: str) -> str:
    """For an error out of an experiment file: the known key nearest to the first name that it quotes."""
    quoted = re.search(r"'([^']*)'", message) or re.search(r'"([^"]*)"', message)
    if not quoted or not quoted[1] or "mean" in message:
        return ""
    return _closest(quoted[1], {part for key in flatten(to_dict(base())) for part in key.split(".")})
