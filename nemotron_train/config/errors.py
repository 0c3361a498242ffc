"""The exceptions that end a command with one line and an exit code. No torch.

Owns: the exceptions and their exit codes. Does not own: printing them (`cli.main`, `run`).
"""


class ConfigError(ValueError):
    """The configuration or an input is wrong: one line that names the knob, its value and what
    would be right. The command line prints it and exits with 2."""


class TrainingFailed(RuntimeError):
    """Training cannot go on; the last checkpoint is good. All ranks raise it at the same step with
    the same line, which the command line prints instead of a traceback."""

    exit_code = 1


class CrashLoop(TrainingFailed):
    """Several starts in a row failed at the same step, so this one does not begin. Whoever
    restarts runs automatically can tell it from other failures by the exit code."""

    exit_code = 4


class RendezvousFailed(RuntimeError):
    """The ranks did not meet: one line with the address, the reason and the knob."""

    exit_code = 1
