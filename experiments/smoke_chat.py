"""Smoke chat: the smoke model learns to answer in a template's form, on any machine.

Purpose: to see a stage of kind "sft" from conversations to answers, in two minutes.
Data: tools/prepare_data.py --config=experiments/data/smoke_chat.py (made there: what comes after a number,
  opposites), after experiments/data/smoke.py, whose tokenizer it takes.
Command: python -m k2jax.train --config=experiments/smoke_chat.py --workdir=runs/smoke_chat
  To go on from the smoke run instead of the seed: tools/convert_to_hf.py --workdir=runs/smoke --out=FOLDER, then
  tools/convert_from_hf.py with --workdir=runs/smoke_chat, and the same command.
Hardware: two CPU cores; under two minutes. Tokens: 0.2M, a third of them learned.
Expect: at the end sample lines that are right, such as "[INST] After 8? [/INST]| 9.", and
  python -m k2jax.generate --workdir=runs/smoke_chat --temperature=0 --prompt="[INST] After 4? [/INST]"
"""

from ml_collections import ConfigDict

from k2jax import config


def get_config() -> ConfigDict:
    c = config.base()
    c.name = "smoke_chat"
    c.model.vocab_size = 4096
    c.model.dim = 224
    c.model.num_layers = 6
    c.model.num_heads = 7
    c.model.num_kv_heads = 7
    c.model.head_dim = 32
    c.model.ffn_dim = 592
    c.data.root = "data/smoke_chat"
    c.data.tokenizer = "data/smoke_chat/tokenizer.json"
    c.data.verify = "sha256"
    c.eval.prompts = ("[INST] After 8? [/INST]", "[INST] Opposite of hot? [/INST]")
    c.eval.new_tokens = 12
    c.log.every_steps = 10
    c.stages = (
        config.stage(
            name="chat",
            kind="sft",
            sequence_length=256,
            rows_per_step=4,
            steps_per_chunk=100,
            chunks=2,
            reset_positions=True,
            rope_base=500_000.0,  # that of the smoke run's last stage
            lr_peak=2e-3,
            lr_final=1e-4,
            warmup_steps=10,
            mix={"numbers": 1, "opposites": 1},
        ),
    )
    return c
