"""nemotron_train: pretraining of Nemotron-3-style hybrid models on Megatron-Core.

Importing this package does not import torch. The commands that need torch import it.
"""

__version__ = "0.1.0"
