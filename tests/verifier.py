"""tools/verify_release.py as a module, and the specification that it is written from."""

import importlib.util
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAM = REPOSITORY / "tools" / "verify_release.py"
SPECIFICATION = REPOSITORY / "k2jax" / "release" / "SPECIFICATION.md"
_spec = importlib.util.spec_from_file_location("verify_release", PROGRAM)
verifier = sys.modules["verify_release"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(verifier)
