"""A multi-node training job: the script from `slurm/job.sh`, and its submission. No torch.

Owns: which `#SBATCH` lines and settings a script gets, quoting, `sbatch`. Does not own: what a
script does (`slurm/*.sh`, the same text for every job), whether the run fits
(`launch.slurm.checks`), the cluster's knobs (`config.cluster`), which cells an array has
(`launch.sweep.slurm`).

No user text reaches a shell unquoted: `#SBATCH` lines hold only words that `config.cluster` has
matched whole, settings are quoted by `shlex`, and line breaks are refused. No secret reaches the
script: what looks like one is refused by name.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_train.compose.compose import (
    compose_config,
    nearest,
    parse_overrides,
    recipes_folder,
    to_typed,
)
from nemotron_train.config.cluster import ClusterConfig, check_cluster, refuse_control_characters
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config
from nemotron_train.launch.slurm.checks import check_nodes
from nemotron_train.plan.derive import Derived, derive
from nemotron_train.run_folder.folder import SECRET_NAME, SECRET_VALUE, run_path, write_atomically

SLURM_FOLDER = "slurm"  # inside a run folder: job.sh, links, chain.log, the jobs' own logs


@dataclass(frozen=True)
class Job:
    """One run on `nodes` nodes of a cluster; `words` follow `nemotron-train pretrain`."""

    config: Config
    derived: Derived
    cluster: ClusterConfig
    nodes: int
    words: list[str]
    workdir: Path

    @property
    def run_folder(self) -> Path:
        """As the user gave it: relative to `workdir`, or absolute."""
        return run_path(self.config)


def templates_folder() -> Path:
    """The job scripts' texts: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parents[2]
    inside = package / "slurm"
    return inside if inside.is_dir() else package.parent / "slurm"


def plan_job(overrides: Sequence[str], config_file: Path | None = None) -> Job:
    """The job that `cluster=`, `cluster.KNOB=`, `nodes=` and a run's overrides ask for, composed
    and derived on all of its ranks. Raises ConfigError."""
    parsed = parse_overrides(overrides)
    own = [o.input_line for o in parsed if is_job_knob(o.key_or_group)]
    given = [o.input_line for o in parsed if not is_job_knob(o.key_or_group)]
    refuse_unsafe(given)
    cluster, nodes = cluster_asked(own)
    config = compose_config(given, config_file)
    words = [*(["--config", str(config_file)] if config_file else []), *given]
    return job_of(config, cluster, nodes, words)


def is_job_knob(knob: str) -> bool:
    """Whether a knob is the job's rather than the run's."""
    return re.fullmatch(r"nodes|cluster(\..*)?", knob) is not None


def refuse_unsafe(words: Sequence[str]) -> None:
    """Raises ConfigError for overrides that hold a line break or what looks like a secret."""
    for word in words:
        _refuse_secret(word)
        refuse_control_characters("an override", word)


def cluster_asked(words: Sequence[str]) -> tuple[ClusterConfig, int]:
    """The cluster and the number of nodes that `cluster=`, `cluster.KNOB=` and `nodes=` ask for.
    Raises ConfigError."""
    parsed = parse_overrides(words)
    cluster = _compose_cluster([o for o in parsed if o.key_or_group != "nodes"])
    nodes = next((o.value() for o in reversed(parsed) if o.key_or_group == "nodes"), 1)
    if not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1:
        raise ConfigError(f"nodes={nodes}: give the number of nodes, 1 or more")
    _check_segments(cluster, nodes)
    return cluster, nodes


def job_of(config: Config, cluster: ClusterConfig, nodes: int, words: list[str]) -> Job:
    """The job of a run that is composed already; `words` follow `nemotron-train pretrain`. Raises
    ConfigError where the layout does not divide its ranks, or for a folder that sbatch would
    misread."""
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
    """The whole job script."""
    options = [f"--job-name={job.config.name}", "--output=slurm-%x-%j.log", *_options(job)]
    # One start of a run at a time, in the order of submission, however the one before ended.
    return fill("job.sh", [*options, "--dependency=singleton"], _settings(job))


def render_array(name: str, folder: Path, cells: Sequence[str], job: Job) -> str:
    """The script of an array whose task N runs cell N of the sweep in `folder`; `job` is any
    cell's."""
    options = [f"--job-name={name}", "--output=slurm-%x-%A_%a.log", *_options(job)]
    settings = [
        f"workdir={shlex.quote(str(job.workdir))}",
        f"sweep_folder={shlex.quote(str(folder))}",
        *("cells=(", *(f"    {shlex.quote(cell)}" for cell in cells), ")"),
    ]
    return fill("array.sh", options, settings)


def fill(template: str, options: Sequence[str], settings: Sequence[str]) -> str:
    """A script of `slurm/`: its `#SBATCH` lines and its settings put where it has marks for them.
    Neither is quoted here."""
    text = (templates_folder() / template).read_text(encoding="utf-8")
    before, mark, after = text.partition("# @SBATCH@\n")
    middle, second_mark, end = after.partition("# @SETTINGS@\n")
    assert mark and second_mark, "the script has both marks"
    lines = [*(f"#SBATCH {option}" for option in options), ""]
    return before + "\n".join(lines) + middle + "\n".join([*settings, ""]) + end


def need_sbatch() -> None:
    """Raises ConfigError where there is no Slurm, before anything is written."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on this machine's PATH: submit from a login node of the cluster, or "
            "print the script with --dry-run"
        )


def sbatch(job: Job, script: Path, log: str, *options: str) -> str:
    """Hand a script to Slurm; the job's number. `log` is the name of its output in the script's
    folder. Raises ConfigError with Slurm's own words where it refuses."""
    output = script.parent.resolve() / log
    command = ["sbatch", "--parsable", f"--chdir={job.workdir}", f"--output={output}"]
    done = subprocess.run([*command, *options, str(script)], capture_output=True, text=True)
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"cluster={job.cluster.name}: sbatch refused the job: {said}")
    return done.stdout.strip().partition(";")[0]


def write_script(job: Job) -> Path:
    """The job's script, into its run folder."""
    folder = job.run_folder / SLURM_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "job.sh"
    write_atomically(script, render(job))
    return script


def submit(job: Job, console: Any) -> list[str]:
    """Write the script into the run folder and hand it to `sbatch`, once a link; the jobs' numbers.
    Raises ConfigError with Slurm's own words where it refuses."""
    need_sbatch()
    script = write_script(job)
    numbers: list[str] = []
    for _ in range(job.cluster.chain_links):
        try:
            numbers.append(sbatch(job, script, "job_%j.log"))
        except ConfigError as error:
            already = f" (submitted before that: {', '.join(numbers)})" if numbers else ""
            raise ConfigError(f"{error}{already}") from None
        # The script of a finished run cancels the links that are still waiting.
        write_links(job, numbers)
    links = "job" if len(numbers) == 1 else "jobs"
    console.print(
        f"submitted {links} {', '.join(numbers)}: {job.nodes} node(s) of {job.cluster.name}, "
        f"{job.derived.num_ranks} ranks, {job.derived.total_steps:,} steps",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"script {script}; nemotron-train slurm status tells how it goes", soft_wrap=True)
    return numbers


def write_links(job: Job, numbers: Sequence[str]) -> None:
    """Notes which jobs are the run's."""
    path = job.run_folder / SLURM_FOLDER / "links"
    write_atomically(path, "".join(f"{number}\n" for number in numbers))


def _options(job: Job) -> list[str]:
    """`sbatch`'s options; every value is a number or a word that `check_cluster` has matched."""
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
    """Assignments of the script's variables, in its own order."""
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
    from omegaconf import OmegaConf
    from yaml import YAMLError

    folder = recipes_folder() / "cluster"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    chosen = [o.value() for o in overrides if o.key_or_group == "cluster"]
    if not chosen:
        raise ConfigError(f"cluster is not set: give cluster=NAME; there are {', '.join(names)}")
    choice = str(chosen[-1])
    path = Path(choice) if choice.endswith(".yaml") else folder / f"{choice}.yaml"
    if not choice.endswith(".yaml") and choice not in names:
        raise ConfigError(
            f"cluster={choice}: no such recipe{nearest(choice, names)}; there are "
            f"{', '.join(names)}; a file of your own is given by its path, which ends in .yaml"
        )
    try:
        base = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ConfigError(f"cluster={choice}: cannot be read ({error})") from error
    if not OmegaConf.is_dict(base):
        raise ConfigError(f"cluster={choice}: {path} holds no cluster")
    knobs = parse_overrides(
        [o.input_line.replace("cluster.", "", 1) for o in overrides if "." in o.key_or_group]
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
    """The value is not shown: this line lands in logs."""
    name, _, value = override.partition("=")
    if SECRET_NAME.search(name.rpartition(".")[2]) or SECRET_VALUE.search(value):
        raise ConfigError(
            f"{name}: the value looks like a secret, and a script is no place for one: export "
            "it in your own environment, which sbatch hands on, or use ~/.netrc"
        )
