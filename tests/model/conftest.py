"""The platform prepared before a test module imports Megatron-Core."""

from nemotron_train.platform import device

device.prepare()
