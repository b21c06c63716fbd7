"""Plug-ins written for MLX RL Trainer import from ``mlx_rl_trainer``; here they find the same names in this package.

Put in place only when a reward file that says so is loaded, and never over an installed package of that name.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

PACKAGE = "mlx_rl_trainer"
#: Their module → ours.
MODULES = {
    "rewards": "rewards",
    "rewards.base_reward": "rewards.base_reward",
    "rewards.registry": "rewards.registry",
    "rewards.context": "rewards.context",
    "utils.text_utils": "rewards.text_utils",
}


def install() -> None:
    """Let ``mlx_rl_trainer.rewards.base_reward`` and the others be imported."""
    if PACKAGE in sys.modules or importlib.util.find_spec(PACKAGE) is not None:
        return
    for package in (PACKAGE, f"{PACKAGE}.utils"):
        module = ModuleType(package, f"Names of this project under those of {PACKAGE}.")
        module.__path__ = []
        sys.modules[package] = module
    for theirs, mine in MODULES.items():
        sys.modules[f"{PACKAGE}.{theirs}"] = importlib.import_module(mine)
