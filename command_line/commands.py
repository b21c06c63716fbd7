"""The commands, in the order in which one needs them."""

from __future__ import annotations

from command_line.chat import CHAT
from command_line.convert import CONVERT
from command_line.data import DATA
from command_line.digits import DIGITS
from command_line.doctor import DOCTOR
from command_line.evaluate import EVALUATE
from command_line.explaining import EXPLAIN
from command_line.fuse import FUSE
from command_line.generate import GENERATE
from command_line.generate_config import GENERATE_CONFIG
from command_line.imessage import IMESSAGE
from command_line.make_preferences import MAKE_PREFERENCES
from command_line.parsing import Command
from command_line.pipeline import PIPELINE
from command_line.preference import PREFERENCE
from command_line.preprocess import PREPROCESS
from command_line.rewards import REWARDS
from command_line.runs import RUNS
from command_line.supervised import REWARD_MODEL, SFT
from command_line.train import TRAIN
from config.declaration import nearest
from config.errors import InvalidConfigurationError

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        GENERATE_CONFIG,
        DATA,
        PREPROCESS,
        SFT,
        REWARD_MODEL,
        PREFERENCE,
        DOCTOR,
        TRAIN,
        RUNS,
        EVALUATE,
        EXPLAIN,
        REWARDS,
        CONVERT,
        FUSE,
        PIPELINE,
        GENERATE,
        CHAT,
        MAKE_PREFERENCES,
        IMESSAGE,
        DIGITS,
    )
}

#: What older systems call some of them.
ALIASES = {
    "infer": "generate",
    "inference": "generate",
    "talk-to-model": "chat",
    "convert-model": "convert",
}


def find_command(name: str) -> Command:
    """The command of this name, ``_`` being ``-``; another word is refused with the nearest."""
    dashed = name.replace("_", "-")
    dashed = ALIASES.get(dashed, dashed)
    if dashed in COMMANDS:
        return COMMANDS[dashed]
    raise InvalidConfigurationError(
        f'there is no command "{name}"{nearest(dashed, COMMANDS) or "; there are " + ", ".join(COMMANDS)}'
    )


def list_commands() -> str:
    """The commands, a line each, for the help of ``main.py``."""
    lines = (f"  {name:21s}{command.summary}" for name, command in COMMANDS.items())
    return "\n".join(("commands (each has its own --help):", *lines))
