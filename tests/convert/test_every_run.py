"""Every verb that takes a run takes every kind of run: trained, imported, merged, merged from an
import, branched from a merge. One that has just begun is one line.

Only whether the verbs end as they should. Their results have tests of their own. Without
the other `evaluate` verbs, which open a checkpoint as `evaluate loss` does. Branches of trained and
imported runs are in tests/run_folder and hugging_face.
"""

import shutil
from pathlib import Path

import pytest

from nemotron_train.cli.main import main

pytestmark = pytest.mark.usefixtures("in_small_run")

DATA = ["data.phases=[{from_tokens: 0, blend: [{path: data, weight: 1.0}]}]"]
DATA += ["data.validation=[{path: data, weight: 1.0}]", "data.tokenizer=data/tokenizer"]
SHORT = ["train.stop_after_steps=1", "train.sequence_length=64", "train.global_batch_tokens=256"]
SHORT += ["train.micro_batch_sequences=4", "train.validation_tokens=512"]
KINDS = {
    "trained": "runs/kind_trained@1",
    "imported": "runs/kind_imported@0",
    "merged": "runs/kind_merged@1",
    "merged from an import": "runs/kind_merged_import@0",
    "branched from a merge": "runs/kind_branch@2",
    "branched from a merge of an import": "runs/kind_import_branch@1",
}
UNTRAINED = ("imported", "merged", "merged from an import")


@pytest.fixture(scope="module")
def kinds(small_run: tuple[Path, list[str]]) -> None:
    """A run of every kind, each made from the one before."""

    def run(*words: str, code: int = 0) -> None:
        assert main(list(words)) == code, words

    words = [*small_run[1], *SHORT, "precision=bf16"]
    run("pretrain", *words, "name=kind_trained", code=3)
    run("convert", "to-hf", KINDS["trained"], "--out", "kind_hf")
    run("convert", "from-hf", "kind_hf", "--out", "runs/kind_imported")
    run("convert", "merge", KINDS["trained"], "output=runs/kind_merged")
    run("convert", "merge", KINDS["imported"], "output=runs/kind_merged_import")
    run("pretrain", f"branch={KINDS['merged']}", "name=kind_branch", *SHORT, code=3)
    words = [f"branch={KINDS['merged from an import']}", "name=kind_import_branch"]
    run("pretrain", *words, *SHORT, *DATA, code=3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_verb_takes_it(kinds: None, kind: str, tmp_path: Path) -> None:
    run, folder = KINDS[kind], KINDS[kind].rpartition("@")[0]
    out = str(tmp_path / "out")
    tokenizer = ["--tokenizer", "data/tokenizer"] if "import" not in kind else []
    for words in (
        ["generate", run, "prompt=def f", "max_new_tokens=1"],
        ["generate", folder, "prompt=def f", "max_new_tokens=1"],
        ["evaluate", "loss", run, "data=data", "max_tokens=256", "sequence_length=64"],
        ["convert", "to-hf", run, "--out", out, *tokenizer],
        ["convert", "merge", run, f"output={out}_merged"],
        ["plan", f"resume={folder}", *DATA],
        ["report", folder, "--output", f"{out}.html"],
        ["report", "diff", folder, "runs/kind_trained"],
    ):
        expected = 0
        if words[0] == "report" and words[1] != "diff" and kind in UNTRAINED:
            expected = 2  # no step was trained there
        assert main(words) == expected, words


def test_one_that_has_just_begun_is_one_line(
    kinds: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begun, out = "runs/kind_begun", str(tmp_path / "out")
    shutil.copytree("runs/kind_trained", begun)
    shutil.rmtree(f"{begun}/checkpoints")
    Path(begun, "metrics.jsonl").write_text("")
    for words in (
        ["generate", begun, "prompt=x"],
        ["generate", f"{begun}@1", "prompt=x"],
        ["evaluate", "loss", begun, "data=data"],
        ["evaluate", "nll-by-position", begun, "data=data"],
        ["convert", "to-hf", f"{begun}@0", "--out", out],
        ["convert", "merge", f"{begun}@1", f"output={out}"],
        ["pretrain", f"branch={begun}@1", "name=kind_none"],
        ["report", begun, "--output", f"{out}.html"],
    ):
        capfd.readouterr()
        code, error = main(words), capfd.readouterr().err
        assert (code, error.count("\n")) == (2, 1), f"{words}: {error}"
    assert main(["plan", f"resume={begun}"]) == 0
    assert main(["report", "diff", begun, "runs/kind_trained"]) == 0
    shutil.rmtree(begun)
    assert not list(tmp_path.iterdir()) and not Path("runs/kind_none").exists()
