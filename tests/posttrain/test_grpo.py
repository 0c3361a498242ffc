"""Reinforcement learning end to end, on a model that says yes or no.

Second truths: the uninterrupted run, bit for bit; the same step in other micro-batches; the sampler
against the trainer. The formulas have their proofs in test_enumeration.py. Not covered here:
several ranks (tests/distributed/test_grpo.py), real environments' rewards.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_train.cli.main import main
from nemotron_train.config.errors import ConfigError
from tests.posttrain.yes_no import GRPO, YES, make_warm, rollouts

pytestmark = pytest.mark.usefixtures("in_small_run")

Small = tuple[Path, list[str]]
Metrics = Callable[[Path], list[dict]]
Weights = Callable[[Path, int], dict]


@pytest.fixture(scope="module", autouse=True)
def warm(small_run: Small) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(small_run[0])
        yield make_warm(small_run[1], "grpo")


def policy(metrics: Metrics, name: str) -> list[dict]:
    return [row for row in metrics(Path("runs") / name) if "reward" in row]


@pytest.fixture(scope="module")
def whole(warm: str) -> str:
    assert main([*GRPO, warm, YES, "name=grpo_whole", "steps=6"]) == 0
    return "grpo_whole"


def test_the_policy_learns_what_is_rewarded(whole: str, metrics: Metrics) -> None:
    """From about half to nearly always. Nothing is masked, and the contract holds."""
    rows = policy(metrics, whole)
    assert len(rows) == 6
    assert 0.1 < rows[0]["pass"] < 0.8, rows[0]["pass"]
    assert rows[-1]["pass"] > rows[0]["pass"] + 0.15
    for row in rows:
        assert row["masked_tokens"] == row["masked_sequences"] == 0
        assert row["logprob_gap_max"] < 1e-4
        assert row["ratio_min"] == row["ratio_max"] == 1


def test_a_rollout_file_tells_the_step(whole: str, metrics: Metrics) -> None:
    """Reward, pass rate and advantages of the metrics are those of the written rollouts; only
    sampled tokens have log-probabilities, and trainer and sampler agree on each."""
    row = policy(metrics, whole)[2]
    found = rollouts(whole, 3)
    assert len(found) == 24
    assert row["reward"] == pytest.approx(np.mean([r["score"]["reward"] for r in found]))
    groups: dict[int, list[dict]] = {}
    for rollout in found:
        groups.setdefault(rollout["group"], []).append(rollout)
    for samples in groups.values():
        rewards = np.array([r["score"]["reward"] for r in samples])
        wanted = rewards - rewards.mean()
        assert [r["advantage"] for r in samples] == pytest.approx(wanted.tolist())
    for rollout in found:
        assert rollout["kinds"] == [["s", len(rollout["ids"])]]
        sampler, trainer = rollout["log_probabilities"], rollout["trainer_log_probabilities"]
        assert sampler == pytest.approx(trainer, abs=1e-4)
        assert rollout["policy_version"] == 2
        assert rollout["sequence"] == 2 * 24 + rollout["group"] * 6 + rollout["sample"]


@pytest.mark.parametrize(("lag", "place"), [(0, "update"), (0, "files"), (1, "files")])
def test_an_interrupted_run_equals_an_uninterrupted_one(
    lag: int,
    place: str,
    warm: str,
    metrics: Metrics,
    weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in step 4 between the rollouts and the update, or between the files of rollouts and of
    the curriculum: metrics, weights and files are bit for bit those of one run."""
    from nemotron_train.posttrain.rollout_files import RolloutFiles
    from nemotron_train.train.train_step import TrainStep

    words = [*GRPO, warm, YES, f"lag={lag}", "steps=5"]
    one, other = f"grpo_one_{lag}_{place}", f"grpo_other_{lag}_{place}"
    assert main([*words, f"name={one}"]) == 0

    class Killed(BaseException):
        pass

    update, observe = TrainStep._update_weights, RolloutFiles.observe

    def killed_update(self: Any, *rest: Any) -> float:
        if self.step == 4 and place == "update":
            raise Killed
        return update(self, *rest)

    def killed_observe(self: Any, step: int, *rest: Any) -> None:
        if step == 4 + lag and place == "files":
            raise Killed
        observe(self, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainStep, "_update_weights", killed_update)
        patch.setattr(RolloutFiles, "observe", killed_observe)
        main([*words, f"name={other}"])
    assert rollouts(other, 4)
    assert main(["posttrain", "grpo", f"resume=runs/{other}"]) == 0
    assert policy(metrics, one) == policy(metrics, other)
    assert weights(Path(f"runs/{one}"), 5) == weights(Path(f"runs/{other}"), 5)
    for folder, count in (("rollouts", 5), ("curriculum", 2)):
        ours, theirs = (
            {path.name: path.read_bytes() for path in Path(f"runs/{run}/{folder}").iterdir()}
            for run in (one, other)
        )
        assert ours == theirs and len(ours) >= count
    versions = [rollouts(one, step)[0]["policy_version"] for step in range(1, 6)]
    assert versions == ([0, 0, 1, 2, 3] if lag else [0, 1, 2, 3, 4])
    means = [row["rate_mean"] for row in policy(metrics, one)]
    assert means == pytest.approx([0.8, 0.65, 0.5, 0.35, 0.2])


def test_rollouts_of_one_step_before_must_be_there(
    warm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Newer weights would give others, so a resumed run refuses to sample them again."""
    words = [*GRPO, warm, YES, "lag=1", "steps=5", "name=grpo_lost", "train.stop_after_steps=2"]
    assert main(words) == 3
    Path("runs/grpo_lost/rollouts/step_00000003.jsonl.gz").unlink()
    assert main(["posttrain", "grpo", "resume=runs/grpo_lost"]) == 2
    assert "step_00000003.jsonl.gz: is missing" in capsys.readouterr().err


def test_what_is_not_trained_does_not_move(warm: str, weights: Weights, metrics: Metrics) -> None:
    """Routers are frozen in a run that learns. A constant reward moves nothing but the block of
    multi-token prediction, which learns from all rollouts."""
    always = YES.replace(":yes'", ":always'")
    assert main([*GRPO, warm, always, "name=grpo_always", "steps=2"]) == 0
    assert main([*GRPO, warm, YES, "name=grpo_moves", "steps=2"]) == 0
    for name, frozen in (("grpo_always", ""), ("grpo_moves", ".router.weight")):
        before, after = (weights(Path(f"runs/{name}"), step) for step in (0, 2))
        parts = {
            part: [
                key
                for key in before
                if not key.startswith(("optimizer", "progress", "chained"))
                and ("mtp" in key) == (part == "mtp")
                and "expert_bias" not in key
                and isinstance(before[key], bytes)
            ]
            for part in ("mtp", "policy")
        }
        still = [key for key in parts["policy"] if frozen in key]
        assert still and all(before[key] == after[key] for key in still)
        assert any(before[key] != after[key] for key in parts["mtp"])
        if frozen:
            assert any(before[key] != after[key] for key in parts["policy"])
    assert {row["groups_trivial"] for row in policy(metrics, "grpo_always")} == {1.0}


def test_a_sampler_with_other_weights_stops_the_run(
    warm: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One weight of the sampler differs by 1 %. The line names rollout, position and token; the
    checkpoint of before and the rollouts stay."""
    from nemotron_train.posttrain.policy_supply import PolicySupply

    sample = PolicySupply._sample

    def with_other_weights(self: Any, *rest: Any) -> Any:
        weight = self._trainer.chunks[0].module.output_layer.weight
        with torch.no_grad():
            weight.mul_(1.01)
            found = sample(self, *rest)
            weight.div_(1.01)
        return found

    monkeypatch.setattr(PolicySupply, "_sample", with_other_weights)
    assert main([*GRPO, warm, YES, "name=grpo_contract", "steps=2"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 1: trainer and sampler disagree by" in line
    assert "of rollout" in line and "contract_bound is 0.001" in line
    assert rollouts("grpo_contract", 1)


def test_healing_trains_the_drafts_alone(warm: str, weights: Weights, metrics: Metrics) -> None:
    """Every weight of the policy and its routers' biases stay, bit for bit; the block's move. Not
    covered: whether more drafts are accepted, which docs/grpo.md measures."""
    words = [*GRPO[2:], warm, YES, "name=grpo_healed", "steps=2", "train.keep_checkpoints=9"]
    assert main(["posttrain", "heal", *words]) == 0
    before, after = (weights(Path("runs/grpo_healed"), step) for step in (0, 2))
    still = [key for key in before if key.startswith(("decoder", "embedding", "output_layer"))]
    assert any("expert_bias" in key for key in still)
    assert len(still) > 20 and all(before[key] == after[key] for key in still)
    rows = policy(metrics, "grpo_healed")
    moved = [key for key in before if key.startswith("mtp") and before[key] != after[key]]
    assert len(moved) > 5
    assert {row["loss"] for row in rows} == {0.0}
    assert all(0 < row["mtp_acceptance_1"] <= 1 for row in rows)


def test_ids_that_no_tokenizer_has_get_no_probability(small_run: Small, metrics: Metrics) -> None:
    """A hardly trained model with 64 ids more than its tokenizer would give them a tenth of the
    probability. The sampler never draws them, and the contract holds."""
    words = [*small_run[1], "model.vocab_size=576", "name=grpo_wide"]
    assert main(["pretrain", *words]) == 0
    words = [*GRPO, "branch=runs/grpo_wide@10", YES, "name=grpo_wide_policy", "steps=1"]
    assert main(words) == 0
    (row,) = policy(metrics, "grpo_wide_policy")
    assert row["logprob_gap_max"] < 1e-4


def test_several_updates_on_the_same_rollouts(warm: str, metrics: Metrics) -> None:
    """The second update of a round sees the ratio of the policy that the first one moved."""
    words = [*GRPO, warm, YES, "updates=2", "ratio=clipped", "steps=4", "name=grpo_updates"]
    assert main(words) == 0
    rows = policy(metrics, "grpo_updates")
    assert [row["reward"] for row in rows][::2] == [row["reward"] for row in rows][1::2]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["ratio_min"] == pytest.approx(1, abs=1e-4)
        assert second["ratio_max"] - second["ratio_min"] > 1e-3
    assert sorted(path.name for path in Path("runs/grpo_updates/rollouts").iterdir()) == [
        f"step_{step:08}.jsonl.gz" for step in (1, 3)
    ]


def test_the_update_does_not_depend_on_micro_batches(warm: str, metrics: Metrics) -> None:
    """Rows alone or four together: the same loss and gradient up to the order of sums."""
    four, alone = "grpo_four", "grpo_alone"
    assert main([*GRPO, warm, YES, f"name={four}", "steps=1"]) == 0
    assert (
        main([*GRPO, warm, YES, "train.micro_batch_sequences=1", f"name={alone}", "steps=1"]) == 0
    )
    (one,), (other,) = policy(metrics, four), policy(metrics, alone)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)


BAD = {
    "prompts=0": "prompts=0: give 1 or more",
    "samples=1": "samples=1: give 2 or more",
    "steps=0": "steps=0: give 1 or more",
    "lag=2": "lag=2: give 0, or 1",
    "updates=2": "needs ratio=clipped",
    "objective=cispo": "objective=cispo with ratio=forced",
    "max_new_tokens=64": "must be below train.sequence_length=64",
    "parallel.tensor=2": "must be whole on each rank",
    "environments={mine: {}}": "environment mine: there are",
    "environments={tools: {ratio: 0}}": "no ratio is above 0",
    "environments={tools: {level: 9}}": "environments.tools.level=9",
    "environments={mine: {use: 'none.py:f', rows: grpo_tasks.jsonl}}": "none.py: no such file",
    "drafts=maybe": "drafts",
    "prompt=3": "there is no such knob",
}


@pytest.mark.parametrize("word", BAD)
def test_mistakes_are_one_line(word: str, warm: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line that says what is wrong; no run folder is left behind."""
    environments = [] if word.startswith("environments") else [YES]
    assert main([*GRPO, warm, *environments, "name=grpo_bad", "steps=2", word]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert BAD[word] in lines[-1], lines
    assert not Path("runs/grpo_bad").exists()


def test_pretrain_does_not_go_on_with_a_policy(
    whole: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would train on the data of the warm start."""
    assert main(["pretrain", f"resume=runs/{whole}"]) == 2
    assert "trains on rollouts" in capsys.readouterr().err


def test_without_a_checkpoint_the_embedded_default_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pretrain`, `posttrain warm`, then the policy from the newest checkpoint. A part that does
    not end well ends all. The three runs themselves are stood in for."""
    from nemotron_train.posttrain import grpo as module

    monkeypatch.chdir(tmp_path)
    done: list[str] = []
    codes = {"tiny": 0, "warm": 3}

    def run(name: str, step: int) -> int:
        done.append(name)
        Path(f"runs/{name}/checkpoints/step_{step:08}").mkdir(parents=True, exist_ok=True)
        return codes.get(name, 0)

    def composed(words: list[str], *unused: Any) -> Any:
        done.append(" ".join(words))
        return words

    monkeypatch.setattr(module, "pretrain", lambda config: run("tiny", 128))
    monkeypatch.setattr(module, "warm", lambda words, say: done.append(words[0]) or run("warm", 9))
    monkeypatch.setattr(module, "compose_config", composed)
    monkeypatch.setattr(module, "_with_defaults", lambda words, given: words)
    monkeypatch.setattr(module, "check_grpo", lambda config: None)
    monkeypatch.setattr(module, "_run", lambda config: 0)
    assert module.grpo(["steps=4"]) == 3
    codes["warm"] = 0
    assert module.grpo(["steps=4"]) == 0
    wanted = ["name=tiny", "tiny", "branch=runs/tiny@128", "warm"]
    assert done == [*wanted, *wanted, "grpo.steps=4 branch=runs/warm@9 name=policy"]
    with pytest.raises(ConfigError, match=r"with model.hidden_size, give branch"):
        module.grpo(["model.hidden_size=64"])
