"""The first eight minutes on a GPU: ten stages, each with one verdict line (docs/gpu.md).

    python -m benchmarks.gpu_acceptance --output DIR [--budget 480] [--stages NAME ...] [--pretend]

`stages`: what is checked, in order, with the seconds each may take. `runner`: each stage in a
process group of its own, killed at its limit. `worker`: the process of a stage. `results` and
`page`: one JSON and one page, written after every stage. `setting`: sizes, the device, the verbs.
The other modules are the stages. `wheels`: what a machine without our environment must be brought.

Nothing here has run on a GPU. With --pretend everything runs on the pretended device of
tests/platform/pretend, with small sizes, so that the first minutes on a GPU are not spent on faults
of these files; its times mean nothing.
"""
