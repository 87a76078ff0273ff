"""The kernels of the top-level folder `kernels/`, as `k2jax.kernels`.

`kernels` itself may be another distribution (Hugging Face's, which transformers looks for): nothing here imports that
name. The folder has no __init__.py, so that where theirs is installed, `import kernels` is theirs everywhere.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
# In a checkout beside k2jax/; in an installation within it (setup.py puts it there).
__path__ = [str(folder) for folder in (_here / "kernels", _here.parent / "kernels") if folder.is_dir()]
