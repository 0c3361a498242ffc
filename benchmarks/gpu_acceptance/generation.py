"""Stage 9: our generation against transformers, on a checkpoint that `convert to-hf` exports.

The checkpoint is the default run's (stage 4), or is trained here if that stage did not leave one.
"""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_acceptance.results import Fail, Report, Skip
from benchmarks.gpu_acceptance.resume import whole_run
from nemotron_train.evaluate.acceptance import held_out_prompts, validation_folders
from nemotron_train.generate.checkpoint import open_checkpoint
from nemotron_train.generate.engine import Engine
from nemotron_train.generate.knobs import DecodingKnobs, ModelKnobs, Sampling
from nemotron_train.platform.terminal import open_console

BOUND = 2e-2  # of the logits' standard deviation: mamba_ssm's FP32 products are TF32
_PROMPTS, _PROMPT_TOKENS = 2, 33


def run(report: Report) -> None:
    """Logits at every position, and greedy continuations, in FP32."""
    if importlib.util.find_spec("transformers") is None:
        raise Skip("transformers is not installed")
    setting = report.setting
    torch.backends.cudnn.allow_tf32 = False  # transformers' convolution
    folder = whole_run(setting)
    exported = setting.work / "exported"
    shutil.rmtree(exported, ignore_errors=True)
    step = max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*"))
    setting.run("convert", "to-hf", f"runs/{folder.name}@{step}", "--out", str(exported))
    theirs = load(exported)
    with open_checkpoint(f"runs/{folder.name}@{step}", ModelKnobs(), open_console().print) as ours:
        prompts, _ = held_out_prompts(validation_folders(ours.config)[0], _PROMPTS, _PROMPT_TOKENS)
        error, scale = _logits(ours.model, theirs, torch.tensor(prompts).to("cuda"))
        report.row("logits", what="largest difference", value=f"{error:.1e}")
        report.row("logits", what="standard deviation", value=f"{scale:.2f}")
        engine = Engine(ours.model, None, ours.platform.device)
        knobs = DecodingKnobs(setting.sizes.new_tokens)
        continued = engine.generate(prompts, Sampling(temperature=0), knobs)
    report.figure = f"logits differ by at most {error / scale:.1e} standard deviations"
    same, worst = 0, 0.0
    for sequence in continued:
        chosen = _their_greedy(theirs, sequence.prompt, len(sequence.new))
        same += sum(a == b for a, b in zip(chosen, sequence.new, strict=True))
        worst = max(worst, _regret(theirs, sequence.prompt, sequence.new))
        report.row("greedy", ours=str(sequence.new[:16]), theirs=str(chosen[:16]))
    count = sum(len(sequence.new) for sequence in continued)
    report.row("greedy", ours=f"{same} of {count} tokens are the same", theirs=f"{worst:.1e} worse")
    report.figure += f"; {same} of {count} greedy tokens are the same"
    if not error <= BOUND * scale:
        raise Fail(f"logits differ by {error / scale:.1e} standard deviations, bound {BOUND:.0e}")
    if not worst <= 2 * BOUND * scale:
        raise Fail(f"a greedy token of ours is {worst:.1e} below transformers' best")


def load(folder: Path) -> Any:
    """transformers' model of the exported folder on the device, in FP32. Raises Skip if this
    transformers does not have the architecture."""
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (KeyError, ValueError, ImportError) as error:
        raise Skip(f"transformers does not load the export: {error}") from error
    return model.eval().to("cuda")


@torch.no_grad()
def _logits(ours: Any, theirs: Any, tokens_BS: Tensor) -> tuple[float, float]:
    """(largest difference, standard deviation) of the logits at every position."""
    logits = ours(tokens_BS).float()
    difference = (logits - theirs(input_ids=tokens_BS).logits.float()).abs().max()
    return float(difference), float(logits.std())


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
