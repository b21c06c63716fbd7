"""What was trained, written to disk and read back by a process that knows nothing else, is the same model."""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from base_setup.lora_setup import DESCRIPTION, WEIGHTS
from base_setup.parameters import named_arrays
from config.errors import ToolkitError
from config.ppo_config import PPOConfig
from diagnosis.findings import Finding, judged
from diagnosis.machine import machine_memory
from diagnosis.tolerance import SPACING, compute_dtype_of, largest
from models.policy_model import PolicyModel
from models.sft_model import LanguageModel, load_language_model
from ppo_trainer.ppo_trainer import PPOTrainer

NAME = "save and load"
ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300.0  # a process may take to load the model and compute the logits
ROUNDING = 8.0  # spacings of the largest logit: another process may add up in another order
CONFIG, TOKENS, LOGITS = "restart.json", "restart_tokens.npy", "restart_logits.npy"


def check_restart(trainer: PPOTrainer, tokens: mx.array, folder: Path, *, fresh: bool = False) -> Finding:
    """A new policy, made from the files alone, gives the same logits: to the last bit over the base that is here.

    Args:
        tokens: (B, T) int32 to compare on. folder: where to save; it is left to the caller to remove.
        fresh: in a process of its own, which loads the base model as well, where the machine has room for a second one,
            too, up to rounding.
    """
    second = sum(x.nbytes for x in named_arrays(trainer.policy.base.model.parameters()).values())
    fresh = fresh and second < machine_memory() / 4
    try:
        trainer.save_model(folder)
        here = _here(trainer, tokens, folder)
        there = _in_a_process(trainer, tokens, folder) if fresh else here
    except (ToolkitError, OSError, subprocess.SubprocessError) as error:
        return Finding(
            NAME,
            "fault",
            str(error),
            "free some space, or choose another folder for temporary files (TMPDIR); what was saved cannot be read",
        )
    mine = _logits(trainer.policy, tokens)
    size = sum((folder / name).stat().st_size for name in (WEIGHTS, DESCRIPTION))
    limit = ROUNDING * SPACING[compute_dtype_of(trainer.policy.model)] * max(1.0, largest(mine))
    seen = f"{size / 1e6:.2f} MB written; logits of {tokens.size} tokens differ by {largest(mine - here):.2g} at most"
    if fresh:
        seen += f", read by another process by {largest(mine - there):.2g} (rounding: {limit:.1g})"
    return judged(
        NAME,
        mine.tobytes() == here.tobytes() and largest(mine - there) <= limit,
        seen,
        "what is on disk is not what was trained: a weight that trains is missing from the adapter folder, or its "
        "scale and rank are not those written in adapter_config.json",
    )


def _logits(policy: PolicyModel, tokens: mx.array) -> np.ndarray:
    return np.array(policy.forward(tokens).logits.astype(mx.float32))


def _restored(base: LanguageModel, config: PPOConfig, folder: Path) -> PolicyModel:
    return PolicyModel(base, config.replace(adapter_path=str(folder)))


def _here(trainer: PPOTrainer, tokens: mx.array, folder: Path) -> np.ndarray:
    return _logits(_restored(trainer.policy.base, trainer.config, folder), tokens)


def _in_a_process(trainer: PPOTrainer, tokens: mx.array, folder: Path) -> np.ndarray:
    base = trainer.policy.base
    name = str(folder / "base") if base.is_altered else base.name
    settings = trainer.config.as_dict() | {"model_name": name, "output_dir": None}
    (folder / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
    np.save(folder / TOKENS, np.array(tokens))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "diagnosis.restart_check",
            str(folder),
        ],  # -P: not a config.py that is here
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise OSError(f"the process that was to read {folder} has failed: {last}")
    logits: np.ndarray = np.load(folder / LOGITS)
    return logits


def main(folder: Path) -> None:
    """The other process."""
    config = PPOConfig(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    policy = _restored(load_language_model(config), config, folder)
    np.save(folder / LOGITS, _logits(policy, mx.array(np.load(folder / TOKENS))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
