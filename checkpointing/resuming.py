"""From ``resume`` to a checkpoint, and what a config that has changed since then means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpointing.durable import read_strict_json
from checkpointing.store import MANIFEST, CheckpointStore, Saved, open_checkpoint
from config.declaration import Declaration
from config.errors import CheckpointError, InvalidConfigurationError

LATEST, STATE = "latest", "state.json"
#: Of these nothing depends that is trained.
FREE = frozenset(
    {
        "model_name",  # a folder may move; its weights are compared
        "train_path",  # likewise, its prompts
        "val_path",
        "dataset_name",
        "dataset_config",
        "output_dir",
        "verbose",
        "log_samples_every",
        "max_logged_samples",
        "prefetch_batches",
        "max_memory_gb",
        "max_skipped_steps",
        "save_every",
        "keep_last_n",
        "keep_best",
        "min_free_gb",
        "resume",
        "resume_fallback",
    }
)
#: What the weights and states in a checkpoint are made for.
FIXED = frozenset(
    {
        "algorithm",
        "embedded_model",
        "fine_tune_type",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_layers",
        "lora_rslora",
        "lora_blocks",
        "lora_modules",
        "modules_to_save",
        "soft_prompt_tokens",
        "value_network",
        "optimizer_bits",
        "kl_target",
        "reference",
        "reference_sync_every",
        "rollout_policy",
        "quantize_for_rollouts",
        "rollout_bits",
        "rollout_quant_group_size",
    }
)


def find_resume(which: str | Path, run_folder: Path | None, *, fallback: bool) -> Saved | None:
    """The checkpoint that ``resume`` names, checked; None: "latest", and there is no run yet.

    Raises:
        CheckpointError: there is none, or it is damaged. InvalidConfigurationError: "latest" of no folder.
    """
    if str(which) == LATEST:
        if run_folder is None:
            raise InvalidConfigurationError(
                'resume: "latest" is the newest checkpoint in output_dir, and there is none; set output_dir, or give '
                "a run folder or a checkpoint"
            )
        return CheckpointStore(run_folder).newest(fallback=fallback)
    path = Path(which).expanduser()
    if (path / MANIFEST).is_file() or not path.is_dir():
        return open_checkpoint(path)
    saved = CheckpointStore(path).newest(fallback=fallback)
    if saved is None:
        raise CheckpointError(
            f'resume: "{path}" holds no complete checkpoint; give a run folder with one (save_every), or start a '
            "new run from weights with adapter_path"
        )
    return saved


def run_folder_of(which: str | Path) -> Path:
    """The run folder that a checkpoint, or the folder itself, stands for."""
    path = Path(which).expanduser().resolve()
    return path.parent if (path / MANIFEST).is_file() else path


def check_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed since the checkpoint and changes what follows, in words; empty: the run goes on exactly.

    Raises:
        InvalidConfigurationError: naming the fields that the checkpoint's weights and states do not fit.
    """
    differing = [name for name in now if name not in FREE and saved.get(name) != now[name]]
    fixed = [name for name in differing if name in FIXED]
    if fixed:
        raise InvalidConfigurationError(
            f"{', '.join(fixed)}: {_change(fixed[0], saved, now)}, and what the checkpoint holds does not fit; give "
            "what it was made with, or start a new run from its weights (adapter_path)"
        )
    return [_change(name, saved, now) for name in differing]


def _change(name: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return f"{name} was {saved.get(name, 'not there')} and is {now[name]}"


def read_state(folder: Path) -> dict[str, Any]:
    """The parsed ``state.json`` of a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        state = read_strict_json(folder / STATE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE}: it cannot be read ({error})") from error
    if not isinstance(state, dict) or "counters" not in state:
        raise CheckpointError(f"{folder / STATE}: this is not the state of a run of ours")
    return state


def plain_config(config: Declaration) -> dict[str, Any]:
    """A config as a checkpoint has it."""
    plain: dict[str, Any] = json.loads(json.dumps(config.as_dict()))
    return plain
