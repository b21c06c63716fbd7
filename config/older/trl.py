"""TRL: the names that its users know from GRPOConfig and PPOConfig, and mlx-lm's from its YAML files."""

from __future__ import annotations

from collections.abc import Iterator

from config.older.meanings import (
    ALWAYS_LOGGED,
    NO_EVALUATION,
    NO_SWITCH,
    NO_TRACKER,
    SCHEDULED,
    learning_rate_itself,
    prompts_per_step,
    same,
    schedule,
    table,
)
from config.older.mlx_grpo_gsm8k import SCHEDULES
from config.older.names import Ignored, Missing, Ours, Renamed, Said, System, Together, Values

LOSSES = {
    "grpo": {"algorithm": "grpo"},
    "dr_grpo": {"algorithm": "dr_grpo"},
    "bnpo": {"algorithm": "bnpo"},
    "dapo": {"algorithm": "grpo", "reduction": "token_mean"},
    "cispo": {"algorithm": "cispo"},
    "sapo": {"algorithm": "sapo"},
    "luspo": {"algorithm": "luspo"},
}


def _loss(values: Values) -> Iterator[Ours | Said]:
    kind = values.text("loss_type")
    if kind not in LOSSES:
        values.refuse("loss_type", f"one of {', '.join(LOSSES)}")
    for name, value in LOSSES[kind].items():
        yield Ours(name, value, ("loss_type",))
    if kind == "dapo":
        yield Said(
            ("loss_type",),
            "TRL's dapo is the token mean alone; algorithm = dapo has the paper's dynamic sampling, clip range and "
            "length penalty too",
        )


def _group(values: Values) -> Iterator[Ours | Said]:
    yield Ours("group_size", values.whole("num_generations"), ("num_generations",))
    if "loss_type" not in values:
        yield Ours("algorithm", "grpo", ("num_generations",))
        yield Ours("reduction", "token_mean", ("num_generations",))
        yield Said(("num_generations",), "TRL's default is grpo with loss_type dapo, a mean over tokens")


def _prompts(values: Values) -> Iterator[Ours | Said]:
    members = 8 if "loss_type" in values else 1  # a GRPOConfig's default; PPOConfig has no groups
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
    yield from prompts_per_step(*names, (8, 1, members), counts_completions=True)(values)


def _rewards(values: Values) -> Iterator[Ours | Said]:
    yield Ours("rewards", values.given["reward_funcs"].value, ("reward_funcs",))


def _scale(values: Values, name: str) -> str:
    value = values.raw(name)
    if isinstance(value, bool):
        return "group" if value else "none"
    return str(value)


def schedule_name(values: Values, name: str) -> str:
    """Our name of a schedule of transformers."""
    kind = values.text(name)
    if kind not in SCHEDULES:
        values.refuse(name, f"one of {', '.join(SCHEDULES)}")
    return SCHEDULES[kind]


def _level(values: Values, name: str) -> str:
    level = values.text(name)
    return {"token": "token", "sequence": "sequence"}.get(level) or values.refuse(name, "token or sequence")


TRL = System(
    name="trl",
    title="TRL",
    other_stages={"PreferenceConfig": "trl-preference"},
    settings=table(
        ("model_name_or_path", same("model_name")),
        ("loss_type", Together(_loss, "`algorithm`, `reduction`")),
        ("num_generations", Together(_group, "`group_size`, `algorithm`")),
        (("max_completion_length", "response_length"), same("max_new_tokens")),
        (
            ("per_device_train_batch_size", "gradient_accumulation_steps"),
            Together(
                _prompts,
                "`batch_size` = both multiplied, in prompts; `micro_batch_size` in completions",
            ),
        ),
        ("beta", same("kl_coef")),
        (("epsilon", "cliprange"), same("clip_epsilon")),
        ("epsilon_high", same("clip_epsilon_high")),
        ("cliprange_value", same("clip_range_value")),
        (("num_iterations", "num_ppo_epochs"), same("num_epochs_per_rollout")),
        ("importance_sampling_level", Renamed("ratio", _level)),
        ("scale_rewards", Renamed("scale_rewards", _scale)),
        ("reward_funcs", Together(_rewards, "`rewards`")),
        ("missing_eos_penalty", same("missing_end_penalty")),
        ("num_train_epochs", same("num_epochs")),
        ("max_steps", Renamed("num_steps", lambda values, name: max(values.number(name), 0) or None)),
        ("lr_scheduler_type", Renamed("lr_schedule", schedule_name)),
        ("adam_epsilon", same("adam_eps")),
        ("ref_model_sync_steps", same("reference_sync_every")),
        ("ref_model_mixup_alpha", same("reference_mixup")),
        ("sync_ref_model", Ignored("reference_sync_every says it")),
        (("report_to", "run_name"), NO_TRACKER),
        (("logging_steps", "log_completions"), ALWAYS_LOGGED),
        ("save_steps", same("save_every")),
        ("save_total_limit", same("keep_last_n")),
        ("save_strategy", Ignored("save_every says it: steps between checkpoints, 0 for none")),
        (("eval_steps", "eval_strategy"), NO_EVALUATION),
        (("use_vllm", "vllm_mode", "torch_compile", "dataloader_num_workers"), NO_SWITCH),
        (("use_peft",), Ignored("fine_tune_type says it")),
        ("lora_target_modules", same("lora_modules")),
    ),
)


def _mlx_lm_schedule(values: Values) -> Iterator[Ours | Said]:
    yield from schedule(values, "lr_schedule")


def _adapters(values: Values) -> Iterator[Ours | Said]:
    given, names = values.table("lora_parameters"), ("lora_parameters",)
    for key, ours in (("rank", "lora_r"), ("dropout", "lora_dropout")):
        if key in given:
            yield Ours(ours, given[key], names)
    if "scale" in given:  # mlx-lm's scale is our alpha / r
        scale, rank = given["scale"], given.get("rank", 8)
        if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in (scale, rank)):
            values.refuse("lora_parameters", "a number for rank and for scale")
        if "rank" not in given:
            yield Ours("lora_r", rank, names)
        yield Ours("lora_alpha", scale * rank, names)
    if "keys" in given:
        yield Ours("lora_modules", given["keys"], names)


def _learned(values: Values, name: str) -> str:
    return "completion" if values.switch(name) else "text"


def _optimiser(values: Values) -> Iterator[Ours | Said]:
    kind, names = values.text("optimizer"), ("optimizer",)
    if kind.lower() in ("adam", "adamw"):
        yield Said(names, "AdamW is the optimiser")
    else:
        yield Said(names, f"AdamW is the only optimiser here, in place of {kind}", loud=True)


MLX_LM = System(
    name="mlx-lm",
    title="mlx-lm",
    tables=frozenset({"lora_parameters", "lr_schedule", "optimizer_config"}),
    settings=table(
        ("model", same("model_name")),
        ("data", same("train_path")),
        ("iters", same("num_steps")),
        ("num_layers", same("lora_layers")),
        (
            "lora_parameters",
            Together(_adapters, "`lora_r`, `lora_alpha` = scale · rank, `lora_dropout`, `lora_modules`"),
        ),
        ("learning_rate", Together(learning_rate_itself, "`learning_rate`")),
        ("lr_schedule", Together(_mlx_lm_schedule, SCHEDULED)),
        (
            "adapter_path",
            Renamed("output_dir", say="there it is where the adapter is written; here final/ in it"),
        ),
        (
            "resume_adapter_file",
            Renamed("adapter_path", say="the folder of an adapter is expected, not its file"),
        ),
        ("max_seq_length", same("max_sequence_length")),
        ("grad_checkpoint", same("gradient_checkpointing")),
        (
            ("batch_size", "grad_accumulation_steps"),
            Together(
                prompts_per_step("batch_size", "grad_accumulation_steps", "num_generations", (4, 1, 1)),
                "`batch_size` = both multiplied, in prompts; `micro_batch_size` in completions",
            ),
        ),
        ("mask_prompt", Renamed("loss_on", _learned)),
        (("train", "test", "config"), Ignored("the subcommand says what is done")),
        ("optimizer", Together(_optimiser, "– AdamW is the optimiser; another one is **not there**")),
        (("steps_per_report", "report_to", "project_name"), ALWAYS_LOGGED),
        ("steps_per_eval", same("eval_every")),
        (("val_batches", "test_batches"), NO_EVALUATION),
        (
            "optimizer_config",
            Missing("options of the optimiser have names of their own: adam_beta1, weight_decay, …"),
        ),
    ),
)
