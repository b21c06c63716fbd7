"""mlx-grpo (``mlx_grpo_trainer_aligned.py``): its flags."""

from __future__ import annotations

from collections.abc import Iterator

from config.older.meanings import (
    NO_EVALUATION,
    NO_QUANTISED_CACHE,
    NO_SPECULATION,
    NO_TRACKER,
    adapters_or_all,
    keeping_the_end,
    learning_rate_itself,
    or_off,
    prompts_per_step,
    random_if_negative,
    reference_model,
    same,
    scheduled,
    table,
    truncated_sampling,
)
from config.older.names import Flag, Ignored, Ours, Said, System, Together, Values

REWARDS = ("reward_content_type", "reward_format_weight", "reward_content_weight")
TAGS = ("think_start_tag", "think_end_tag", "answer_start_tag", "answer_end_tag")
CONTENT = ("jaccard", "math_eval", "choice_correctness")


def _rewards(values: Values) -> Iterator[Ours | Said]:
    names = values.present(*REWARDS, *TAGS)
    content = values.text("reward_content_type", "jaccard")
    if content not in CONTENT:
        values.refuse("reward_content_type", f"one of {', '.join(CONTENT)}")
    # Its code's tags are <thinking>, its document's <think>: the document's are the default.
    defaults = dict(zip(TAGS, ("<think>", "</think>", "<answer>", "</answer>"), strict=True))
    tags = {name.removesuffix("_tag"): values.text(name, tag) for name, tag in defaults.items()}
    entries = [
        {
            "name": name,
            "weight": values.number(weight, 0.5),
            **({"config": {"tags": tags}} if any(tag in values for tag in TAGS) else {}),
        }
        for name, weight in (("format", "reward_format_weight"), (content, "reward_content_weight"))
    ]
    yield Ours("rewards", [one for one in entries if one["weight"]] or entries, names)


SYSTEM = System(
    name="mlx-grpo",
    title="mlx-grpo",
    preset="mlx_grpo",
    tables=frozenset({"lr_schedule_config"}),
    settings=table(
        (
            ("model_path", "ref_model_path"),
            Together(reference_model("model_path", "ref_model_path"), "`model_name`, `reference_path`"),
        ),
        ("train_dataset_path", same("train_path")),
        ("val_dataset_path", same("val_path")),
        ("dataset_prompt_key", same("prompt_column")),
        ("dataset_answer_key", same("completion_column")),
        ("resume_from_checkpoint", same("resume")),
        (
            "max_prompt_len",
            Together(keeping_the_end("max_prompt_len"), "`max_prompt_length`, `prompt_overflow`"),
        ),
        ("max_gen_len", same("max_new_tokens")),
        (
            "max_kv_size",
            Ignored("every completion has room for max_prompt_length + max_new_tokens keys and values"),
        ),
        ("init_new_embeddings_with_mean", same("init_new_embeddings_with_mean")),
        ("learning_rate", Together(learning_rate_itself, "`learning_rate`")),
        ("lr_schedule_config", scheduled()),
        ("grad_clip_norm", or_off("max_grad_norm")),
        ("optimizer_beta1", same("adam_beta1")),
        ("optimizer_beta2", same("adam_beta2")),
        ("num_rollout_samples", same("group_size")),
        (
            ("ppo_batch_size", "grad_accum_steps"),
            Together(
                prompts_per_step("ppo_batch_size", "grad_accum_steps", "num_rollout_samples", (2, 1, 2)),
                "`batch_size` = both multiplied, in prompts; `micro_batch_size` in completions",
            ),
        ),
        ("sampling_temperature", same("temperature")),
        (
            ("sampling_top_p", "sampling_min_p"),
            Together(
                truncated_sampling(top_p="sampling_top_p", min_p="sampling_min_p"),
                "ours of the same meaning, with `importance_correction`",
            ),
        ),
        ("grpo_beta", same("kl_coef")),
        (("use_speculative_decoding", "draft_model_path", "num_draft_tokens"), NO_SPECULATION),
        ("kv_bits", NO_QUANTISED_CACHE),
        (("kv_group_size", "quantized_kv_start"), Ignored("keys and values are not quantised")),
        ("num_training_steps", same("num_steps")),
        ("eval_every", NO_EVALUATION),
        ("seed", Together(random_if_negative, "`seed`; -1 draws one")),
        ("use_grad_checkpointing", same("gradient_checkpointing")),
        ("grad_checkpoint_layers", Ignored("gradient_checkpointing is about every block or none")),
        ((*REWARDS, *TAGS), Together(_rewards, "`rewards`")),
        (("use_wandb", "wandb_project", "wandb_entity", "wandb_run_name"), NO_TRACKER),
        ("use_lora", Together(adapters_or_all, "`fine_tune_type`")),
        ("lora_rank", same("lora_r")),
    ),
    flags=(
        Flag("model_path", False, "the model to train, a folder or a Hugging Face name"),
        Flag("ref_model_path", False, "the reference, if it is another one"),
        Flag("train_dataset_path", False, "training rows; they override a Hugging Face data set"),
        Flag("val_dataset_path", False, "validation rows"),
        Flag("dataset_prompt_key", False, "column with the prompt"),
        Flag("dataset_answer_key", False, "column with the reference answer"),
        Flag("resume_from_checkpoint", False, "go on from a checkpoint of ours"),
        Flag("num_training_steps", False, "optimiser steps"),
        Flag("reward_content_type", False, "jaccard, math_eval or choice_correctness"),
        Flag("reward_format_weight", False, "weight of the format reward"),
        Flag("reward_content_weight", False, "weight of the content reward"),
        Flag("max_prompt_len", False, "longest prompt, in tokens; its end is kept"),
        Flag("max_gen_len", False, "longest completion, in tokens"),
        Flag("max_kv_size", False, "not needed"),
        Flag("think_start_tag", False, "opens the thinking"),
        Flag("think_end_tag", False, "ends the thinking"),
        Flag("answer_start_tag", False, "opens the answer"),
        Flag("answer_end_tag", False, "ends the answer"),
        Flag("init_new_embeddings_with_mean", True, "how the rows of new tokens begin"),
        Flag("lr_schedule_config", False, "JSON: name, arguments, warmup"),
        Flag("grad_clip_norm", False, "largest norm of the gradient; 0 = no limit"),
        Flag("optimizer_beta1", False, "decay of Adam's first moment"),
        Flag("optimizer_beta2", False, "decay of Adam's second moment"),
        Flag("num_rollout_samples", False, "completions per prompt"),
        Flag("ppo_batch_size", False, "prompts per pass"),
        Flag("grad_accum_steps", False, "passes per optimiser step"),
        Flag("sampling_temperature", False, "temperature of the rollouts"),
        Flag("sampling_top_p", False, "mass of the tokens sampled from"),
        Flag("sampling_min_p", False, "least share of the likeliest token's probability"),
        Flag("grpo_beta", False, "weight of the KL"),
        Flag("use_speculative_decoding", True, "not available"),
        Flag("draft_model_path", False, "not available"),
        Flag("num_draft_tokens", False, "not available"),
        Flag("kv_bits", False, "not available"),
        Flag("kv_group_size", False, "not available"),
        Flag("quantized_kv_start", False, "not available"),
        Flag("save_every", False, "steps between checkpoints"),
        Flag("eval_every", False, "not available yet"),
        Flag("use_grad_checkpointing", True, "less memory, a third more time"),
        Flag("grad_checkpoint_layers", False, "every block or none"),
        Flag("use_wandb", True, "not available yet"),
        Flag("wandb_project", False, "not available yet"),
        Flag("wandb_entity", False, "not available yet"),
        Flag("wandb_run_name", False, "not available yet"),
        Flag("use_lora", True, "train adapters in place of every weight"),
        Flag("lora_rank", False, "rank of the adapters"),
    ),
)
