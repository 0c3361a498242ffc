"""Transformer Engine's real Python on the pretended device, with its C++ extension replaced.

`bindings`: what the extension offers to Python, read from its C++ source. `stand_in`: a module with
exactly that, where a call with other arguments than C++ takes is a TypeError. `quantized`,
`products`, `norms`, `optimizer`, `attention`: the functions that a step of ours calls, in torch.

It shows what the Python of Transformer Engine and Megatron-Core does with our modules and plans:
shapes, usages, recipes, formats, arguments. It shows nothing of the C++ code and the CUDA kernels:
their numbers, alignments, limits and speed.
"""
