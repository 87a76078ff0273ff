"""Stub until merged."""


def stages(config, out, tokenizer):
    return []
