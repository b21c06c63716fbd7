"""mlx-rlhf: the flags of ``ppo_training.py`` (its PPOConfig's fields among them) and of ``sft.py``."""

from __future__ import annotations

from collections.abc import Iterator

from config.older.meanings import NO_EVALUATION, NO_TRACKER, same, table
from config.older.names import Flag, Ignored, Missing, Ours, Renamed, Said, System, Together, Values

KL_NAMES = {"kl": "k1", "abs": "abs", "mse": "mse", "full": "full"}
BATCH = ("batch_size", "mini_batch_size", "gradient_accumulation_steps")
CONTROL = ("adap_kl_ctrl", "target", "horizon")
STOPPING = ("early_stopping", "target_kl")
SCALING = ("use_score_scaling", "use_score_norm")
REWARD = ("ground_truth_reward", "reward_model")
DATA = ("data", "data_base")
PROMPT = ("prompt_tuning", "num_prompt_tokens")


def _batches(values: Values) -> Iterator[Ours | Said]:
    names = values.present(*BATCH)
    rows = values.whole("batch_size", 4)
    part, passes = values.whole("mini_batch_size", min(4, rows)), values.whole(
        "gradient_accumulation_steps", 1
    )
    if "batch_size" in values:
        yield Ours("batch_size", rows, ("batch_size",))
    if "mini_batch_size" in values or "gradient_accumulation_steps" in values:
        if not part or not passes or rows % (part * passes):
            values.refuse(
                names[0],
                f"a batch_size ({rows}) that mini_batch_size × accumulation ({part * passes}) divides",
            )
        others = tuple(name for name in names if name != "batch_size")
        yield Ours("minibatch_size", part * passes, others)
        yield Ours("micro_batch_size", part, others)


def _control(values: Values) -> Iterator[Ours | Said]:
    names = values.present(*CONTROL)
    if not values.switch("adap_kl_ctrl", True):
        yield Ours("kl_target", None, ("adap_kl_ctrl",))
        return
    yield Ours("kl_target", values.number("target", 6.0), names)
    if "horizon" in values:
        yield Ours("kl_horizon", values.number("horizon"), ("horizon",))


def _estimator(values: Values) -> Iterator[Ours | Said]:
    kind = values.text("kl_penalty")
    if kind not in KL_NAMES:
        values.refuse("kl_penalty", f"one of {', '.join(KL_NAMES)}")
    yield Ours("kl_estimator", KL_NAMES[kind], ("kl_penalty",))
    if kind != "kl":
        yield Ours("allow_biased_kl", True, ("kl_penalty",))
        yield Said(
            ("kl_penalty",),
            f'"{kind}" in the reward does not have the gradient of the KL; it is used because it is asked for '
            "(allow_biased_kl)",
        )


def _stopping(values: Values) -> Iterator[Ours | Said]:
    names = values.present(*STOPPING)
    if values.switch("early_stopping"):
        yield Ours("target_kl", 1.5 * values.number("target_kl", 1.0), names)
    elif "target_kl" in values:
        yield Said(("target_kl",), "it is read with early_stopping only, there as here")


def _scaling(values: Values) -> Iterator[Ours | Said]:
    kind = "none"
    if values.switch("use_score_scaling"):
        kind = "norm" if values.switch("use_score_norm") else "std"
    yield Ours("score_scaling", kind, values.present(*SCALING))


def _reward(values: Values) -> Iterator[Ours | Said]:
    names = values.present(*REWARD)
    if values.raw("ground_truth_reward"):
        yield Ours("rewards", ["sequential_digits"], names)
        return
    model = values.raw("reward_model")
    if isinstance(model, str):
        yield Ours("rewards", [f"learned:{model}"], ("reward_model",))
    # A reward_model that is a switch asks sft.py for the training of one: the subcommand says that here.


def _data(values: Values) -> Iterator[Ours | Said]:
    names = values.present(*DATA)
    folder, base = values.text("data", "data/").rstrip("/"), values.raw("data_base", "")
    if "data_base" in values and base:
        base = values.text("data_base")
        yield Ours("train_path", f"{folder}/{base}train.jsonl", names)
        yield Ours("val_path", f"{folder}/{base}valid.jsonl", names)
    else:
        yield Ours("train_path", folder, names)


def _quantised(values: Values) -> Iterator[Ours | Said]:
    if values.switch("quantize"):
        yield Ours("quantize_base", 4, ("quantize",))


def _soft_prompt(values: Values) -> Iterator[Ours | Said]:
    if values.switch("prompt_tuning"):
        names = values.present(*PROMPT)
        yield Ours("fine_tune_type", "soft_prompt", names)
        yield Ours("soft_prompt_tokens", values.whole("num_prompt_tokens", 10), names)
    else:
        yield Said(("num_prompt_tokens",), "it is read with prompt_tuning only, there as here")


def _adapter(values: Values, name: str) -> str:
    path: str = values.text(name)
    return path.rpartition("/")[0] if path.endswith((".npz", ".safetensors")) and "/" in path else path


SAVED = (
    "the adapter is written to final/ in the run folder, as a folder that mlx-lm reads; adapter files without their "
    "description (.npz) are not read"
)

SYSTEM = System(
    name="mlx-rlhf",
    title="mlx-rlhf",
    preset="mlx_rlhf",
    settings=table(
        ("model", same("model_name")),
        ("tokenizer", Ignored("the model's own tokenizer is used")),
        ("quantize", Together(_quantised, "`quantize_base` = 4")),
        (PROMPT, Together(_soft_prompt, "`fine_tune_type` = soft_prompt, `soft_prompt_tokens`")),
        (
            "use_peft",
            Ignored("adapters train unless fine_tune_type = full; there it was accepted and not read"),
        ),
        ("me_chatbot", Missing("the chatbot on messages is not available yet")),
        (REWARD, Together(_reward, "`rewards`: sequential_digits, or learned:FOLDER")),
        ("save_file", Ignored(SAVED)),
        (("resume_file", "resume_adapter_file"), Renamed("adapter_path", _adapter, SAVED)),
        (("num_steps", "steps", "iters"), same("num_steps")),
        (BATCH, Together(_batches, "`batch_size`, `minibatch_size`, `micro_batch_size`")),
        (("ppo_epochs", "ppo_epoch"), same("num_epochs_per_rollout")),
        ("init_kl_coef", same("kl_coef")),
        (CONTROL, Together(_control, "`kl_target`, `kl_horizon`")),
        ("kl_penalty", Together(_estimator, "`kl_estimator`, `allow_biased_kl`")),
        ("cliprange", same("clip_epsilon")),
        ("cliprange_value", same("clip_range_value")),
        (STOPPING, Together(_stopping, "`target_kl`, 1.5 times theirs")),
        (SCALING, Together(_scaling, "`score_scaling`")),
        ("compare_steps", Ignored("there it was not read")),
        (("log_with", "tracker_project_name", "tracker_kwargs", "exp_name", "task_name"), NO_TRACKER),
        # sft.py
        (DATA, Together(_data, "`train_path`, `val_path`")),
        (("train", "test"), Ignored("the subcommand says what is done")),
        ("max_tokens", same("max_new_tokens")),
        ("temp", Renamed("eval_temperature")),
        ("steps_per_eval", same("eval_every")),
        (("val_batches", "test_batches"), NO_EVALUATION),
        ("steps_per_report", Ignored("every step is logged to metrics.jsonl")),
    ),
    flags=(
        Flag("model", False, "the model, a folder or a Hugging Face name"),
        Flag("tokenizer", False, "the model's own is used"),
        Flag("quantize", True, "pack the base into 4 bits while it is loaded"),
        Flag("prompt_tuning", True, "train a soft prompt in place of adapters"),
        Flag("num_prompt_tokens", False, "vectors of the soft prompt"),
        Flag("use_peft", True, "accepted, and not read"),
        Flag("me_chatbot", True, "not available yet"),
        Flag("ground_truth_reward", True, "score increasing even numbers"),
        Flag("save_file", False, "the run folder has the adapter"),
        Flag("resume_file", False, "an adapter to start from"),
        Flag("resume_adapter_file", False, "an adapter to start from"),
        Flag("steps", False, "batches of rollouts"),
        Flag("iters", False, "optimiser steps"),
        Flag("mini_batch_size", False, "completions per pass"),
        Flag("gradient_accumulation_steps", False, "passes per optimiser step"),
        Flag("ppo_epochs", False, "passes over each batch"),
        Flag("ppo_epoch", False, "passes over each batch"),
        Flag("init_kl_coef", False, "weight of the KL at the start"),
        Flag("adap_kl_ctrl", False, "true or false: whether the weight of the KL adapts"),
        Flag("target", False, "KL that the controller steers to, in nats per completion"),
        Flag("horizon", False, "episodes over which the controller acts"),
        Flag("kl_penalty", False, "kl, abs, mse or full"),
        Flag("cliprange", False, "clip range of the ratio"),
        Flag("cliprange_value", False, "clip range of the value"),
        Flag("early_stopping", True, "end a batch's epochs at 1.5 × target_kl"),
        Flag("use_score_scaling", True, "divide scores by their running deviation"),
        Flag("use_score_norm", True, "and take off their running mean"),
        Flag("compare_steps", False, "not read"),
        Flag("log_with", False, "not available yet"),
        Flag("tracker_project_name", False, "not available yet"),
        Flag("data", False, "folder with train.jsonl and valid.jsonl"),
        Flag("data_base", False, "what their names begin with"),
        Flag("train", True, "the subcommand says so"),
        Flag("test", True, "the subcommand says so"),
        Flag("max_tokens", False, "longest completion"),
        Flag("temp", False, "temperature of evaluation"),
        Flag("val_batches", False, "all validation rows are used"),
        Flag("steps_per_eval", False, "optimiser steps between validations"),
        Flag("test_batches", False, "not available yet"),
        Flag("steps_per_report", False, "every step is logged"),
        Flag("save_every", False, "steps between checkpoints"),
    ),
)
