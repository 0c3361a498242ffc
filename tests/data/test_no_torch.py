"""The data modules work if torch is not installed or is too slow to import."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import importlib, pkgutil, sys
sys.modules["torch"] = None  # an import of torch raises ImportError from here on
import nemotron_train.data
for module in pkgutil.iter_modules(nemotron_train.data.__path__):
    importlib.import_module(f"nemotron_train.data.{module.name}")
from nemotron_train.config.schema import BlendSource, DataConfig, DataPhase
from nemotron_train.data.batches import BatchSource
folder = sys.argv[1]
config = DataConfig(tokenizer=folder + "/tokenizer", phases=[DataPhase(0, [BlendSource(folder)])])
source = BatchSource(config, sequence_length=4, seed=0, split="train", vocab_size=60_000)
batch, _ = source.take(source.state_at_start(), 3)
print(batch.tokens_BS.shape)
"""


def test_every_module_and_a_batch_without_torch(tmp_path: Path, write_folder) -> None:
    """Not covered: format=dataset, where the `datasets` library imports torch by itself."""
    folder = write_folder(tmp_path / "x", [[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(3, 4)", done.stderr
