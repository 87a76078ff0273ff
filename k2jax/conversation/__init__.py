"""Talking to a checkpoint: turns to a prompt, an answer from a row that is kept, by lines of JSON or at a terminal."""
