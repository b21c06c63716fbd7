"""The samplers' flags, made from their declaration, with the shorter spellings that mlx-lm and others have for them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from command_line.parsing import Parser
from config.decoding_config import DecodingConfig
from config.options import options_of

SPELLINGS = {
    "max_tokens": ("-m", "--max-new-tokens"),
    "temperature": ("--temp",),
    "penalty_context": ("--repetition-context-size", "--repetition-context"),
}


def add_decoding_options(parser: Parser, defaults: Mapping[str, Any] | None = None) -> None:
    """A flag for each field of ``DecodingConfig``; ``defaults`` in place of its own."""
    group = parser.add_argument_group("sampling")
    for name, field in options_of(DecodingConfig).items():
        default = (defaults or {}).get(name, field.default)
        limits = f"; {field.limits}" if field.limits else ""
        group.add_argument(
            *SPELLINGS.get(name, ())[:1] if name == "max_tokens" else (),
            "--" + name.replace("_", "-"),
            *(one for one in SPELLINGS.get(name, ()) if one.startswith("--")),
            dest=f"decoding_{name}",
            metavar={int: "N", float: "X"}.get(field.base, "JSON"),
            default=None,
            help=f"{field.meaning} (default {field.shown(default)}{limits})".replace("%", "%%"),
        )
    parser.set_defaults(decoding_defaults=dict(defaults or {}))


def decoding_config(options: argparse.Namespace) -> DecodingConfig:
    """What the flags say.

    Raises:
        InvalidConfigurationError: naming the option, what was found and what was expected.
    """
    values = dict(options.decoding_defaults)
    for name, field in options_of(DecodingConfig).items():
        text = getattr(options, f"decoding_{name}")
        if text is not None:
            values[name] = field.from_text(text)
    return DecodingConfig(**values)


def add_model_options(parser: Parser) -> None:
    """Which model, with which adapter."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="folder, Hugging Face name or embedded (default: what the adapter was trained on; else mlx_model)",
    )
    group.add_argument(
        "--adapter-path",
        "--resume-file",
        "--resume-adapter-file",
        metavar="FOLDER",
        help="an adapter, or the run that trained it",
    )
    group.add_argument(
        "--quantize", action="store_true", help="the base to 4 bits in groups of 64, on loading"
    )
    add_trust(group)


def add_trust(group: Any) -> None:
    """Whether a model's own Python may run."""
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let the model's own Python files run: they can do anything",
    )


def load_model(options: argparse.Namespace) -> Any:
    """The model of :func:`add_model_options`."""
    from tools.loading import base_of, load_for_use

    model = options.model
    if model is None:
        model = "mlx_model" if options.adapter_path is None else base_of(options.adapter_path)
    return load_for_use(
        model,
        options.adapter_path,
        quantize=options.quantize,
        trust_remote_code=options.trust_remote_code,
    )
