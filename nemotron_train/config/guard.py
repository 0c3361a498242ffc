"""The knobs of a run's supervision. No torch."""

from dataclasses import dataclass
from enum import StrEnum


class NonFinitePolicy(StrEnum):
    """The reaction to a step whose loss or gradient is not finite on any rank."""

    stop = "stop"  # exit with code 1; the last checkpoint stays valid
    skip = "skip"  # drop the update and continue with the next batch
    roll_back = "roll_back"  # load the last checkpoint and skip the batches used since then


class SpikePolicy(StrEnum):
    """The reaction to a step whose loss or gradient norm is far above that of recent steps."""

    ignore = "ignore"
    report = "report"  # print and log one line
    skip = "skip"
    roll_back = "roll_back"


@dataclass
class GuardConfig:
    """Supervision of a run (docs/guard.md). All ranks take the same action at the same step."""

    non_finite: NonFinitePolicy = NonFinitePolicy.stop
    spike: SpikePolicy = SpikePolicy.report
    spike_window: int = 128  # number of recent steps compared; needs half of them to judge
    spike_sigmas: float = 6.0  # standard deviations above the window's mean
    max_skips: int = 10  # consecutive dropped updates before the run stops
    max_roll_backs: int = 3  # roll-backs in one process before the run stops
    health_every: int = 100  # steps between health measurements of each layer; 0: never
    straggler_every: int = 50  # steps between measurements of each rank's time; 0: never
    straggler_ratio: float = 1.5  # report a rank above this ratio to the median, 3 times in a row
    hang_minutes: float = 10.0  # no step for this long: write stack traces, exit 1; 0: never
    crash_loop_starts: int = 3  # starts without progress before the next is refused; 0: never
    first_step_minutes: float = 30.0  # hang_minutes for the first step, which may compile kernels
