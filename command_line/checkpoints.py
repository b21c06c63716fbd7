"""What a folder given as ``--checkpoint`` holds: a run, an adapter, or a model; and the config it was made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from base_setup.lora_setup import DESCRIPTION, WEIGHTS, read_description
from checkpointing.store import CheckpointStore
from config.errors import CheckpointError
from config.ppo_config import PPOConfig


class Checkpoint(NamedTuple):
    """Trained weights on disk."""

    folder: Path  # of the adapter, or of the whole model
    is_adapter: bool
    config: dict[str, Any]  # what a run wrote down, of the fields that PPOConfig has; empty where nothing was
    rewards: dict[str, float]  # name → weight, of a run of reinforcement learning


def find_checkpoint(name: str) -> Checkpoint:
    """The newest weights in ``name``, or ``name`` itself.

    Of a run ``final``, else ``interrupted``, else its newest checkpoint, else ``model``.

    Raises:
        CheckpointError: there are none.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f'--checkpoint: there is no folder "{name}"; give a run folder, an adapter or a model'
        )
    for part in (folder / "final", folder / "interrupted", folder):
        if (part / WEIGHTS).is_file() and (part / DESCRIPTION).is_file():
            read_description(part)
            return Checkpoint(part, True, *written_down(part / "ppo_config.json", folder / "config.json"))
    if stored := CheckpointStore(folder).complete():
        path = stored[-1].path
        return Checkpoint(path, True, *written_down(path / "ppo_config.json", folder / "config.json"))
    for part in (folder / "model", folder):
        if any(part.glob("*.safetensors")) and (part / "config.json").is_file():
            return Checkpoint(part, False, *written_down(folder / "config.json"))
    raise CheckpointError(
        f'--checkpoint: "{name}" holds neither a run (final/{WEIGHTS}), nor an adapter ({WEIGHTS}), nor a model '
        "(config.json and *.safetensors); give a folder that does"
    )


def written_down(*paths: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Config and rewards of the first of these files that a run of ours wrote."""
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and isinstance(content.get("config"), dict):
            fields = PPOConfig.__dataclass_fields__
            config = {name: value for name, value in content["config"].items() if name in fields}
            rewards = content.get("rewards")
            return config, rewards if isinstance(rewards, dict) else {}
    return {}, {}
