"""``fuse``: base and adapter as one model."""

from __future__ import annotations

import argparse

from command_line.convert import add_upload_options, check_upload, finish
from command_line.decoding_options import add_trust
from command_line.parsing import Command, Parser


def _options(parser: Parser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the base: folder, Hugging Face name or embedded (default: what the adapter says it was trained on)",
    )
    parser.add_argument(
        "--adapter-path",
        "--adapter-file",
        default="adapters",
        metavar="FOLDER",
        help="an adapter, or the run that trained it (default adapters)",
    )
    parser.add_argument(
        "--save-path", default="fused_model", metavar="FOLDER", help="a new folder (default fused_model)"
    )
    parser.add_argument(
        "-d", "--de-quantize", "--dequantize", action="store_true", help="unpack a quantised base's weights"
    )
    parser.add_argument(
        "--export-gguf", action="store_true", help="write a GGUF file, too (llama, mistral, mixtral)"
    )
    parser.add_argument(
        "--gguf-path",
        default="ggml-model-f16.gguf",
        metavar="FILE",
        help="its name within --save-path (default ggml-model-f16.gguf)",
    )
    parser.add_argument(
        "--hf-path", metavar="NAME", help="the base's Hugging Face name, for the card of an upload"
    )
    add_trust(parser)
    add_upload_options(parser)


def run(options: argparse.Namespace) -> int:
    """Fuse, and upload if that was asked for and agreed to."""
    from tools.fusing import fuse
    from tools.loading import base_of

    check_upload(options)
    name = options.model or base_of(options.adapter_path)
    if options.verbose:
        print(f"fusing {options.adapter_path} into {name}", flush=True)
    print(
        fuse(
            name,
            options.adapter_path,
            options.save_path,
            de_quantize=options.de_quantize,
            gguf=options.gguf_path if options.export_gguf else None,
            trust_remote_code=options.trust_remote_code,
        )
    )
    return finish(options, options.save_path, options.hf_path or name)


FUSE = Command(
    "fuse",
    "base and adapter as one model",
    _options,
    run,
    [
        "fuse --adapter-path runs/digits --save-path fused",
        "fuse --model embedded --adapter-path runs/digits/final --save-path fused-too",
    ],
)
