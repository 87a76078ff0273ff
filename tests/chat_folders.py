"""Tiny random models with the tokenizers and templates of well-known families, in Hugging Face's format."""

import json
from pathlib import Path

from chat_templates import FAMILIES
from conftest import Later
from test_chat import folder_of

transformers = Later("transformers")

# A family, the tokens that end its texts as the folder lists them, and what it says of sampling.
KINDS = {
    "llama-3": (["<|end_of_text|>", "<|eot_id|>"], {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
    "llama-2": (["</s>"], {}),  # BOS by the template and by tokenizer.json; SentencePiece's kind
    "chatml": (["<|im_end|>", "<|endoftext|>"], {"do_sample": False}),  # no BOS at all
    "gemma": (["<end_of_turn>", "<eos>"], {}),  # whose template refuses a system turn
    "mistral": (["</s>"], {"do_sample": True, "temperature": 0.7, "top_k": 20}),
}


def chat_folder(path: Path, name: str, context: int = 512) -> Path:
    """As transformers leaves such a model; its weights are drawn so that answers are long, and differ."""
    family, (stops, sampling) = FAMILIES[name], KINDS[name]
    folder, tokenizer = folder_of(path, family)
    ids = tokenizer.convert_tokens_to_ids(stops)
    assert None not in ids
    transformers.set_seed(1)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=context, initializer_range=0.4,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=ids if len(ids) > 1 else ids[0], pad_token_id=0,
        )
    )  # fmt: skip
    model.generation_config = transformers.GenerationConfig(eos_token_id=ids, pad_token_id=0, **sampling)
    model.save_pretrained(folder)
    (folder / "LICENSE").write_text("Do as you like.\n")
    return folder


def without_template(folder: Path) -> Path:
    """The same folder, of a model that nobody talks to."""
    side = json.loads((folder / "tokenizer_config.json").read_text())
    del side["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(side))
    return folder
