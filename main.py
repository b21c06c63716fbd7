"""The command line. Without arguments: the demo, from a freshly made model to PPO and GRPO in two minutes.

python main.py [--fast] [--seed N] [--output FOLDER]
python main.py --dry-run [--model FOLDER_OR_NAME] [--algorithm NAME] …
python main.py COMMAND [OPTIONS]          (train, sft, evaluate, …: see docs/command_line.md)
"""

from __future__ import annotations

from command_line.program import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
