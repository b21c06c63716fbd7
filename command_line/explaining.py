"""``explain``: the config as a run will have it, where each value came from, and the formula that it trains."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from command_line.config_options import add_config_options, load
from command_line.parsing import Command, Parser
from config.errors import InvalidConfigurationError
from config.loader import Loaded
from config.ppo_config import PPOConfig

if TYPE_CHECKING:
    from ppo_trainer.algorithms import Algorithm


def resolved(loaded: Loaded[PPOConfig], config: PPOConfig | None = None) -> tuple[PPOConfig, Algorithm]:
    """The config with what nobody set filled in from its algorithm's row, and that row.

    Args:
        config: in place of the loaded one.
    Raises:
        InvalidConfigurationError: with the place where the option that cannot stay was set.
    """
    from ppo_trainer.algorithms import find_algorithm
    from ppo_trainer.resolution import resolve_config

    config = config or loaded.config
    try:
        algorithm = find_algorithm(config.algorithm)
        return resolve_config(config, algorithm), algorithm
    except InvalidConfigurationError as error:
        raise loaded.located(error) from None


def explained(loaded: Loaded[Any]) -> str:
    """The page for a loaded config of any class; one of reinforcement learning is resolved first."""
    from config.explain import explain

    if not isinstance(loaded.config, PPOConfig):
        return explain(loaded.config, loaded.origins)
    config, algorithm = resolved(loaded)
    loaded = loaded.resolved(config)
    return explain(config, loaded.origins, advantage=algorithm.advantage)


def run(options: argparse.Namespace) -> int:
    """Print it; nothing is looked up, read or loaded but the config."""
    print(explained(load(PPOConfig, options)))
    return 0


def _options(parser: Parser) -> None:
    add_config_options(parser, PPOConfig)


EXPLAIN = Command(
    "explain",
    "print the resolved config of train, where each value came from, and its formula",
    _options,
    run,
    ["explain --config run.yaml", "explain --algorithm dapo --set kl_coef=0.01"],
)
