"""Conversations with no download, for experiments/smoke_chat.py: what comes after a number, opposites; made here.
And preference pairs of such, for a stage of kind "dpo".

    python tools/prepare_data.py --config=experiments/data/smoke_chat.py --out=data/smoke_chat

They are tokenized with the smoke run's tokenizer, so that its model can be fine-tuned on them: prepare
experiments/data/smoke.py before. What is made lies in data/smoke_chat_made, with the template: questions between [INST]
and [/INST], answers ended by EOS.
"""

from pathlib import Path

from ml_collections import ConfigDict

from k2jax.prepare.chat import made
from k2jax.prepare.recipe import base, conversations

MADE = "data/smoke_chat_made"


def get_config() -> ConfigDict:
    made.write(Path(MADE))
    c = base()
    c.tokenizer = "data/smoke/tokenizer.json"
    c.validation_fraction = 0.05
    c.chat.template = f"{MADE}/chat_template.jinja"
    c.subsets.numbers = conversations(f"jsonl:{MADE}/numbers.jsonl")
    c.subsets.opposites = conversations(f"jsonl:{MADE}/opposites.jsonl")
    c.subsets.preferred = conversations(f"jsonl:{MADE}/preferred.jsonl", pairs=True)
    return c
