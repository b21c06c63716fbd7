"""Row and config together: which combinations are accepted, which are refused, and with what reason."""

from __future__ import annotations

from typing import Any

import pytest

from config.errors import InvalidConfigurationError
from config.ppo_config import PPOConfig
from ppo_trainer.algorithms import ALGORITHMS, find_algorithm
from ppo_trainer.resolution import kl_is_used, resolve_config, updates_per_batch


def resolve(algorithm: str, **options: Any) -> PPOConfig:
    return resolve_config(PPOConfig(**options), find_algorithm(algorithm))


# The KL ---------------------------------------------------------------------------------------------------

LOSS: dict[str, Any] = {"kl_placement": "loss", "kl_coef": 0.1, "group_size": 4, "num_epochs_per_rollout": 1}
REWARD: dict[str, Any] = {**LOSS, "kl_placement": "reward"}


@pytest.mark.parametrize("options", [{}, {"allow_biased_kl": True}, {"num_epochs_per_rollout": 4}])
def test_k1_in_the_loss_is_refused_with_its_reason_whatever_is_allowed(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigurationError, match=r"kl_estimator: k1 .*expected gradient is exactly 0"):
        resolve("grpo", **{**LOSS, "kl_estimator": "k1", **options})


@pytest.mark.parametrize("estimator", ["k3", "k3_plain", "full"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_these_are_right_in_the_loss_on_and_off_policy_or_named_for_what_they_are(
    estimator: str, epochs: int
) -> None:
    resolved = resolve("grpo", **{**LOSS, "kl_estimator": estimator, "num_epochs_per_rollout": epochs})
    assert (resolved.kl_placement, resolved.kl_estimator) == ("loss", estimator)


@pytest.mark.parametrize("estimator", ["k2", "mse"])
@pytest.mark.parametrize("several", [{"num_epochs_per_rollout": 2}, {"minibatch_size": 8}])
def test_k2_in_the_loss_is_for_a_single_update(estimator: str, several: dict[str, Any]) -> None:
    options = {**LOSS, "kl_estimator": estimator}
    assert updates_per_batch(resolve("grpo", **options)) == 1
    with pytest.raises(
        InvalidConfigurationError, match=rf"kl_estimator: {estimator} in the loss .*on-policy"
    ):
        resolve("grpo", **{**options, **several})
    assert resolve("grpo", **{**options, **several, "allow_biased_kl": True}).kl_estimator == estimator


def test_abs_in_the_loss_needs_permission() -> None:
    with pytest.raises(InvalidConfigurationError, match="kl_estimator: abs in the loss"):
        resolve("grpo", **LOSS, kl_estimator="abs")
    assert resolve("grpo", **LOSS, kl_estimator="abs", allow_biased_kl=True).kl_estimator == "abs"


@pytest.mark.parametrize("estimator", ["k2", "k3", "abs", "mse", "full"])
def test_in_the_reward_all_but_k1_need_permission(estimator: str) -> None:
    assert resolve("ppo", **REWARD).kl_estimator == "k1"
    with pytest.raises(InvalidConfigurationError, match=f"kl_estimator: {estimator} in the reward .*only k1"):
        resolve("ppo", **REWARD, kl_estimator=estimator)
    assert resolve("ppo", **REWARD, kl_estimator=estimator, allow_biased_kl=True).kl_estimator == estimator


def test_plain_k3_has_no_meaning_in_the_reward() -> None:
    with pytest.raises(InvalidConfigurationError, match="k3_plain is k3 in the loss without the ratio"):
        resolve("ppo", **REWARD, kl_estimator="k3_plain", allow_biased_kl=True)


def test_without_a_kl_the_estimator_is_nobodys_business() -> None:
    assert not kl_is_used(resolve("grpo", kl_coef=0.0, kl_placement="loss", kl_estimator="k1"))


@pytest.mark.parametrize("name", [name for name, row in ALGORITHMS.items() if row.kl_placement == "none"])
def test_a_row_without_a_kl_gets_a_right_one_in_its_loss_when_asked(name: str) -> None:
    assert not kl_is_used(resolve(name))
    asked = resolve(name, kl_coef=0.05)
    assert (asked.kl_placement, asked.kl_estimator, kl_is_used(asked)) == ("loss", "k3", True)


def test_a_kl_that_is_moved_takes_the_estimator_that_is_right_there() -> None:
    assert resolve("ppo", kl_placement="loss").kl_estimator == "k3"
    assert resolve("grpo", kl_placement="reward").kl_estimator == "k1"


def test_no_reference_means_no_kl() -> None:
    assert not kl_is_used(resolve("grpo", reference="none"))
    with pytest.raises(InvalidConfigurationError, match='kl_coef: with reference = "none"'):
        resolve("grpo", reference="none", kl_coef=0.1)


def test_a_target_needs_a_kl_to_steer() -> None:
    with pytest.raises(InvalidConfigurationError, match="kl_target: dr_grpo has no KL"):
        resolve("dr_grpo", kl_target=6.0, kl_coef=0.1, kl_placement="none")
    with pytest.raises(InvalidConfigurationError, match="kl_target: .* 0 stays 0"):
        resolve("grpo", kl_target=6.0, kl_coef=0.0)


# The rest of the columns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "options", "field"),
    [
        ("cispo", {"dual_clip": 3.0}, "dual_clip"),
        ("rloo", {"delta": 4.0}, "delta"),
        ("grpo", {"ratio_cap": 2.0}, "ratio_cap"),
        ("grpo", {"dual_clip": 0.5}, "dual_clip"),
        ("dapo", {"delta": 1.25}, "delta"),
        ("ppo", {"dynamic_sampling": True}, "group_size"),
        ("grpo", {"reference_sync_every": 2, "reference": "base"}, "reference_sync_every"),
        ("grpo", {"reference_sync_every": 2, "reference_path": "x"}, "reference_sync_every"),
    ],
)
def test_contradictions_are_refused_by_name(algorithm: str, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=f"^{field}: "):
        resolve(algorithm, **options)


def test_what_was_set_wins_over_the_column() -> None:
    resolved = resolve("grpo", ratio="sequence", surrogate="unclipped", reduction="token_mean")
    assert (resolved.ratio, resolved.surrogate, resolved.reduction) == ("sequence", "unclipped", "token_mean")
    assert resolve("grpo", ratio=None).ratio == "token"


def test_resolving_twice_changes_nothing() -> None:
    for name in ALGORITHMS:
        once = resolve(name)
        assert resolve_config(once, find_algorithm(name)) == once


# Rollouts from another distribution -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "unlike",
    [
        {"top_p": 0.9},
        {"top_k": 20},
        {"min_p": 0.1},
        {"logit_bias": {3: -5.0}},
        {"repetition_penalty": 1.2},
    ],
)
def test_a_sampler_that_is_not_the_policy_is_corrected_or_refused(unlike: dict[str, Any]) -> None:
    (field,) = unlike
    with pytest.raises(InvalidConfigurationError, match=f"{field} = .*importance_correction"):
        PPOConfig(**unlike)
    assert PPOConfig(**unlike, importance_correction="sequence_mask").correction == "sequence_mask"
    assert PPOConfig(**unlike, allow_truncated_sampling=True).correction == "none"
    assert PPOConfig(**unlike, old_logprobs_from="rollout").correction == "none"


@pytest.mark.parametrize("copy", [{"rollout_policy": "copy"}, {"quantize_for_rollouts": True}])
def test_a_copy_is_corrected_unless_told_otherwise(copy: dict[str, Any]) -> None:
    assert PPOConfig(**copy).correction == "token_truncate"
    assert PPOConfig().correction == "none"
    with pytest.raises(InvalidConfigurationError, match="the policy's own"):
        PPOConfig(**copy, importance_correction="none")
    assert PPOConfig(**copy, old_logprobs_from="rollout").correction == "none"


def test_the_same_difference_is_not_counted_twice() -> None:
    with pytest.raises(InvalidConfigurationError, match="count the same difference twice"):
        PPOConfig(old_logprobs_from="rollout", importance_correction="token_truncate")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"importance_cap": 0.5, "importance_floor": 0.5}, "importance_floor: 0.5 must be below"),
        ({"dual_clip": 3.0, "delta": 4.0}, "the same limit"),
        ({"reference": "none", "reference_path": "somewhere"}, "reference_path"),
        ({"reference_mixup": 0.0}, "reference_mixup"),
        ({"rollout_bits": 5}, "rollout_bits"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=sentence):
        PPOConfig(**options)
