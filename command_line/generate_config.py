"""``generate-config``: a commented file that trains as it is."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from command_line.parsing import Command, Parser, one_of
from config.errors import CheckpointError, InvalidConfigurationError

TEMPLATES = ("minimal", "standard", "advanced")


def _options(parser: Parser) -> None:
    parser.add_argument(
        "--model-path", required=True, metavar="NAME", help="folder or Hugging Face name of the model"
    )
    parser.add_argument("--data-path", required=True, metavar="FILE", help="rows to train on")
    parser.add_argument("--val-path", metavar="FILE", help="rows to validate on")
    parser.add_argument(
        "--output", default="config.yaml", metavar="FILE", help="ends in .yaml or .toml (default config.yaml)"
    )
    parser.add_argument(
        "--template",
        type=one_of(TEMPLATES),
        default="standard",
        metavar="NAME",
        help=f"{', '.join(TEMPLATES)} (default standard)",
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.add_argument("--verbose", action="store_true", help="print the file, too")


def run(options: argparse.Namespace) -> int:
    """Write the file and say what to type next."""
    from config.template import generate_config

    path = Path(options.output).expanduser()
    text = generate_config(
        options.model_path,
        options.data_path,
        template=options.template,
        val_path=options.val_path,
        suffix=path.suffix,
    )
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise InvalidConfigurationError(
            f"a name has a byte that is no UTF-8, which a config cannot hold ({text[error.start - 20 : error.end]!r}); "
            "rename that file"
        ) from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb" if options.force else "xb") as file:
            file.write(content)
    except FileExistsError:
        raise CheckpointError(f"--output: {path} exists already; name another file, or add --force") from None
    except OSError as error:
        raise CheckpointError(f"--output: {path} cannot be written ({error.strerror or error})") from error
    if options.verbose:
        print(text)
    print(f"written: {path}")
    print(f"next:    python main.py train --config {shlex.quote(str(path))} --dry-run")
    return 0


GENERATE_CONFIG = Command(
    "generate-config",
    "write a commented config file for a model and a data file",
    _options,
    run,
    [
        "generate-config --model-path embedded --data-path pairs.jsonl --template minimal",
        "generate-config --model-path embedded --data-path pairs.jsonl --output small.toml --force",
    ],
)
