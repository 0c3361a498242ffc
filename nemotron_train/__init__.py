"""nemotron_train: pretraining of Nemotron-3-style hybrid models on Megatron-Core.

Importing this package imports no torch; the verbs that need it import it themselves.
"""

__version__ = "0.1.0"
