#!/usr/bin/env bash
# Installs the optional GPU packages into an environment that has torch already:
#
#   launch/gpu_packages.sh PYTHON          `make env EXTRAS=dev,gpu` calls it
#
# GPU_ARCH      compute capabilities without the dot, such as "90" or "90,100"; default: what
#               nvidia-smi reports, else 90 and 100
# GPU_PACKAGES  default "mamba-ssm transformer-engine causal-conv1d"
# GPU_STRICT=1  exit with 1 if a package is missing at the end; default: say so and exit with 0
# MAX_JOBS      compilers at once; default: one a core, and 4 GiB of free memory for each
#
# Versions: constraints-gpu.txt. Everything is built against the torch that is there
# (--no-build-isolation) and brings no torch of its own (--no-deps). docs/gpu.md explains.
set -euo pipefail

build_tools=(ninja pybind11 setuptools wheel)

refuse() {
    echo "gpu_packages: $*" >&2
    exit 2
}

say() { echo "gpu_packages: $*"; }

[[ $# == 1 && -x $(command -v "$1") ]] || refuse "usage: launch/gpu_packages.sh PYTHON"
python=$(command -v "$1")
# Absolute, but not resolved: a virtual environment is found by the link's own folder.
python=$(cd -- "$(dirname -- "$python")" && pwd)/$(basename -- "$python")
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# --- choices --------------------------------------------------------------------------------
choose_architectures() {
    local found
    if [[ -n ${GPU_ARCH-} ]]; then
        found=${GPU_ARCH//[,;]/ }
    elif found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null) &&
        [[ $found =~ ^[0-9.[:space:]]+$ ]]; then
        found=${found//./}
    else
        found="90 100"
        say "no GPU here: building for GPU_ARCH=90,100 (Hopper and Blackwell); give one to halve" \
            "the time"
    fi
    mapfile -t architectures < <(tr -s ' ' '\n' <<<"$found" | sed '/^$/d' | sort -nu)
    local architecture
    for architecture in "${architectures[@]}"; do
        [[ $architecture =~ ^[1-9][0-9]{1,2}$ ]] || refuse "GPU_ARCH=$GPU_ARCH: must be compute" \
            "capabilities without the dot, such as 90 for an H100 or 90,100"
        ((architecture >= 80)) || refuse "GPU_ARCH=$architecture: the kernels need 80 (A100) or more"
    done
    ((${#architectures[@]})) || refuse "GPU_ARCH=$GPU_ARCH: names no architecture"
}

choose_jobs() {
    local cores memory
    if [[ -n ${MAX_JOBS-} ]]; then
        [[ $MAX_JOBS =~ ^[1-9][0-9]*$ ]] || refuse "MAX_JOBS=$MAX_JOBS: must be 1 or more"
        return
    fi
    cores=$(nproc)
    memory=$(awk '/^MemAvailable:/ { print int($2 / 4194304) }' /proc/meminfo)
    MAX_JOBS=$((cores < memory ? cores : memory))
    ((MAX_JOBS >= 1)) || MAX_JOBS=1
}

# --- what the compilers need ------------------------------------------------------------------
# Sets `obstacle` to the reason why nothing can be compiled here, or to nothing. torch's CUDA and
# nvcc's must have the same major version, which torch checks late and at length.
look_for_compilers() {
    local torch_cuda nvcc_cuda
    obstacle=
    # /usr/local/cuda first: an nvcc on PATH may be a link or a script in another folder.
    if [[ -z ${CUDA_HOME-} && -x /usr/local/cuda/bin/nvcc ]]; then
        CUDA_HOME=/usr/local/cuda
    elif [[ -z ${CUDA_HOME-} ]] && nvcc=$(command -v nvcc); then
        CUDA_HOME=$(dirname -- "$(dirname -- "$(readlink -f -- "$nvcc")")")
    fi
    torch_cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")')
    if [[ -z $torch_cuda ]]; then
        obstacle="this torch is a CPU build; install the CUDA build that constraints.txt pins"
    elif [[ ! -x ${CUDA_HOME-}/bin/nvcc ]]; then
        obstacle="no nvcc: install the CUDA toolkit $torch_cuda or set CUDA_HOME to its folder"
    elif ! command -v g++ >/dev/null; then
        obstacle="no g++: install a C++ compiler (Debian: build-essential)"
    elif ! "$python" -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())'; then
        obstacle="no Python.h: install Python's headers (Debian: python3-dev)"
    else
        nvcc_cuda=$("$CUDA_HOME/bin/nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
        [[ ${nvcc_cuda%%.*} == "${torch_cuda%%.*}" ]] || obstacle="$CUDA_HOME has CUDA $nvcc_cuda and \
torch $torch_cuda: install the CUDA toolkit $torch_cuda or set CUDA_HOME to its folder"
    fi
}

set_build_environment() {
    local nvidia dotted=() architecture
    for architecture in "${architectures[@]}"; do
        dotted+=("${architecture%?}.${architecture: -1}")
    done
    TORCH_CUDA_ARCH_LIST=$(IFS=';' && echo "${dotted[*]}")
    NVTE_CUDA_ARCHS=$(IFS=';' && echo "${architectures[*]}")
    export TORCH_CUDA_ARCH_LIST NVTE_CUDA_ARCHS MAX_JOBS
    [[ -z ${CUDA_HOME-} ]] || export CUDA_HOME
    # The toolkit's headers come first. cuDNN's, often NCCL's and, in a small toolkit, cuBLAS's are
    # missing there and come from torch's own wheels, which in turn lack those of the compiler.
    nvidia=$("$python" -c 'import nvidia; print(list(nvidia.__path__)[0])' 2>/dev/null) || nvidia=
    if [[ -n $nvidia ]]; then
        export CPATH=${CPATH:+$CPATH:}${CUDA_HOME:+$CUDA_HOME/include:}$nvidia/cu13/include
        CPATH+=:$nvidia/cudnn/include:$nvidia/nccl/include
    fi
    # causal_conv1d's setup names nine architectures itself: this nvcc leaves out the others.
    export PYTORCH_NVCC=$here/launch/nvcc_selected.sh
    export NVCC_SELECTED=${architectures[*]}
    # Without these, the setups download what their projects built, for every architecture.
    export CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE NVTE_PYTORCH_FORCE_BUILD=TRUE
    # Of mamba_ssm only the scan is used, which is Triton: nothing of it is compiled.
    export MAMBA_SKIP_CUDA_BUILD=TRUE
}

# --- the packages -----------------------------------------------------------------------------
pip_install() { # no cache: pip would reuse a wheel that was built for another torch or GPU
    (cd "$here" && "$python" -m pip install --disable-pip-version-check --no-cache-dir \
        --no-build-isolation --no-deps --constraint constraints.txt \
        --constraint constraints-gpu.txt "$@")
}

# Fails unless package $1 can be imported, on a machine without a GPU, too.
imports() {
    case $1 in
        causal-conv1d) "$python" -c 'import torch, causal_conv1d' ;;
        transformer-engine) "$python" -c 'import torch, transformer_engine.pytorch' ;;
        # Its __init__ imports the compiled half, which is left out: the scan is imported alone.
        mamba-ssm) "$python" -c 'import importlib.util, sys, types
bare = types.ModuleType("mamba_ssm")
bare.__path__ = list(importlib.util.find_spec("mamba_ssm").submodule_search_locations)
sys.modules["mamba_ssm"] = bare
import mamba_ssm.ops.triton.ssd_combined' ;;
    esac
}

# What package $1 imports, besides torch and what torch brings.
needed_by() {
    case $1 in
        mamba-ssm) echo einops ;;
        transformer-engine) echo einops ml-dtypes nvdlfw-inspect nvidia-cudnn-frontend onnx \
            onnx-ir onnxscript ;;
    esac
}

fallback() {
    case $1 in
        mamba-ssm) echo "Mamba-2 runs as chunked torch" ;;
        transformer-engine) echo "linears are Megatron-Core's, FP4 and FP8 are emulated" ;;
        causal-conv1d) echo "the convolution runs as torch operations" ;;
    esac
}

missing() { # PACKAGE REASON
    say "$1 is not installed: $2. Without it $(fallback "$1") (docs/gpu.md)"
    num_missing=$((num_missing + 1))
}

# The reason in a log: a compiler's first error, else the last line about an error, else the last.
reason_in() {
    local reason
    reason=$(grep -m 1 -E '(^|[ :])(fatal )?error: [^s]|^RuntimeError|Killed' "$1") ||
        reason=$(grep -iE 'error|not found' "$1" | tail -n 1) || reason=$(tail -n 1 "$1")
    sed 's/^[[:space:]]*//; s/[.[:space:]]*$//' <<<"$reason" | tr -cd '[:print:]' | cut -c 1-160
}

install_package() {
    local package=$1 parts=("$1") log=$logs/$1.log
    [[ $package != transformer-engine ]] ||
        parts=(transformer-engine transformer-engine-cu13 transformer-engine-torch)
    if [[ $package != mamba-ssm && -n $obstacle ]]; then
        missing "$package" "$obstacle"
        return
    fi
    # A part that pip already has at the pinned version stays, unless it does not import or was built
    # here for another torch or GPU.
    local force=() built=$logs/$package.built what="torch $torch"
    [[ $package != causal-conv1d ]] || what+=", architectures ${architectures[*]}"
    if ! imports "$package" >/dev/null 2>&1 || [[ -e $built && $(<"$built") != "$what" ]]; then
        force=(--force-reinstall)
    fi
    say "$package ... (log: $log)"
    if ! pip_install "${force[@]}" "${parts[@]}" >"$log" 2>&1; then
        missing "$package" "$(reason_in "$log"); whole log: $log"
    elif ! imports "$package" >>"$log" 2>&1; then
        # Found but not usable would end a run in its first step.
        "$python" -m pip uninstall --yes "${parts[@]}" >/dev/null 2>&1 || true
        missing "$package" "built, but it does not import: $(reason_in "$log"); removed; log: $log"
    else
        echo "$what" >"$built"
        say "$package is installed"
    fi
}

num_missing=0
read -ra packages <<<"${GPU_PACKAGES-mamba-ssm transformer-engine causal-conv1d}"
for package in "${packages[@]}"; do
    [[ -n $(fallback "$package") ]] || refuse "GPU_PACKAGES: $package is none of mamba-ssm," \
        "transformer-engine, causal-conv1d"
done
torch=$("$python" -c 'import torch; print(torch.__version__)' 2>/dev/null) ||
    refuse "$python has no torch: run make env first"
choose_architectures
choose_jobs
look_for_compilers
set_build_environment
logs=$("$python" -c 'import sys; print(sys.prefix)')/gpu_logs
mkdir -p "$logs"
say "architectures ${architectures[*]}, $MAX_JOBS compilers at once"
mapfile -t needed < <(for package in "${packages[@]}"; do needed_by "$package"; done |
    tr ' ' '\n' | sort -u)
pip_install --quiet "${build_tools[@]}" "${needed[@]}" >"$logs/needed.log" 2>&1 ||
    refuse "what the packages need cannot be installed: $(reason_in "$logs/needed.log"); whole" \
        "log: $logs/needed.log"
for package in "${packages[@]}"; do
    install_package "$package"
done
[[ ${GPU_STRICT-} != 1 || $num_missing == 0 ]] || exit 1
