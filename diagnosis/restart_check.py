"""What was trained, written to disk and read back, is the same model."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from base_setup.lora_setup import DESCRIPTION, WEIGHTS
from config.errors import ToolkitError
from diagnosis.findings import Finding, judged
from diagnosis.tolerance import largest
from models.policy_model import PolicyModel
from ppo_trainer.ppo_trainer import PPOTrainer

NAME = "save and load"


def check_restart(trainer: PPOTrainer, tokens: mx.array, folder: Path) -> Finding:
    """A new policy over the same base, made from the files alone, gives the same logits to the last bit.

    Args:
        tokens: (B, T) int32 to compare on. folder: where to save; it is left to the caller to remove.
    """
    try:
        trainer.save_model(folder)
        again = PolicyModel(trainer.policy.base, trainer.config.replace(adapter_path=str(folder)))
    except ToolkitError as error:
        return Finding(
            NAME,
            "fault",
            str(error),
            "free some space, or choose another folder for temporary files (TMPDIR)",
        )
    mine, theirs = (
        np.array(policy.forward(tokens).logits.astype(mx.float32)) for policy in (trainer.policy, again)
    )
    size = sum((folder / name).stat().st_size for name in (WEIGHTS, DESCRIPTION))
    return judged(
        NAME,
        mine.tobytes() == theirs.tobytes(),
        f"{size / 1e6:.2f} MB written; logits of {tokens.size} tokens differ by {largest(mine - theirs):.2g} at most",
        "what is on disk is not what was trained: a weight that trains is missing from the adapter folder, or its "
        "scale and rank are not those written in adapter_config.json",
    )
