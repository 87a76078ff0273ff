"""Mine: a small model on your own folder, in minutes. The README's "Train on your own folder".

Purpose: to see your own documents become a model, before a larger one does (experiments/mine_1b.py).
Data: tools/prepare_data.py --config=experiments/data/mine.py --out=data/mine
Command: python -m k2jax.train --config=experiments/mine.py --workdir=runs/mine
Hardware: two CPU cores. Tokens: 0.5M. Expected time: 4 minutes.
Expect: a validation loss well below the unigram distribution's (both are printed at the end).
"""

from ml_collections import ConfigDict

from k2jax import config

DATA = "data/mine"  # or gs://BUCKET/mine, where the whole of that folder was copied to


def get_config() -> ConfigDict:
    c = config.base()
    c.name = "mine"
    c.model.vocab_size = 8192  # no smaller than the tokenizer's
    c.model.dim = 224
    c.model.num_layers = 6
    c.model.num_heads = 7
    c.model.num_kv_heads = 7
    c.model.head_dim = 32
    c.model.ffn_dim = 592
    c.data.root = DATA
    c.data.tokenizer = "data/mine/tokenizer.json"
    mix = config.mix_of(DATA)  # {store: repeats}, as in the recipe: mix["documents"] *= 2 or del mix["..."] change it
    c.stages = (
        config.stage(
            name="stage1",
            sequence_length=256,
            rows_per_step=8,
            steps_per_chunk=50,
            chunks=5,
            lr_peak=3e-3,
            lr_final=3e-4,
            warmup_steps=20,
            mix=mix,
        ),
    )
    return c
