"""MLX RL Trainer 0.6.0: the YAML that its document shows, and the further settings that its code reads."""

from __future__ import annotations

from collections.abc import Iterator

from config.older.meanings import (
    ALWAYS_LOGGED,
    NO_EVALUATION,
    NO_SWITCH,
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
from config.older.names import Ignored, Missing, Ours, Said, System, Together, Values

DUAL = (
    "use_dual_gradients",
    "thinking_layer_start",
    "thinking_layer_end",
    "answer_layer_start",
    "answer_layer_end",
    "answer_gradient_weight",
    "thinking_gradient_weight",
    "adaptive_gradient_weights",
    "alternate_dual_gradients",
)
SFT = (
    "use_sft_on_answer",
    "sft_mode",
    "sft_thinking_weight",
    "sft_answer_weight",
    "sft_weight",
)
THINKING_PENALTY = (
    "use_thinking_penalty",
    "thinking_penalty_rate",
    "max_thinking_tokens",
    "use_thinking_bonus",
    "efficiency_bonus_weight",
    "optimal_thinking_tokens",
)
BIASES = (
    "bias_close_think",
    "bias_answer_start",
    "punish_extra_think_end",
    "min_think_tokens",
    "think_end_early_bias",
    "punish_reopen_think",
    "punish_reopen_answer",
    "bias_eos_after_answer",
    "min_answer_tokens",
    "min_answer_tokens_mcq",
    "hard_mask_mcq_first_token",
    "mcq_letter_lift",
    "mcq_ban_first_bias",
    "nonmcq_ban_first_bias",
    "mcq_close_after_k",
    "mcq_answer_end_bias",
    "encourage_think_bias",
    "ban_think_bias",
    "ban_phrases_for_bias",
    "encourage_phrases_for_bias",
)
PHASES = ("think_boost_tokens", "think_temperature", "answer_temperature")
LENGTH_TARGETS = ("think_length_target_min", "think_length_target_max", "think_length_penalty_strength")
TAGS = ("think_start_tag", "think_end_tag", "answer_start_tag", "answer_end_tag")


def _dual_gradients(values: Values) -> Iterator[Ours | Said]:
    yield from _switched(
        values,
        DUAL,
        ("use_dual_gradients",),
        "gradients of thinking and answer apart, by layer, are not available yet: every trained layer learns from "
        "every token of the completion, with weight 1",
    )


def _sft_on_answer(values: Values) -> Iterator[Ours | Said]:
    yield from _switched(
        values,
        SFT,
        ("use_sft_on_answer",),
        "a supervised loss on the reference answer beside the policy's is not available yet: the run learns from its "
        "rewards alone (main.py sft trains on answers, before)",
    )


def _thinking_penalty(values: Values) -> Iterator[Ours | Said]:
    yield from _switched(
        values,
        THINKING_PENALTY,
        ("use_thinking_penalty", "use_thinking_bonus"),
        "the trainer adds nothing to the rewards for the length of the thinking; the reward thinking_quality does",
    )


def _switched(
    values: Values, names: tuple[str, ...], switches: tuple[str, ...], why: str
) -> Iterator[Ours | Said]:
    """Settings that mean something only where one of the switches is on."""
    present = tuple(name for name in names if name in values)
    if any(values.switch(name) for name in switches if name in values):
        yield Said(present, why, loud=True)


def _group(values: Values) -> Iterator[Ours | Said]:
    names = ("num_rollout_samples",)
    members = values.whole("num_rollout_samples")
    if members > 1 or values.raw("algorithm", "grpo") != "grpo":
        yield Ours("group_size", max(members, 1), names)
        return
    yield Ours("group_size", 2, names)
    yield Said(
        names,
        f"a group of {members} has no advantage (a score minus itself), so it would teach nothing but the KL; "
        "group_size = 2, the least that compares, is used",
        loud=True,
    )


def _algorithm(values: Values) -> Iterator[Ours | Said]:
    name = values.text("algorithm")
    yield Ours("algorithm", name, ("algorithm",))
    yield Ours("surrogate", "unclipped" if name == "grpo" else None, ("algorithm",))
    if name == "grpo":
        yield Said(("algorithm",), "its policy loss is −(π/π_old)·A without a clip (surrogate = unclipped)")


def _rewards(values: Values) -> Iterator[Ours | Said]:
    rewards = values.raw("rewards")
    tags = {
        name: values.text(f"{name}_tag") for name in ("think_start", "think_end") if f"{name}_tag" in values
    }
    tags |= {
        name: values.raw(f"{name}_tag")
        for name in ("answer_start", "answer_end")
        if values.raw(f"{name}_tag")
    }
    usual = (
        tags.get("think_start", "<think>") == "<think>" and tags.get("think_end", "</think>") == "</think>"
    )
    if rewards is not None:
        yield Ours("rewards", values.given["rewards"].value, ("rewards",))
    if tags and not (usual and len(tags) <= 2):
        yield Said(
            tuple(name for name in TAGS if name in values),
            "tags are an option of each reward: give those that read tags config = {tags: "
            f"{{{', '.join(f'{name}: {tag}' for name, tag in tags.items())}}}}}",
            loud=True,
        )


SYSTEM = System(
    name="mlx-rl-trainer",
    title="MLX RL Trainer",
    preset="mlx_rl_trainer",
    tables=frozenset({"lr_schedule_config"}),
    headings=frozenset({"trainer", "generation", "monitoring", "checkpointing"}),
    settings=table(
        # trainer
        ("algorithm", Together(_algorithm, "`algorithm`, `surrogate`")),
        ("num_training_steps", same("num_steps")),
        ("learning_rate", Together(learning_rate_itself, "`learning_rate`")),
        ("optimizer_beta1", same("adam_beta1")),
        ("optimizer_beta2", same("adam_beta2")),
        ("optimizer_weight_decay", same("weight_decay")),
        ("grad_clip_norm", or_off("max_grad_norm")),
        ("lr_schedule_config", scheduled()),
        (
            ("ppo_batch_size", "grad_accum_steps"),
            Together(
                prompts_per_step("ppo_batch_size", "grad_accum_steps", "num_rollout_samples", (1, 1, 2)),
                "`batch_size` = both multiplied, in prompts; `micro_batch_size` in completions",
            ),
        ),
        ("num_rollout_samples", Together(_group, "`group_size`, at least 2")),
        ("grpo_beta", same("kl_coef")),
        ("seed", Together(random_if_negative, "`seed`; -1 draws one")),
        ("use_compile", NO_SWITCH),
        (
            "reward_smoothing_window",
            Ignored("rewards are not averaged over calls: an advantage has to see each completion's own"),
        ),
        (DUAL, Together(_dual_gradients, "**not there**: gradients of thinking and answer apart")),
        (SFT, Together(_sft_on_answer, "**not there**: a supervised loss beside the policy's")),
        (
            THINKING_PENALTY,
            Together(_thinking_penalty, "**not there**: the reward `thinking_quality` judges lengths"),
        ),
        (
            (
                "train_layer_start",
                "train_layer_end",
                "low_layer_gradient_multiplier",
                "mid_layer_gradient_multiplier",
                "top_layer_gradient_multiplier",
                "head_gradient_multiplier",
            ),
            Missing("gradients are not weighted by layer: every trained layer learns alike"),
        ),
        ("eval_every", NO_EVALUATION),
        ("use_grad_checkpointing", same("gradient_checkpointing")),
        # model
        (
            ("model_path", "ref_model_path"),
            Together(reference_model("model_path", "ref_model_path"), "`model_name`, `reference_path`"),
        ),
        ("use_lora", Together(adapters_or_all, "`fine_tune_type`")),
        ("lora_rank", same("lora_r")),
        (
            ("lora_scale_by_rank",),
            Ignored("the adapters' scale is always lora_alpha / lora_r"),
        ),
        ("lora_target_modules", same("lora_modules")),
        # generation
        (BIASES, Missing("biases on tags and phrases while sampling are not available yet; none is added")),
        (
            PHASES,
            Missing(
                "thinking and answer have one temperature here: temperature, in sampling and training alike"
            ),
        ),
        (
            LENGTH_TARGETS,
            Missing(
                "lengths of the thinking are options of the rewards: put them under config of format_structure or "
                "thinking_quality"
            ),
        ),
        (
            ("top_p", "top_k", "min_p", "repetition_penalty"),
            Together(
                truncated_sampling(
                    top_p="top_p", top_k="top_k", min_p="min_p", repetition_penalty="repetition_penalty"
                ),
                "ours of the same meaning, with `importance_correction`",
            ),
        ),
        ("repetition_context_size", same("repetition_context")),
        (("xtc_probability", "xtc_threshold"), Missing("XTC sampling is not available")),
        (("allow_tool_calls", "tool_call_penalty"), Missing("calls of tools are not looked for")),
        (("rewards", *TAGS), Together(_rewards, "`rewards`")),
        # data
        (
            "max_prompt_len",
            Together(keeping_the_end("max_prompt_len"), "`max_prompt_length`, `prompt_overflow`"),
        ),
        ("max_gen_len", same("max_new_tokens")),
        ("loader_type", Ignored("the ending of the path says what the file is")),
        (
            ("train_npy_path", "val_npy_path"),
            Missing(
                "pre-tokenised rows have no option of their own: give their prefix as train_path or val_path"
            ),
        ),
        ("dataset_prompt_key", same("prompt_column")),
        ("dataset_answer_key", same("completion_column")),
        ("dataset_filter_keywords", same("filter_keywords")),
        (("num_workers",), Ignored("one thread reads ahead of the training (prefetch_batches)")),
        ("prefetch_factor", same("prefetch_batches")),
        ("max_samples_per_file", same("max_samples")),
        # monitoring
        (("use_wandb", "wandb_project", "wandb_entity", "wandb_run_name"), NO_TRACKER),
        ("log_prompts", Ignored("samples.jsonl always has the prompts")),
        ("sample_log_path", Ignored("samples are written to samples.jsonl in the run folder")),
        ("log_level", ALWAYS_LOGGED),
        # checkpointing
        (("checkpoint_dir", "save_dir"), Ignored("checkpoints are written to the run folder, output_dir")),
        (
            "save_optimizer_state",
            Ignored("a checkpoint always has the optimiser's state; without it no run goes on"),
        ),
        ("resume_from_checkpoint", same("resume")),
        ("init_new_embeddings_with_mean", same("init_new_embeddings_with_mean")),
        (("evaluators", "benchmarks"), NO_EVALUATION),
    ),
)
