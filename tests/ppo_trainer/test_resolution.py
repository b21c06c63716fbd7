"""Row and config together: which combinations are accepted, which are refused, and with what reason."""

from __future__ import annotations

import dataclasses
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
    with pytest.raises(InvalidConfigurationError, match=r"kl_target: .* 0 stays 0"):
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
        ("gdpo", {"missing_end_penalty": 1.0, "missing_end_mode": "replace"}, "missing_end_mode"),
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


# Every combination, and what the sentences say ------------------------------------------------------------

ESTIMATORS = ("k1", "k2", "k3", "k3_plain", "abs", "mse", "full")
ONE: dict[str, Any] = {"num_epochs_per_rollout": 1}
SEVERAL: dict[str, dict[str, Any]] = {
    "epochs": {"num_epochs_per_rollout": 2},
    "minibatches": {"num_epochs_per_rollout": 1, "minibatch_size": 8},  # of 4 prompts times 8
}


def refusal(algorithm: str = "grpo", **options: Any) -> str:
    """The sentence that refuses these options; fails where nothing does."""
    with pytest.raises(InvalidConfigurationError) as caught:
        resolve(algorithm, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def verdict(placement: str, estimator: str, several: bool, biased: bool) -> str | None:
    """Why the combination is refused, or None, as reward_kl/kl_divergence.py has it in its table."""
    if placement == "loss":
        if estimator == "k1":
            return "k1 in the loss does nothing, since its expected gradient is exactly 0"
        if estimator == "abs" and not biased:
            return "abs in the loss does not have the reverse KL's gradient"
        if estimator in ("k2", "mse") and several and not biased:
            return f"{estimator} in the loss has the reverse KL's gradient on-policy only"
        return None
    if estimator == "k3_plain":
        return "k3_plain is k3 in the loss without the ratio"
    if estimator != "k1" and not biased:
        return f"{estimator} in the reward does not have the reverse KL's gradient, only k1 has"
    return None


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("updates", ["one", *SEVERAL])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("placement", ["reward", "loss"])
def test_a_kl_is_refused_where_it_would_teach_something_else(
    placement: str, estimator: str, updates: str, biased: bool
) -> None:
    options = {
        "kl_placement": placement,
        "kl_estimator": estimator,
        "allow_biased_kl": biased,
        **(ONE if updates == "one" else SEVERAL[updates]),
    }
    reason = verdict(placement, estimator, updates != "one", biased)
    if reason is None:
        config = resolve("grpo", **options)
        assert (config.kl_placement, config.kl_estimator) == (placement, estimator)
        assert kl_is_used(config)
    else:
        sentence = refusal("grpo", **options)
        assert sentence.startswith("kl_estimator: ")
        assert reason in sentence
        # Where the bias may be accepted the sentence says so, and nowhere else.
        always = estimator == "k3_plain" or (placement, estimator) == ("loss", "k1")
        assert ("allow_biased_kl" in sentence) == (not always)


def test_the_sentence_about_several_updates_counts_them() -> None:
    options = {"kl_estimator": "k2", "batch_size": 4, "group_size": 8}
    assert "here 6 updates follow" in refusal(num_epochs_per_rollout=3, minibatch_size=16, **options)
    assert "here 2 updates follow" in refusal(num_epochs_per_rollout=2, minibatch_size=10**6, **options)


@pytest.mark.parametrize(
    ("options", "updates"),
    [
        ({}, 1),
        ({"num_epochs_per_rollout": 3}, 3),
        ({"minibatch_size": 12}, 1),
        ({"minibatch_size": 11}, 2),
        ({"minibatch_size": 5, "num_epochs_per_rollout": 2}, 6),
        ({"minibatch_size": 100}, 1),
    ],
)
def test_updates_of_a_batch_of_twelve(options: dict[str, Any], updates: int) -> None:
    config = PPOConfig(batch_size=3, group_size=4, **{**ONE, **options})
    assert updates_per_batch(config) == updates
    assert updates_per_batch(config, 1) == config.num_epochs_per_rollout


@pytest.mark.parametrize("name", [name for name, row in ALGORITHMS.items() if row.kl_placement == "none"])
def test_a_row_without_a_kl_can_have_any_kl_or_none(name: str) -> None:
    assert not kl_is_used(resolve(name, kl_coef=0.0))
    declined = resolve(name, kl_coef=0.2, kl_placement="none")
    assert (declined.kl_placement, kl_is_used(declined)) == ("none", False)
    moved = resolve(name, kl_coef=0.2, kl_placement="reward")
    assert (moved.kl_placement, moved.kl_estimator) == ("reward", "k1")
    chosen = resolve(name, kl_coef=0.2, kl_estimator="full")
    assert (chosen.kl_placement, chosen.kl_estimator) == ("loss", "full")


@pytest.mark.parametrize("name", [name for name, row in ALGORITHMS.items() if row.kl_placement != "none"])
def test_every_rows_kl_can_be_moved(name: str) -> None:
    row = find_algorithm(name)
    kept = resolve(name)
    assert (kept.kl_placement, kept.kl_estimator) == (row.kl_placement, row.kl_estimator)
    named = resolve(name, kl_placement=row.kl_placement)
    assert named.kl_estimator == row.kl_estimator
    other, right = ("loss", "k3") if row.kl_placement == "reward" else ("reward", "k1")
    assert resolve(name, kl_placement=other).kl_estimator == right
    assert f"kl_estimator: {'k1' if other == 'loss' else 'k2'}" in refusal(
        name, kl_placement=other, kl_estimator="k1" if other == "loss" else "k2"
    )


def test_on_policy_k2_is_refused_where_nothing_corrects_for_another_sampler() -> None:
    """One update, but the ratio of the policy to a sampler that lags behind is not in k2."""
    lagging = {"rollout_policy": "copy", "kl_estimator": "k2", **ONE}
    assert resolve("grpo", **lagging).correction == "token_truncate"  # which weighs the KL too
    assert "k2" in refusal(old_logprobs_from="rollout", **lagging)
    assert (
        resolve("grpo", old_logprobs_from="rollout", **{**lagging, "kl_estimator": "k3"}).kl_estimator == "k3"
    )


@pytest.mark.parametrize("horizon", [6, 7])
def test_the_horizon_must_outlast_a_batch(horizon: int) -> None:
    """0.2 of 32 completions are 6.4: with 6 one step could take the coefficient below 0."""
    options = {"kl_target": 3.0, "batch_size": 4, "group_size": 8, "kl_horizon": horizon}
    if horizon == 7:
        assert resolve("grpo", **options).kl_horizon == 7
    else:
        assert "kl_horizon: 6 is too short for batches of 32 completions" in refusal(**options)


@pytest.mark.parametrize(
    "options", [{"reference": "base"}, {"reference_path": "a/model"}, {"reference": "none"}]
)
def test_only_a_reference_that_was_the_policy_can_follow_it(options: dict[str, Any]) -> None:
    assert refusal("grpo", reference_sync_every=5, **options).startswith("reference_sync_every: ")
    assert resolve("grpo", **options).reference_sync_every is None
    assert resolve("grpo", reference_sync_every=5).reference_sync_every == 5


@pytest.mark.parametrize("surrogate", ["clipped", "unclipped", "cispo", "sapo"])
@pytest.mark.parametrize(
    ("name", "own"), [("dual_clip", "clipped"), ("delta", "clipped"), ("ratio_cap", "cispo")]
)
def test_a_surrogates_own_option_is_refused_elsewhere(name: str, own: str, surrogate: str) -> None:
    options = {"surrogate": surrogate, name: 3.0}
    if surrogate == own:
        assert getattr(resolve("grpo", **options), name) == 3.0
    else:
        sentence = refusal("grpo", **options)
        assert sentence.startswith(f'{name}: it belongs to the surrogate "{own}"')
        assert f'"{surrogate}"' in sentence


def test_a_rows_own_cap_goes_with_the_surrogate_that_it_belongs_to() -> None:
    """Nobody set ratio_cap here, so nobody can leave it out."""
    assert resolve("cispo").ratio_cap == find_algorithm("cispo").defaults["ratio_cap"]
    assert resolve("cispo", surrogate="clipped").surrogate == "clipped"
    assert resolve("cispo", surrogate="clipped").ratio_cap is None
    assert refusal("cispo", surrogate="clipped", ratio_cap=5.0).startswith("ratio_cap: ")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dual_clip": 1.0}, "dual_clip: more than 1 is needed, found 1.0"),
        ({"delta": 1.2}, "delta: more than 1 + clip_epsilon_high = 1.2 is needed, found 1.2"),
        ({"delta": 1.2, "clip_epsilon_high": 0.5}, "= 1.5 is needed"),
    ],
)
def test_a_limit_must_lie_beyond_the_clip_range(options: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal("grpo", **options)
    (name,) = options.keys() & {"dual_clip", "delta"}
    assert resolve("grpo", **{**options, name: 1.6}) is not None


def test_a_value_head_on_the_trunk_has_no_warm_up_of_its_own() -> None:
    assert refusal("ppo", value_network="shared", value_warmup_steps=1).startswith("value_warmup_steps: ")


COLUMNS: dict[str, Any] = {
    "ratio": "sequence_product",
    "surrogate": "unclipped",
    "reduction": "fixed_length",
    "kl_placement": "reward",
    "kl_estimator": "k1",
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_column_in_the_config_wins_over_the_rows(name: str) -> None:
    config = resolve(name, **COLUMNS, kl_coef=0.1)
    assert {column: getattr(config, column) for column in COLUMNS} == COLUMNS


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_column_set_to_none_is_the_rows(name: str) -> None:
    assert resolve(name, **dict.fromkeys(COLUMNS)) == resolve(name)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_resolved_stays_as_it_is_when_resolved_again(name: str) -> None:
    once = resolve(name, kl_coef=0.3)
    again = resolve_config(once, find_algorithm(name))
    assert dataclasses.asdict(again) == dataclasses.asdict(once)


def test_the_policy_itself_needs_no_correction_and_may_have_one() -> None:
    assert (PPOConfig().correction, PPOConfig().samples_from_copy) == ("none", False)
    assert PPOConfig(importance_correction="sequence_mask").correction == "sequence_mask"
    assert PPOConfig(logit_bias={}, top_k=0, top_p=1.0).correction == "none"  # written out, and nothing


def test_the_sentence_names_everything_that_is_unlike() -> None:
    with pytest.raises(
        InvalidConfigurationError,
        match=r"^top_p = 0.9 and repetition_penalty = 1.2 and quantize_for_rollouts: ",
    ):
        PPOConfig(top_p=0.9, repetition_penalty=1.2, quantize_for_rollouts=True, importance_correction="none")


@pytest.mark.parametrize(
    ("name", "option"), [("cispo", "ratio_cap"), ("dapo", "clip_epsilon_high"), ("gspo", "clip_epsilon_high")]
)
def test_a_limit_set_to_none_on_purpose_is_none(name: str, option: str) -> None:
    """In these fields None says something: no limit; the same as below."""
    assert getattr(resolve(name), option) is not None
    assert getattr(resolve(name, **{option: None}), option) is None


@pytest.mark.parametrize(
    ("algorithm", "options", "field"),
    [
        ("grpo", {"reference_mixup": 0.5}, "reference_mixup"),
        ("grpo", {"dynamic_sampling_reward": "right"}, "dynamic_sampling_reward"),
        ("grpo", {"sapo_temperature_neg": 2.0}, "sapo_temperature_neg"),
        ("dr_grpo", {"kl_placement": "loss"}, "kl_placement"),
        ("grpo", {"whiten_rewards": True}, "whiten_rewards"),
        ("reinforce", {"batch_size": 1, "group_size": 1}, "batch_size"),
    ],
)
def test_what_was_set_on_purpose_and_would_do_nothing_is_refused(
    algorithm: str, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidConfigurationError, match=f"^{field}: "):
        resolve(algorithm, **options)


def test_the_same_options_where_they_do_something() -> None:
    resolve("grpo", reference_mixup=0.5, reference_sync_every=1)
    resolve("dapo", dynamic_sampling_reward="right")
    resolve("sapo", sapo_temperature_neg=2.0)
    resolve("dr_grpo", kl_placement="loss", kl_coef=0.1)
    resolve("ppo", whiten_rewards=True)
    resolve("reinforce", batch_size=2, group_size=1)
    resolve("grpo", reference_mixup=1.0)  # what it is anyway


@pytest.mark.parametrize("bias", [{-1: 1.0}, {3: float("nan")}, {3: float("inf")}])
def test_a_bias_that_cannot_be_added_is_refused(bias: dict[int, float]) -> None:
    with pytest.raises(InvalidConfigurationError, match="logit_bias: a token id from 0 up"):
        PPOConfig(logit_bias=bias, importance_correction="token_truncate")
    PPOConfig(logit_bias={3: float("-inf")}, importance_correction="token_truncate")


@pytest.mark.parametrize("unlike", [{"top_p": 0.9}, {"rollout_policy": "copy"}])
def test_on_policy_k2_needs_a_sampler_that_is_the_policy_or_weights(unlike: dict[str, Any]) -> None:
    options = {**LOSS, "kl_estimator": "k2", **unlike}
    for uncorrected in ({"old_logprobs_from": "rollout"}, {"allow_truncated_sampling": True}):
        with pytest.raises(InvalidConfigurationError, match=r"kl_estimator: k2 .*nothing corrects for"):
            resolve("grpo", **options, **uncorrected)
    assert resolve("grpo", **options, importance_correction="token_truncate").kl_estimator == "k2"
