"""Conversations to documents: rows to turns, turns through a chat template, answers to a loss mask."""
