"""``chat``: talking to a model in the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from command_line.decoding_options import add_decoding_options, add_model_options, decoding_config, load_model
from command_line.parsing import Command, Parser, count, one_of
from config.errors import DataLoadError, InvalidConfigurationError

if TYPE_CHECKING:
    from tools.chatting import Conversation

TEMPLATES = ("auto", "chat", "plain", "lines")
#: The defaults of mlx-rlhf's ``talk_to_model.py``.
OLDER = {"max_tokens": 32, "temperature": 0.0}
HELP = "clear forgets the conversation; quit, exit, q or the end of the input leaves; all else is said to the model"


def _options(parser: Parser) -> None:
    parser.add_argument("-c", "--max-context", type=count, default=1024, metavar="N", help=CONTEXT)
    parser.add_argument(
        "--template",
        type=one_of(TEMPLATES),
        default="auto",
        metavar="NAME",
        help="chat: the tokenizer's; plain: User/Assistant; lines: User/System, as mlx-rlhf; auto: chat, else plain",
    )
    parser.add_argument(
        "--system", "--system-prompt", metavar="TEXT", help="a system message before everything"
    )
    parser.add_argument(
        "--reply-as",
        metavar="NAME",
        help="who answers in the template lines, which this chooses (default System)",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="say when a part of the conversation is left out"
    )
    parser.add_argument(
        "--from",
        dest="from_system",
        type=one_of(["mlx-rlhf"]),
        metavar="SYSTEM",
        help="mlx-rlhf: its template and defaults (talk_to_model.py)",
    )
    add_model_options(parser)
    add_decoding_options(parser)


CONTEXT = "tokens of the conversation that the model sees at most; the oldest go first (default 1024)"


def run(options: argparse.Namespace) -> int:
    """Talk until the user leaves."""
    template = "lines" if options.reply_as and options.template == "auto" else options.template
    if options.reply_as and template not in ("auto", "lines"):
        raise InvalidConfigurationError(
            f"--reply-as: the template lines alone has a name for who answers, not {template}; leave one of the two out"
        )
    if options.from_system is not None:
        options.decoding_defaults = OLDER
        template = "lines" if template == "auto" else template
    how = decoding_config(options)
    from tools.chatting import Conversation

    conversation = Conversation(
        load_model(options),
        how,
        max_context=options.max_context,
        template=template,
        system=options.system,
        speaker=options.reply_as or "System",
    )
    return talk(conversation, verbose=options.verbose)


def talk(conversation: Conversation, *, verbose: bool = False) -> int:
    """Read lines, print replies."""
    asks = sys.stdin.isatty()
    if asks:
        print(HELP)
    while True:
        try:
            text = input("you: " if asks else "")
        except EOFError:
            return 0
        except UnicodeDecodeError as error:
            raise DataLoadError(f"standard input is not UTF-8 text ({error})") from None
        word = text.strip()
        if word.lower() in ("quit", "exit", "q"):
            return 0
        if word.lower() == "clear":
            conversation.clear()
            print("(forgotten)")
        elif word.lower() in ("help", "h"):
            print(HELP)
        elif word:
            _reply(conversation, text, verbose=verbose)


def _reply(conversation: Conversation, text: str, *, verbose: bool) -> None:
    try:
        for piece in conversation.say(text):
            print(piece, end="", flush=True)
        print()
    except DataLoadError as error:  # this message cannot be said; another one can
        print(f"error: {error}", file=sys.stderr)
        return
    except KeyboardInterrupt:  # enough of this answer
        print(" …")
        return
    if verbose and conversation.was_cut:
        print("(the oldest part of the conversation was left out)", file=sys.stderr)


CHAT = Command(
    "chat",
    "talk to a model, with its adapter, in the terminal",
    _options,
    run,
    [
        "chat --model embedded --max-tokens 16",
        "chat --from mlx-rlhf --model embedded --max-tokens 16 --max-context 64",
    ],
)
