"""Renders the script of a multi-node training job from `slurm/job.sh` and submits it. No torch.

Owns: the `#SBATCH` lines and settings of a script, quoting, calling `sbatch`. Does not own: what a
script does (`slurm/*.sh`, the same text for every job), whether the run fits
(`launch.slurm.checks`), the cluster's knobs (`config.cluster`), the cells of an array
(`launch.sweep.slurm`).

No user text reaches a shell unquoted: `#SBATCH` lines hold only words that fully match the patterns
of `config.cluster`, `shlex` quotes settings, and line breaks are rejected. No secret reaches the
script: a value that looks like one is rejected.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron_train.compose.compose import (
    compose_config,
    nearest,
    recipes_folder,
    to_typed,
)
from nemotron_train.compose.overrides import parse_overrides
from nemotron_train.config.cluster import ClusterConfig, check_cluster, refuse_control_characters
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config
from nemotron_train.config.secrets import is_secret
from nemotron_train.config.yaml_file import load_yaml
from nemotron_train.launch.slurm.checks import check_nodes
from nemotron_train.plan.derive import Derived, derive
from nemotron_train.platform.files import write_atomically
from nemotron_train.run_folder.folder import run_path

SLURM_FOLDER = "slurm"  # in a run folder: job.sh, links, chain.log, job logs


@dataclass
class JobConfig(Config):
    """The knobs that `slurm` takes: those of a run, the cluster and the number of nodes."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    nodes: int = 1


@dataclass(frozen=True)
class Job:
    """One run on `nodes` nodes of a cluster. words: the arguments of `nemotron-train pretrain`."""

    config: Config
    derived: Derived
    cluster: ClusterConfig
    nodes: int
    words: list[str]
    workdir: Path

    @property
    def run_folder(self) -> Path:
        """As the user set it: relative to `workdir`, or absolute."""
        return run_path(self.config)


def templates_folder() -> Path:
    """The folder of the script templates: in an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    inside = package / "slurm"
    return inside if inside.is_dir() else package.parent / "slurm"


def plan_job(overrides: Sequence[str], config_file: Path | None = None) -> Job:
    """Compose a job from `cluster=`, `cluster.KNOB=`, `nodes=` and the overrides of a run.

    Raises ConfigError if the overrides, the cluster or the layout are invalid.
    """
    # Before they are parsed: a message about a knob must not come before that about a secret in it.
    refuse_unsafe([word for word in overrides if not is_job_knob(_knob_of(word))])
    parsed = parse_overrides(overrides, JobConfig)
    job_words = [override.input_line for override in parsed if is_job_knob(override.key_or_group)]
    run_words = [
        override.input_line for override in parsed if not is_job_knob(override.key_or_group)
    ]
    cluster, nodes = requested_cluster(job_words)
    config = compose_config(run_words, config_file)
    words = [*(["--config", str(config_file)] if config_file else []), *run_words]
    return make_job(config, cluster, nodes, words)


def _knob_of(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def is_job_knob(knob: str) -> bool:
    """Whether a knob belongs to the job (`nodes`, `cluster`, `cluster.KNOB`), not to the run."""
    return re.fullmatch(r"nodes|cluster(\..*)?", knob) is not None


def refuse_unsafe(words: Sequence[str]) -> None:
    """Raises ConfigError if an override contains a control character or looks like a secret."""
    for word in words:
        _refuse_secret(word)
        refuse_control_characters("an override", word)


def requested_cluster(words: Sequence[str]) -> tuple[ClusterConfig, int]:
    """The cluster and number of nodes from `cluster=`, `cluster.KNOB=` and `nodes=` (default 1).

    Raises ConfigError if one is missing or invalid.
    """
    parsed = parse_overrides(words, JobConfig)
    cluster = _compose_cluster(
        [override for override in parsed if override.key_or_group != "nodes"]
    )
    nodes = next(
        (override.value() for override in reversed(parsed) if override.key_or_group == "nodes"), 1
    )
    if not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1:
        raise ConfigError(f"nodes={nodes}: give the number of nodes, 1 or more")
    _check_segments(cluster, nodes)
    return cluster, nodes


def make_job(config: Config, cluster: ClusterConfig, nodes: int, words: list[str]) -> Job:
    """The job of a composed run. words: the arguments of `nemotron-train pretrain`.

    Raises ConfigError if the layout does not divide the ranks, or a path contains a control
    character or a character that sbatch expands.
    """
    check_nodes(config, cluster, nodes)
    derived = derive(config, nodes * cluster.ranks_per_node)
    job = Job(config, derived, cluster, nodes, words, Path.cwd())
    for knob, text in (("--config", " ".join(words)), ("the folder", str(job.workdir))):
        refuse_control_characters(knob, text)
    refuse_control_characters("folder", str(job.run_folder))
    if re.search(r"[%\\]", f"{job.workdir}{job.run_folder}"):
        raise ConfigError(
            f"{job.workdir}, {job.run_folder}: sbatch gives % and \\ in a path a meaning of its "
            "own; choose another folder"
        )
    return job


def render(job: Job) -> str:
    """The complete job script."""
    options = [f"--job-name={job.config.name}", "--output=slurm-%x-%j.log", *_options(job)]
    # singleton: jobs of the same name run one at a time, in submission order, however the previous
    # one ended.
    return fill("job.sh", [*options, "--dependency=singleton"], _settings(job))


def render_array(name: str, folder: Path, cells: Sequence[str], job: Job) -> str:
    """The script of a job array whose task N runs `cells[N]` of the sweep in `folder`.

    job: the job of any cell; sets the `#SBATCH` options.
    """
    options = [f"--job-name={name}", "--output=slurm-%x-%A_%a.log", *_options(job)]
    settings = [
        f"workdir={shlex.quote(str(job.workdir))}",
        f"sweep_folder={shlex.quote(str(folder))}",
        *("cells=(", *(f"    {shlex.quote(cell)}" for cell in cells), ")"),
    ]
    return fill("array.sh", options, settings)


def fill(template: str, options: Sequence[str], settings: Sequence[str]) -> str:
    """Fill the `#SBATCH` lines and settings into a template of `slurm/`. Quotes neither of them."""
    text = (templates_folder() / template).read_text(encoding="utf-8")
    head, sbatch_mark, after_sbatch = text.partition("# @SBATCH@\n")
    middle, settings_mark, tail = after_sbatch.partition("# @SETTINGS@\n")
    assert sbatch_mark and settings_mark, "the script has both marks"
    lines = [*(f"#SBATCH {option}" for option in options), ""]
    return head + "\n".join(lines) + middle + "\n".join([*settings, ""]) + tail


def need_sbatch() -> None:
    """Raises ConfigError if `sbatch` is not on the PATH. Call it before writing files."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on this machine's PATH: submit from a login node of the cluster, or "
            "print the script with --dry-run"
        )


def sbatch(job: Job, script: Path, log: str, *options: str) -> str:
    """Submit a script and return the job number.

    log: file name of the job's output, in the script's folder. Raises ConfigError with Slurm's
    message if it rejects the job.
    """
    output = script.parent.resolve() / log
    command = ["sbatch", "--parsable", f"--chdir={job.workdir}", f"--output={output}"]
    result = subprocess.run([*command, *options, str(script)], capture_output=True, text=True)
    if result.returncode != 0:
        message = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
        raise ConfigError(f"cluster={job.cluster.name}: sbatch refused the job: {message}")
    return result.stdout.strip().partition(";")[0]


def write_script(job: Job) -> Path:
    """Write the job's script into its run folder and return its path."""
    folder = job.run_folder / SLURM_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "job.sh"
    write_atomically(script, render(job))
    return script


def submit(job: Job, console: Any) -> list[str]:
    """Write the script into the run folder and submit it once per chain link; return job numbers.

    Raises ConfigError if there is no Slurm or it rejects a job; the message lists the jobs
    submitted before.
    """
    need_sbatch()
    script = write_script(job)
    numbers: list[str] = []
    for _ in range(job.cluster.chain_links):
        try:
            numbers.append(sbatch(job, script, "job_%j.log"))
        except ConfigError as error:
            submitted = f" (submitted before that: {', '.join(numbers)})" if numbers else ""
            raise ConfigError(f"{error}{submitted}") from None
        # When a run is finished, its script cancels the remaining jobs of this list.
        write_links(job, numbers)
    links = "job" if len(numbers) == 1 else "jobs"
    console.print(
        f"submitted {links} {', '.join(numbers)}: {job.nodes} node(s) of {job.cluster.name}, "
        f"{job.derived.num_ranks} ranks, {job.derived.total_steps:,} steps",
        soft_wrap=True,
    )
    console.print(f"script {script}; nemotron-train slurm status tells how it goes", soft_wrap=True)
    return numbers


def write_links(job: Job, numbers: Sequence[str]) -> None:
    """Write the run's job numbers to `slurm/links`, one per line."""
    path = job.run_folder / SLURM_FOLDER / "links"
    write_atomically(path, "".join(f"{number}\n" for number in numbers))


def _options(job: Job) -> list[str]:
    """The `sbatch` options. Every value is a number or a word that `check_cluster` validated."""
    cluster, minutes = job.cluster, job.cluster.time_limit_minutes
    tasks = cluster.ranks_per_node
    options = [
        "--open-mode=append",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cluster.cpus_per_rank}",
        f"--time={minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00",
        f"--signal=B:USR1@{cluster.signal_lead_seconds}",
        "--requeue" if cluster.requeue else "--no-requeue",
    ]
    options += [
        f"--{name}={value}"
        for name, value in (
            ("partition", cluster.partition),
            ("account", cluster.account),
            ("qos", cluster.qos),
        )
        if value
    ]
    if cluster.constraint:
        options.append(f'--constraint="{cluster.constraint}"')
    if cluster.gpus_per_node:
        options.append(f"--gpus-per-node={cluster.gpus_per_node}")
    if cluster.exclusive:
        options += ["--exclusive", "--mem=0"]
    if cluster.segment_nodes:
        options.append(f"--segment={min(cluster.segment_nodes, job.nodes)}")
    return options


def _settings(job: Job) -> list[str]:
    """Shell assignments of the script's variables."""
    cluster = job.cluster
    python = cluster.python or ("python3" if cluster.container_image else sys.executable)
    values = {
        "workdir": str(job.workdir),
        "run_folder": str(job.run_folder),
        "launcher": cluster.launcher.value,
        "ranks_per_node": str(cluster.ranks_per_node),
        "cpus_per_rank": str(cluster.cpus_per_rank),
        "requeue": "true" if cluster.requeue else "false",
        "chain_links": str(cluster.chain_links),
        "scratch": cluster.scratch,
        "container_image": cluster.container_image,
        "container_mounts": ",".join(cluster.container_mounts),
        "python": python,
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    command = [python, "-m", "nemotron_train", "pretrain", *job.words]
    lines += ["command=(", *(f"    {shlex.quote(word)}" for word in command), ")"]
    environment = dict(cluster.environment)
    if cluster.network_interface:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environment.setdefault(name, cluster.network_interface)
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return lines


def _compose_cluster(overrides: Sequence[Any]) -> ClusterConfig:
    folder = recipes_folder() / "cluster"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    chosen = [override.value() for override in overrides if override.key_or_group == "cluster"]
    if not chosen:
        raise ConfigError(f"cluster is not set: give cluster=NAME; there are {', '.join(names)}")
    choice = str(chosen[-1])
    path = Path(choice) if choice.endswith(".yaml") else folder / f"{choice}.yaml"
    if not choice.endswith(".yaml") and choice not in names:
        raise ConfigError(
            f"cluster={choice}: no such recipe{nearest(choice, names)}; there are "
            f"{', '.join(names)}; a file of your own is given by its path, which ends in .yaml"
        )
    base = load_yaml(path, f"cluster={choice}", ClusterConfig)
    knobs = parse_overrides(
        [
            override.input_line.replace("cluster.", "", 1)
            for override in overrides
            if "." in override.key_or_group
        ],
        ClusterConfig,
    )
    try:
        cluster = to_typed(ClusterConfig, base, knobs)
    except ConfigError as error:
        raise ConfigError(f"cluster.{error}") from error
    check_cluster(cluster)
    texts = {f"environment.{name}": value for name, value in cluster.environment.items()}
    for knob, value in (texts | {"container_image": cluster.container_image}).items():
        _refuse_secret(f"cluster.{knob}={value}")
    return cluster


def _check_segments(cluster: ClusterConfig, nodes: int) -> None:
    segment = cluster.segment_nodes
    if segment and nodes > segment and nodes % segment:
        raise ConfigError(
            f"nodes={nodes} is no multiple of cluster.segment_nodes={segment}, the nodes of one "
            f"NVLink domain: {nodes // segment * segment} or {(nodes // segment + 1) * segment} "
            "would be"
        )


def _refuse_secret(override: str) -> None:
    """Raises ConfigError if the override looks like a secret. The message omits the value, because
    it may end up in logs."""
    name, _, value = override.partition("=")
    if is_secret(name, value):
        raise ConfigError(
            f"{name}: the value looks like a secret, and a script is no place for one: export "
            "it in your own environment, which sbatch hands on, or use ~/.netrc"
        )
