"""The commands, in the order in which one needs them."""

from __future__ import annotations

from command_line.data import DATA
from command_line.digits import DIGITS
from command_line.doctor import DOCTOR
from command_line.evaluate import EVALUATE
from command_line.explaining import EXPLAIN
from command_line.generate_config import GENERATE_CONFIG
from command_line.parsing import Command
from command_line.preprocess import PREPROCESS
from command_line.rewards import REWARDS
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
        DOCTOR,
        TRAIN,
        EVALUATE,
        EXPLAIN,
        REWARDS,
        DIGITS,
    )
}

#: What the systems that came before have a command for, and what to do until it is here.
NOT_YET = {
    "chat": "mlx_lm.chat --model NAME --adapter-path RUN/final talks to what was trained",
    "infer": "mlx_lm.generate --model NAME --adapter-path RUN/final answers a prompt",
    "fuse": "mlx_lm.fuse --model NAME --adapter-path RUN/final makes one model of base and adapter",
    "convert": "mlx_lm.convert --hf-path NAME converts and quantises a model",
}


def find_command(name: str) -> Command:
    """The command of this name, ``_`` being ``-``; another word is refused with the nearest."""
    dashed = name.replace("_", "-")
    if dashed in COMMANDS:
        return COMMANDS[dashed]
    if dashed in NOT_YET:
        raise InvalidConfigurationError(
            f"{name}: this command is not there yet; until then, {NOT_YET[dashed]}"
        )
    raise InvalidConfigurationError(
        f'there is no command "{name}"{nearest(dashed, COMMANDS) or "; there are " + ", ".join(COMMANDS)}'
    )


def list_commands() -> str:
    """The commands, a line each, for the help of ``main.py``."""
    lines = (f"  {name:21s}{command.summary}" for name, command in COMMANDS.items())
    return "\n".join(("commands (each has its own --help):", *lines))
