"""A row and a config together: what nobody set is filled in, and contradictions are refused with a reason."""

from __future__ import annotations

from typing import Any

from config.errors import InvalidConfigurationError
from config.ppo_config import PPOConfig
from ppo_trainer.algorithms import Algorithm

#: Placements of the KL whose expected gradient is the reverse KL's, or that a paper's own name asks for.
RIGHT_IN_REWARD = ("k1",)
RIGHT_IN_LOSS = ("k2", "mse", "k3", "k3_plain", "full")
ON_POLICY_ONLY = ("k2", "mse")

#: The fields in which None means the row's; in others (a cap, a clip) it means none.
COLUMNS = ("ratio", "surrogate", "reduction", "kl_placement", "kl_estimator")

#: Options that only one surrogate reads.
OWNERS = {"dual_clip": "clipped", "delta": "clipped", "ratio_cap": "cispo"}


def resolve_config(config: PPOConfig, algorithm: Algorithm) -> PPOConfig:
    """The config with the row's columns filled in, checked against what the row needs.

    Raises:
        InvalidConfigurationError: one sentence, before any weight is loaded.
    """
    _check_placement(config, algorithm)
    defaults = dict(algorithm.defaults)
    if config.surrogate not in (None, algorithm.surrogate):
        for name in OWNERS:  # a limit of the row's own surrogate goes with it
            defaults.pop(name, None)
    config = config.with_defaults({"algorithm": algorithm.name, **defaults})
    # A column that was set to None on purpose means the same as one that was not set.
    columns = _columns_for(config, algorithm)
    empty = {name: columns[name] for name in COLUMNS if getattr(config, name) is None}
    config = config.replace(**empty) if empty else config
    _check_groups(config, algorithm)
    _check_surrogate(config)
    _check_scores(config, algorithm)
    _check_idle(config)
    _check_kl(config)
    _check_controller(config)
    if config.reference_sync_every is not None and (
        config.reference != "initial" or config.reference_path is not None
    ):
        raise InvalidConfigurationError(
            "reference_sync_every: a base model or a model from elsewhere stays what it is; leave reference and "
            "reference_path out for a reference that follows the policy"
        )
    if config.value_warmup_steps and config.value_network == "shared":
        raise InvalidConfigurationError(
            "value_warmup_steps: a head on the policy's trunk cannot learn without the policy; set it to 0, or "
            'value_network to "separate"'
        )
    return config


def updates_per_batch(config: PPOConfig, rows: int | None = None) -> int:
    """Optimiser steps on one batch of rollouts."""
    rows = rows or config.batch_size * config.group_size
    return config.num_epochs_per_rollout * -(-rows // min(config.minibatch_size or rows, rows))


def kl_is_used(config: PPOConfig) -> bool:
    """Whether a KL enters what is optimised."""
    return config.uses_kl


def _columns_for(config: PPOConfig, algorithm: Algorithm) -> dict[str, Any]:
    """The row's columns, its KL moved to where the config wants one."""
    columns, placement = algorithm.columns(), config.kl_placement
    if placement is None and columns["kl_placement"] == "none" and _asks_for_kl(config):
        placement = "loss"  # whoever gives a row without a KL a weight for it gets one
    if placement not in (None, columns["kl_placement"]):
        columns["kl_placement"] = placement
        columns["kl_estimator"] = "k1" if placement == "reward" else "k3"  # what is right there
    return columns


def _asks_for_kl(config: PPOConfig) -> bool:
    return config.was_set("kl_coef") and config.kl_coef > 0


def _check_groups(config: PPOConfig, algorithm: Algorithm) -> None:
    needs = [algorithm.name] if algorithm.needs_groups else []
    if algorithm.needs_others and config.batch_size * config.group_size < 2:
        raise InvalidConfigurationError(
            f"batch_size: {algorithm.name} compares the completions of a batch and needs at least 2 of them"
        )
    needs += ["dynamic_sampling"] if config.dynamic_sampling else []
    if needs and config.group_size < 2:
        raise InvalidConfigurationError(
            f"group_size: {needs[0]} compares the completions of one prompt and needs at least 2, "
            f"found {config.group_size}"
        )


def _check_surrogate(config: PPOConfig) -> None:
    for name, surrogate in OWNERS.items():
        if getattr(config, name) is not None and config.surrogate != surrogate:
            raise InvalidConfigurationError(
                f'{name}: it belongs to the surrogate "{surrogate}", and {config.algorithm} has '
                f'"{config.surrogate}"; leave it out'
            )
    high = config.clip_epsilon if config.clip_epsilon_high is None else config.clip_epsilon_high
    if config.dual_clip is not None and config.dual_clip <= 1:
        raise InvalidConfigurationError(f"dual_clip: more than 1 is needed, found {config.dual_clip}")
    if config.delta is not None and config.delta <= 1 + high:
        raise InvalidConfigurationError(
            f"delta: more than 1 + clip_epsilon_high = {1 + high:g} is needed, found {config.delta}"
        )


def _check_scores(config: PPOConfig, algorithm: Algorithm) -> None:
    for name in ("score_scaling", "score_clip"):
        if algorithm.weighs_rewards_apart and getattr(config, name) not in (None, "none"):
            raise InvalidConfigurationError(
                f"{name}: {algorithm.name} normalises each reward by itself, so the scale of their sum is not used; "
                "leave it out, or scale or limit the reward itself"
            )
    if algorithm.weighs_rewards_apart and config.missing_end_penalty and config.missing_end_mode == "replace":
        raise InvalidConfigurationError(
            f"missing_end_mode: {algorithm.name} normalises each reward by itself, and what replaces their sum would "
            'not be on that scale; use "subtract"'
        )
    if config.whiten_rewards and algorithm.needs_groups:
        raise InvalidConfigurationError(
            f"whiten_rewards: it scales rewards per token, and {algorithm.name} compares whole completions; leave it "
            "out, or set whiten_advantages"
        )


def _check_placement(config: PPOConfig, algorithm: Algorithm) -> None:
    """Refuse a KL that is placed on purpose and weighs nothing because the row has none of its own."""
    placed = config.kl_placement in ("reward", "loss") and not config.was_set("kl_coef")
    if placed and algorithm.defaults.get("kl_coef") == 0:
        raise InvalidConfigurationError(
            f"kl_placement: {algorithm.name} has no KL of its own, so its weight is 0; set kl_coef too"
        )


def _check_idle(config: PPOConfig) -> None:
    """Refuse what was set on purpose and would do nothing."""
    idle = {
        "reference_mixup": config.reference_sync_every is None and "reference_sync_every",
        "dynamic_sampling_reward": not config.dynamic_sampling and "dynamic_sampling",
        "sapo_temperature_pos": config.surrogate != "sapo" and 'surrogate = "sapo"',
        "sapo_temperature_neg": config.surrogate != "sapo" and 'surrogate = "sapo"',
    }
    for name, needs in idle.items():
        default = type(config).__dataclass_fields__[name].default.default
        if needs and config.was_set(name) and getattr(config, name) != default:
            raise InvalidConfigurationError(
                f"{name}: it does nothing without {needs}; set that, or leave it out"
            )


def _check_kl(config: PPOConfig) -> None:
    if config.reference == "none" and _asks_for_kl(config):
        raise InvalidConfigurationError(
            f'kl_coef: with reference = "none" there is nothing to measure a KL from, found {config.kl_coef}; set it '
            "to 0 or leave reference out"
        )
    if not kl_is_used(config):
        return
    estimator, several = config.kl_estimator, updates_per_batch(config) > 1
    if config.kl_placement == "loss":
        if estimator == "k1":
            raise InvalidConfigurationError(
                "kl_estimator: k1 in the loss does nothing, since its expected gradient is exactly 0 (the mean of the "
                'score function); use "k3", or kl_placement = "reward"'
            )
        if config.allow_biased_kl:
            return
        if estimator in ON_POLICY_ONLY and several:
            raise InvalidConfigurationError(
                f"kl_estimator: {estimator} in the loss has the reverse KL's gradient on-policy only, and here "
                f'{updates_per_batch(config)} updates follow each batch; use "k3", make it one update '
                "(num_epochs_per_rollout, minibatch_size), or set allow_biased_kl = true"
            )
        if estimator in ON_POLICY_ONLY and config.unlike_policy and config.correction == "none":
            raise InvalidConfigurationError(
                f"kl_estimator: {estimator} in the loss has the reverse KL's gradient on-policy only, and nothing "
                f'corrects for {" and ".join(config.unlike_policy)}; use "k3", set importance_correction, or set '
                "allow_biased_kl = true"
            )
        if estimator not in RIGHT_IN_LOSS:
            raise InvalidConfigurationError(
                f"kl_estimator: {estimator} in the loss does not have the reverse KL's gradient; use "
                f'"k3", or set allow_biased_kl = true'
            )
    else:
        if estimator == "k3_plain":
            raise InvalidConfigurationError(
                'kl_estimator: k3_plain is k3 in the loss without the ratio; in the reward use "k1"'
            )
        if estimator not in RIGHT_IN_REWARD and not config.allow_biased_kl:
            raise InvalidConfigurationError(
                f"kl_estimator: {estimator} in the reward does not have the reverse KL's gradient, only k1 has; use "
                '"k1", or set allow_biased_kl = true'
            )


def _check_controller(config: PPOConfig) -> None:
    if config.kl_target is None:
        return
    if config.kl_coef == 0:
        raise InvalidConfigurationError(
            "kl_target: the controller multiplies kl_coef, and 0 stays 0; set kl_coef to where it should start"
        )
    if not kl_is_used(config):
        raise InvalidConfigurationError(
            f"kl_target: {config.algorithm} has no KL to steer here; set kl_placement, or leave kl_target out"
        )
    completions = config.batch_size * config.group_size
    if config.kl_horizon <= 0.2 * completions:
        # One step of the controller could take the coefficient to 0, and from there it never returns.
        raise InvalidConfigurationError(
            f"kl_horizon: {config.kl_horizon} is too short for batches of {completions} completions; "
            f"more than {0.2 * completions:g} is needed"
        )
