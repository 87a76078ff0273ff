"""Hugging Face's format, both ways: layout (names and config.json), files, export with its certificate, import."""
