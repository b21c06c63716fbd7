"""What a run could be refused for, looked at before a weight is loaded: model, adapter, output folder, rows.

A dry run and a run go through the same checks, so that they fail alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base_setup.lora_setup import read_description
from base_setup.memory_estimate import read_config
from base_setup.outline import check_what_trains
from base_setup.pickled_tokenizer import FILE as PICKLED
from base_setup.pickled_tokenizer import load_pickled_tokenizer
from base_setup.tokenizer_setup import byte_tokenizer, encode_pair
from base_setup.untrusted import check_model_folder
from config.errors import CheckpointError, DataLoadError, InvalidConfigurationError, ModelLoadError
from config.ppo_config import PPOConfig
from config.supervised_config import (
    NO_PACKED_SOFT_PROMPT,
    PreferenceConfig,
    RewardModelConfig,
    SFTConfig,
    SupervisedConfig,
)
from config.training_config import TrainingConfig
from data_loading.loading import DataSplits, load_data, load_prompts
from data_loading.prepared_prompts import PreparedPrompts
from data_loading.schemas import Kind
from examples.digits_data import DIFFERENT_PROMPTS, digit_prompts
from models.process_reward_model import encode_steps
from models.sft_model import EMBEDDED, build_embedded, existing_model, has_pickled_tokenizer
from monitoring.run_folder import refuse_used
from training.reward_trainer import margin_sentence
from training.sft_rows import encode_example
from training.supervised import place_of

#: Rows of a large file whose tokens are counted before a run; a dry run, and a smaller file, counts them all.
COUNTED_ROWS = 10_000
#: What is fetched of a model on the hub for its tokenizer alone.
TOKENIZER_FILES = ["*.json", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja", "tokenizer.pkl"]


# The model and the folder --------------------------------------------------------------------------------


def check_model(config: TrainingConfig) -> None:
    """Refuse a model or an adapter that is not there or does not fit, and what the model has nothing of to train."""
    if config.model_name != EMBEDDED:
        existing_model(config.model_name, trust_remote_code=config.trust_remote_code)
    if config.adapter_path is not None:
        read_description(Path(config.adapter_path).expanduser())
    wants_text = config.soft_prompt_text is not None and config.adapter_path is None
    check_what_trains(model_config(config), config, load_tokenizer(config) if wants_text else None)


def model_config(config: TrainingConfig) -> Mapping[str, Any]:
    """The contents of the model's ``config.json``; nothing else of it is read, or fetched."""
    if config.model_name == EMBEDDED:
        return build_embedded(config.embedded_model, config.seed).config
    return read_config(config.model_name)


def load_tokenizer(config: TrainingConfig) -> Any:
    """The model's tokenizer alone."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.utils import _download
    from mlx_lm.utils import load_tokenizer as load

    if config.model_name == EMBEDDED:
        tokenizer = byte_tokenizer()
        return TokenizerWrapper(tokenizer, eos_token_ids=[tokenizer.eos_token_id])
    try:
        folder = Path(config.model_name).expanduser()
        if not folder.is_dir():
            folder = _download(config.model_name, allow_patterns=TOKENIZER_FILES)
        check_model_folder(folder, trust_remote_code=config.trust_remote_code)
        if has_pickled_tokenizer(folder):
            return load_pickled_tokenizer(folder / PICKLED)
        return load(folder, {"trust_remote_code": config.trust_remote_code})
    except ModelLoadError:
        raise
    except Exception as error:  # transformers and the hub client each raise their own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelLoadError(
            f'model_name: the tokenizer of "{config.model_name}" could not be loaded ({reason}); give a folder with '
            "tokenizer.json, or a Hugging Face name that can be reached"
        ) from error


def check_output(folder: str | None, *, goes_on: bool = False) -> None:
    """Refuse, without making it, a run folder that cannot be made or is taken (``goes_on``: by a run to continue)."""
    path = Path(folder or "runs").expanduser()
    if not goes_on:
        refuse_used(path)
    above = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise CheckpointError(
            f'output_dir: "{path}" cannot be written to ({above}: {error.strerror}); choose another folder'
        ) from error


# Rows ----------------------------------------------------------------------------------------------------


def read_rows(config: TrainingConfig, kind: Kind) -> DataSplits:
    """The rows that the config names.

    Raises:
        DataLoadError: file, line and what was found. InvalidConfigurationError: no data are named at all.
    """
    if config.train_path is None and config.dataset_name is None:
        raise InvalidConfigurationError(
            "train_path: no data are named; give --train-path FILE, or --dataset-name NAME of a Hugging Face data set"
        )
    return load_data(config, kind)


def digit_rows(config: TrainingConfig) -> DataSplits:
    """The prompts that mlx-rlhf's ``ppo_training.py`` makes for itself: the even numbers from 0 to 300, as text."""
    return DataSplits(load_prompts(digit_prompts(DIFFERENT_PROMPTS, config.seed), config), None, 0)


def fitted_prompts(config: PPOConfig, rows: Any, *, every: bool) -> PreparedPrompts:
    """The prompts that are trained on; of a large file's first rows, unless ``every``.

    Raises:
        DataLoadError: a prompt that cannot be used, or is too long.
    """
    count = len(rows) if every else min(len(rows), COUNTED_ROWS)
    some = rows if count == len(rows) else [rows[i] for i in range(count)]
    return PreparedPrompts(
        load_tokenizer(config),
        some,
        max_prompt_length=config.max_prompt_length,
        overflow=config.prompt_overflow,
        on_bad_row=config.on_bad_row,
    )


def row_lengths(config: SupervisedConfig, rows: Any, *, every: bool) -> list[int]:
    """Tokens of prompt and (longest) answer of each row, encoded as the stage encodes them; of a large file's first
    ones, unless ``every``.

    Raises:
        DataLoadError: a row that cannot be used, or is too long.
    """
    tokenizer, limit = load_tokenizer(config), config.max_sequence_length
    lengths = []
    for i in range(len(rows) if every else min(len(rows), COUNTED_ROWS)):
        try:
            length = _row_length(tokenizer, rows[i], config)
        except DataLoadError as error:
            raise DataLoadError(f"{place_of(rows, i, 'rows')}: {error}") from error
        if length > limit:
            raise DataLoadError(
                f"{place_of(rows, i, 'rows')}: {length} tokens, max_sequence_length is {limit}; shorten the row or "
                "raise the limit"
            )
        lengths.append(length)
    return lengths


def _row_length(tokenizer: Any, row: Mapping[str, Any], config: SupervisedConfig) -> int:
    if isinstance(config, SFTConfig):
        return len(encode_example(tokenizer, row, config.loss_on).ids)
    if isinstance(config, RewardModelConfig) and "steps" in row:
        return len(encode_steps(tokenizer, row["prompt"], row["steps"], config.step_separator)[0])
    if "completions" in row:
        pairs = [encode_pair(tokenizer, {**row, "answer": one}, "answer") for one in row["completions"]]
    else:
        sides = [side for side in ("chosen", "rejected") if side in row] or ["completion"]
        pairs = [encode_pair(tokenizer, row, side) for side in sides]
    if isinstance(config, PreferenceConfig) and not pairs[0][0]:
        raise DataLoadError("the prompt is empty")
    return max(len(prompt) + len(answer) for prompt, answer in pairs)


def check_packing(config: SFTConfig) -> None:
    """Refuse to pack rows for an adapter that brings a soft prompt."""
    if config.packing and config.adapter_path is not None:
        folder = Path(config.adapter_path).expanduser()
        if read_description(folder).get("soft_prompt_tokens"):
            raise InvalidConfigurationError(f"{NO_PACKED_SOFT_PROMPT} (adapter_path: {folder} has one)")


def check_comparisons(rows: Any) -> None:
    """Refuse scored answers that are all as good as each other, and pairs whose margin says that they are not one."""
    if "chosen" in rows[0]:
        for i, row in enumerate(rows):
            if row.get("margin", 1) <= 0:
                raise DataLoadError(f"{rows.place(i)}: {margin_sentence(row['margin'])}")
    if "reward" in rows[0] and all(row["reward"] == rows[0]["reward"] for row in rows):
        raise DataLoadError(
            f"{rows.report.name}: the reward of all {len(rows)} answers is {rows[0]['reward']:g}, so there is nothing "
            "to compare; give answers that differ in it"
        )


def check_preferences(config: PreferenceConfig, rows: Any) -> None:
    """Refuse single answers where pairs are learned from, and a single prompt where others are needed."""
    if config.algorithm != "kto":
        if "completion" in rows[0]:
            raise DataLoadError(
                f"{rows.place(0)}: {config.algorithm} learns from pairs, and this is a single answer with a label or a "
                "reward; give chosen and rejected, or --algorithm kto"
            )
    elif all(row["prompt"] == rows[0]["prompt"] for row in rows):
        raise DataLoadError(
            f"{rows.report.name}: kto measures its KL on each other's prompts, and there is one prompt only; at least "
            "two are needed"
        )
