"""A stand-in for Transformer Engine, for tests without a GPU: what Megatron-Core 0.19.2's wrappers
ask of it, computed in plain PyTorch without any block format.

It keeps what the real package keeps on its modules: under which recipe each linear last ran. So a
run over it tells what Megatron's wrappers, contexts and per-module recipes choose, and nothing of
the kernels. Its names are the real package's (2.14 to 2.20).
"""

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.17.1"
