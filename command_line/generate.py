"""``generate``: answers of a model, one as it comes or many side by side."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line.decoding_options import add_decoding_options, add_model_options, decoding_config, load_model
from command_line.parsing import Command, Parser, count
from config.errors import CheckpointError, DataLoadError, InvalidConfigurationError

if TYPE_CHECKING:
    from config.decoding_config import DecodingConfig
    from models.sft_model import LanguageModel
    from tools.generating import Answer


def _options(parser: Parser) -> None:
    parser.add_argument(
        "-p",
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="a prompt; - reads standard input; repeatable",
    )
    parser.add_argument("--prompts", metavar="FILE", help="prompts from a data file, as train reads them")
    parser.add_argument(
        "--as-chat",
        action="store_true",
        help="a text is a user's message in the tokenizer's template, not plain text",
    )
    parser.add_argument(
        "--system", metavar="TEXT", help="a system message before each; a text is a user's message then"
    )
    parser.add_argument(
        "-n", "--num", type=count, default=1, metavar="N", help="answers to each prompt (default 1)"
    )
    parser.add_argument("--stream", action="store_true", help="show an answer as it comes; of one prompt")
    parser.add_argument("--output", metavar="FILE", help="write prompts and answers as JSONL, too")
    parser.add_argument("--verbose", action="store_true", help="tokens, seconds and why each answer ended")
    parser.add_argument("--chat", action="store_true", help="talk instead, as the command chat does")
    add_model_options(parser)
    add_decoding_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print the answers."""
    how = decoding_config(options)
    if options.chat:
        return _chat(options, how)
    if options.num < 1:
        raise InvalidConfigurationError(f"--num: at least 1 is expected, found {options.num}")
    prompts = _prompts(options)
    if options.stream and (len(prompts) > 1 or options.num > 1):
        raise InvalidConfigurationError(
            f"--stream: one answer at a time can be shown, not {len(prompts)} × {options.num}; leave it out"
        )
    output = None if options.output is None else _writable(options.output)
    base = load_model(options)
    from base_setup.tokenizer_setup import encode_prompt
    from tools.generating import generate

    ids = [encode_prompt(base.tokenizer, prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not tokens:
            raise DataLoadError(f"--prompt: the tokenizer makes nothing of {prompt!r:.60}; write something")
    if options.stream:
        answers = [_stream(base, ids[0], how, verbose=options.verbose)]
    else:
        answers = generate(base, ids, how, members=options.num)
    rows = []
    for number, answer in enumerate(answers):
        prompt = prompts[number // options.num]
        rows.append(
            {"prompt": prompt, "completion": answer.text, "tokens": len(answer.ids), "finish": answer.finish}
        )
        if options.stream:  # it has been seen
            continue
        if len(answers) > 1:
            print(f"── {number + 1}: {_shown(prompt)}")
        print(answer.text)
        if options.verbose:
            print(f"{len(answer.ids)} tokens, {answer.finish}", file=sys.stderr)
    if output is not None:
        output.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    return 0


def _prompts(options: argparse.Namespace) -> list[Any]:
    """Texts and chats, as the model is to see them."""
    found: list[Any] = [_standard_input() if text == "-" else text for text in options.prompt]
    if options.prompts is not None:
        from data_loading.loading import load_prompts

        found += [row["prompt"] for row in load_prompts(options.prompts)]
    if not found:
        raise InvalidConfigurationError(
            "--prompt: there is nothing to answer; give --prompt TEXT or --prompts FILE"
        )
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    if options.as_chat or system:
        return [
            [*system, *([{"role": "user", "content": one}] if isinstance(one, str) else one)] for one in found
        ]
    return found


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataLoadError(f"--prompt -: standard input is not UTF-8 text ({error})") from None


def _shown(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:79]}…"


def _stream(base: LanguageModel, ids: list[int], how: DecodingConfig, *, verbose: bool) -> Answer:
    """Show an answer as it comes, and return it."""
    from tools.generating import Answer, check_decoding, stream

    check_decoding(base, how)
    for piece in stream(base, ids, how):
        print(piece.text, end="", flush=True)
    print()
    if verbose:
        print(
            f"{len(piece.ids)} tokens, {piece.finish}, {piece.tokens_per_second:.1f} a second",
            file=sys.stderr,
        )
    text = base.tokenizer.decode(list(piece.ids), skip_special_tokens=True)
    return Answer(text, piece.ids, piece.finish or "length")


def _writable(name: str) -> Path:
    path = Path(name).expanduser()
    if path.exists():
        raise CheckpointError(f"--output: {path} exists already; name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _chat(options: argparse.Namespace, how: DecodingConfig) -> int:
    for name in ("prompt", "prompts", "as_chat", "stream", "output"):
        if getattr(options, name):
            raise InvalidConfigurationError(
                f"--{name.replace('_', '-')}: with --chat everything is typed; leave one of the two out"
            )
    if options.num != 1:
        raise InvalidConfigurationError(
            "--num: with --chat there is one answer at a time; leave one of the two out"
        )
    from command_line.chat import talk
    from tools.chatting import Conversation

    return talk(Conversation(load_model(options), how, system=options.system), verbose=options.verbose)


GENERATE = Command(
    "generate",
    "answers of a model, with its adapter: one as it comes, or many",
    _options,
    run,
    [
        "generate --model embedded --prompt 'Say hello' --max-tokens 8 --temp 1",
        "generate --model embedded --prompts prompts.jsonl -n 2 --max-tokens 8 --output answers.jsonl",
    ],
)
