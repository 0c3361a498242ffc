"""The tasks that a policy is trained on, and which of them a step draws. No torch.

Owns: the pool of each environment, and its draw by ratio and curriculum. Does not own: the rows
(`tasks`), the rule of the draw (`curriculum`, `ratios`).
"""

from collections.abc import Sequence
from pathlib import Path

from nemotron_train.config.environments import EnvironmentConfig
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.grpo import GrpoConfig
from nemotron_train.posttrain.curriculum import CurriculumState, draw_prompts
from nemotron_train.posttrain.environments.families import FAMILY_NAMES
from nemotron_train.posttrain.environments.protocol import Row
from nemotron_train.posttrain.environments.scoring import Scoring
from nemotron_train.posttrain.knobs import check_environments
from nemotron_train.posttrain.ratios import step_counts
from nemotron_train.posttrain.tasks import Split, read_rows, rows_of_levels


class Pool:
    """The rows of all environments of a run.

    Raises ConfigError for an unknown environment, no ratio above 0, or rows that cannot be read.
    """

    def __init__(self, knobs: GrpoConfig, seed: int) -> None:
        environments = dict(knobs.environments)
        if not environments:
            environments = {name: EnvironmentConfig() for name in FAMILY_NAMES}
        self.ratios = check_environments(environments)
        self._knobs = knobs
        self._seed = seed
        self.rows = {
            environment.use or name: _rows(
                environment.use or name, name, environment, knobs.pool, seed
            )
            for name, environment in environments.items()
            if environment.ratio > 0
        }
        self._ids = {name: [row.id for row in rows] for name, rows in self.rows.items()}

    def check(self, scoring: Scoring) -> None:
        """Load the environments and check every row. Raises ConfigError for one that misses
        something."""
        scoring.load(self.rows)
        for name, rows in self.rows.items():
            for row, missing in zip(rows, scoring.check_rows(rows), strict=True):
                if missing:
                    raise ConfigError(f"environment {name}: row {row.id}: {missing}")

    def draw(self, state: CurriculumState, step: int, total_steps: int) -> list[Row]:
        """The rows of a step, counted from 0, environment by environment. Depends on the arguments
        and the configuration alone."""
        ratios = {name: ratio for name, ratio in self.ratios.items() if ratio > 0}
        counts = step_counts(ratios, self._knobs.prompts, self._seed, step)
        drawn: list[Row] = []
        for name, count in counts.items():
            places: Sequence[int] = draw_prompts(
                state, name, self._ids[name], count, step, total_steps, self._seed, self._knobs
            )
            drawn += [self.rows[name][place] for place in places]
        return drawn


def _rows(name: str, key: str, environment: EnvironmentConfig, count: int, seed: int) -> list[Row]:
    if not environment.rows:
        return rows_of_levels(name, Split.train, seed, count, environment.level)
    found = [row for row in read_rows(Path(environment.rows), name) if row.environment == name]
    if not found:
        raise ConfigError(f"environments.{key}.rows={environment.rows}: has no row of {name}")
    return found
