"""The data card of a preparation: what came in and out, what was left out and why."""
