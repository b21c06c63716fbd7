"""TRL: the names of DPOConfig, KTOConfig, ORPOConfig and CPOConfig, for ``preference``."""

from __future__ import annotations

from collections.abc import Iterator

from config.older.meanings import (
    ALWAYS_LOGGED,
    NO_SWITCH,
    NO_TRACKER,
    prompts_per_step,
    same,
    table,
)
from config.older.names import OFF, Ignored, Missing, Ours, Renamed, Said, System, Together, Values
from config.older.trl import schedule_name

#: Their loss_type where it is a row of ours. ``sigmoid`` is DPO's and CPO's own, and says nothing.
LOSSES = {"sigmoid": None, "ipo": "ipo", "kto": "kto", "simpo": "simpo"}
NAMES = ("loss_type", "cpo_alpha", "simpo_gamma", "reference_free", "beta")


def _algorithm(values: Values) -> Iterator[Ours | Said]:
    """The row of the table, and its β, from the names that say it together."""
    kind = values.raw("loss_type", "sigmoid")
    kind = kind[0] if isinstance(kind, list) and len(kind) == 1 else kind
    if not isinstance(kind, str) or kind not in LOSSES or (kind == "ipo" and "cpo_alpha" in values):
        values.refuse("loss_type", f"one of {', '.join(LOSSES)}")
    nll = values.number("cpo_alpha") if "cpo_alpha" in values else None
    if "beta" in values:
        yield Ours("preference_beta", values.number("beta"), ("beta",))
    if values.switch("reference_free"):
        if kind != "sigmoid":
            values.refuse("reference_free", f"false with loss_type = {kind}")
        yield Ours("algorithm", "cpo", ("reference_free",))
        yield Ours("nll_weight", 0.0, ("reference_free",))
        return
    if kind == "simpo":
        yield Ours("algorithm", "simpo", ("loss_type",))
        named = values.present("simpo_gamma") or ("loss_type",)
        yield Ours("target_margin", values.number("simpo_gamma", 0.5), named)
        if "beta" not in values:
            yield Ours("preference_beta", 0.1, ("loss_type",))  # theirs; ours is the paper's 2
        if nll != 0:
            yield Said(
                values.present("cpo_alpha") or ("loss_type",),
                "the answer's own loss beside SimPO's is not there (cpo_alpha = 0 asks for none)",
                loud=True,
            )
        return
    if "simpo_gamma" in values:
        yield Said(("simpo_gamma",), "only loss_type = simpo has a use for it")
    if LOSSES[kind] is not None:
        yield Ours("algorithm", LOSSES[kind], ("loss_type",))
    if kind == "ipo":
        yield Said(
            ("loss_type",),
            "TRL averages IPO's logprobs over tokens, and here they are summed as in the paper: β is another one",
        )
    if nll is not None:
        yield Ours("algorithm", "cpo", ("cpo_alpha",))
        yield Ours("nll_weight", nll, ("cpo_alpha",))
        yield Said(
            ("cpo_alpha",),
            "there it weighs a mean over the batch's tokens, here the summed logprob of each chosen answer, as the "
            "paper does: divide it by the tokens of an answer to have the same",
        )


def _dropout(values: Values) -> Iterator[Ours | Said]:
    if values.switch("disable_dropout"):
        yield Ours("lora_dropout", 0.0, ("disable_dropout",))


def _adapters(values: Values) -> Iterator[Ours | Said]:
    names = values.present("use_peft", "use_dora")
    if "use_peft" in values:
        kind = "dora" if values.switch("use_dora") else "lora"
        yield Ours("fine_tune_type", kind if values.switch("use_peft") else "full", names)
    elif values.switch("use_dora"):
        yield Ours("fine_tune_type", "dora", names)


def _quantised(values: Values) -> Iterator[Ours | Said]:
    for name, bits in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if name in values and values.switch(name):
            yield Ours("quantize_base", bits, (name,))


def _rows_are_not_cut(values: Values) -> Iterator[Ours | Said]:
    names = values.present("max_prompt_length", "max_completion_length", "truncation_mode")
    names = tuple(name for name in names if values.raw(name) not in OFF)
    if names:
        yield Said(names, "no row is cut here; one of more than max_sequence_length tokens is refused")


def _steps(values: Values) -> Iterator[Ours | Said]:
    steps = values.number("max_steps", -1)
    if steps > 0:
        yield Ours("num_steps", values.whole("max_steps"), ("max_steps",))
    elif "num_train_epochs" in values:
        yield Said(
            ("num_train_epochs",),
            "this stage counts steps and not epochs: num_steps = epochs × rows / batch_size",
            loud=True,
        )


TRL_PREFERENCE = System(
    name="trl-preference",
    title="TRL's DPO, KTO, ORPO and CPO",
    stage="PreferenceConfig",
    settings=table(
        ("model_name_or_path", same("model_name")),
        ("dataset_test_split", same("dataset_val_split")),
        (
            NAMES,
            Together(
                _algorithm,
                "`algorithm`, `preference_beta`, `nll_weight`, `target_margin`; reference_free is `cpo` with "
                "`nll_weight` = 0",
            ),
        ),
        (("max_length",), same("max_sequence_length")),
        (
            ("max_prompt_length", "max_completion_length", "truncation_mode"),
            Together(
                _rows_are_not_cut, "– rows are not cut; a longer one than `max_sequence_length` is refused"
            ),
        ),
        (
            ("per_device_train_batch_size", "gradient_accumulation_steps"),
            Together(
                prompts_per_step(
                    "per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", (8, 1, 1)
                ),
                "`batch_size` = both multiplied, `micro_batch_size`",
            ),
        ),
        (("num_train_epochs", "max_steps"), Together(_steps, "`num_steps`; epochs are not counted")),
        ("lr_scheduler_type", Renamed("lr_schedule", schedule_name)),
        ("adam_epsilon", same("adam_eps")),
        ("disable_dropout", Together(_dropout, "`lora_dropout` = 0")),
        (("use_peft", "use_dora"), Together(_adapters, "`fine_tune_type`")),
        (("load_in_4bit", "load_in_8bit"), Together(_quantised, "`quantize_base`")),
        ("use_rslora", same("lora_rslora")),
        ("lora_target_modules", same("lora_modules")),
        ("lora_modules_to_save", same("modules_to_save")),
        ("eval_steps", same("eval_every")),
        ("eval_strategy", Ignored("eval_every says it: steps between validations")),
        (("report_to", "run_name"), NO_TRACKER),
        (("logging_steps", "logging_first_step"), ALWAYS_LOGGED),
        (
            ("save_steps", "save_strategy", "save_total_limit"),
            Ignored("the result is saved when training ends"),
        ),
        (
            ("precompute_ref_log_probs", "precompute_ref_batch_size"),
            Ignored("the reference's logprobs of a row are computed once and kept, always"),
        ),
        (
            (
                "use_vllm",
                "torch_compile",
                "dataloader_num_workers",
                "dataset_num_proc",
                "use_liger_kernel",
                "bf16",
            ),
            NO_SWITCH,
        ),
        (("padding_free", "padding_value", "label_pad_token_id"), Ignored("padding is never seen by a loss")),
        (
            ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
            Missing("the reference stays what the policy is before its first step"),
        ),
        (
            ("rpo_alpha", "loss_weights"),
            Missing("a loss beside DPO's is not there; orpo and cpo have the chosen answer's own"),
        ),
        (
            ("ld_alpha", "use_weighting", "discopop_tau", "f_divergence_type", "f_alpha_divergence_coef"),
            Missing("this form of DPO's loss is not there"),
        ),
    ),
)
