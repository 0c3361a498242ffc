"""The files of a run's rollouts and of its curriculum. No torch but for the ranks' agreement.

    rollouts/step_00000003.jsonl.gz     what step 3 was trained on; written before its update
    curriculum/step_00000003.json       what is known of the prompts after those rollouts

Owns: names, retention, what a resumed run needs. Only the first rank writes; every rank reads, so
the folder is shared.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch.distributed as dist

from nemotron_train.config.errors import ConfigError
from nemotron_train.platform.files import write_atomically
from nemotron_train.posttrain.curriculum import CurriculumState
from nemotron_train.posttrain.rollout import Rollout, read_rollouts, write_rollouts
from nemotron_train.run_folder.integrity import steps_in

_DIGITS = 8


class RolloutFiles:
    """The files of one run. keep: files of rollouts that stay, the newest; 0: all. Those that a
    resume from a checkpoint needs always stay."""

    def __init__(self, run_folder: Path, keep: int) -> None:
        self._run_folder = run_folder
        self._keep = keep
        self._state: tuple[int, CurriculumState] | None = None
        self._writes = dist.get_rank() == 0

    def _rollouts(self, step: int) -> Path:
        return self._run_folder / "rollouts" / f"step_{step:0{_DIGITS}}.jsonl.gz"

    def _curriculum(self, step: int) -> Path:
        return self._run_folder / "curriculum" / f"step_{step:0{_DIGITS}}.json"

    def exists(self, step: int) -> bool:
        """Whether the rollouts of a step are there, and what was learnt of the prompts from them,
        which is written after them."""
        return self._rollouts(step).is_file() and self._curriculum(step).is_file()

    def read(self, step: int, rank: int, ranks: int) -> list[Rollout]:
        """The rollouts of a step that belong to a rank: every `ranks`-th prompt."""
        path = self._rollouts(step)
        if not path.is_file():
            raise ConfigError(f"{path}: is missing; the run cannot go on from this checkpoint")
        return [r for r in read_rollouts(path) if r.group % ranks == rank]

    def write(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Write the rollouts of a step, on the first rank."""
        if not self._writes:
            return
        path = self._rollouts(step)
        path.parent.mkdir(exist_ok=True)
        write_rollouts(path, rollouts)
        self._remove_old()

    def _remove_old(self) -> None:
        needed = min(steps_in(self._run_folder / "checkpoints"), default=0)
        if self._keep:
            for path in sorted((self._run_folder / "rollouts").glob("step_*"))[: -self._keep]:
                if _step_of(path) < needed:
                    path.unlink(missing_ok=True)
        kept = sorted((self._run_folder / "curriculum").glob("step_*"))
        older = [path for path in kept if _step_of(path) <= needed]
        for path in older[:-1]:  # the newest of them is what the oldest checkpoint goes on from
            path.unlink(missing_ok=True)

    def curriculum(self, step: int) -> CurriculumState:
        """What is known after the rollouts of `step`; nothing before the first one."""
        if step < 1:
            return CurriculumState()
        if self._state is None or self._state[0] != step:
            path = self._curriculum(step)
            try:
                text = path.read_text(encoding="utf-8")
            except OSError as error:
                raise ConfigError(
                    f"{path}: cannot be read ({error.strerror}); the run cannot go on from here"
                ) from None
            self._state = (step, CurriculumState.from_json(text, str(path)))
        return self._state[1]

    def observe(
        self, step: int, before: int, outcomes: Iterable[tuple[str, str, int, int]]
    ) -> None:
        """Take in the outcomes of the rollouts of `step`, which follow those of `before`."""
        state = CurriculumState.from_json(self.curriculum(before).to_json(), "curriculum")
        state.observe(step, outcomes)
        self._state = (step, state)
        if self._writes:
            path = self._curriculum(step)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, state.to_json() + "\n")


def _step_of(path: Path) -> int:
    digits = path.name.removeprefix("step_")[:_DIGITS]
    return int(digits) if digits.isdigit() else 0
