"""K2-Chat: K2-65B fine-tuned on conversations, its third stage.

Purpose: to make a chat model of K2. Published are the mix (2,920,634,227 tokens of six subsets) and the length of 8192;
  learning rate (2e-5, cosine), warm-up (5%), clipping (0.5) and two epochs are K2-V2's, whose SFT was published; batch,
  weight decay and what becomes of longer conversations are our choice.
Data: a store of conversations for each subset of k2jax/k2.py's CHAT_TOKENS under data/k2_chat, made by recipes with
  conversations(...) and a chat template, with the tokenizer of the weights. A third of them was never published.
Command: tools/convert_from_hf.py makes a run of K2's weights, or of those that convert_to_hf.py wrote, in DIR; then
  python -m k2jax.train --config=experiments/k2_chat.py --workdir=DIR
  In one run with stages one and two: stages = (*k2.stages_65b(...), k2.stage_chat(...)).
Hardware: 128 devices with 80 GB (our choice), 8 tensor parallel as K2 had.
Tokens: two epochs, 5.84B, 1,048,576 positions a step; of 1,000 to 1,500 conversations, if they are 700 to 1,000 tokens.
Expected time and loss: not measured, not published.
"""

from ml_collections import ConfigDict

from k2jax import config, k2


def get_config() -> ConfigDict:
    c = config.base()  # the model section of base() is K2-65B's
    c.name = "k2_chat"
    c.model.remat = "full"
    c.optimizer.clip_norm = 0.5
    c.mesh.replica, c.mesh.fsdp, c.mesh.tensor = 1, 16, 8
    c.data.root, c.data.tokenizer = "data/k2_chat", "data/k2_chat/tokenizer.json"
    c.data.threads, c.data.prefetch = 4, 8
    c.checkpoint.every_steps = 200  # K2-V2's
    c.stages = (k2.stage_chat(rows=128, microbatches=8),)
    return c
