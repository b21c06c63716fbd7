"""The doctor: a few steps of the user's own run in a temporary folder, and every check on what they left.

config → a shorter one → trainer → rollouts, scores, experience → two updates → findings
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from base_setup.memory_estimate import predict
from base_setup.parameters import named_arrays
from config.errors import InvalidConfigurationError, ModelLoadError, RewardError
from config.ppo_config import PPOConfig
from data_loading.prepared_prompts import PreparedPrompts
from diagnosis.findings import Finding
from diagnosis.gradient_checks import (
    check_gradients,
    check_kl,
    check_padding,
    check_ratio,
    loss_gradients,
    trained_module,
    with_probe_advantages,
)
from diagnosis.learning_checks import (
    ReferenceState,
    check_critic_moves,
    check_reference,
    check_rewards,
    check_weights_move,
)
from diagnosis.machine import MemoryUse, check_environment, check_memory, machine_memory, this_process
from diagnosis.restart_check import check_restart
from diagnosis.token_checks import check_batched, check_mask, check_prompt_matters, check_sampler
from experience_buffer.data_structures import Experience, Prompt, Rollout
from ppo_trainer.ppo_trainer import PPOTrainer
from rewards.scored_batch import ScoredBatch

#: What a short run has at most.
PROMPTS, COMPLETIONS, NEW_TOKENS, EPOCHS = 4, 4, 32, 2
#: Of different lengths, so that batches are padded; for a run without data.
OWN_PROMPTS = ("One", "Count: 2 4 6", "What is the capital of France?", "Say a word that rhymes with light.")
#: What two steps are no time for, or what would let them teach nothing. Each only where the config has it otherwise.
STEADY: dict[str, Any] = {
    "lr_schedule": "constant",
    "warmup_steps": 0,
    "warmup_ratio": 0.0,
    "value_warmup_steps": 0,
    "dynamic_sampling": False,
    "mask_truncated_completions": False,
    "reference_sync_every": None,
    "target_kl": None,
    "ratio_threshold": None,
    "verbose": False,
}

Tell = Callable[[Finding], None]


def shorter(config: PPOConfig, folder: Path) -> PPOConfig:
    """A resolved config as the doctor runs it: few and short completions, steady options, another folder."""
    limits = {
        "batch_size": PROMPTS,
        "group_size": COMPLETIONS,
        "max_new_tokens": NEW_TOKENS,
        "num_epochs_per_rollout": EPOCHS,
    }
    changes = {name: limit for name, limit in limits.items() if getattr(config, name) > limit}
    changes |= {name: value for name, value in STEADY.items() if getattr(config, name) != value}
    rows = changes.get("batch_size", config.batch_size) * changes.get("group_size", config.group_size)
    if config.minibatch_size is not None and config.minibatch_size > rows:
        changes["minibatch_size"] = rows
    return config.replace(**changes, output_dir=str(folder))


def examine(config: PPOConfig, rows: Sequence[Any], tell: Tell = lambda finding: None) -> list[Finding]:
    """Every check on a short run of a resolved ``config``, in the order in which a mistake is best understood.

    Args:
        rows: prompts, of which the first few are used. tell: called with each finding as it is made.
    Raises:
        ToolkitError: what would keep the run itself from starting, in its own words.
    """
    findings: list[Finding] = []

    def note(finding: Finding) -> None:
        findings.append(finding)
        tell(finding)

    for finding in check_environment(this_process()):
        note(finding)
    with tempfile.TemporaryDirectory(prefix="mlx-ppo-doctor-") as name:
        folder = Path(name)
        short = shorter(config, folder / "run")
        mx.reset_peak_memory()
        trainer = PPOTrainer(short, reward_model=short.rewards or "well_formed")
        for finding in _findings(trainer, config, _prompts(trainer, rows), folder):
            note(finding)
    return findings


def examine_trainer(trainer: PPOTrainer, rows: Sequence[Any], folder: Path) -> list[Finding]:
    """The checks on a trainer that is there already, made with a config as short as :func:`shorter` makes it.

    It is trained by them. Two of them, environment and memory, are about a run from the start and left out.
    """
    return list(_findings(trainer, None, _prompts(trainer, rows), folder))


def _prompts(trainer: PPOTrainer, rows: Sequence[Any]) -> list[Prompt]:
    config = trainer.config
    some = [rows[i] for i in range(min(len(rows), config.batch_size))]
    prepared = PreparedPrompts(
        trainer.policy.tokenizer,
        some,
        max_prompt_length=config.max_prompt_length,
        overflow="keep_end",
        on_bad_row=config.on_bad_row,
    )
    return [prepared[i] for i in range(len(prepared))]


# The run -------------------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    rollouts: list[Rollout]
    scored: ScoredBatch | None  # None: a reward failed
    experience: Experience  # to learn from, with a gradient whatever the rewards said
    failure: str


def _batch(trainer: PPOTrainer, prompts: Sequence[Prompt]) -> _Batch:
    rollouts = trainer.generate(prompts)
    scored, failure = None, ""
    try:
        scored = trainer.score(rollouts)
    except RewardError as error:
        failure = str(error)
    experience, _ = trainer.make_experience(rollouts, scored or _unscored(trainer, rollouts))
    if not bool(mx.any((experience.advantages != 0) & experience.mask)):
        experience = with_probe_advantages(experience)
    return _Batch(rollouts, scored, experience, failure)


def _unscored(trainer: PPOTrainer, rollouts: Sequence[Rollout]) -> ScoredBatch:
    """Scores of 0 in place of those that a failing reward did not give."""
    zeros = np.zeros(len(rollouts), dtype=np.float32)
    return ScoredBatch(zeros, dict.fromkeys(trainer.rewards.names, zeros))


def _findings(
    trainer: PPOTrainer, whole: PPOConfig | None, prompts: Sequence[Prompt], folder: Path
) -> Iterator[Finding]:
    config, policy, reference = trainer.config, trainer.policy, trainer.reference
    temperature = config.temperature
    first = _batch(trainer, prompts)
    rollouts, experience = first.rollouts, first.experience
    tokens, mask = experience.tokens, experience.mask

    if first.scored is None:
        yield Finding(
            "reward", "fault", first.failure, "try it: python main.py rewards try NAME --completion …"
        )
    else:
        yield check_rewards(
            first.scored, [r.prompt.index for r in rollouts], shortened=_shortened(whole, config)
        )
    yield check_mask(rollouts, policy.end_ids)
    yield check_prompt_matters(policy, rollouts, temperature)
    yield check_batched(policy, rollouts, temperature)
    yield check_sampler(policy, rollouts, temperature, config.unlike_policy)
    if reference is not None:
        yield check_kl(policy, reference, experience, temperature, same=_starts_as_reference(config))
    probe = with_probe_advantages(experience)
    yield check_gradients(trained_module(trainer), loss_gradients(trainer, probe))
    yield check_padding(lambda one: loss_gradients(trainer, one), probe)

    weights = named_arrays(trained_module(trainer).trainable_parameters())
    critic = (
        trainer.value_model if trainer.value_model is not None and not trainer.value_model.shared else None
    )
    critic_weights = named_arrays(critic.module.trainable_parameters()) if critic is not None else {}
    state = ReferenceState.of(reference, tokens, mask, temperature) if reference is not None else None
    reports = [trainer.update(experience)]
    second = _batch(trainer, prompts)
    yield check_ratio(policy, second.experience, temperature)
    reports.append(trainer.update(second.experience))
    yield check_weights_move(
        trained_module(trainer),
        weights,
        {
            "made": sum(report["num_updates"] for report in reports),
            "skipped": sum(report["skipped_updates"] for report in reports),
            "rejected": sum(report["rejected_updates"] for report in reports),
        },
    )
    if critic is not None:
        yield check_critic_moves(critic.module, critic_weights)
    if reference is not None and state is not None:
        yield check_reference(state, ReferenceState.of(reference, tokens, mask, temperature))
    peak = mx.get_peak_memory()
    yield check_restart(trainer, tokens, folder / "saved", fresh=whole is not None)
    if whole is not None:
        yield _memory(trainer, whole, max(len(prompt.ids) for prompt in prompts), peak)


def _starts_as_reference(config: PPOConfig) -> bool:
    """Whether policy and reference are one model before the first update."""
    another = config.reference_path is not None
    return not another and (config.reference == "initial" or config.adapter_path is None)


def _shortened(whole: PPOConfig | None, config: PPOConfig) -> str:
    if whole is None:
        return ""
    parts = [
        f"{getattr(config, name)} of {getattr(whole, name)} {words}"
        for name, words in (("max_new_tokens", "tokens"), ("group_size", "completions per prompt"))
        if getattr(config, name) < getattr(whole, name)
    ]
    return f"sampled were only {' and '.join(parts)}" if parts else ""


def _memory(trainer: PPOTrainer, whole: PPOConfig, prompt_length: int, peak: int) -> Finding:
    model, critic = trainer.policy.base.config, trainer.algorithm.needs_critic
    try:
        short = predict(model, trainer.config, critic=critic, prompt_length=prompt_length).peak
        long = predict(model, whole, critic=critic).peak
    except (ModelLoadError, InvalidConfigurationError) as error:
        return Finding("memory", "warning", f"no estimate: {error}", "watch the first steps of the run")
    return check_memory(MemoryUse(peak, short, long), machine_memory())
