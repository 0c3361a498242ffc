"""The exit codes of all verbs, and the exceptions that end one with a one-line message. No torch.

Owns: the exceptions and their exit codes. Does not own: printing them (`cli.main`, `run`).
"""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2  # wrong configuration or input; nothing was lost
EXIT_STOPPED = 3  # stopped on request, checkpoint saved
EXIT_CRASH_LOOP = 4  # not begun: the last starts crashed at the same step


class ConfigError(ValueError):
    """The configuration or an input is wrong. The message is one line with the knob, its value and
    what would be valid. The command line prints it and exits with code 2."""


class TrainingFailed(RuntimeError):
    """Training cannot continue; the last checkpoint is valid. All ranks raise this error at the
    same step with the same message, which the command line prints instead of a traceback."""

    exit_code = EXIT_FAILED


class CrashLoop(TrainingFailed):
    """Several consecutive starts failed at the same step, so training does not start. A tool that
    restarts runs automatically can recognize this failure by its exit code."""

    exit_code = EXIT_CRASH_LOOP


class RendezvousFailed(RuntimeError):
    """The ranks could not connect. The message is one line with the address, the reason and the
    knob that sets the time limit."""

    exit_code = EXIT_FAILED
