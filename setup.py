"""Packaging. Tool settings (ruff, pytest) live in pyproject.toml; exact versions in requirements.lock."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "k2jax" / "__init__.py").read_text())[1]
README = HERE / "README.md"

# Lower bounds: releases whose interfaces we rely on. Upper bounds: the next ones that may break them.
BASE = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "tensorstore>=0.1.86,<0.2",
    "ml-collections>=1.1,<2",
    "numpy>=2.2,<3",
    "pyarrow>=20,<28",
    "tokenizers>=0.22,<0.24",
    "safetensors>=0.5,<0.9",
    "tqdm>=4.66,<5",
    "tensorboardX>=2.6.4,<3",
    "pyyaml>=6,<7",
]
FASTTEXT = "fasttext-numpy2-wheel>=0.9.2,<0.10"  # no wheels for Python 3.13 and macOS: there it needs a compiler
TRANSFORMERS = "transformers>=5.5,<5.24"  # 5.24 makes other tokens of a SentencePiece model with symbols of its own
# For models of SentencePiece: it encodes, protobuf reads them, transformers makes a tokenizer.json of one.
SENTENCEPIECE = ["sentencepiece>=0.2.3,<0.3", "protobuf>=7.36.1,<8", TRANSFORMERS]
EXTRAS = {
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    "gpu": ["jax[cuda13]>=0.10.2,<0.13", "nvidia-ml-py>=12.575,<14"],  # the second counts energy
    "hf": [TRANSFORMERS],
    "report": ["plotly>=7.1,<8"],
    # For releases: the cards' metadata, uploads; the signature's manifest, and signatures.
    "release": ["huggingface_hub>=2.4,<3", "model-signing>=1.1.1,<2", "pyopenssl>=25,<27"],  # it imports the third
    "wandb": ["wandb>=0.19,<1"],
    # datatrove's own extras bring more than is used here, and lack lxml_html_clean, which trafilatura imports.
    "data": [
        "brotli>=1.2,<2",  # older ones cannot be told how much to unpack
        "chardet>=6,<7",  # guesses encodings, where a recipe asks for it (LGPL)
        "datatrove>=0.10.1,<0.11",
        "jinja2>=3.1.6,<4",  # chat templates; older ones let a template out of the sandbox
        "lxml_html_clean>=0.4,<0.5",
        "orjson>=3.10,<4",
        "phonenumberslite>=9,<10",  # phonenumbers, less 40 MB of names of places and carriers
        "regex>=2024.11,<2027",
        "trafilatura>=1.11,<1.12",
        "warcio>=1.7,<2",
        "xxhash>=3.4,<4",
        "zstandard>=0.23,<0.26",
    ],
    "langid": [FASTTEXT],
    "ray": ["ray>=2.50,<3"],
    "eval": ["lm_eval>=0.4.13,<0.5"],
    "sentencepiece": SENTENCEPIECE,
    "seqio": ["seqio>=0.0.20,<0.1", *SENTENCEPIECE],
    "test": [
        "pytest>=8,<10",
        "pytest-xdist>=3.6,<4",
        "hypothesis>=6.130,<7",
        "ruff>=0.17,<0.18",
        "scipy>=1.15,<2",
        "pandas>=2.2,<4",
        # Buckets on loopback; moto's own extra "server" brings the rest of AWS.
        "moto>=5.2,<6",
        "flask>=3,<4",
        "flask-cors>=6,<7",
        "gcp-storage-emulator>=2026.7,<2027",
        "selenium>=4.40,<5",  # drives Debian's chromium; brings none
        # What others check releases with.
        "mlcroissant>=1.1.1,<2",
        "cyclonedx-python-lib[json-validation]>=11.12,<12",
        "nbclient>=0.10,<0.12",  # experiments/colab.ipynb, which these run and which draws with matplotlib
        "nbformat>=5.10,<6",
        "ipykernel>=7,<8",
        "matplotlib>=3.10,<4",
        f"{FASTTEXT} ; python_version < '3.13' and sys_platform == 'linux'",
    ],
    # What our numbers are compared with, in tests and benchmarks.
    "parity": ["torch==2.13.0", TRANSFORMERS, "accelerate>=1,<2"],
}

setup(
    name="k2jax",
    version=VERSION,
    description="Trains K2-class language models in the open, on TPU pods and GPUs, through JAX",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["k2jax", "k2jax.*"]), "k2jax.kernels", "k2jax.tools"],
    package_dir={"k2jax.kernels": "kernels", "k2jax.tools": "tools"},
    entry_points={"console_scripts": ["k2jax = k2jax.command:main"]},
    package_data={
        "k2jax.plan": ["*.txtpb"],
        "k2jax.launch": ["templates/*.sh"],
        "k2jax.report": ["assets/*"],
        "k2jax.release": ["SPECIFICATION.md"],
    },
    install_requires=BASE,
    extras_require=EXTRAS,
)
