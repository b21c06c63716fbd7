"""``convert``: a Hugging Face model as an MLX model, with fewer bits if wanted."""

from __future__ import annotations

import argparse
import shlex

from command_line.decoding_options import add_trust
from command_line.parsing import Command, Parser, count, one_of
from config.errors import InvalidConfigurationError

# What tools/converting.py has, written here because that imports MLX; a test compares them.
DTYPES = ("float16", "bfloat16", "float32")
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")


def _options(parser: Parser) -> None:
    parser.add_argument(
        "--hf-path", "--model", required=True, metavar="NAME", help="folder, Hugging Face name or embedded"
    )
    parser.add_argument(
        "--mlx-path",
        "--output-dir",
        default="mlx_model",
        metavar="FOLDER",
        help="a new folder (default mlx_model)",
    )
    parser.add_argument(
        "--dtype", type=one_of(DTYPES), metavar="TYPE", help=f"{', '.join(DTYPES)} (default: as it is stored)"
    )
    parser.add_argument("--eos-token", metavar="TOKEN", help="make this token end answers")
    add_trust(parser)
    bits = parser.add_argument_group("quantisation")
    bits.add_argument("-q", "--quantize", action="store_true", help="pack the weights")
    bits.add_argument("-d", "--dequantize", "--de-quantize", action="store_true", help="unpack them")
    bits.add_argument("--q-bits", "--bits", type=count, metavar="N", help="bits per weight (default 4)")
    bits.add_argument(
        "--q-group-size", "--group-size", type=count, metavar="N", help="weights per scale (default 64)"
    )
    bits.add_argument(
        "--q-mode",
        type=one_of(MODES),
        default="affine",
        metavar="MODE",
        help=f"{', '.join(MODES)} (default affine)",
    )
    bits.add_argument(
        "--quant-predicate",
        type=one_of(RECIPES),
        metavar="RECIPE",
        help=f"more bits for some layers: {', '.join(RECIPES)}",
    )
    older = parser.add_argument_group("an adapter of mlx-rlhf")
    older.add_argument(
        "--adapter-file",
        metavar="FILE",
        help="its .npz file: --mlx-path becomes an adapter folder for the base --hf-path, which stays as it is",
    )
    older.add_argument(
        "--lora-scale",
        type=float,
        metavar="X",
        help="what the update is multiplied by (default 10, its sft.py's)",
    )
    add_upload_options(parser)


def add_upload_options(parser: Parser) -> None:
    """Nothing is uploaded unless a repository is named, and the user agrees once more."""
    group = parser.add_argument_group("upload")
    group.add_argument(
        "--upload-repo",
        "--upload-name",
        metavar="OWNER/NAME",
        help="put the result on the Hugging Face Hub; asks first",
    )
    group.add_argument("--yes", action="store_true", help="upload without asking")
    group.add_argument("--verbose", action="store_true", help="say what is being done")


def run(options: argparse.Namespace) -> int:
    """Convert, and upload if that was asked for and agreed to."""
    if options.adapter_file is not None:
        return _adapter(options)
    if options.lora_scale is not None:
        raise InvalidConfigurationError(
            "--lora-scale: it belongs to --adapter-file, which is not given; leave it out"
        )
    from tools.converting import Conversion, convert

    how = Conversion(
        dtype=options.dtype,
        quantize=options.quantize,
        dequantize=options.dequantize,
        bits=options.q_bits,
        group_size=options.q_group_size,
        mode=options.q_mode,
        recipe=options.quant_predicate,
        eos_token=options.eos_token,
        trust_remote_code=options.trust_remote_code,
    )
    check_upload(options)
    if options.verbose:
        print(f"converting {options.hf_path}: {how}", flush=True)
    print(convert(options.hf_path, options.mlx_path, how))
    return finish(options, options.mlx_path, options.hf_path)


def _adapter(options: argparse.Namespace) -> int:
    """An adapter alone; what is said of weights has no meaning for it."""
    from tools.older_adapters import SCALE, convert_adapter

    others = (
        "dtype",
        "eos_token",
        "quantize",
        "dequantize",
        "q_bits",
        "q_group_size",
        "q_mode",
        "quant_predicate",
    )
    for name in (*others, "upload_repo", "yes"):
        if getattr(options, name) not in (None, False, "affine"):
            raise InvalidConfigurationError(
                f"--{name.replace('_', '-')}: with --adapter-file the adapter alone is written; leave it out"
            )
    print(
        convert_adapter(
            options.adapter_file,
            options.hf_path,
            options.mlx_path,
            scale=SCALE if options.lora_scale is None else options.lora_scale,
            trust_remote_code=options.trust_remote_code,
        )
    )
    base, folder = shlex.quote(options.hf_path), shlex.quote(options.mlx_path)
    print(f"next: python main.py chat --model {base} --adapter-path {folder}")
    return 0


def check_upload(options: argparse.Namespace) -> None:
    """Refuse a repository's name that is none, before anything is made."""
    import re

    if options.upload_repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.upload_repo):
        raise InvalidConfigurationError(
            f"--upload-repo: OWNER/NAME is expected, found {options.upload_repo!r}"
        )
    if options.yes and not options.upload_repo:
        raise InvalidConfigurationError(
            "--yes: there is nothing to agree to without --upload-repo; leave it out"
        )


def finish(options: argparse.Namespace, path: str, source: str) -> int:
    """Upload if that was asked for, and say what to type next."""
    if options.upload_repo:
        from pathlib import Path

        from tools.saving import upload

        base = source if "/" in source and not Path(source).expanduser().exists() else None
        upload(Path(path).expanduser(), options.upload_repo, base, consented=options.yes)
    print(f"next: python main.py chat --model {shlex.quote(path)}")
    return 0


CONVERT = Command(
    "convert",
    "a Hugging Face model as an MLX model: other numbers, fewer bits",
    _options,
    run,
    [
        "convert --hf-path embedded --mlx-path converted -q --q-bits 8 --q-group-size 32",
        "convert --hf-path embedded --mlx-path half --dtype float16",
    ],
)
