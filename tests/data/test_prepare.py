"""`data prepare`: the output holds exactly the input documents, after any interruption."""

import gzip
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import pytest

from nemotron_train.cli.data import inspect, run_prepare
from nemotron_train.config.errors import ConfigError
from nemotron_train.data import prepare as prepare_module
from nemotron_train.data import readers
from nemotron_train.data.encode import is_held_out
from nemotron_train.data.indexed import ShardReader
from nemotron_train.data.inputs import find_inputs
from nemotron_train.data.manifest import Manifest, load_manifest
from nemotron_train.data.prepare import OnBad, PrepareConfig, Progress, prepare
from nemotron_train.data.readers import (
    InputFormat,
    Position,
    TextDocuments,
    read_files,
)
from nemotron_train.data.tokenize import load_tokenizer, train_tokenizer

TEXTS = [
    f"document {i}: " + "üñîcödé \u2028 and <|endoftext|> in the text\n" * (i % 7)
    for i in range(300)
]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_BATCH_BYTES", 2000)
    monkeypatch.setattr(readers, "_BATCH_ROWS", 16)
    monkeypatch.setattr(prepare_module, "_COMMIT_TOKENS", 1000)


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode()


def settings(tmp_path: Path, folder: Path, output: str = "out", **changes) -> PrepareConfig:
    given = {
        "input": str(tmp_path / "in"),
        "output": str(tmp_path / output),
        "tokenizer": str(folder),
        "validation_fraction": 0.2,
        "shard_tokens": 3000,
        "workers": 1,
    }
    return PrepareConfig(**{**given, **changes})


def read_back(folder: Path) -> dict[str, list[str]]:
    """The documents of each split, decoded. Each must end in exactly one end-of-document id."""
    manifest, loaded = load_manifest(folder), load_tokenizer(folder / "tokenizer")
    end = manifest.tokenizer.end_of_document_id
    texts = {"train": [], "validation": []}
    for name, split in manifest.splits.items():
        for entry in split.shards:
            shard = ShardReader(folder, entry.name)
            for i in range(shard.documents):
                ids = shard.document(i).tolist()
                assert ids.index(end) == len(ids) - 1
                texts[name].append(loaded.decode(ids[:-1]))
    return texts


def expected(texts: list[str]) -> dict[str, list[str]]:
    return {
        "train": [text for text in texts if not is_held_out(text, 0.2)],
        "validation": [text for text in texts if is_held_out(text, 0.2)],
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_inputs(folder: Path, kind: str) -> dict[str, object]:
    """Writes TEXTS as `kind`; returns the knobs that read them."""
    folder.mkdir()
    half = json_lines(TEXTS[:150]), json_lines(TEXTS[150:])
    if kind == "jsonl":
        (folder / "a.jsonl").write_bytes(half[0].removesuffix(b"\n"))
        (folder / "b.jsonl").write_bytes(half[1])
        (folder / ".hidden.jsonl").write_bytes(b"not read")
    elif kind == "gz and zst":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(half[0]))
        with pyarrow.CompressedOutputStream(str(folder / "b.jsonl.zst"), "zstd") as stream:
            stream.write(half[1])
    elif kind == "parquet":
        for name, texts in (("a", TEXTS[:150]), ("b", TEXTS[150:])):
            table = pyarrow.table({"id": list(range(len(texts))), "content": texts})
            pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=40)
        return {"text_field": "content"}
    elif kind == "dataset":
        (folder / "a.jsonl").write_bytes(half[0])
        (folder / "b.jsonl").write_bytes(half[1])
        return {"format": InputFormat.dataset}
    else:
        for i, text in enumerate(TEXTS):
            (folder / f"{i:03d}.txt").write_bytes(text.encode())
    return {}


KINDS = ["jsonl", "gz and zst", "parquet", "dataset", "text files"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_comes_back_in_order(tmp_path: Path, tokenizer_folder: Path, kind: str) -> None:
    """Second truth: the texts themselves. Not covered: data sets from the network."""
    knobs = write_inputs(tmp_path / "in", kind)
    manifest = prepare(settings(tmp_path, tokenizer_folder, **knobs))
    assert read_back(tmp_path / "out") == expected(TEXTS)
    for split in manifest.splits.values():
        *full, _ = split.shards
        assert all(shard.tokens <= 3000 for shard in split.shards) and full
        assert all(shard.tokens > 2000 for shard in full)  # the longest document has < 1000
    assert inspect(tmp_path / "out") is None


def test_lines_of_text_are_documents_by_a_knob(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo \xe2\x80\xa8 three\nlast")
    config = settings(
        tmp_path,
        tokenizer_folder,
        input=str(tmp_path / "*.txt"),
        text_documents=TextDocuments.line,
        validation_fraction=0.0,
    )
    prepare(config)
    assert read_back(tmp_path / "out")["train"] == ["one", "two \u2028 three", "last"]


def test_packages_are_documents_by_a_knob(tmp_path: Path, tokenizer_folder: Path) -> None:
    for name, text in {
        "one/b.py": "b = 1",
        "one/a/c.py": "\ufeffc = 2\n",
        "two.py": "alone\n",
        "zip/x.py": "x\n",
        "zip/y.txt": "y",
    }.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    config = settings(
        tmp_path,
        tokenizer_folder,
        text_documents=TextDocuments.package,
        validation_fraction=0.0,
    )
    prepare(config)
    expected_texts = ["c = 2\nb = 1\n", "alone\n", "x\ny\n"]
    assert read_back(tmp_path / "out")["train"] == expected_texts
    # With a pattern, packages lie below the deepest folder that holds all files.
    pattern = str(tmp_path / "in/**/*.py")
    prepare(replace(config, input=pattern, output=str(tmp_path / "python"), workers=2))
    expected_texts[2] = "x\n"
    assert read_back(tmp_path / "python")["train"] == expected_texts
    # Reading that stops after any package continues with the same documents.
    for count in (1, 2):
        files = find_inputs(config.input, config.format).files
        partly = list(read_files(files, Position(), "", TextDocuments.package))
        rest = read_files(files, partly[count - 1].after, "", TextDocuments.package)
        assert list(rest) == partly[count:]
    (tmp_path / "in/rows.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"text_documents=package: .*rows.jsonl is jsonl"):
        prepare(replace(config, output=str(tmp_path / "bad")))


def test_the_number_of_workers_changes_nothing(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_inputs(tmp_path / "in", "jsonl")
    prepare(settings(tmp_path, tokenizer_folder, "one"))
    prepare(settings(tmp_path, tokenizer_folder, "three", workers=3))
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_again_and_again_it_ends_with_the_same_bytes(
    tmp_path: Path, tokenizer_folder: Path, kind: str
) -> None:
    """Stopped after every few batches until it is done. Data that the stopped writers still add to
    their files after the last commit must be dropped. A real kill has its own test."""
    knobs = write_inputs(tmp_path / "in", kind)
    prepare(settings(tmp_path, tokenizer_folder, "whole", **knobs))
    attempts = 0
    while not (tmp_path / "out").exists():
        left = 60 if kind == "text files" else 5

        def stop(progress: Progress) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Interrupted

        try:
            prepare(settings(tmp_path, tokenizer_folder, **knobs), stop)
        except Interrupted:
            attempts += 1
            assert not (tmp_path / "out").exists()
    assert attempts > 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


KILLED = """
import sys
from pathlib import Path
from nemotron_train.data import prepare, readers
readers._BATCH_BYTES, prepare._COMMIT_TOKENS = 2000, 1000
def report(progress):
    print(progress.documents, flush=True)
if __name__ == "__main__":
    folder = sys.argv[1]
    prepare.prepare(prepare.PrepareConfig(
        input=folder + "/in", output=folder + "/out", train_tokenizer_vocab_size=280,
        validation_fraction=0.2, shard_tokens=3000, workers=2,
    ), report)
"""


def test_killed_with_its_workers_the_same_command_continues(tmp_path: Path) -> None:
    """SIGKILL while it writes, then the same settings in this process and with one worker. Not
    covered: loss of power."""
    write_inputs(tmp_path / "in", "jsonl")
    script = tmp_path / "program.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(tmp_path)]
    workers: list[psutil.Process] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if int(line) > 100:
                workers = psutil.Process(process.pid).children()
                process.send_signal(signal.SIGKILL)
                break
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=20)[1], "workers outlive their parent"
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    reported: list[int] = []
    for output in ("out", "whole"):
        config = settings(tmp_path, tmp_path, output, tokenizer="", train_tokenizer_vocab_size=280)
        prepare(config, lambda progress: reported.append(progress.documents))
        assert (reported[0] > 50) == (output == "out")  # only the killed output continues
        reported.clear()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_at_the_very_end_it_only_tidies_up(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path / "in", "jsonl")
    config = settings(tmp_path, tokenizer_folder)
    prepare(settings(tmp_path, tokenizer_folder, "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "remove_working_files", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(config)
    prepare(config)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


BAD = {
    "not json": (b'{"text": "cut', "Unterminated"),
    "no object": (b"[1]", "not a JSON object"),
    "no field": (b'{"txt": "a"}', "no field 'text'"),
    "no text": (b'{"text": null}', "'text' is NoneType"),
    "not utf-8": (b'{"text": "\xff"}', "not UTF-8"),
    "half a surrogate": (b'{"text": "\\ud800"}', "surrogates"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_record_stops_or_is_left_out(
    tmp_path: Path, tokenizer_folder: Path, bad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names file and line. The same command with on_bad=skip then continues."""
    record, reason = BAD[bad]
    (tmp_path / "in").mkdir()
    lines = json_lines(TEXTS).splitlines(keepends=True)
    lines.insert(200, record + b"\n")
    lines.insert(250, b"\n")
    (tmp_path / "in" / "a.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(ConfigError, match=rf"a\.jsonl:201: .*{reason}.*on_bad=skip"):
        prepare(settings(tmp_path, tokenizer_folder))
    run_prepare(settings(tmp_path, tokenizer_folder, on_bad=OnBad.skip))
    output = capsys.readouterr().out
    assert "1 bad records, 1 empty ones" in output and "a.jsonl:201" in output
    assert read_back(tmp_path / "out") == expected(TEXTS)


def test_max_documents_stops_exactly(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_inputs(tmp_path / "in", "jsonl")
    prepare(settings(tmp_path, tokenizer_folder, max_documents=77))
    assert read_back(tmp_path / "out") == expected(TEXTS[:77])


def test_finished_output_is_reused_and_nothing_is_overwritten(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    write_inputs(tmp_path / "in", "jsonl")
    config = settings(tmp_path, tokenizer_folder)
    first = prepare(config)

    def untouched(progress: Progress) -> None:
        raise AssertionError("it read the input again")

    assert prepare(config, untouched) == first
    with pytest.raises(ConfigError, match=r"output=.*other settings"):
        prepare(settings(tmp_path, tokenizer_folder, shard_tokens=99))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    with pytest.raises(ConfigError, match=r"output=.*mine: exists and is no prepared data"):
        prepare(settings(tmp_path, tokenizer_folder, "mine"))


def test_an_unfinished_output_of_other_settings_is_refused(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    write_inputs(tmp_path / "in", "jsonl")

    def stop(progress: Progress) -> None:
        if progress.documents > 100:
            raise Interrupted

    with pytest.raises(Interrupted):
        prepare(settings(tmp_path, tokenizer_folder), stop)
    with pytest.raises(ConfigError, match=r"unfinished preparation with other settings \(shard_"):
        prepare(settings(tmp_path, tokenizer_folder, shard_tokens=99))


def test_wrong_settings_are_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("hello")

    def refused(message: str, **changes) -> None:
        with pytest.raises(ConfigError, match=message):
            prepare(settings(tmp_path, tokenizer_folder, **changes))

    refused("give exactly one", tokenizer="")
    refused("give exactly one", train_tokenizer_vocab_size=300)
    refused("validation_fraction=1", validation_fraction=1.0)
    refused("workers=0", workers=0)
    refused("shard_tokens=0", shard_tokens=0)
    refused("max_documents=-1", max_documents=-1)
    refused("input=.*nowhere: no file", input=str(tmp_path / "nowhere"))
    refused(r"tokenizer\.json: missing", tokenizer=str(tmp_path))
    refused(r"end_of_document_token='</s>': .*<\|endoftext\|>", end_of_document_token="</s>")
    refused("at least 265", tokenizer="", train_tokenizer_vocab_size=256)
    (tmp_path / "tokenizer.json").write_text("{}")
    refused(r"tokenizer\.json: not a tokenizer", tokenizer=str(tmp_path))
    (tmp_path / "in" / "a.txt").write_text("")
    refused("holds no document with text", output=str(tmp_path / "other"))
    (tmp_path / "in" / "a.txt").write_bytes(b"\xff\xfe")
    refused(r"a\.txt: not UTF-8", output=str(tmp_path / "third"))
    (tmp_path / "p.parquet").write_bytes(b"x" * 20)
    refused(r"p\.parquet: not a Parquet file", input=str(tmp_path / "p.parquet"))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "q.parquet")
    refused(r"text_field=text: .*q\.parquet; it has body", input=str(tmp_path / "q.parquet"))
    (tmp_path / "g.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS))[:-300])
    refused(r"g\.jsonl\.gz: cannot be read", input=str(tmp_path / "g.jsonl.gz"))
    missing = {"input": str(tmp_path / "no"), "output": str(tmp_path / "fourth")}
    refused("cannot be made", output=str(tmp_path / "in" / "a.txt" / "out"))
    refused("`datasets` cannot open", format=InputFormat.dataset, **missing)


def test_two_at_once_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_inputs(tmp_path / "in", "jsonl")
    config = settings(tmp_path, tokenizer_folder)

    def again(progress: Progress) -> None:
        with pytest.raises(ConfigError, match="another process is at work"):
            prepare(config)

    prepare(config, again)


def test_tokenizer_sees_training_documents_only(tmp_path: Path) -> None:
    """Second truth: training on exactly those texts. Validation documents must not shape the
    vocabulary."""
    write_inputs(tmp_path / "in", "jsonl")
    config = settings(tmp_path, tmp_path, tokenizer="", train_tokenizer_vocab_size=400)
    manifest: Manifest = prepare(config)
    split = expected(TEXTS)
    ours = train_tokenizer(split["train"], 400, tmp_path / "mine")
    assert manifest.tokenizer.sha256 == ours.sha256
    everything = train_tokenizer([*split["train"], *split["validation"]], 400, tmp_path / "all")
    assert everything.sha256 != ours.sha256, "these texts would show it"


@pytest.mark.parametrize("seed", range(12))
def test_inspect_finds_any_flipped_bit(tmp_path: Path, tokenizer_folder: Path, seed: int) -> None:
    """One flipped bit anywhere in a shard or its index. The message names the file."""
    import random

    write_inputs(tmp_path / "in", "jsonl")
    prepare(settings(tmp_path, tokenizer_folder))
    random.seed(seed)
    files = [p for p in sorted((tmp_path / "out").iterdir()) if p.suffix in (".bin", ".idx")]
    victim = random.choice(files)
    content = bytearray(victim.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    victim.write_bytes(content)
    problem = inspect(tmp_path / "out", samples=1)
    assert problem is not None and victim.stem in problem


def test_memory_does_not_grow_with_the_input(tmp_path: Path, tokenizer_folder: Path) -> None:
    """32 times the input uses at most 20 MB more. Not covered: huge single documents, which must
    fit in memory."""
    program = (
        "import resource, sys\n"
        "from nemotron_train.data.prepare import *\n"
        "prepare(PrepareConfig(input=sys.argv[1], output=sys.argv[2], tokenizer=sys.argv[3],"
        " workers=1, shard_tokens=200_000))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = []
    for repeat in (4, 128):
        path = tmp_path / f"{repeat}.jsonl"
        path.write_bytes(json_lines(TEXTS) * repeat)
        output = tmp_path / f"out{repeat}"
        command = [sys.executable, "-c", program, str(path), str(output), str(tokenizer_folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 20_000


def test_progress_reaches_the_end(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_inputs(tmp_path / "in", "jsonl")
    seen: list[tuple[int, int]] = []
    prepare(
        settings(tmp_path, tokenizer_folder),
        lambda progress: seen.append((progress.bytes_read, progress.bytes_total)),
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] > 0
