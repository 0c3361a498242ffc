"""A stand-in for Transformer Engine, for tests without a GPU. It has the interface that
Megatron-Core 0.19.2's wrappers use, computed in plain PyTorch without any block format.

Like the real package, it records on each linear the recipe under which it last ran. A run over it
therefore shows the choices of Megatron's wrappers, contexts and per-module recipes. It shows
nothing about the kernels. Its names are those of the real package (2.14 to 2.20).
"""

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.17.1"
