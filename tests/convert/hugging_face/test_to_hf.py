"""Conversion to Hugging Face and back, bit for bit; interrupted conversions that continue; memory;
bad folders.

Second truths: torch's own loader of distributed checkpoints; the weight layout written again with
loops; the uninterrupted conversion. One rank; tests/distributed/test_hugging_face.py has other
layouts. test_transformers.py checks that the function is the same. Not covered: a machine that
loses power.
"""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemotron_train.cli.main import main
from nemotron_train.convert.hugging_face import from_hf as from_hf_module
from nemotron_train.convert.hugging_face import to_hf as to_hf_module
from nemotron_train.run_folder import integrity
from tests.conftest import checkpoint_texts

pytestmark = pytest.mark.usefixtures("in_small_run")

Small = tuple[Path, list[str]]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained(small_run: Small) -> Path:
    """The checkpoint of step 3 of a BF16 run: parameters and FP32 masters differ."""
    words = ["name=for_hf", "precision=bf16", "train.stop_after_steps=3"]
    assert main(["pretrain", *small_run[1], *words]) == 3
    return Path("runs/for_hf/checkpoints/step_00000003")


@pytest.fixture(scope="module")
def both(trained: Path) -> tuple[Path, Path]:
    """The run exported in its own dtype, in a few shards, and in FP32."""
    words = ["convert", "to-hf", "runs/for_hf@3", "--shard-gib", "0.0001"]
    assert main([*words, "--out", "hf/bf16"]) == 0
    assert main([*words, "--out", "hf/fp32", "--dtype", "float32"]) == 0
    return Path("hf/bf16"), Path("hf/fp32")


def checkpoint_tensors(path: Path) -> Tensors:
    """Every tensor of a checkpoint, assembled by torch."""
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(saved.size, dtype=saved.properties.dtype)
        for name, saved in metadata.items()
        if isinstance(saved, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return found


def shards(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def split(stored: Tensors) -> tuple[Tensors, Tensors]:
    """The parameters and buffers alone, and the same with the optimizer's FP32 masters in place."""
    prefix = "optimizer.state.param."
    own = {name: t for name, t in stored.items() if not name.startswith("optimizer.")}
    return own, own | {k.removeprefix(prefix): t for k, t in stored.items() if k.startswith(prefix)}


def test_layout_of_weights_written_out_again(trained: Path, both: tuple[Path, Path]) -> None:
    """BF16 shards hold the parameters that the run computes with; FP32 shards hold the optimizer's
    masters. Every row is where it should be."""
    heads, groups, width = 4, 2, 16  # of attention, from SMALL_RUN in tests/conftest.py
    for folder, ours in zip(both, split(checkpoint_tensors(trained)), strict=True):
        theirs = shards(folder)
        assert torch.equal(theirs["lm_head.weight"], ours["output_layer.weight"])
        mixer = "decoder.layers.0.mixer"
        for name, letters in (("in_proj.weight", "zxBCt"), ("conv_bias", "xBC")):
            joined = torch.cat([ours[f"{mixer}.{name}.{letter}"] for letter in letters])
            their_name = name.replace("conv_bias", "conv1d.bias")
            assert torch.equal(theirs[f"backbone.layers.0.mixer.{their_name}"], joined)
        kernel = theirs["backbone.layers.0.mixer.conv1d.weight"]
        assert kernel.shape == (128, 1, 4)
        assert torch.equal(kernel[:64, 0], ours[f"{mixer}.conv_weight.x"])
        for name in ("A_log", "D", "dt_bias"):
            tensor = theirs[f"backbone.layers.0.mixer.{name}"]
            assert tensor.dtype == torch.float32 and torch.equal(tensor, ours[f"{mixer}.{name}"])
        qkv = ours["decoder.layers.3.self_attention.linear_qkv.weight"]
        row = 0
        for group in range(groups):
            for letter, count in (("q", heads // groups), ("k", 1), ("v", 1)):
                tensor = theirs[f"backbone.layers.3.mixer.{letter}_proj.weight"]
                for head in range(group * count, (group + 1) * count):
                    part = tensor[head * width : (head + 1) * width]
                    assert torch.equal(part, qkv[row : row + width]), (group, letter)
                    row += width
        assert row == len(qkv)
        for expert in (0, 5):
            stacked = ours["decoder.layers.1.mlp.experts.linear_fc2.weight"][expert]
            name = f"backbone.layers.1.mixer.experts.{expert}.down_proj.weight"
            assert torch.equal(theirs[name], stacked)
        bias = theirs["mtp.layers.1.mixer.gate.e_score_correction_bias"]
        assert bias.dtype == torch.float32 and bias.abs().max() > 0
        dtypes = {t.dtype for name, t in theirs.items() if name.endswith("weight")}
        assert dtypes == {qkv.dtype}


def test_shards_and_index(both: tuple[Path, Path]) -> None:
    for folder in both:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
        tensors = shards(folder)
        assert tensors.keys() == index["weight_map"].keys()
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert size == index["metadata"]["total_size"]
        for name in files:
            assert (folder / name).stat().st_size < 0.0001 * 2**30 + 20_000 or len(
                load_file(folder / name)
            ) == 1
    assert sorted(p.name for p in Path("hf").iterdir()) == ["bf16", "fp32"], "nothing beside them"


def test_back_again_is_bit_exact(trained: Path, both: tuple[Path, Path]) -> None:
    """Every tensor, read by torch's loader; a second export is equal byte for byte."""
    wanted = split(checkpoint_tensors(trained))
    for folder, ours in zip(both, wanted, strict=True):
        run = Path("runs") / f"back_{folder.name}"
        words = ["convert", "from-hf", str(folder), "--out", str(run), "--shard-gib", "0.0001"]
        assert main(words) == 0
        imported = run / "checkpoints" / "step_00000000"
        assert integrity.damage(imported) is None
        assert len(list(imported.glob("*.distcp"))) > 2
        back = checkpoint_tensors(imported)
        assert back.keys() == ours.keys()
        for name, tensor in back.items():
            assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), name
        size = sum(t.numel() * t.element_size() for t in back.values())
        stored = sum(path.stat().st_size for path in imported.glob("*.distcp"))
        assert stored < size + 3000 * 2 * len(shards(folder)), "no more than what is named"
        words = ["convert", "to-hf", f"{run}@0", "--out", f"{folder}_again"]
        assert main([*words, "--shard-gib", "0.0001"]) == 0
        again, before = content(Path(f"{folder}_again")), content(folder)
        fields, before_fields = (json.loads(files.pop("config.json")) for files in (again, before))
        assert again == before
        # The length of training rows is not a property of the weights.
        assert fields.pop("max_position_embeddings") == 256
        assert before_fields.pop("max_position_embeddings") == 64
        assert fields == before_fields


def test_a_run_goes_on_from_it(
    trained: Path, both: tuple[Path, Path], metrics: Callable[[Path], list[dict]]
) -> None:
    """A branch from the imported checkpoint holds the same weights, starts its data at the
    beginning, and trains. So does the imported run itself, if its configuration has data."""
    data = ["data.phases=[{from_tokens: 0, blend: [{path: data, weight: 1.0}]}]"]
    data.append("data.validation=[{path: data, weight: 1.0}]")
    short = ["train.stop_after_steps=2", "train.keep_checkpoints=9"]
    sizes = ["train.sequence_length=64", "train.global_batch_tokens=256"]
    sizes += ["train.micro_batch_sequences=4", "train.validation_tokens=512"]
    words = ["convert", "from-hf", str(both[0]), *sizes]
    assert main([*words, "--out", "runs/imported"]) == 0
    given = ["data=prepared", "data.tokenizer=data/tokenizer", *data]
    assert main([*words, "--out", "runs/with_data", *given]) == 0
    ours = split(checkpoint_tensors(trained))[0]
    branch = ["branch=runs/imported@0", "name=more", *data, *short]
    assert main(["pretrain", *branch]) == 3
    begun = checkpoint_tensors(Path("runs/more/checkpoints/step_00000000"))
    for name, tensor in ours.items():
        assert begun[name].dtype == tensor.dtype and torch.equal(begun[name], tensor), name
    assert main(["pretrain", "resume=runs/with_data", *short]) == 3
    again, other = (metrics(Path("runs") / name) for name in ("more", "with_data"))
    losses = [row["loss"] for row in again if "loss" in row]
    assert len(losses) == 2 and losses == [row["loss"] for row in other if "loss" in row]
    progress = json.loads(Path("runs/more/checkpoints/step_00000002/progress.json").read_text())
    assert progress["data"]["samples"] == 2 * 4
    assert main(["convert", "merge", "runs/imported@0", "output=runs/merged_import"]) == 0
    assert main(["generate", "runs/imported@0", "prompt=def f", "max_new_tokens=2"]) == 0


# Interrupted --------------------------------------------------------------------------------


def run_until_cut(
    words: list[str], module: Any, writer: str, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Runs the verb until `writer` has been called `after` times. Then a user interrupts it."""
    original, calls = getattr(module, writer), []

    def fail_later(*arguments: Any, **options: Any) -> Any:
        calls.append(writer)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, writer, fail_later)
        assert main(words) == 1


def test_export_goes_on_after_the_last_whole_shard(
    both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", "to-hf", "runs/for_hf@3", "--out", "hf_cut/x", "--shard-gib", "0.0001"]
    run_until_cut(words, to_hf_module, "write_safetensors", monkeypatch, after=3)
    assert not Path("hf_cut/x").exists()
    partial = Path("hf_cut/.x.partial")
    first, second, third = sorted(partial.glob("*.safetensors"))
    before = first.stat().st_mtime_ns, first.stat().st_ino
    second.write_bytes(second.read_bytes()[:-1])  # truncated
    data = bytearray(third.read_bytes())
    data[-1] ^= 1
    third.write_bytes(data)
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out.count("is there already") == 1
    kept = Path("hf_cut/x") / first.name
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == before
    assert content(Path("hf_cut/x")) == content(both[0])
    assert [path.name for path in Path("hf_cut").iterdir()] == ["x"]


def test_another_question_is_not_answered_with_old_shards(
    both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", "to-hf", "runs/for_hf@3", "--out", "hf_other/x", "--shard-gib", "0.0001"]
    run_until_cut(words, to_hf_module, "write_safetensors", monkeypatch, after=2)
    capsys.readouterr()
    assert main([*words, "--dtype", "float32"]) == 0
    assert "is there already" not in capsys.readouterr().out
    assert content(Path("hf_other/x")) == content(both[1])


def test_import_goes_on_after_the_last_whole_shard(
    both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def words(run: str) -> list[str]:
        return ["convert", "from-hf", str(both[0]), "--out", run, "--shard-gib", "0.0001"]

    assert main(words("runs/whole")) == 0
    run_until_cut(words("runs/cut"), from_hf_module, "_blocks", monkeypatch, after=60)
    partial = Path("runs/.cut.partial/checkpoints/.step_00000000.partial")
    made = sorted(partial.glob("*.distcp"), key=lambda path: path.stat().st_mtime_ns)
    assert len(made) > 2
    made[1].write_bytes(made[1].read_bytes()[:-1])
    capsys.readouterr()
    assert main(words("runs/cut")) == 0
    assert capsys.readouterr().out.count("is there already") == len(made) - 2
    cut, whole = (Path(f"runs/{name}/checkpoints/step_00000000") for name in ("cut", "whole"))
    assert integrity.damage(cut) is None
    expected = checkpoint_tensors(whole)
    assert all(torch.equal(t, expected[name]) for name, t in checkpoint_tensors(cut).items())
    assert not Path("runs/.cut.partial").exists() and not Path("runs/.cut.lock").exists()


MEMORY = """
import sys
from pathlib import Path
from rich.console import Console
from nemotron_train.compose.compose import compose_config
from nemotron_train.convert.hugging_face.from_hf import from_hf
from nemotron_train.convert.hugging_face.to_hf import to_hf

def resident(name):  # bytes; VmHWM is the peak, which clear_refs sets back
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))

kind, source, target, *overrides = sys.argv[1:]
config, console = compose_config(overrides), Console(quiet=True)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
if kind == "to":
    to_hf(source + "@1", Path(target), console, shard_bytes=2**26)
else:
    from_hf(Path(source), config, Path(target), console, shard_bytes=2**26)
print(resident("VmHWM") - before)
"""


def test_memory_is_a_few_tensors(tmp_path: Path) -> None:
    """A model of 140 MB whose largest tensor has 16 MB, in both directions."""
    from dataclasses import asdict

    import yaml

    from nemotron_train.compose.compose import compose_config
    from nemotron_train.config.knobs import to_plain
    from nemotron_train.convert.checkpoint_tensors import CheckpointWriter
    from nemotron_train.convert.hugging_face.mapping import our_shapes, weights

    overrides = ["model.pattern='MEME*E'", "model.hidden_size=256", "model.vocab_size=16384"]
    overrides += ["model.moe.experts=64", "model.moe.latent_size=0", "model.mtp.depths=0"]
    overrides += ["model.moe.expert_hidden_size=256", "data.tokenizer=data/tokenizer"]
    config = compose_config(overrides)
    final = integrity.step_folder(tmp_path / "run" / "checkpoints", 1)
    partial = integrity.partial_folder(final)
    partial.mkdir(parents=True)
    writer, total = CheckpointWriter(partial), 0
    for name, shape in our_shapes(weights(config.model)).items():
        writer.write(name, torch.full(shape, 0.5))
        total += writer.places[-1].length
    writer.finish()
    for name, text in checkpoint_texts(1, asdict(config.model)).items():
        (partial / name).write_text(text)
    integrity.commit(final, {}, lambda: None)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
    assert total > 128 * 2**20
    for kind, source, target in (("to", "run", "hf"), ("from", "hf", "back")):
        paths = [str(tmp_path / source), str(tmp_path / target)]
        command = [sys.executable, "-c", MEMORY, kind, *paths, *overrides]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 56 * 2**20, f"{kind}: {int(done.stdout) / 2**20:.0f} MiB"


# Bad input ----------------------------------------------------------------------------------


def refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["convert", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/for_hf"], "give RUN_FOLDER@STEP"),
        (["runs/none@3"], "no such run folder"),
        (["runs/for_hf@7"], "no checkpoint of step 7; it has 3"),
        (["runs/for_hf@3", "--dtype", "int4"], "--dtype"),
        (["runs/for_hf@3", "--shard-gib", "0"], "--shard-gib 0"),
        (["runs/for_hf@3", "--tokenizer", "nowhere"], "give --tokenizer FOLDER"),
        (["runs/for_hf@3", "--tokenizer", "other"], "not the tokenizer that the checkpoint"),
    ],
)
def test_exports_that_are_refused(
    both: tuple[Path, Path], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path("other/tokenizer.json")
    other.parent.mkdir(exist_ok=True)
    other.write_text(Path("data/tokenizer/tokenizer.json").read_text() + "\n")
    refused(["to-hf", *words, "--out", "hf_bad/x"], message, capsys)
    assert not Path("hf_bad/x").exists()


def test_a_damaged_checkpoint_and_a_taken_folder(
    both: tuple[Path, Path], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["to-hf", "runs/for_hf@3", "--out", str(both[0])], "is there already", capsys)
    shutil.copytree("runs/for_hf", "runs/hurt")
    shard = Path("runs/hurt/checkpoints/step_00000003/__0_0.distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    refused(["to-hf", "runs/hurt@3", "--out", "hf_bad/x"], "is damaged", capsys)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Rewrites the folder as one file, with tensors replaced, added, or (None) left out."""
    found = shards(folder)
    for name, tensor in tensors.items():
        found.pop(name, None)
        if tensor is not None:
            found[name] = tensor
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "backbone.norm_f.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({NORM: None}, f"{NORM} is missing"),
        ({NORM: torch.ones(63)}, f"{NORM} is (63,); config.json says (64,)"),
        ({NORM: torch.ones(64, dtype=torch.int8)}, f"{NORM} is I8"),
        ({"backbone.norm_g.weight": torch.ones(64)}, "not in the model"),
        (
            {"backbone.layers.3.mixer.q_proj.weight": torch.ones(64, 64)},
            "are not all of one dtype",
        ),
    ],
)
def test_weights_that_are_refused(
    both: tuple[Path, Path],
    tensors: dict[str, torch.Tensor | None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(both[0], folder)
    change(folder, **tensors)
    refused(["from-hf", str(folder), "--out", str(tmp_path / "run")], message, capsys)
    assert not (tmp_path / "run").exists()


def test_files_that_are_refused(
    both: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names that point out of the folder, shards that are missing or not safetensors, pickles."""
    out = ["--out", str(tmp_path / "run")]

    def folder(name: str) -> Path:
        shutil.copytree(both[0], tmp_path / name)
        return tmp_path / name

    outside = folder("outside")
    index = outside / "model.safetensors.index.json"
    for name in ("../outside.safetensors", "/etc/passwd", "", 7):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        refused(["from-hf", str(outside), *out], "no plain file name", capsys)
    index.write_text("[]")
    refused(["from-hf", str(outside), *out], "cannot be read", capsys)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    refused(["from-hf", str(outside), *out], "gone.safetensors: cannot be read", capsys)
    torn = folder("torn")
    shard = sorted(torn.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    for data in (whole[:-1], whole[:4], struct.pack("<Q", 2**40) + whole[8:], b""):
        shard.write_bytes(data)
        refused(["from-hf", str(torn), *out], f"{shard.name}: cannot be read", capsys)
    pickled = folder("pickled")
    for path in [*pickled.glob("*.safetensors"), pickled / "model.safetensors.index.json"]:
        path.unlink()
    torch.save({"lm_head.weight": torch.zeros(1)}, pickled / "pytorch_model.bin")
    refused(["from-hf", str(pickled), *out], "is a pickle", capsys)
    refused(["from-hf", str(tmp_path / "none"), *out], "config.json: missing", capsys)
    refused(["from-hf", str(both[0]), "--out", "runs/a b"], "name=a b", capsys)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.hidden_size=128", "model.hidden_size=128"),
        ("model.mtp.depths=0", "model.mtp.depths=0"),
        ("model.moe.router_scaling_factor=1.0", "router_scaling_factor=1.0"),
        ("model.nothing=1", "no such knob"),
    ],
)
def test_overrides_cannot_make_another_model(
    both: tuple[Path, Path], word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["from-hf", str(both[0]), "--out", "runs/another", word], message, capsys)


def test_overrides_of_training_are_taken(both: tuple[Path, Path]) -> None:
    words = ["model.mtp.depths=3", "model.pattern='MEM|*EME'", "parallel.pipeline=2"]
    words += ["optim=nemotron3_super", "train.seed=5"]
    assert main(["convert", "from-hf", str(both[0]), "--out", "runs/three", *words]) == 0
    from nemotron_train.run_folder.folder import read_config

    config = read_config(Path("runs/three"))
    assert (config.model.mtp.depths, config.train.seed) == (3, 5)
    assert config.name == "three" and config.data.tokenizer == "runs/three/tokenizer"
    assert Path("runs/three/tokenizer/tokenizer.json").is_file()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_wider_weights_than_config_json_says_are_kept(
    both: tuple[Path, Path], dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.json says bfloat16, one tensor holds more bits than that: the run keeps them all, and
    says so. With precision=bf16 it says that they will be rounded."""
    folder, name = tmp_path / "hf", "backbone.layers.1.mixer.gate.weight"
    shutil.copytree(both[0], folder)
    path = next(p for p in folder.glob("*.safetensors") if name in load_file(p))
    tensors = load_file(path)
    tensors[name] = (torch.randn(tensors[name].shape) / 3).to(dtype)
    assert not torch.equal(tensors[name].bfloat16().to(dtype), tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    assert main(["convert", "from-hf", str(folder), "--out", str(tmp_path / "run")]) == 0
    assert "the run is float32" in capsys.readouterr().out
    assert main(["convert", "to-hf", f"{tmp_path / 'run'}@0", "--out", str(tmp_path / "back")]) == 0
    assert torch.equal(shards(tmp_path / "back")[name], tensors[name].float())
    words = ["convert", "from-hf", str(folder), "--out", str(tmp_path / "b"), "precision=bf16"]
    assert main(words) == 0
    assert "will be rounded to bfloat16" in capsys.readouterr().out


def test_what_lies_beside_the_weights_comes_back(both: tuple[Path, Path], tmp_path: Path) -> None:
    """End tokens of generation_config.json, the chat template and the longest context."""
    folder = tmp_path / "hf"
    shutil.copytree(both[0], folder)
    generation = {"eos_token_id": [3, 1], "bos_token_id": 2, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 262144}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["convert", "from-hf", str(folder), "--out", str(tmp_path / "run")]) == 0
    assert main(["convert", "to-hf", f"{tmp_path / 'run'}@0", "--out", str(tmp_path / "back")]) == 0
    back = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation.items() <= back.items()
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ messages }}"
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (fields["eos_token_id"], fields["bos_token_id"]) == ([3, 1], 2)
    assert fields["max_position_embeddings"] == 262144
