"""What a folder given as ``--checkpoint`` holds: a run, an adapter, or a model; and the config it was made with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpointing.store import CheckpointStore
from config.errors import CheckpointError
from config.ppo_config import PPOConfig


class Checkpoint(NamedTuple):
    """Trained weights on disk."""

    folder: Path  # of the adapter, or of the whole model
    is_adapter: bool
    config: dict[str, Any]  # what a run wrote down, of the fields that PPOConfig has; empty where nothing was
    rewards: dict[str, float]  # name → weight, of a run of reinforcement learning


#: Settings of rewards that send texts, or a key, elsewhere, or run a program: not for a file to decide.
REACHING_OUT = ("url", "api_key_env", "sandbox_command", "allow_unsafe_code")


def find_checkpoint(name: str) -> Checkpoint:
    """The newest weights in ``name``, or ``name`` itself.

    Of a run ``final``, else ``interrupted``, else ``model``, else its newest checkpoint.

    Raises:
        CheckpointError: there are none.
    """
    from base_setup.lora_setup import DESCRIPTION, WEIGHTS, read_description  # MLX, which no --help waits for

    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f'--checkpoint: there is no folder "{name}"; give a run folder, an adapter or a model'
        )
    for part in (folder / "final", folder / "interrupted", folder):
        if (part / WEIGHTS).is_file() and (part / DESCRIPTION).is_file():
            read_description(part)
            return Checkpoint(part, True, *_described(part, folder))
    stored = CheckpointStore(folder).complete()
    if stored and not (folder / "model").is_dir():
        path = stored[-1].path
        return Checkpoint(path, True, *_described(path, folder))
    for part in (folder / "model", folder):
        if any(part.glob("*.safetensors")) and (part / "config.json").is_file():
            return Checkpoint(part, False, *written_down(folder / "config.json"))
    raise CheckpointError(
        f'--checkpoint: "{name}" holds neither a run (final/{WEIGHTS}), nor an adapter ({WEIGHTS}), nor a model '
        "(config.json and *.safetensors); give a folder that does"
    )


def _described(part: Path, folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """What RL or another stage wrote beside its weights, or into its run folder."""
    return written_down(part / "ppo_config.json", part / "run_config.json", folder / "config.json")


def check_written_rewards(checkpoint: Checkpoint, rewards: Any, option: str = "--checkpoint") -> None:
    """Refuse rewards that a checkpoint names and that would run its own code, or reach out: it may be anybody's.

    Functions in files elsewhere, which the run was trained with on this machine, are let through.

    Raises:
        CheckpointError: naming the reward and how to give it oneself.
    """
    folder = checkpoint.folder.resolve()
    home = folder.parent if folder.name in ("final", "interrupted", "model") else folder
    parts = (
        rewards if isinstance(rewards, list) else list(rewards) if isinstance(rewards, Mapping) else [rewards]
    )
    for part in parts:
        name, settings = (part.get("name"), part.get("config")) if isinstance(part, Mapping) else (part, None)
        reason = None
        try:
            inside = any(file.resolve().is_relative_to(home) for file in _files_of(str(name)))
        except (
            ValueError,
            RuntimeError,
            OSError,
        ) as error:  # nothing before the colon, a NUL, links in a circle
            raise CheckpointError(
                f"{option}: {home} asks for the reward {str(name)!r:.60}, which nothing can be called ({error}); give "
                "the rewards yourself with --reward"
            ) from error
        if inside:
            reason = "which is code that came with it"
        options = settings if isinstance(settings, Mapping) else {}
        reaching = [key for key in REACHING_OUT if key in options]
        if reaching:
            reason = f"with {reaching[0]} = {options[reaching[0]]!r:.60}"
        if reason is not None:
            raise CheckpointError(
                f'{option}: {home} asks for the reward "{name}", {reason}; if you trust it, give it yourself with '
                "--reward, or --config with the file that the run was trained from"
            )


def _files_of(reward: str) -> Iterator[Path]:
    """Where the code of ``file.py:function`` or ``package.module:function`` would be read from."""
    source = reward.partition(":")[0].strip()
    if source.endswith(".py"):
        yield Path(source).expanduser()
    elif ":" in reward:
        for place in ("", *sys.path):
            below = Path(place or ".") / source.replace(".", "/")
            yield from (below.with_suffix(".py"), below / "__init__.py")


def written_down(*paths: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Config and rewards of the first of these files that a run of ours wrote.

    Raises:
        CheckpointError: one of them is there and cannot be read.
    """
    for path in paths:
        content = read_written(path)
        if isinstance(content.get("config"), dict):
            fields = PPOConfig.__dataclass_fields__
            mine = fields.keys() - {"trust_remote_code"}  # which only whoever runs it can give
            config = {name: value for name, value in content["config"].items() if name in mine}
            rewards = content.get("rewards")
            return config, rewards if isinstance(rewards, dict) else {}
    return {}, {}


def read_written(path: Path, option: str = "--checkpoint") -> dict[str, Any]:
    """The JSON object in a file that a run wrote; {} where there is none.

    Raises:
        CheckpointError: it is damaged. Defaults in its place would be of another model.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{option}: {path} says what was trained, and cannot be read ({error}); put it back, or remove it and say "
            "the same with --config"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{option}: {path} says what was trained, and holds no JSON object; put it back, or remove it and say the "
            "same with --config"
        )
    return content
