"""The model that a checkpoint belongs to. Not covered: its tensors (tests/distributed)."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nemotron_train.compose.compose import compose_config
from nemotron_train.config.errors import ConfigError
from nemotron_train.run_folder.checkpoint_metadata import PROGRESS, check_model


def test_the_cut_into_stages_is_no_part_of_the_model(tmp_path: Path) -> None:
    model = compose_config(["model.pattern='MEM|*EME'"]).model
    (tmp_path / PROGRESS).write_text(json.dumps({"model": asdict(model)}))
    check_model(tmp_path, replace(model, pattern="MEM*EME"))
    check_model(tmp_path, replace(model, pattern="ME|M*|EM|E", name="another"))
    with pytest.raises(ConfigError, match=r"model\.pattern is MEM\*EME there and MEM\*EMM here"):
        check_model(tmp_path, replace(model, pattern="MEM*|EMM"))
