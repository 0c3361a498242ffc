"""Our checkpoint against Hugging Face's transformers: the same function and the same names.

Second truths: `AutoModelForCausalLM` on the exported folder, in FP32, at every position. For
multi-token prediction, which transformers does not run: its own attention and mixture-of-experts
modules behind the exported projection. Names as vLLM and Megatron-Bridge read them. Not covered:
transformers' fused GPU kernels, BF16 arithmetic (each implementation rounds in different places),
vLLM itself.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nemotron_train.cli.main import main

transformers = pytest.importorskip("transformers")

LENGTHS = (1, 7, 33, 129)
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["tiny", "nano", "super"])
def exported(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    saved_model: Callable[..., tuple[Any, Path]],
) -> tuple[Any, Path]:
    """Our model and the folder that `convert to-hf` makes from its checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    model, run = saved_model(folder / "run", request.param)
    words = ["convert", "to-hf", f"{run}@3", "--out", str(folder / "theirs")]
    assert main([*words, "--shard-gib", "0.002"]) == 0
    return model, folder / "theirs"


def load(folder: Path) -> Any:
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading[keys] for keys in ("missing_keys", "mismatched_keys", "error_msgs"))
    assert type(model).__module__.startswith("transformers."), "its own code, none of the folder"
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the shards, found through the index and read by the safetensors library."""
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for shard in set(places.values()):
        with safe_open(folder / shard, framework="pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert held.keys() == {name for name, place in places.items() if place == shard}
        found |= held
    assert found.keys() == places.keys()
    return found


def rows(vocab_size: int, length: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(length)
    return torch.randint(0, vocab_size, (2, length), generator=draws)


@torch.no_grad()
def test_logits_are_hugging_faces(exported: tuple[Any, Path]) -> None:
    ours, folder = exported
    theirs = load(folder)
    for length in LENGTHS:
        tokens = rows(ours.vocab_size, length)
        logits = ours(tokens)
        assert logits.std() > 0.5, "a model whose layers matter"
        difference = (logits - theirs(input_ids=tokens).logits).abs().max().item()
        assert difference < TOLERANCE, f"{difference} at length {length}"


@torch.no_grad()
def test_multi_token_prediction_is_hugging_faces_layers(exported: tuple[Any, Path]) -> None:
    """Both depths: the embedding of the next token and the hidden state are normalized, joined and
    projected; then transformers' two-layer model runs, whose final norm is the block's."""
    ours, folder = exported
    config = transformers.AutoConfig.from_pretrained(folder)
    if not config.num_nextn_predict_layers:
        pytest.skip("Nano has none")
    theirs, norm_class = load(folder), transformers.models.nemotron_h.modeling_nemotron_h
    stored = {k: v for k, v in tensors(folder).items() if k.startswith("mtp.layers.")}
    around = {}
    for name in ("0.enorm", "0.hnorm"):
        around[name] = norm_class.NemotronHRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        around[name].weight.copy_(stored.pop(f"mtp.layers.{name}.weight"))
    projection = stored.pop("mtp.layers.0.eh_proj.weight")
    config.layers_block_type = ["full_attention", "moe"]
    block = transformers.NemotronHModel(config).eval()
    state = {"norm_f.weight": stored.pop("mtp.layers.1.final_layernorm.weight")}
    state["embeddings.weight"] = block.embeddings.weight
    for kind in ("up_proj", "down_proj"):
        name = "mtp.layers.1.mixer.experts.{}." + kind + ".weight"
        experts = [stored.pop(name.format(e)) for e in range(config.n_routed_experts)]
        state[f"layers.1.mixer.experts.{kind}"] = torch.stack(experts)
    block.load_state_dict(state | {k.removeprefix("mtp."): v for k, v in stored.items()})

    tokens = rows(ours.vocab_size, 33)
    hidden = ours.decoder(ours.embedding(tokens, None), attention_mask=None)
    their_hidden, shifted, ahead = theirs.model(input_ids=tokens)[0], tokens, tokens
    for depth in (1, 2):
        hidden, shifted, *_ = ours.mtp.layers[0](
            input_ids=shifted,
            position_ids=None,
            hidden_states=hidden,
            attention_mask=None,
            embedding=ours.embedding,
        )
        ahead = torch.nn.functional.pad(ahead[:, 1:], (0, 1))
        joined = [
            around["0.enorm"](theirs.model.embeddings(ahead)),
            around["0.hnorm"](their_hidden),
        ]
        their_hidden = block(inputs_embeds=torch.cat(joined, -1) @ projection.T)[0]
        logits = ours._output_logits(hidden).transpose(0, 1)
        assert logits.std() > 0.5
        difference = (logits - theirs.lm_head(their_hidden)).abs().max().item()
        assert difference < TOLERANCE, f"{difference} at depth {depth}"


def test_names_are_the_published_ones(exported: tuple[Any, Path]) -> None:
    """The names of the first layer of each kind and of multi-token prediction, written out."""
    _, folder = exported
    fields = json.loads((folder / "config.json").read_text())
    pattern, latent = fields["hybrid_override_pattern"], "moe_latent_size" in fields
    mamba = "norm.weight mixer.A_log mixer.D mixer.dt_bias mixer.conv1d.bias mixer.conv1d.weight"
    mamba += " mixer.in_proj.weight mixer.norm.weight mixer.out_proj.weight"
    attention = "norm.weight mixer.q_proj.weight mixer.k_proj.weight mixer.v_proj.weight"
    attention += " mixer.o_proj.weight"
    moe = "norm.weight mixer.gate.weight mixer.gate.e_score_correction_bias"
    moe += " mixer.shared_experts.up_proj.weight mixer.shared_experts.down_proj.weight"
    moe += " mixer.fc1_latent_proj.weight mixer.fc2_latent_proj.weight" if latent else ""
    for expert in range(fields["n_routed_experts"]):
        moe += f" mixer.experts.{expert}.up_proj.weight mixer.experts.{expert}.down_proj.weight"
    there = tensors(folder)

    def below(prefix: str) -> set[str]:
        return {name.removeprefix(prefix) for name in there if name.startswith(prefix)}

    for letter, names in (("M", mamba), ("*", attention), ("E", moe)):
        assert below(f"backbone.layers.{pattern.index(letter)}.") == set(names.split())
    outside = {name for name in there if ".layers." not in name}
    assert outside == {"backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"}
    if fields["num_nextn_predict_layers"]:
        assert fields["num_nextn_predict_layers"] == 1
        assert fields["mtp_hybrid_override_pattern"] == "*E"
        start = {"enorm.weight", "hnorm.weight", "eh_proj.weight"}
        assert below("mtp.layers.0.") == set(attention.split()) | start
        assert below("mtp.layers.1.") == set(moe.split()) | {"final_layernorm.weight"}
    else:
        assert not below("mtp.")


@torch.no_grad()
def test_transformers_clamps_dt_by_the_range_of_the_initial_draw(
    exported: tuple[Any, Path], tmp_path: Path
) -> None:
    """The reason for time_step_min=1e-30 in config.json: with the published 0.001, the same weights
    give other logits. If transformers switches to time_step_limit (its pull request 48989), this
    test fails and NO_LIMIT may go."""
    ours, folder = exported
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    fields = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(fields | {"time_step_min": 0.001}))
    tokens = rows(ours.vocab_size, 129)
    logits, clamped = ours(tokens), load(tmp_path)(input_ids=tokens).logits
    assert (logits - clamped).abs().max() > 1
    assert torch.cosine_similarity(logits, clamped, dim=-1).min() < 0.9


def test_transformers_own_files_come_back(exported: tuple[Any, Path], tmp_path: Path) -> None:
    """A checkpoint that transformers saves reads back as the same numbers. It drops multi-token
    prediction; the conversion is refused, naming a tensor, until config.json agrees."""
    _, folder = exported
    load(folder).save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "saved" / name).write_bytes((folder / name).read_bytes())
    words = ["convert", "from-hf", str(tmp_path / "saved"), "--out", str(tmp_path / "run")]
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    if fields["num_nextn_predict_layers"]:
        assert main(words) == 2
        fields["num_nextn_predict_layers"] = 0
        del fields["nemotron_train"]
        (tmp_path / "saved" / "config.json").write_text(json.dumps(fields))
    assert main(words) == 0
    back = ["convert", "to-hf", f"{tmp_path / 'run'}@0", "--out", str(tmp_path / "back")]
    assert main(back) == 0
    before, after = tensors(folder), tensors(tmp_path / "back")
    assert after.keys() == {name for name in before if not name.startswith("mtp.")}
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


def test_tokenizer_and_generation_settings_load(
    exported: tuple[Any, Path], small_run: tuple[Path, list[str]]
) -> None:
    from nemotron_train.data.tokenize import load_tokenizer

    _, folder = exported
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(small_run[0] / "data" / "tokenizer")
    text = "def f(x):\n\treturn x ** 2  # «élan» , isn't  it ?"
    assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert theirs.decode(theirs(text)["input_ids"]) == text
    settings = transformers.GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id == theirs.eos_token_id
    assert theirs.convert_ids_to_tokens(settings.eos_token_id) == "<|endoftext|>"
