"""Every key of the configuration: default, unit, meaning and range, and whether a resumed run may change it.

`base()` is the whole list; an experiment starts from it (config.py). A key that is not listed here is an error wherever
it is written.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from k2jax.errors import ConfigError

# Arrays of a layer that `model.remat` may keep; "attention" is its output, "middle" the stream between its two halves.
ATTENTION_SUMS = "attention_sums"  # of its softmax: kept with it
REMAT_NAMES = ("q", "k", "v", "attention", "middle", "gate", "up")
PACKED_KINDS = "sft", "dpo"  # of stages whose rows hold whole documents
KINDS = ("pretrain", *PACKED_KINDS)  # of stages
TOO_LONG = ("refuse", "drop", "cut")  # what an sft stage does of conversations that are longer than its rows
SCHEDULES = ("cosine", "linear", "constant", "wsd", "wsd_sqrt")  # training/optimizer.py has what they are
OPTIMIZERS = ("adamw", "muon", "lion", "adafactor")  # there, too
GROUPS = ("embed", "norms", "q", "k", "v", "biases", "o", "gate", "up", "down", "head")  # of parameters: decoder.py
PRODUCTS = ("compute", "float8", "int8")  # that precision.products may be
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
    c.model.width_base = 0                # muP: `dim` of the model whose init_std and rates these are; 0: off
    c.model.tie_embeddings = False        # True: the head is the embedding transposed
    c.model.qkv_bias = False              # True: q, k and v have biases, as in Qwen2
    c.model.qk_norm = False               # True: q and k are RMS-normed before RoPE, each head by itself, as in Qwen3
    c.model.qk_norm_whole = False         # True: all heads of a position together instead, as in OLMo-2
    c.model.reordered_norm = False        # True: x + norm(f(x)), as in OLMo-2; False: x + f(norm(x))
    c.model.sliding_window = 0            # positions that its maker let each see: no row may be longer; 0: all of them
    c.model.mask_documents = False        # True: attention and loss stop at document ends (K2: packed, unmasked)
    c.model.remat = "none"                # kept for backward: "none" all, "full" layer inputs, or "dots", q+k+up@host
    c.model.rings = ()                    # sizes that gathers over mesh.fsdp go by, such as (8, 8, 8) on v5p:8x8x8
    c.model.unroll = 0                    # layers in a turn of the scan over them; 0: all on GPUs (no scan), else 1
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
    c.precision.products = "compute"      # of layers: as compute says; inputs in 8 bits: "float8", "int8" (products.py)
    c.precision.logits = "float32"        # of the head's product, of its result: the loss is float32

    c.loss = ConfigDict()
    c.loss.block = 256                    # positions of a row whose logits a device holds at a time
    c.loss.z_loss = 0.0                   # times log(softmax's denominator)^2, added to a target's loss; PaLM: 1e-4

    c.stages = ()                         # the run, a row a stage: see `stage()`

    c.optimizer = ConfigDict()            # fp32 master parameters and moments
    c.optimizer.name = "adamw"            # or "muon" (AdamW for all but layers' matrices), "lion", "adafactor"
    c.optimizer.momentum = 0.95           # of Muon's one moment
    c.optimizer.b1 = 0.9                  # AdamW's and Lion's, as b2
    c.optimizer.b2 = 0.95
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.1        # on matrices and embeddings, not on norms and biases
    c.optimizer.decay_embeddings = True   # False: weight_decay spares the embedding (which may be the head, too)
    c.optimizer.groups = ()               # factors of the rate, and of weight_decay: ("embed.lr=0.5", "head.decay=0")
    c.optimizer.ema_decay = 0.0           # of a moving average of the weights, such as 0.9999; 0: none
    c.optimizer.clip_norm = 1.0           # global gradient norm
    c.optimizer.adagc = ConfigDict()      # AdaGC: each tensor's gradient clipped by its own history (remedies.py)
    c.optimizer.adagc.ratio = 0.0         # to so many times its mean norm; AdaGC: 1.05; 0: off
    c.optimizer.adagc.beta = 0.98         # of the moving mean
    c.optimizer.adagc.warmup_updates = 100 # first, in which clip_norm clips, and after them no more
    c.optimizer.update_clip = 0.0         # largest RMS of g / sqrt(v) in a tensor, else smaller steps; 1.0; 0: off
    c.optimizer.qk_clip = 0.0             # largest attention logit of a head, else its wq and wk shrink; 100.0; 0: off
    c.optimizer.max_skips_in_a_row = 3    # non-finite steps that are a spike: see stability

    c.stability = ConfigDict()            # outliers, spikes and what is done about them: stability/detect.py
    c.stability.window = 128              # accepted steps from whose median the limits are computed
    c.stability.deviations = 6.0          # above the median, in standard deviations as the MAD gives them
    c.stability.loss_floor = 0.05         # but no lower than this share of the median above it
    c.stability.grad_norm_floor = 2.0     # the same of the gradient norm, which small batches spread by more than twice
    c.stability.skip = True               # a step above a limit makes no update; False: it is only noted
    c.stability.max_skips = 8             # steps without an update in a window that make it a spike
    c.stability.persistence = 100         # steps in a row above a limit that do
    c.stability.drift = 0.02              # of the loss: median of 50 over that of 200 or 2,000, as a share, that does
    c.stability.attention_every = 100     # steps between measurements of attention's largest logits; 0: none
    c.stability.rerun_every = 0           # steps of which one is computed again, and devices are tested; 0: none
    c.stability.rollback = ConfigDict()   # of a spike, by the run itself: stability/ladder.py
    c.stability.rollback.most = 3         # one after the other, each wider, until it stops with 65; 0: at once
    c.stability.rollback.how = "defer"    # the steps around the spike go to the stage's end, or "skip"
    c.stability.rollback.before = 50      # steps before the first above a limit that do
    c.stability.rollback.after = 50       # and after it
    c.stability.rollback.replay = 50      # a spike at most so many steps after that checkpoint is run again: doctor.py
    c.stability.rollback.watch = 200      # steps after the spike's place without another one: it has helped

    c.compiler = ConfigDict()
    c.compiler.defaults = True            # XLA's options for this kind of device, as xla_options.py lists them
    c.compiler.tpu = ()                   # after them, on TPUs, as ("xla_tpu_enable_async_collective_fusion=false",)
    c.compiler.gpu = ()                   # on GPUs; an option that the installed compiler does not know is an error
    c.compiler.deterministic = True       # GPUs: sums in one order, and what XLA tunes is kept: bits repeat

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
    c.data.mask_repeats = 0               # rows with 1 to 13 tokens so often in a row weigh nothing; OLMo: 32; 0: off
    c.data.verify = "sizes"               # at start: "sizes" of the stores' files, or "sha256" of their bytes
    c.data.threads = 2                    # that read ahead in each process
    c.data.workers = 0                    # worker processes that read ahead; never change what is read
    c.data.prefetch = 4                   # batches read ahead

    c.checkpoint = ConfigDict()           # one a chunk always, kept for ever
    c.checkpoint.every_steps = 0          # more of them, every so many steps; 0: none
    c.checkpoint.keep_between = 2         # how many of those are kept
    c.checkpoint.max_launches = 20        # without a new checkpoint, one after the other; 0: no limit
    c.checkpoint.moments_every = 1        # the optimizer's moments: kept of every so many chunks, and of the newest two

    c.watchdog = ConfigDict()             # seconds that a process may be at one thing, else it ends with 70; 0: any
    c.watchdog.start = 14400              # data and run are opened, and hashed where data.verify says so
    c.watchdog.restore = 7200             # of a checkpoint
    c.watchdog.data = 1800                # the next batch, and once a stage its compiled step
    c.watchdog.step = 1800                # until the step before it is done
    c.watchdog.save = 7200                # until a save has begun, and with it the one before ended
    c.watchdog.evaluate = 14400           # what ends a run

    c.eval = ConfigDict()                 # on held-out windows, after the last step
    c.eval.at_checkpoints = 8             # windows per subset at each of them, for the rows in held_out/; 0: none
    c.eval.windows = 64                   # windows per subset at most
    c.eval.prompts = ()                   # texts to go on from, printed at the end
    c.eval.new_tokens = 48                # sampled after each prompt

    c.log = ConfigDict()
    c.log.tensorboard = True              # event files in workdir/tensorboard
    c.log.wandb_project = ""              # Weights & Biases project; "" is off. The key is read from the environment
    c.log.every_steps = 10                # steps between printed lines
    c.log.layers_every = 10               # steps between rows that have norms by layer; 0: only where a step is odd
    return c.lock()
# fmt: on


# fmt: off
def stage(**overrides: Any) -> ConfigDict:
    """One row of the stage table; every key with its default."""
    s = ConfigDict()
    s.name = "stage1"
    s.kind = "pretrain"                   # "sft": rows of whole conversations, of which what is masked is learned; or
                                          # "dpo": of whole pairs of them, of which one is preferred
    s.sequence_length = 2048              # T: tokens a row
    s.rows_per_step = 2040                # global batch, rows
    s.microbatches = 1                    # gradient accumulation: the batch is cut into this many
    s.steps_per_chunk = 941               # one chunk of data = one checkpoint = this many steps
    s.chunks = 360                        # in the stage
    s.rope_base = 10000.0
    s.lr_peak = 1.5e-4
    s.schedule = "cosine"                 # from lr_peak to lr_final, or "linear", "constant", "wsd", "wsd_sqrt"
    s.lr_final = 1.5e-5                   # reached at the stage's last step; by "constant" never
    s.decay_share = 0.1                   # of the steps after the warm-up, the last, in which "wsd..." decays
    s.warmup_steps = 2000                 # linear from `lr_start`: in a later stage, up again from where the last ended
    s.lr_start = 0.0
    s.too_long = "refuse"                 # sft: conversations longer than a row; or "drop" (counted), "cut" at its end
    s.reset_positions = False             # sft: RoPE's positions begin anew with each conversation of a row
    s.beta = 0.1                          # dpo: what a pair's log-odds are multiplied by, less its reference's
    s.mix = ConfigDict()                  # {subset: repeats}: weight of each of its windows; epochs result
    s.lock()
    for key, value in overrides.items():
        if key not in s:
            raise ConfigError(f"stage(): unknown key {key!r}{closest(key, s.keys())}")
        if key == "mix":
            if not isinstance(value, (dict, ConfigDict)):
                raise ConfigError(f"stage(): mix={value!r}: must be a dict {{store: repeats}}, such as {{'web': 1}}")
            s.mix = ConfigDict({name: float(repeats) for name, repeats in value.items()})
        else:
            s[key] = value
    return s.lock()
# fmt: on


# Of every number but the mesh's sizes, in mathematics' notation: "[0, 1)" holds 0, and 1 not. None holds NaN.
RANGES = {
    "[1, inf)": """model.vocab_size model.dim model.num_layers model.num_heads model.num_kv_heads model.head_dim
        model.ffn_dim model.pipeline.microbatches model.pipeline.repeats model.rope_scaling.factor
        loss.block optimizer.max_skips_in_a_row data.threads data.prefetch eval.windows eval.new_tokens log.every_steps
        stages.*.sequence_length stages.*.rows_per_step stages.*.microbatches stages.*.steps_per_chunk
        stages.*.chunks checkpoint.moments_every
        stability.max_skips stability.rollback.after stability.rollback.watch""",
    "[8, 2001)": "stability.window",  # of no more rows than detect.HISTORY
    "[1, 2001)": "stability.persistence",
    "[0, inf)": """model.unroll model.sliding_window model.width_base loss.z_loss optimizer.weight_decay data.workers
        checkpoint.every_steps checkpoint.keep_between checkpoint.max_launches log.layers_every eval.at_checkpoints
        stability.attention_every
        watchdog.start watchdog.restore watchdog.data watchdog.step watchdog.save watchdog.evaluate
        stability.loss_floor stability.grad_norm_floor stability.drift stability.rollback.most stability.rollback.replay
        stability.rollback.before stability.rerun_every
        stages.*.lr_peak stages.*.lr_final stages.*.lr_start stages.*.warmup_steps""",
    "[0, 1000000000)": """optimizer.adagc.ratio optimizer.adagc.warmup_updates optimizer.update_clip
        optimizer.qk_clip data.mask_repeats""",
    # A clip_norm of 0, which elsewhere is "off", would multiply gradients by it: 1e9 clips nothing.
    "(0, inf)": """optimizer.clip_norm optimizer.eps model.norm_eps model.init_std model.rope_scaling.low_freq_factor
        model.rope_scaling.high_freq_factor model.rope_scaling.original_context stages.*.mix.* stages.*.beta
        stability.deviations""",
    "(1, inf)": "stages.*.rope_base",
    "(0, 1)": "stages.*.decay_share",
    "[0, 1)": "optimizer.b1 optimizer.b2 optimizer.momentum optimizer.ema_decay optimizer.adagc.beta",
    "[0, 4294967296)": "seed",
}
_RANGE_OF = {key: interval for interval, keys in RANGES.items() for key in keys.split()}


# Keys, or all keys below one, that a resumed run may change freely: they change where and how fast it runs, never what
# it computes (beyond the order of floating-point sums). All else is drift. data.eos must be the stores' in any case.
FREE_KEYS = tuple(
    """mesh log watchdog checkpoint eval allow_drift data.root data.tokenizer data.eos data.verify data.threads
    data.workers data.prefetch compiler stability.rollback stability.rerun_every stability.attention_every model.remat
    model.rings model.unroll model.attention model.pipeline loss.block stages.*.microbatches""".split()
)


def range_of(key: str) -> str | None:
    """That of RANGES, of "stages.0.chunks" as of "stages.*.chunks"; None for what is no number, and for mesh sizes."""
    return _RANGE_OF.get(re.sub(r"(?<=\.mix\.).*|(?<=^stages\.)\d+", "*", key))


def closest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
