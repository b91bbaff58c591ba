"""What every result here says of itself: when, on what, with which versions and settings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from amcli.evaluation.results import today
from amcli.evaluation.runner import hardware
from amcli.models.loading import LoadedModel
from amcli.system.versions import tools


def about(args: argparse.Namespace, loaded: LoadedModel) -> dict[str, Any]:
    """Date, hardware, versions, and the settings; a model's folder by its last name only."""
    settings = {**vars(args), "model": Path(args.model).name}
    return {
        "date": today(),
        "hardware": hardware(loaded.device),
        **tools(),
        "settings": settings,
    }
