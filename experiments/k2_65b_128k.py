"""K2-65B at 131,072 tokens: fine-tuning a trained K2-65B on whole books, papers and repositories.

Purpose: to lengthen the context of a trained K2-65B sixteenfold; LLM360 published no such run, all of it is our choice.
Data: the stores of K2's second stage (k2jax/k2.py) under data/k2, documents as long as they come.
Command: python tools/convert_from_hf.py --hf=K2_FOLDER --out=DIR, then
  python -m k2jax.train --config=experiments/k2_65b_128k.py --workdir=DIR
    --config.allow_drift="('model.mask_documents',)"
Hardware: TPU v5p 8x8x8; 16 chips share a row, each with the 8,192 positions that it has in stage two.
Tokens: 20 chunks x 50 steps x 32 rows x 131,072 = 4.2B.
Expected time, by tools/plan.py (libtpu 0.0.42), not measured: 48 s a step, MFU 33.7% causal, 30.2 of 95.7 GiB, 14 hours
  in all. Expected loss: not known.
"""

from ml_collections import ConfigDict

from k2jax import config, k2


def get_config() -> ConfigDict:
    c = config.base()  # the model section and the optimizer of base() are K2-65B's
    c.name = "k2_65b_128k"
    c.model.mask_documents = True  # Llama 3 found it to matter for long rows (arXiv:2407.21783, section 3.2)
    c.model.remat = "full"
    # Parameters are cut into 128 and not 512, 16 rows of a matrix, which the TPU compiler gathers by an all-reduce.
    c.mesh.replica, c.mesh.fsdp, c.mesh.context = 4, 8, 16
    c.loss.block = 2048  # after each, devices add up their gradients of the head
    c.checkpoint.every_steps = 25  # 20 min at 48 s a step: half a chunk
    c.data.threads, c.data.prefetch = 4, 8
    c.stages = (
        config.stage(
            name="long",
            sequence_length=131_072,
            # The smallest round base at which the sum of cos(distance x frequency) is negative at no distance in a row
            # (Men et al. 2024, arXiv:2405.14591, with head_dim 128).
            rope_base=10_000_000.0,
            rows_per_step=32,  # 4.2M tokens, as in stage one
            steps_per_chunk=50,
            chunks=20,
            lr_peak=1.5e-5,  # a tenth of stage one's, where stage two began
            lr_final=1.5e-6,
            warmup_steps=50,
            mix=k2.STAGE2_MIX,
        ),
    )
    return c
