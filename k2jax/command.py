"""`k2jax COMMAND ...`: what an installation puts on the PATH; each command of k2jax/ and of tools/ by its name.

    k2jax train --config=experiments/smoke.py --workdir=runs/smoke       is python -m k2jax.train ...
    k2jax prepare_data --config=experiments/data/smoke.py --out=DIR      is python tools/prepare_data.py ...

It becomes that program: same process, same options, same exit codes. In a checkout's folder, too, it is what is
installed, and not the checkout.
"""

import ast
import difflib
import os
import sys
from pathlib import Path

from k2jax.errors import ConfigError, run_main

HERE = Path(__file__).resolve().parent
MODULES = ("train", "evaluate", "generate", "replay", "doctor", "goodput", "costs", "gallery", "preflight")
TOOLS = next(folder for folder in (HERE / "tools", HERE.parent / "tools") if folder.is_dir())  # installed; a checkout's


def programs() -> dict[str, tuple[Path, list[str]]]:
    """{command: (its file, what Python is told to run it)}."""
    found = {name: (HERE / f"{name}.py", ["-m", f"k2jax.{name}"]) for name in MODULES}
    for path in sorted(TOOLS.glob("*.py")):
        found[path.stem] = path, ["-m", f"k2jax.tools.{path.stem}"] if TOOLS.parent == HERE else [str(path)]
    return found


def described() -> str:
    """Of each command its name and the first line of what it says of itself."""
    known = programs()
    lines = ["usage: k2jax COMMAND [OPTIONS], k2jax COMMAND --help; COMMAND is one of", ""]
    for name, (path, _) in known.items():
        lines.append(f"  {name:<18}{ast.get_docstring(ast.parse(path.read_bytes())).partition(chr(10))[0]}")
    return "\n".join(lines)


def run() -> None:
    """Becomes the program that the first argument names. Raises ConfigError if none has that name."""
    known, arguments = programs(), sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(described())
        return
    name = arguments[0].replace("-", "_")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f", did you mean {near[0]}?" if near else ";"
        raise ConfigError(f"k2jax {arguments[0]}: no such command{hint} there are {', '.join(known)}")
    os.execv(sys.executable, [sys.executable, "-P", *known[name][1], *arguments[1:]])


def main() -> None:
    """The console script."""
    run_main(run, prints=True)
