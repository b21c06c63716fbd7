"""Where rows come from, what their columns are called, and what is done with the ones that do not fit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from config.declaration import BelowOne, Declaration, NonNegativeInt, PositiveInt, declared, option

Name = Annotated[str, Field(min_length=1)]


@declared
class DataConfig(Declaration):
    """Options of ``data_loading``. They describe rows; no trainer needs them when it is given rows."""

    # Sources
    train_path: str | None = option(
        section="data",
        default=None,
        meaning="Training rows: a .jsonl, .json, .csv or .parquet file, a folder with train.jsonl, or the prefix of "
        "pre-tokenised .npy files.",
    )
    val_path: str | None = option(
        default=None,
        meaning="Validation rows, in any of the forms of train_path; a folder's valid.jsonl is its own.",
    )
    dataset_name: str | None = option(
        default=None,
        meaning="A data set on the Hugging Face Hub, or a folder that `datasets` reads; used where train_path is none.",
    )
    dataset_config: str | None = option(
        default=None, meaning="Which configuration of it, where it has several."
    )
    dataset_train_split: Name = option(default="train", meaning="Split of dataset_name to train on.")
    dataset_val_split: Name | None = option(
        default=None, meaning="Split of dataset_name to validate on; none = no validation from there."
    )

    # Columns
    prompt_column: Name = option(section="columns", default="prompt", meaning="Column with the prompt.")
    completion_column: Name = option(
        default="completion", meaning="Column with the demonstrated or the reference answer."
    )
    chosen_column: Name = option(default="chosen", meaning="Column with the better answer of a pair.")
    rejected_column: Name = option(default="rejected", meaning="Column with the worse answer of a pair.")
    reward_column: Name = option(
        default="reward", meaning="Column with the score of an answer, as a number or as text."
    )
    completions_column: Name = option(
        default="completions", meaning="Column with a list of answers to one prompt, or of the steps of one."
    )
    rewards_column: Name = option(
        default="rewards",
        meaning="Column with the score of each of these answers; rows without it have the best answer first.",
    )
    steps_column: Name = option(default="steps", meaning="Column with a list of the steps of an answer.")
    labels_column: Name = option(
        default="labels",
        meaning="Column that says of each step whether it is right: true, false, or from 0 to 1.",
    )
    messages_column: Name = option(
        default="messages", meaning="Column with a chat, a list of role and content."
    )
    text_column: Name = option(default="text", meaning="Column with a text that is prompt and answer in one.")

    # Prompts
    system_prompt: str | None = option(
        section="prompts",
        default=None,
        meaning="System message put before prompts that have none; a row's own field system takes its place.",
    )
    prompt_format: Literal["as_is", "chat"] = option(
        default="as_is",
        meaning="Prompts that are plain text stay so (as_is), or become a user's message in the chat template (chat); "
        "with a system message they always do.",
    )
    prompt_overflow: Literal["error", "keep_end", "drop"] = option(
        default="error",
        meaning="Prompts longer than max_prompt_length are refused, cut to their last tokens, or left out; the last "
        "two are counted and said.",
    )

    # Which rows
    on_bad_row: Literal["error", "skip"] = option(
        section="rows",
        default="error",
        meaning="A row that cannot be used stops the run, or is counted and left out.",
    )
    filter_keywords: list[Name] | None = option(
        default=None,
        meaning="Rows with one of these texts in any field are left out, case ignored; none = keep all.",
    )
    max_samples: PositiveInt | None = option(
        default=None, meaning="Most rows to train on, drawn with the seed if shuffle_data; none = all."
    )
    shuffle_data: bool = option(
        default=True, meaning="Draw rows in a fresh order each epoch; false = in the order of the file."
    )
    validation_fraction: BelowOne = option(
        default=0.0,
        meaning="Share of the training rows set aside for validation where none are named, all rows of one prompt "
        "together; 0 = none.",
    )
    prefetch_batches: NonNegativeInt = option(
        default=2, meaning="Batches of rows that a background thread reads ahead; 0 = read when needed."
    )
