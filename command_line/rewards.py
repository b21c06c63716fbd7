"""``rewards list``, ``rewards show NAME`` and ``rewards try NAME``: the library of rewards, at hand."""

from __future__ import annotations

import argparse
import json
from typing import Any

from command_line.parsing import Command, Parser, one_of
from config.errors import InvalidConfigurationError

ACTIONS = ("list", "show", "try")
#: What rewards are given whatever the row has.
GIVEN = frozenset(("self", "prompts", "completions", "log_extra", "log_metric", "trainer_state"))


def _options(parser: Parser) -> None:
    parser.usage = "%(prog)s list   |   %(prog)s show NAME   |   %(prog)s try NAME --prompt P --completion C"
    parser.add_argument("action", type=one_of(ACTIONS), metavar="ACTION", help=", ".join(ACTIONS))
    parser.add_argument("name", nargs="?", metavar="NAME", help="a reward, by any of its names")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what was asked")
    parser.add_argument("--completion", metavar="TEXT", help="what the model answered")
    parser.add_argument("--answer", metavar="TEXT", help="the reference answer, as the column answer")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further column of the row; repeatable",
    )
    parser.add_argument("--reward-config", metavar="JSON", help="settings of the reward, as a JSON object")


def run(options: argparse.Namespace) -> int:
    """Print what ``rewards.show`` says."""
    from rewards.show import list_rewards, show, try_reward

    if options.action == "list":
        print(list_rewards())
        return 0
    if options.name is None:
        raise InvalidConfigurationError(
            f"rewards {options.action}: the name of a reward is expected; rewards list shows them"
        )
    if options.action == "show":
        print(show(options.name))
        return 0
    if options.completion is None:
        raise InvalidConfigurationError("rewards try: --completion TEXT is expected, the answer to be judged")
    print(
        try_reward(
            options.name,
            options.prompt,
            options.completion,
            _settings(options.reward_config),
            _columns(options),
        )
    )
    return 0


def _settings(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise InvalidConfigurationError(f"--reward-config: not valid JSON ({error})") from None
    if not isinstance(settings, dict):
        raise InvalidConfigurationError(f"--reward-config: a JSON object is expected, found {text!r:.60}")
    return settings


def _columns(options: argparse.Namespace) -> dict[str, Any]:
    """Columns of the row: text, or whatever JSON stands there."""
    columns: dict[str, Any] = {"answer": options.answer} if options.answer is not None else {}
    for one in options.column:
        name, equals, value = one.partition("=")
        if not equals or not name:
            raise InvalidConfigurationError(f"--column: NAME=VALUE is expected, found {one!r}")
        if name in GIVEN:
            raise InvalidConfigurationError(
                f"--column: {name!r} is something that rewards are given anyway; name the column otherwise"
            )
        try:
            columns[name] = json.loads(value)
        except ValueError:
            columns[name] = value
    return columns


REWARDS = Command(
    "rewards",
    "list the rewards, show one, try one on a text of your own",
    _options,
    run,
    ["rewards list", 'rewards try sequential_digits --prompt 8 --completion " 10 12 14 16 18"'],
)
