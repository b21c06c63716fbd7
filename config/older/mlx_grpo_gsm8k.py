"""MLX-GRPO (``mlx-grpo.py``, GSM8K): the fields of its TOML files, flat or in a table ``[mlx_grpo]``, and ``--set``."""

from __future__ import annotations

from collections.abc import Iterator

from config.older.meanings import (
    ALWAYS_LOGGED,
    NO_EVALUATION,
    NO_SWITCH,
    prompts_per_step,
    same,
    table,
)
from config.older.names import Ignored, Ours, Renamed, Said, System, Together, Values

SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}


def _folder(values: Values) -> Iterator[Ours | Said]:
    folder = values.text("output_dir", "outputs/Qwen-1.5B-MLX-GRPO")
    run = f"/{values.text('run_name')}" if "run_name" in values else ""
    yield Ours("output_dir", folder.rstrip("/") + run, values.present("output_dir", "run_name"))


def _longest(values: Values) -> Iterator[Ours | Said]:
    names = values.present("max_new_tokens", "max_completion_length")
    if "max_new_tokens" not in values:
        yield Ours("max_new_tokens", values.whole("max_completion_length"), names)
    else:
        yield Ours("max_new_tokens", values.whole("max_new_tokens"), ("max_new_tokens",))
        if "max_completion_length" in values:
            yield Said(
                ("max_completion_length",), "max_new_tokens is what completions are limited to, there as here"
            )


def _schedule(values: Values, name: str) -> str:
    kind = values.text(name)
    if kind not in SCHEDULES:
        values.refuse(name, f"one of {', '.join(SCHEDULES)}")
    return SCHEDULES[kind]


SYSTEM = System(
    name="mlx-grpo-gsm8k",
    title="MLX-GRPO",
    preset="mlx_grpo_gsm8k",
    headings=frozenset({"mlx_grpo"}),
    file_variable="MLX_GRPO_CONFIG",
    settings=table(
        (("output_dir", "run_name"), Together(_folder, "`output_dir`, one within the other")),
        (
            ("batch_size", "gradient_accumulation_steps"),
            Together(
                prompts_per_step("batch_size", "gradient_accumulation_steps", "num_generations", (1, 4, 64)),
                "`batch_size` = both multiplied, in prompts; `micro_batch_size` in completions",
            ),
        ),
        (
            "max_train_samples",
            Renamed("max_samples", lambda values, name: values.whole(name) or None),
        ),
        ("logging_steps", ALWAYS_LOGGED),
        ("log_jsonl", ALWAYS_LOGGED),
        ("num_generations", same("group_size")),
        (("max_new_tokens", "max_completion_length"), Together(_longest, "`max_new_tokens`")),
        ("clip_eps", same("clip_epsilon")),
        ("kl_coeff", same("kl_coef")),
        ("lr_scheduler_type", Renamed("lr_schedule", _schedule)),
        ("save_steps", same("save_every")),
        (
            ("eval_steps", "eval_samples", "eval_every_updates", "eval_subset_size", "eval_max_new_tokens"),
            NO_EVALUATION,
        ),
        ("use_compile", NO_SWITCH),
        (
            "trust_remote_code",
            Ignored("code that comes with a model is not run for a setting of another system"),
        ),
    ),
)
