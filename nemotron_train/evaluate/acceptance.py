"""`evaluate acceptance`: how many drafted tokens a checkpoint accepts on held-out text.

Owns: choosing prompts from prepared data, the table. Does not own: decoding (`generate.engine`).

It measures real decoding, not teacher-forced agreement: the prompt is the start of a held-out
document, and every following round drafts, verifies and rolls back as in `generate`.
"""

from dataclasses import replace
from pathlib import Path

from rich.table import Table

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config, DataKind
from nemotron_train.data.indexed import ShardReader
from nemotron_train.data.manifest import FILE_NAME, load_manifest
from nemotron_train.generate.checkpoint import open_checkpoint
from nemotron_train.generate.continuation import Costs
from nemotron_train.generate.engine import Engine
from nemotron_train.generate.knobs import AcceptanceConfig, check_decoding, check_sampling
from nemotron_train.generate.speculative import Acceptance
from nemotron_train.generate.terminal import check_speculative
from nemotron_train.platform.terminal import open_console

# Published: arXiv 2604.12374, Table 2 (Super, 7 drafts, SPEED-Bench), and arXiv 2512.20856, section
# 2.3 (an 8B ablation, the first two drafts).
PUBLISHED = (
    "published: 3.45 tokens a round with 7 drafts (Nemotron 3 Super, SPEED-Bench); about 97 % of "
    "the first two drafts accepted (an 8B ablation)"
)


def evaluate_acceptance(run: str, knobs: AcceptanceConfig) -> dict[str, Acceptance]:
    """Measure and print draft acceptance of the checkpoint `run`; returns it by data folder.

    Every folder is decoded twice, with and without speculation, for the speed-up. Raises
    ConfigError if a knob is out of range or the data cannot be used. COLLECTIVE over the ranks of
    this launch.
    """
    knobs.speculative = True
    check_sampling(knobs)
    check_decoding(knobs)
    for name in ("num_prompts", "prompt_tokens"):
        if getattr(knobs, name) < 1:
            raise ConfigError(f"{name}={getattr(knobs, name)}: give 1 or more")
    console = open_console()
    acceptances: dict[str, Acceptance] = {}
    with open_checkpoint(run, knobs, console.print) as model:
        console.quiet = not model.is_first_rank
        check_speculative(True, model)
        folders = [Path(path) for path in knobs.data] or validation_folders(model.config)
        speed_ups = []
        for folder in folders:
            prompts, end_token = held_out_prompts(folder, knobs.num_prompts, knobs.prompt_tokens)
            engine = Engine(model.model, end_token, model.platform.device)
            engine.generate(prompts, knobs, knobs)
            plain = Engine(model.model, end_token, model.platform.device)
            plain.generate(prompts, knobs, replace(knobs, speculative=False))
            acceptances[str(folder)] = engine.acceptance
            speed_ups.append(speed_up(plain.costs, engine.costs))
        console.print(f"{model.checkpoint}")
        console.print(_table(acceptances, speed_ups))
        console.print(PUBLISHED, soft_wrap=True)
    return acceptances


def validation_folders(config: Config) -> list[Path]:
    """The run's validation data folders, from its configuration."""
    if config.data.kind == DataKind.embedded:
        return [Path(config.data.embedded_folder)]
    return [Path(source.path) for source in config.data.validation]


def held_out_prompts(
    folder: Path, num_prompts: int, prompt_tokens: int
) -> tuple[list[list[int]], int]:
    """The first `prompt_tokens` tokens of `num_prompts` documents, evenly spread over the
    validation split, and the end-of-document id.

    Only documents with more than `prompt_tokens` tokens count. Raises ConfigError if there are too
    few, or no validation split.
    """
    manifest = load_manifest(folder)
    split = manifest.splits.get("validation")
    if split is None:
        raise ConfigError(f"{folder / FILE_NAME}: has no validation split")
    documents = []
    for shard in split.shards:
        reader = ShardReader(folder, shard.name, shard)
        long_enough = (reader.lengths() > prompt_tokens).nonzero()[0]
        documents += [(reader, int(number)) for number in long_enough]
    if len(documents) < num_prompts:
        raise ConfigError(
            f"num_prompts={num_prompts}: the validation split of {folder} has only "
            f"{len(documents)} documents of more than prompt_tokens={prompt_tokens} tokens"
        )
    chosen = [documents[index * len(documents) // num_prompts] for index in range(num_prompts)]
    prompts = [reader.document(number, prompt_tokens).tolist() for reader, number in chosen]
    return prompts, manifest.tokenizer.end_of_document_id


def _table(acceptances: dict[str, Acceptance], speed_ups: list[float]) -> Table:
    table = Table("data", "rounds", "tokens a round", "speed-up")
    depths = max(len(acceptance.rates) for acceptance in acceptances.values())
    for depth in range(1, depths + 1):
        table.add_column(f"depth {depth} accepted", justify="right")
    for (folder, acceptance), factor in zip(acceptances.items(), speed_ups, strict=True):
        rates = [f"{rate:.1%}" for rate in acceptance.rates]
        length = f"{acceptance.mean_length:.2f}"
        table.add_row(folder, str(acceptance.rounds), length, f"{factor:.2f}", *rates)
    return table


def speed_up(plain: Costs, speculative: Costs) -> float:
    """Ratio of decoded tokens per second: speculative / plain."""
    plain_rate = plain.new_tokens / max(plain.decode_seconds, 1e-9)
    return speculative.new_tokens / max(speculative.decode_seconds, 1e-9) / plain_rate
