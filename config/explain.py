"""A config as a page of text: every value with where it came from, and the formula that it trains."""

from __future__ import annotations

from collections.abc import Mapping

from config.declaration import Declaration
from config.formula import LEGEND, formula
from config.options import sections_of
from config.ppo_config import PPOConfig
from config.settings import Origin

VALUE_WIDTH = 44


def explain(
    config: Declaration,
    origins: Mapping[str, Origin],
    *,
    advantage: str | None = None,
    all_values: bool = True,
) -> str:
    """The page.

    Args:
        config: of any class; a ``PPOConfig`` as ``resolve_config`` leaves it.
        origins: as ``Loaded.resolved(config).origins``; a field that is not in it counts as default.
        advantage: ``Algorithm.advantage`` of the config's row; None leaves the formula out.
        all_values: also those that nobody set.
    """
    lines: list[str] = []
    sections = sections_of(type(config))
    width = max(len(option.name) for options in sections.values() for option in options)
    for section, options in sections.items():
        shown = [
            f"  {option.name:{width}}  {_short(option.shown(getattr(config, option.name))):{VALUE_WIDTH}}  {origin}"
            for option in options
            if (origin := str(origins.get(option.name, "default"))) != "default" or all_values
        ]
        lines += [f"[{section}]", *shown, ""] if shown else []
    if advantage is not None and isinstance(config, PPOConfig):
        parts = formula(config, advantage)
        lines += [f"What it trains ({config.algorithm})"]
        lines += [f"  {what:10} {text}" for what, text in parts]
        lines += ["", f"  {LEGEND}", ""]
    return "\n".join(lines).rstrip("\n")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= VALUE_WIDTH else f"{text[: VALUE_WIDTH - 1]}…"
