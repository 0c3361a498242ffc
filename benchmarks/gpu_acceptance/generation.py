"""Stage 9: our generation against transformers, on a checkpoint that `convert to-hf` exports.

The checkpoint is the default run's (stage 4), or is trained here if that stage did not leave one.
"""

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_acceptance.results import Fail, Report, Skip
from benchmarks.gpu_acceptance.resume import whole_run
from nemotron_train.convert.hugging_face.to_hf import to_hf
from nemotron_train.evaluate.acceptance import held_out_prompts, validation_folders
from nemotron_train.generate.checkpoint import open_checkpoint
from nemotron_train.generate.engine import Continuation, Engine
from nemotron_train.generate.knobs import DecodingKnobs, ModelKnobs, Sampling
from nemotron_train.platform.terminal import open_console

BOUND = 2e-2  # of the logits' standard deviation: mamba_ssm's FP32 products are TF32
_PROMPTS, _PROMPT_TOKENS = 2, 33


def run(report: Report) -> None:
    """Logits at every position, and greedy continuations, in the run's FP32. Ours come first, so
    that transformers can then be kept from the packages that both would use."""
    if importlib.util.find_spec("transformers") is None:
        raise Skip("transformers is not installed")
    setting, say = report.setting, open_console()
    name, step = whole_run(setting)
    exported = setting.work / "exported"
    shutil.rmtree(exported, ignore_errors=True)
    to_hf(f"{name}@{step}", exported, say)
    with open_checkpoint(f"{name}@{step}", ModelKnobs(), say.print) as model:
        data = validation_folders(model.config)[0]
        prompts, _ = held_out_prompts(data, _PROMPTS, _PROMPT_TOKENS)
        tokens_BS = torch.tensor(prompts).to("cuda")
        with torch.no_grad():
            ours_BSV = model.model(tokens_BS).float()
        engine = Engine(model.model, None, model.platform.device)
        knobs = DecodingKnobs(setting.sizes.new_tokens)
        continued = engine.generate(prompts, Sampling(temperature=0), knobs)
    report.figure = f"{len(continued)} continuations of ours"
    theirs = load(exported)
    with torch.no_grad():
        theirs_BSV = theirs(input_ids=tokens_BS).logits.float()
    error, scale = float((ours_BSV - theirs_BSV).abs().max()), float(theirs_BSV.std())
    report.row("logits", what="largest difference", value=f"{error:.1e}")
    report.row("logits", what="standard deviation", value=f"{scale:.2f}")
    report.figure = f"logits differ by at most {error / scale:.1e} standard deviations"
    same, worst = _compare(report, theirs, continued)
    count = sum(len(sequence.new) for sequence in continued)
    report.row("greedy", ours=f"{same} of {count} tokens are the same", theirs=f"{worst:.1e} worse")
    report.figure += f"; {same} of {count} greedy tokens are the same"
    if not error <= BOUND * scale:
        raise Fail(f"logits differ by {error / scale:.1e} standard deviations, bound {BOUND:.0e}")
    if not worst <= 2 * BOUND * scale:
        raise Fail(f"a greedy token of ours is {worst:.1e} below transformers' best")


def _compare(report: Report, theirs: Any, continued: list[Continuation]) -> tuple[int, float]:
    """(number of equal greedy tokens, how far below transformers' best logit ours lie at most)."""
    same, worst = 0, 0.0
    for sequence in continued:
        chosen = _their_greedy(theirs, sequence.prompt, len(sequence.new))
        same += sum(a == b for a, b in zip(chosen, sequence.new, strict=True))
        worst = max(worst, _regret(theirs, sequence.prompt, sequence.new))
        report.row("greedy", ours=str(sequence.new[:16]), theirs=str(chosen[:16]))
    return same, worst


def load(folder: Path) -> Any:
    """transformers' model of the exported folder on the device, in FP32, by its own operators.
    Raises Skip if this transformers does not have the architecture."""
    for package in ("mamba_ssm", "causal_conv1d"):
        sys.modules[package] = None  # type: ignore[assignment]  # from now on not importable
    torch.backends.cudnn.allow_tf32 = False  # of its convolution
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (KeyError, ValueError, ImportError) as error:
        raise Skip(f"transformers does not load the export: {error}") from error
    return model.eval().to("cuda")


@torch.no_grad()
def _their_greedy(theirs: Any, prompt: list[int], num_tokens: int) -> list[int]:
    inputs = torch.tensor([prompt]).to("cuda")
    tokens = theirs.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tokens[0, len(prompt) :].tolist()


@torch.no_grad()
def _regret(theirs: Any, prompt: list[int], new: list[int]) -> float:
    """How far below transformers' best logit the tokens lie at most, each given those before."""
    tokens = torch.tensor([[*prompt, *new]]).to("cuda")
    logits = theirs(input_ids=tokens[:, :-1]).logits[0, len(prompt) - 1 :].float()
    chosen = logits.gather(1, tokens[0, len(prompt) :, None]).squeeze(1)
    return float((logits.amax(1) - chosen).max())
