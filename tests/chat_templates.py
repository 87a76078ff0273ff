"""Chat templates of well-known families, written from their documented formats, and what they make of a dialogue."""

from typing import NamedTuple


class Family(NamedTuple):
    """A template, its control tokens, and what it makes of DIALOGUE."""

    template: str
    control: tuple[str, ...]
    bos: str | None
    eos: str
    text: str  # of DIALOGUE, without its system turn where `system` is False
    answers: tuple[str, ...]  # what is learned of it
    system: bool = True


DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And naïve 日本?\nTwo lines."},
    {"role": "assistant", "content": "Still\nfour 🙂."},
]

_CHATML_TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}"
_CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
_CHATML_TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
    "<|im_start|>assistant\nFour.<|im_end|>\n<|im_start|>user\nAnd naïve 日本?\nTwo lines.<|im_end|>\n"
    "<|im_start|>assistant\nStill\nfour 🙂.<|im_end|>\n"
)
_CHATML_ANSWERS = ("Four.<|im_end|>", "Still\nfour 🙂.<|im_end|>")
_CHATML_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = "{% for m in messages %}" + _CHATML_TURN + "{% endfor %}" + _CHATML_PROMPT
CHATML_BLOCKS = """{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- m.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
# Reasoning of turns before the last question is left out, as Qwen3 does.
QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set content = m.content %}
    {%- if m.role == 'assistant' and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- elif m.role == 'assistant' and '</think>' not in content %}
        {%- set content = '<think>\\n\\n</think>\\n\\n' + content %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

FAMILIES = {
    "chatml": Family(CHATML, _CHATML_CONTROL, None, "<|endoftext|>", _CHATML_TEXT, _CHATML_ANSWERS),
    "chatml-blocks": Family(CHATML_BLOCKS, _CHATML_CONTROL, None, "<|endoftext|>", _CHATML_TEXT, _CHATML_ANSWERS),
    "llama-2": Family(
        """{% if messages[0]['role'] == 'system' %}
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}
{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{% for m in turns %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if m['role'] == 'user' %}
{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}{% else %}
{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}
{% endfor %}""",
        ("<unk>", "<s>", "</s>"),
        "<s>",
        "</s>",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 2 + 2? [/INST] Four. </s>"
        "<s>[INST] And naïve 日本?\nTwo lines. [/INST] Still\nfour 🙂. </s>",
        (" Four. </s>", " Still\nfour 🙂. </s>"),
    ),
    "llama-3": Family(
        """{% for m in messages %}
{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' -}}
{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}""",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nFour.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd naïve 日本?\nTwo lines.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nStill\nfour 🙂.<|eot_id|>",
        ("Four.<|eot_id|>", "Still\nfour 🙂.<|eot_id|>"),
    ),
    "mistral": Family(
        """{{ bos_token }}{% for m in messages %}
{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
{%- elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}
{%- else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}""",
        ("<unk>", "<s>", "</s>"),
        "<s>",
        "</s>",
        "<s>[INST] What is 2 + 2? [/INST] Four.</s>[INST] And naïve 日本?\nTwo lines. [/INST] Still\nfour 🙂.</s>",
        (" Four.</s>", " Still\nfour 🙂.</s>"),
        system=False,
    ),
    "gemma": Family(
        """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}
{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""",
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<bos><start_of_turn>user\nWhat is 2 + 2?<end_of_turn>\n<start_of_turn>model\nFour.<end_of_turn>\n"
        "<start_of_turn>user\nAnd naïve 日本?\nTwo lines.<end_of_turn>\n"
        "<start_of_turn>model\nStill\nfour 🙂.<end_of_turn>\n",
        ("Four.<end_of_turn>", "Still\nfour 🙂.<end_of_turn>"),
        system=False,
    ),
    "zephyr": Family(
        """{% for m in messages %}
{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}""",
        ("<unk>", "<s>", "</s>"),
        "<s>",
        "</s>",
        "<|system|>\nBe brief.</s>\n<|user|>\nWhat is 2 + 2?</s>\n<|assistant|>\nFour.</s>\n"
        "<|user|>\nAnd naïve 日本?\nTwo lines.</s>\n<|assistant|>\nStill\nfour 🙂.</s>\n",
        ("Four.</s>", "Still\nfour 🙂.</s>"),
    ),
    "tulu": Family(
        """{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] }}
{%- if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '\\n<|assistant|>\\n' }}{% endif %}""",
        ("<|endoftext|>",),
        "<|endoftext|>",
        "<|endoftext|>",
        "<|endoftext|><|system|>\nBe brief.\n<|user|>\nWhat is 2 + 2?\n<|assistant|>\nFour.<|endoftext|>\n"
        "<|user|>\nAnd naïve 日本?\nTwo lines.\n<|assistant|>\nStill\nfour 🙂.<|endoftext|>",
        ("Four.<|endoftext|>", "Still\nfour 🙂.<|endoftext|>"),
    ),
    "phi-3": Family(
        """{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}""",
        ("<unk>", "<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        "<s>",
        "<|endoftext|>",
        "<|system|>\nBe brief.<|end|>\n<|user|>\nWhat is 2 + 2?<|end|>\n<|assistant|>\nFour.<|end|>\n"
        "<|user|>\nAnd naïve 日本?\nTwo lines.<|end|>\n<|assistant|>\nStill\nfour 🙂.<|end|>\n",
        ("Four.<|end|>", "Still\nfour 🙂.<|end|>"),
    ),
}  # fmt: skip
