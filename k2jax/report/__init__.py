"""The report of a run: one page that needs no network, made of what the run directory holds."""
