"""``make-preferences``: rejected answers by a language model beside what somebody wrote."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

from command_line.decoding_options import add_decoding_options, add_model_options, decoding_config, load_model
from command_line.parsing import Command, Parser, count
from config.errors import InvalidConfigurationError


def _options(parser: Parser) -> None:
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="rows with prompt and completion, as sft reads them"
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="JSONL; what it has already is not made again"
    )
    parser.add_argument(
        "-n", "--num", type=count, default=1, metavar="N", help="rejected answers per row (default 1)"
    )
    parser.add_argument("--limit", type=count, metavar="N", help="the first N rows alone")
    parser.add_argument(
        "--max-prompt-length",
        type=count,
        default=2048,
        metavar="N",
        help="longest prompt, in tokens (default 2048)",
    )
    remote = parser.add_argument_group("a model elsewhere, in place of --model")
    remote.add_argument(
        "--url", metavar="ADDRESS", help="OpenAI-compatible, as http://localhost:8080/v1; prompts go there"
    )
    remote.add_argument("--remote-model", default="default", metavar="NAME", help="the model's name there")
    remote.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="variable with the key (default OPENAI_API_KEY)",
    )
    remote.add_argument("--instruction", metavar="TEXT", help='what it is told about its task; "" = nothing')
    remote.add_argument(
        "--concurrency", type=count, default=8, metavar="N", help="requests at once (default 8)"
    )
    remote.add_argument(
        "--retries", type=count, default=4, metavar="N", help="further tries of one (default 4)"
    )
    add_model_options(parser)
    add_decoding_options(parser, {"max_tokens": 128, "temperature": 1.0, "top_p": 1.0})


def run(options: argparse.Namespace) -> int:
    """Write the pairs and say how many."""
    how = decoding_config(options)
    for name in ("num", "concurrency", "limit"):
        if getattr(options, name) == 0:
            raise InvalidConfigurationError(f"--{name}: at least 1 is expected, found 0")
    if options.url is not None and not re.match(r"https?://[^/\s]", options.url):
        raise InvalidConfigurationError(
            f'--url: an address such as "http://localhost:8080/v1" is expected, found {options.url!r}'
        )
    from tools.preference_making import demonstrations, make_preferences

    rows = demonstrations(options.data, options.limit)
    output = Path(options.output).expanduser()
    made = make_preferences(rows, _sampler(options, how), output)
    print(f"{output}: {made}")
    print(f"next: python main.py reward-model --model-name NAME --train-path {shlex.quote(str(output))}")
    return 0


def _sampler(options: argparse.Namespace, how: Any) -> Any:
    from rewards.chat_endpoint import ChatEndpoint
    from tools.preference_making import INSTRUCTION, from_endpoint, from_model

    if options.url is None:
        return from_model(load_model(options), how, options.num, options.max_prompt_length)
    print(f"the prompts are sent to {options.url}", flush=True)
    return from_endpoint(
        ChatEndpoint(options.url.rstrip("/"), options.api_key_env, options.retries),
        options.remote_model,
        how,
        options.num,
        instruction=INSTRUCTION if options.instruction is None else options.instruction,
        concurrency=options.concurrency,
    )


MAKE_PREFERENCES = Command(
    "make-preferences",
    "rejected answers by a language model, for reward models and preference training",
    _options,
    run,
    [
        "make-preferences --data pairs.jsonl --output made.jsonl --model embedded --max-tokens 8",
        "make-preferences --data pairs.jsonl --output more.jsonl --model embedded -n 2 --limit 4 --max-tokens 8",
    ],
)
