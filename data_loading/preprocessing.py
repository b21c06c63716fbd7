"""Tokenise once: a config's rows out as JSONL, or as NPY files that are mapped into memory."""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

from base_setup.tokenizer_setup import encode, encode_pair, fingerprint
from config.errors import DataLoadError, InvalidConfigurationError
from config.training_config import TrainingConfig
from data_loading.json_text import to_json
from data_loading.loading import load_data
from data_loading.prepared_prompts import Fitting
from data_loading.rows import Rows
from data_loading.schemas import Kind
from data_loading.token_rows import TokenRows
from data_loading.token_writer import TokenWriter

TEXT_ENDINGS = (".jsonl", ".json", ".ndjson")


class Written(NamedTuple):
    """One output of ``preprocess``."""

    path: str
    rows: int
    tokens: int | None  # None: written as text

    def __str__(self) -> str:
        tokens = "" if self.tokens is None else f", {self.tokens} tokens"
        return f"{self.path}: {self.rows} rows{tokens}"


class Preprocessed(NamedTuple):
    """What was written, and the sentences about rows that were left out or cut on the way."""

    outputs: list[Written]
    notes: list[str]

    def __str__(self) -> str:
        return "\n".join([*self.notes, *map(str, self.outputs)])


def preprocess(
    config: TrainingConfig,
    output_train_path: str | Path,
    output_val_path: str | Path | None = None,
    *,
    tokenizer: TokenizerWrapper,
    kind: Kind = "prompts",
) -> Preprocessed:
    """Write the rows of a config's data, selected and split as it says.

    Args:
        output_train_path: ends in .jsonl for JSON Lines; anything else is the prefix of NPY files.
        output_val_path: the same for the validation rows; None: they are not written.
        tokenizer: the one of the model that will be trained; NPY files carry its fingerprint.
        kind: what the rows are for. "prompts" keeps all their columns; "preferences" and "steps" can only be JSONL.
    Raises:
        ToolkitError: for rows that cannot be used, or files that cannot be written.
    """
    if output_val_path is not None and _same_output(output_train_path, output_val_path):
        raise InvalidConfigurationError(
            f"output_val_path: {output_val_path} is output_train_path, too, and would take its place; name another"
        )
    splits = load_data(config, kind)
    notes = [str(splits.train.report)]
    targets = [(output_train_path, splits.train)]
    if output_val_path is not None:
        if splits.validation is None:
            raise DataLoadError(
                "output_val_path: there are no validation rows; give val_path or validation_fraction"
            )
        notes.append(str(splits.validation.report))
        targets.append((output_val_path, splits.validation))
    if splits.leaks:
        notes.append(f"{splits.leaks} validation rows have a prompt that is trained on, too")
    outputs = []
    for path, rows in targets:
        as_text = str(path).lower().endswith(TEXT_ENDINGS)
        if isinstance(rows, TokenRows):
            raise DataLoadError(f"{rows.files.prefix}_prompts.npy: the rows are tokenised already")
        try:
            if as_text:
                outputs.append(_write_text(Path(path), rows))
            else:
                outputs.append(_write_tokens(str(path), rows, tokenizer, config, kind, notes))
        except OSError as error:
            raise DataLoadError(f"{path}: cannot be written ({error.strerror or error})") from None
    return Preprocessed(outputs, notes)


def _same_output(first: str | Path, second: str | Path) -> bool:
    return Path(first).expanduser().resolve() == Path(second).expanduser().resolve()


def _write_text(path: Path, rows: Rows) -> Written:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".writing")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            for index, row in enumerate(rows):
                file.write(to_json(row, rows.place(index)) + "\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return Written(str(path), len(rows), None)


def _write_tokens(
    prefix: str,
    rows: Rows,
    tokenizer: TokenizerWrapper,
    config: TrainingConfig,
    kind: Kind,
    notes: list[str],
) -> Written:
    if kind in ("preferences", "steps"):
        raise DataLoadError(f"{prefix}: {kind} are written as text; let the output end in .jsonl")
    description = {"fingerprint": fingerprint(tokenizer), "model_name": config.model_name}
    with TokenWriter(prefix, description) as writer:
        for ids, completion, columns in _encoded(rows, tokenizer, config, kind, notes):
            writer.add(ids, completion, columns)
    return Written(f"{prefix}_prompts.npy …", writer.rows, writer.tokens)


def _encoded(
    rows: Rows, tokenizer: TokenizerWrapper, config: TrainingConfig, kind: Kind, notes: list[str]
) -> Iterator[tuple[Sequence[int], list[int] | None, Mapping[str, Any]]]:
    """Ids of prompt and completion, the latter without an end token, and the other fields."""
    if kind == "pairs":
        for index, row in enumerate(rows):
            try:
                ids, completion = encode_pair(tokenizer, row)
            except DataLoadError as error:
                raise DataLoadError(f"{rows.place(index)}: {error}") from error
            yield ids, completion[:-1], {}
        return
    fitting = Fitting(config.max_prompt_length, config.prompt_overflow, config.on_bad_row)
    for index, row in enumerate(rows):
        prompt = fitting.encode(tokenizer, index, row, rows.place(index))
        if prompt is None:
            continue
        columns = dict(prompt.columns)
        answer = columns.get("completion")
        if isinstance(answer, str):
            del columns["completion"]
            yield prompt.ids, encode(tokenizer, answer), columns
        else:
            yield prompt.ids, None, columns
    notes += [str(fitting)] if str(fitting) else []
