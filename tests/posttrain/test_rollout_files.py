"""The rollout files of a run, their metrics, and the pool of tasks.

Second truths: retention and means counted by hand; largest-remainder counts. Not covered: metrics
of several ranks and a resumed run (the tests of policy_supply).
"""

import math
from collections import Counter
from pathlib import Path

import pytest

from nemotron_train.config.environments import EnvironmentConfig
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.grpo import GrpoConfig
from nemotron_train.data.chat.messages import Message
from nemotron_train.posttrain.curriculum import CurriculumState
from nemotron_train.posttrain.environments.protocol import Score
from nemotron_train.posttrain.pool import Pool
from nemotron_train.posttrain.rollout_files import RolloutFiles
from nemotron_train.posttrain.rollout_metrics import rollout_metrics
from nemotron_train.posttrain.sandbox.verdict import Verdict
from tests.posttrain.rollouts import rollout

pytestmark = pytest.mark.usefixtures("groups")


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:13]) for path in folder.glob("step_*"))


def checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize("keep", [0, 2])
def test_what_a_resume_needs_stays(tmp_path: Path, keep: int) -> None:
    """The newest `keep` files stay, and all since the oldest checkpoint."""
    files = RolloutFiles(tmp_path, keep)
    checkpoint(tmp_path, 3)
    checkpoint(tmp_path, 6)
    for step in range(1, 9):
        files.write(step, [rollout([1], [2], group=step)])
        files.observe(step, step - 1, [("strings", f"row{step}", 4, 2)])
    assert steps(tmp_path / "rollouts") == ([3, 4, 5, 6, 7, 8] if keep else list(range(1, 9)))
    assert steps(tmp_path / "curriculum") == [3, 4, 5, 6, 7, 8]
    again = RolloutFiles(tmp_path, keep)
    assert again.exists(8) and not again.exists(9)
    assert again.curriculum(8).to_json() == files.curriculum(8).to_json()
    assert again.curriculum(0).to_json() == CurriculumState().to_json()
    assert again.curriculum(3).to_json() != again.curriculum(8).to_json()


def test_each_rank_reads_its_prompts(tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path, 0)
    files.write(1, [rollout([1], [2], group=group, sample=s) for group in range(5) for s in (0, 1)])
    parts = [[(r.group, r.sample) for r in files.read(1, rank, 2)] for rank in (0, 1)]
    assert parts[0] == [(g, s) for g in (0, 2, 4) for s in (0, 1)]
    assert parts[1] == [(g, s) for g in (1, 3) for s in (0, 1)]


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path, 0)
    with pytest.raises(ConfigError, match=r"step_00000004.jsonl.gz: is missing; the run cannot go"):
        files.read(4, 0, 1)
    with pytest.raises(ConfigError, match=r"step_00000004.json: cannot be read \(No such file"):
        files.curriculum(4)


def test_metrics_by_hand() -> None:
    fault = (Message("assistant", "", fault="a tool call is blank"),)
    timeout = Score(0.0, {}, Verdict.timeout, "")
    made = [
        rollout([1], [2, 3, 4], "ses", passed=True, thinking_tokens=1, answer_tokens=1),
        rollout([1], [2, 3, 4, 5], cut=True, environment="tools", turns=fault),
        rollout([1], [2], environment="tools", turns=fault, malformed_calls=2),
        rollout([1], [2, 3], "sf", score=timeout, forced_closes=1),
    ]
    found = rollout_metrics(made)
    wanted = {"pass": 1 / 4, "response_tokens_mean": 2.0, "response_tokens_max": 4}
    wanted |= {"thinking_tokens": 1 / 4, "answer_tokens": 1 / 4, "truncated": 1 / 4}
    wanted |= {"malformed": 1 / 4, "invalid_calls": 1 / 4, "forced_closes": 1 / 4, "turns": 1.0}
    wanted |= {"turns_reached": 0.0, "timeouts": 1 / 4, "errors": 1 / 4}
    wanted |= {"reward/strings": 1 / 2, "pass/strings": 1 / 2}
    wanted |= {"reward/tools": 0.0, "pass/tools": 0.0}
    assert found == pytest.approx(wanted)
    assert math.isnan(rollout_metrics([])["pass"])


def test_a_pool_draws_by_ratio_and_from_its_seed() -> None:
    environments = {"strings": EnvironmentConfig(ratio=3), "tools": EnvironmentConfig(ratio=1)}
    environments["arithmetic"] = EnvironmentConfig(ratio=0)
    knobs = GrpoConfig(environments=environments, prompts=8, pool=40)
    pool, again, other = Pool(knobs, 5), Pool(knobs, 5), Pool(knobs, 6)
    drawn = [pool.draw(CurriculumState(), step, 10) for step in range(3)]
    for rows in drawn:
        assert Counter(row.environment for row in rows) == {"strings": 6, "tools": 2}
        assert len({row.id for row in rows}) == 8
    assert [again.draw(CurriculumState(), step, 10) for step in range(3)] == drawn
    assert {row.id for row in drawn[0]} != {row.id for row in drawn[1]}
    assert [other.draw(CurriculumState(), step, 10) for step in range(3)] != drawn
    assert set(pool.rows) == {"strings", "tools"} and len(pool.rows["tools"]) == 40


def test_a_pool_refuses_rows_of_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"environment": "tools", "prompt": "get cat", "answer": "4"}\n')
    own = EnvironmentConfig(rows=str(path))
    with pytest.raises(ConfigError, match=r"environments.strings.rows=.*: has no row of strings"):
        Pool(GrpoConfig(environments={"strings": own}), 5)
