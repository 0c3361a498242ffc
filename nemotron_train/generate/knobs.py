"""The knobs of `generate` and `evaluate acceptance`, and their checks. No torch."""

from dataclasses import dataclass, field

from nemotron_train.config.budget import NO_LIMIT, BudgetKnobs, check_budget
from nemotron_train.config.errors import ConfigError


@dataclass
class Sampling:
    """How the next token is drawn. Order as in Hugging Face: divide logits by temperature, keep the
    top_k largest, softmax, keep the fewest tokens whose probabilities reach top_p, renormalize."""

    temperature: float = 1.0  # 0: greedy, always the most probable token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 1234  # a sequence's draws depend only on the seed and the sequence's number
    coupled: bool = False  # drafts do not change the text: with the same seed it is that without


@dataclass
class ModelKnobs:
    """How a checkpoint's model is opened and sharded."""

    tokenizer: str = ""  # folder with tokenizer.json; empty: the run's own
    tensor: int = 1  # ranks that share every layer
    expert: int = 1  # ranks that share the experts
    expert_tensor: int = 1  # ranks that share every expert's hidden width
    threads: int = 0  # CPU threads per rank; 0: the machine's cores divided by its ranks


@dataclass
class DecodingKnobs:
    """How sequences are decoded."""

    max_new_tokens: int = 256
    end_of_document: bool = True  # stop at the tokenizer's end-of-document token
    batch: int = 8  # sequences decoded together
    prefill_chunk: int = 512  # prompt tokens of a sequence per forward call
    speculative: bool = False  # draft with the multi-token-prediction block
    draft_tokens: int = 0  # per round; 0: as many as the block was trained for (model.mtp.depths)


@dataclass
class GenerateConfig(Sampling, ModelKnobs, DecodingKnobs, BudgetKnobs):
    """Knobs of `generate`."""

    prompt: list[str] = field(default_factory=list)
    prompts: str = ""  # a file: .jsonl with a "prompt" in each line, else one prompt a line
    samples: int = 1  # continuations per prompt
    chat: bool = False  # a prompt is what a user says; the model answers in the chat format
    thinking: bool = True  # with chat: the answer begins with reasoning
    stop: list[str] = field(
        default_factory=list
    )  # stop strings; the output ends before the first one
    output: str = ""  # write every sequence with its tokens and log-probabilities, as JSON lines


@dataclass
class AcceptanceConfig(Sampling, ModelKnobs, DecodingKnobs):
    """Knobs of `evaluate acceptance`."""

    data: list[str] = field(default_factory=list)  # prepared folders; empty: the run's validation
    num_prompts: int = 32  # per folder
    prompt_tokens: int = 64
    max_new_tokens: int = 64
    end_of_document: bool = False


def check_sampling(knobs: Sampling) -> None:
    """Raises ConfigError for a knob outside its range."""
    if not 0 <= knobs.temperature < float("inf"):
        raise ConfigError(f"temperature={knobs.temperature}: give 0 (greedy) or a number above")
    if knobs.top_k < 0:
        raise ConfigError(f"top_k={knobs.top_k}: give 0 (all tokens) or a number of tokens")
    if not 0 < knobs.top_p <= 1:
        raise ConfigError(f"top_p={knobs.top_p}: give a share above 0 and at most 1")
    if not 0 <= knobs.seed < 1 << 64:
        raise ConfigError(f"seed={knobs.seed}: give a number from 0 to 2^64 - 1")


def check_decoding(knobs: DecodingKnobs) -> None:
    """Raises ConfigError for a knob outside its range."""
    for name in ("max_new_tokens", "batch", "prefill_chunk"):
        if getattr(knobs, name) < 1:
            raise ConfigError(f"{name}={getattr(knobs, name)}: give 1 or more")
    if knobs.draft_tokens < 0:
        raise ConfigError(
            f"draft_tokens={knobs.draft_tokens}: give 0 (the trained depths) or a number of tokens"
        )
    if knobs.draft_tokens and not knobs.speculative:
        raise ConfigError(f"draft_tokens={knobs.draft_tokens}: needs speculative=true")


def check_chat(knobs: GenerateConfig) -> None:
    """Raises ConfigError for a budget outside its range, or without reasoning that it limits."""
    check_budget(knobs)
    if knobs.budget == NO_LIMIT:
        return
    for name, value in (("chat", knobs.chat), ("thinking", knobs.thinking)):
        if not value:
            raise ConfigError(
                f"budget={knobs.budget}: needs {name}=true; it limits the reasoning in the chat "
                "format"
            )


def check_model_knobs(knobs: ModelKnobs) -> None:
    """Raises ConfigError for a knob outside its range."""
    for name in ("tensor", "expert", "expert_tensor"):
        if getattr(knobs, name) < 1:
            raise ConfigError(f"{name}={getattr(knobs, name)}: give the number of ranks, 1 or more")
    if knobs.threads < 0:
        raise ConfigError(f"threads={knobs.threads}: give 0 (the machine's share) or a number")
