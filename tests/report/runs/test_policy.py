"""Runs that trained on rollouts: their table, their picture and their last line.

Second truth: arithmetic by hand on made-up metrics. Not covered: the look of the picture, which a
person has checked.
"""

from pathlib import Path

import pytest
import yaml
from PIL import Image
from rich.console import Console

from nemotron_train.cli.main import main
from nemotron_train.report.gap.pairs import config_of, find_pairs
from nemotron_train.report.plot.reward import plain, plot_reward
from nemotron_train.report.runs.policy import closing_line, environments_of, is_policy
from nemotron_train.report.runs.read import read_run
from nemotron_train.report.runs.table import print_runs, run_tables, summarize_policy
from nemotron_train.run import finish
from nemotron_train.run_folder.folder import RunFolder
from tests.report.made_up import make_run
from tests.report.made_up_policy import make_policy_run


def test_the_row_of_a_policy(tmp_path: Path) -> None:
    """Reward s/30 in step s: 20.5/30 over the steps 11 to 30. Half as much passed."""
    run = read_run(make_policy_run(tmp_path / "a"))
    assert summarize_policy(run) == [
        "a", "30", "0.683", "0.033, 1.000", "34.2", "1.7, 50.0", "21.0", "1.00", "1.0e-03", "going",
    ]  # fmt: skip
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 1, "tokens": 9, "reward": null}\n')
    assert summarize_policy(read_run(tmp_path / "b"))[1:-1] == ["1", *["-"] * 7]


def test_the_configuration_tells_the_kind_and_then_the_metrics(tmp_path: Path) -> None:
    policy, other = make_policy_run(tmp_path / "a"), make_run(tmp_path / "b")
    for folder, wanted in ((policy, True), (other, False)):
        run = read_run(folder)
        assert is_policy(run, config_of(run)) == is_policy(run, None) == wanted
    (policy / "metrics.jsonl").write_text('{"step": 1, "tokens": 9, "loss": 0.5}\n')
    run = read_run(policy)
    assert is_policy(run, config_of(run)), "its rewards were not finite, and it is a policy still"


def test_both_kinds_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two tables, each run in one of them, and each kind with its own pictures. One run of a kind
    has no picture of several."""
    for name in ("p1", "p2"):
        make_policy_run(tmp_path / name)
    make_run(tmp_path / "d1", num_steps=3)
    assert main(["report", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    [data] = [n for n, line in enumerate(lines) if "unigram entropy" in line]
    [policy] = [n for n, line in enumerate(lines) if "passed %" in line]
    for name, begin, end in (("d1", data, policy), ("p1", policy, len(lines))):
        rows = [n for n, line in enumerate(lines) if line.startswith(f"│ {name} ")]
        assert len(rows) == 1 and begin < rows[0] < end
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png")}
    assert found == {"rewards.png", "p1/reward.png", "p2/reward.png", "d1/loss.png"}


def test_policies_alone_have_no_table_of_losses(tmp_path: Path) -> None:
    runs = [read_run(make_policy_run(tmp_path / "a"))]
    console = Console(width=120, record=True)
    print_runs(run_tables(["a"], runs, [True]), console)
    text = console.export_text()
    assert "reward" in text and "unigram" not in text and "validation" not in text


def test_the_losses_of_policies_are_not_compared(tmp_path: Path) -> None:
    """Two plans of one seed: a gap for runs on data (grpo.steps=0), none for policies."""
    for steps, count in ((0, 1), (100, 0)):
        plans = ("precision=bf16", "precision=nvfp4_all")
        folders = [
            make_policy_run(tmp_path / f"{steps}{plan}", plan, grpo_steps=steps) for plan in plans
        ]
        assert len(find_pairs([read_run(folder) for folder in folders])) == count


def test_picture_of_rewards(tmp_path: Path) -> None:
    """The colours of the reward, of both environments and of the groups. A dollar is no formula,
    and a name with an underscore is in the legend."""
    folder = make_policy_run(tmp_path / "made $x_{$", names=("_a $y^{$", "b"))
    assert plot_reward(folder) == folder / "reward.png"
    with Image.open(folder / "reward.png") as image:
        assert image.size == (1200, 1125)
        colours = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=1 << 20) or []}
    assert {(0x08, 0x51, 0x9C), (0x31, 0xA3, 0x54), (0xFD, 0xAE, 0x6B), (0xD9,) * 3} <= colours
    assert {(0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)} <= colours, "C0 and C1"
    assert plain("_a $y$") == r"a \$y\$"
    assert environments_of(read_run(folder)) == ["_a $y^{$", "b"]


@pytest.mark.parametrize("line", ['"reward": 0.5', '"loss": 0.5'])
def test_picture_of_one_step_or_none_with_a_reward(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "tokens": 9, {line}}}\n')
    assert plot_reward(tmp_path).is_file()


def test_the_end_of_a_run(tmp_path: Path) -> None:
    """What a run says and draws at its end: a policy its rewards, any other its loss."""

    def folder_of(path: Path) -> RunFolder:
        return RunFolder(path, "an id", is_new=False)

    console = Console(width=200, record=True)
    summary = {"finished": True, "validation_loss": 3.0, "unigram_entropy": 6.0}
    finish(folder_of(make_policy_run(tmp_path / "a")), summary, console, on_rollouts=True)
    text = console.export_text()
    assert "reward 0.033 at step 1, 1.000 at step 30" in text and "reward.png" in text
    assert "entropy" not in text and "loss" not in text
    assert [path.name for path in (tmp_path / "a").glob("*.png")] == ["reward.png"]

    finish(folder_of(make_run(tmp_path / "b")), summary, console, on_rollouts=False)
    text = console.export_text()
    assert "validation loss 3.000 nats a token" in text and "loss.png" in text
    assert "reward" not in text

    stopped = {"finished": False, "step": 4, "stop_reason": "a signal"}
    finish(folder_of(tmp_path / "a"), stopped, console, on_rollouts=True)
    assert "stopped at step 4 (a signal)" in console.export_text()
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1, "tokens": 9}\n')
    assert closing_line(read_run(tmp_path / "a")) == "no reward was logged"


def test_a_folder_without_a_readable_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_policy_run(tmp_path / "a")
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"of_another_version": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["report", str(folder)]) == 0
    assert "passed %" in capsys.readouterr().out and (folder / "reward.png").is_file()
