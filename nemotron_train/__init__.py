"""nemotron_train: pretraining of Nemotron-3-style hybrid models on Megatron-Core.

Importing this package does not import torch. The commands that need torch import it.
"""

from nemotron_train.platform.cores import wait_without_spinning

__version__ = "0.1.0"

wait_without_spinning()  # OpenMP reads its settings when torch is imported
