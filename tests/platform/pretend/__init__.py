"""A CUDA device that is not there, for tests of the GPU path on machines without a GPU.

`device`: labels on storages, a dispatch mode that refuses what a GPU would refuse and counts what
makes the host wait. `python_view`: what Python sees of tensors and of `torch.cuda`. `run`: verbs on
it, as a process of its own. `causal_conv1d`: the contract of that package on a CPU.

It shows devices that do not match, host waits and copies, and what a GPU's code path computes. It
shows nothing of CUDA kernels, streams, NCCL, memory or speed.
"""
