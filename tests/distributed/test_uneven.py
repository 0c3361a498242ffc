"""Megatron's gather and reduce-scatter of parts of different lengths, which experts sharded over
ranks need, on three gloo ranks. One part is empty. Second truth: the whole tensor, known to every
rank.
"""

from collections.abc import Callable
from pathlib import Path


def test_parts_of_different_lengths(
    tmp_path: Path, run_ranks: Callable[[list[str], Path, int], None]
) -> None:
    script = Path(__file__).with_name("uneven_parts.py")
    run_ranks([str(script), "answer"], tmp_path, 3)
    # The canary: once gloo accepts uneven parts, platform.megatron_cpu need not pad them.
    assert "invalid tensor size" in (tmp_path / "answer").read_text()
