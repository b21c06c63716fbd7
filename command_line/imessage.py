"""``imessage``: an export of one's own conversations as rows for ``sft``. Everything stays on this machine."""

from __future__ import annotations

import argparse
import shlex

from command_line.parsing import Command, Parser, count

PRIVACY = (
    "These are private messages of two people each, and a model that learned from them can repeat them word for word: "
    "keep data and model to yourself."
)


def _options(parser: Parser) -> None:
    parser.add_argument(
        "--export",
        default="message_data",
        metavar="FOLDER",
        help="what imessage-exporter -f txt -o FOLDER wrote",
    )
    parser.add_argument(
        "--name", required=True, metavar="NAME", help="yours, as the model is to speak under it"
    )
    parser.add_argument("--me", default="Me", metavar="NAME", help="what the export calls you (default Me)")
    parser.add_argument(
        "--output",
        default="imessage_rows",
        metavar="FOLDER",
        help="for train, valid and test.jsonl (default imessage_rows)",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.1,
        metavar="X",
        help="of each conversation, its end (default 0.1)",
    )
    parser.add_argument(
        "--test-fraction", type=float, default=0.0, metavar="X", help="the same, after it (default 0)"
    )
    parser.add_argument(
        "--context-words",
        type=count,
        default=24,
        metavar="N",
        help="of what was said before, in each row (default 24)",
    )
    parser.add_argument(
        "--as-messages", action="store_true", help="rows for a chat template in place of lines"
    )


def run(options: argparse.Namespace) -> int:
    """Write the files and say what was left out."""
    from config.errors import CheckpointError
    from data_loading.imessage import read_export, split_rows
    from data_loading.json_text import to_json
    from monitoring.run_folder import writable_folder

    parsed = read_export(options.export, options.me)
    rows = split_rows(
        parsed,
        options.name,
        validation_fraction=options.validation_fraction,
        test_fraction=options.test_fraction,
        context_words=options.context_words,
        as_messages=options.as_messages,
    )
    folder = writable_folder(options.output, "--output")
    for split in rows:
        if (folder / f"{split}.jsonl").exists():
            raise CheckpointError(f"--output: {folder / split}.jsonl exists already; name another folder")
    print(parsed)
    for split, part in rows.items():
        if part:
            path = folder / f"{split}.jsonl"
            path.touch(mode=0o600)  # nobody else's business
            path.write_text("".join(to_json(row, split) + "\n" for row in part), encoding="utf-8")
            print(f"{path}: {len(part)} rows")
    print(PRIVACY)
    print(f"next: python main.py sft --model-name NAME --train-path {shlex.quote(str(folder))}")
    return 0


IMESSAGE = Command(
    "imessage",
    "an iMessage export as rows to learn one's own replies from",
    _options,
    run,
    [
        "imessage --export message_data --name Jo",
        "imessage --export message_data --name Jo --output chats --as-messages --test-fraction 0.1",
    ],
    description="An iMessage export as rows to learn one's own replies from.\n\n" + PRIVACY,
)
