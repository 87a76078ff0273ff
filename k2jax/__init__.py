"""k2jax trains K2-class language models in the open, on TPU pods and GPUs, through JAX."""

__version__ = "0.1.0"
