"""Ends of a run that are nobody's wrong configuration. No torch: the command line knows them."""


class TrainingFailed(RuntimeError):
    """Training cannot go on; the last checkpoint is good. All ranks raise it at the same step, with
    the same line, which the command line prints in place of a traceback."""

    exit_code = 1


class CrashLoop(TrainingFailed):
    """The run's starts end out of order again and again, at the same step: this one does not begin.
    Whoever starts runs by themselves can tell it from other failures by the exit code."""

    exit_code = 4
