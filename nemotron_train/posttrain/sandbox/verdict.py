"""How a judgement ended."""

from enum import StrEnum


class Verdict(StrEnum):
    """Only `passed` and `failed` say something about the answer alone."""

    passed = "passed"
    failed = "failed"
    timeout = "timeout"  # the wall clock or the processor time ran out
    memory = "memory"
    output = "output"  # more output than allowed
    killed = "killed"  # the process ended without a result
    error = "error"  # the code or the reward function raised, or returned what is no reward
