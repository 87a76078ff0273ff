"""Mine, 1.35B: K2-1B's model and schedule on your own folder. The README's "Train on your own folder".

Purpose: what experiments/mine.py is small, in earnest.
Data: as experiments/mine.py's, with c.vocab_size = 32_018 in the recipe; 28B tokens, or as many epochs as make them.
Command: python -m k2jax.train --config=experiments/mine_1b.py --workdir=runs/mine_1b
Hardware: 8 H100s; others as in experiments/k2_1b.py. Tokens: 360 chunks x 74 steps x 512 rows x 2048 = 27.9B.
Expected time: on 8 H100s 15 hours by tools/plan.py (not measured). Expected loss: not known. The start prints how many
  epochs of each store that is: more than four of a text teach little (arXiv:2305.16264): lower `chunks` then.
"""

from ml_collections import ConfigDict

from k2jax import config

DATA = "data/mine"  # or gs://BUCKET/mine, where the whole of that folder was copied to


def get_config() -> ConfigDict:
    c = config.base()
    c.name = "mine_1b"
    c.model.vocab_size = 32_018  # no smaller than the tokenizer's
    c.model.dim = 2048
    c.model.num_layers = 24
    c.model.num_heads = 16
    c.model.num_kv_heads = 16
    c.model.ffn_dim = 5504
    c.model.remat = "dots"
    c.data.root = DATA
    c.data.tokenizer = "data/mine/tokenizer.json"  # on each host's disk
    c.stages = (
        config.stage(
            name="stage1",
            rows_per_step=512,
            microbatches=4,
            steps_per_chunk=74,
            chunks=360,
            lr_peak=4e-4,
            lr_final=4e-5,
            mix=config.mix_of(DATA),
        ),
    )
    return c
