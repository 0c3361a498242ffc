"""Folders with the Python of GPU packages, for tests: `make env` and `make test-transformer-engine`
fill them. They lie beside the environment's own packages, where nothing else finds them.
"""

import os
import sys
from pathlib import Path


def folder(name: str) -> Path | None:
    """Where the package `name` is, or None if it was not installed. TEST_PACKAGES in the
    environment names another place, for a checkout that shares its environment."""
    place = Path(os.environ.get("TEST_PACKAGES", f"{sys.prefix}/test_packages")) / name
    return place if (place / ".installed").exists() else None


def put_on_path(name: str) -> None:
    """Let this process import what is in the package's folder, before others of that name."""
    place = folder(name)
    assert place is not None, name
    sys.path.insert(0, str(place))
