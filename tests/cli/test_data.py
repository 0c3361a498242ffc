"""`data inspect` of names and texts that rich or a terminal would obey."""

import json
import unicodedata
from pathlib import Path

import pytest

from nemotron_train.cli.main import main
from nemotron_train.data.tokenize import train_tokenizer

NASTY = "[red]a[blink] :smile: [link] \x1b[31mb\x1b]0;t\x07 \u202ec"


def test_names_and_texts_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the summary, the samples, and the line of an error. Also with a newline in the name."""
    train_tokenizer([NASTY], 300, tmp_path / "tokenizer")
    inputs, output = tmp_path / f"in {NASTY}", tmp_path / f"out {NASTY}\n"
    inputs.mkdir()
    lines = [json.dumps({"text": f"{NASTY} {number}"}) for number in range(9)]
    (inputs / "a.jsonl").write_text("\n".join([*lines, "no JSON"]))
    words = ["data", "prepare", f"tokenizer={tmp_path}/tokenizer", "workers=1"]
    words += [f"input={inputs}", f"output={output}"]
    assert main(words) == 2
    assert main([*words, "on_bad=skip"]) == 0
    assert main(["data", "inspect", str(output)]) == 0
    bin_file = output / "train_00000.bin"
    bin_file.write_bytes(bin_file.read_bytes()[::-1])
    assert main(["data", "inspect", str(output)]) == 2
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        shown = r"[red]a[blink] :smile: [link] \x1b[31mb\x1b]0;t\x07 \u202ec"
        assert shown in text
        assert {c for c in text if unicodedata.category(c) in ("Cc", "Cf")} == {"\n"}
    assert len(printed.err.splitlines()) == 2
