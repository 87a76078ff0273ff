"""What goes wrong while a run runs, and what the run must make of it.

The trainer is the real program, started by runs.py and watched through what it prints; where nothing is killed, its
`main` in this process. Faults come from outside: signals, limits, damaged files, and functions that a test replaces.

Each test was seen to fail with its defence taken out: moments lost on resume, the ledger not cut or not
compared, half lines read, the trash or half a save left, no preemption, no digest, no digest of the meta, bad
steps left in place, a start from scratch, save errors swallowed, drift not compared or not written or written
twice, arrays that drift, no layout check, decisions ignored, the loss alone checked for finiteness, moments
that move in a skipped step, no end to skips, the save under way dropped, broken parameters saved, no lock, no
closest key, dimensions or token ids or digests of stores unchecked, processes that give up alone, all write,
or stop each at a step of its own.
"""
