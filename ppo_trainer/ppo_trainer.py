"""Reinforcement learning of a language model: the loop.

rollouts   = generate(prompts)           sample completions
experience = make_experience(rollouts)   score, compare with the reference, work out advantages
metrics    = update(experience)          epochs of minibatches through the algorithm's loss
"""

from __future__ import annotations

import math
from collections.abc import Generator as Iteration
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from base_setup import backend
from base_setup.lora_setup import read_description
from base_setup.memory_estimate import read_config, within_memory
from base_setup.out_of_memory import in_words
from base_setup.parameters import count_parameters, describe_trainable
from base_setup.tokenizer_setup import check_vocabulary
from checkpointing.run_session import RunSession
from checkpointing.stopping import StopRequest
from checkpointing.store import CheckpointStore
from config.errors import InvalidConfigurationError
from config.ppo_config import PPOConfig
from data_loading.prepared_prompts import PreparedPrompts, Reordered
from experience_buffer.data_structures import Experience, Prompt, Rollout
from models.policy_model import FrozenPolicy, PolicyModel
from models.rollout_policy import RolloutPolicy
from models.sft_model import (
    LanguageModel,
    load_language_model,
    save_language_model,
    vocabulary_size,
)
from models.value_model import ValueModel
from monitoring.guards import RunGuards
from monitoring.run_folder import write_json
from ppo_trainer.algorithms import Algorithm, find_algorithm
from ppo_trainer.callbacks import Callback, Callbacks, EpochPrinter
from ppo_trainer.credit import from_critic
from ppo_trainer.dynamic_sampling import check_outcome_reward, collect_live_groups
from ppo_trainer.evaluator import Evaluator, sample_records, score_rollouts
from ppo_trainer.experience_maker import ExperienceMaker
from ppo_trainer.generator import Generator
from ppo_trainer.group_scorer import GroupScorer
from ppo_trainer.progress import Progress
from ppo_trainer.reference import build_reference, check_reference_path, describe_reference
from ppo_trainer.resolution import kl_is_used, resolve_config, updates_per_batch
from ppo_trainer.reward_sources import build_rewards
from ppo_trainer.run_state import STAGE, RunState
from ppo_trainer.timing import Clock, speed
from ppo_trainer.updater import Updater
from reward_kl.kl_divergence import AdaptiveKLController, FixedKLController
from rewards.scored_batch import ScoredBatch


class PPOTrainer:
    """PPO with a value network, or a critic-free method, as ``config.algorithm`` says.

        def reward(completions, **columns):
            return [float(len(set(text.split()))) for text in completions]

        trainer = PPOTrainer(PPOConfig(model_name="embedded"), reward_model=reward)
        trainer.train(["Once upon a time"], num_epochs=10)

    Args:
        config: see ``PPOConfig``; fields that nobody set take the algorithm's own defaults.
        reward_model: a callable ``f(prompts, completions, **columns) -> list[float]``, a list of them, a
            mapping from reward to weight, a registered name, entries ``{"name", "weight", "config"}``, a
            ``RewardModel`` or ``"learned:FOLDER"`` (docs/rewards.md). None: ``config.rewards``, and without those
            the reference-free default of ``rewards/default_reward.py``.
        model: a base model that is loaded already, in place of ``config.model_name``.
        tokenizer: in place of the model's own.
        policy, value_model, reference: built already, in place of what config asks for.
        algorithm: a row of your own, in place of ``config.algorithm``.
        callbacks: as for :meth:`train`, for every run.
    Raises:
        InvalidConfigurationError, ModelLoadError, CheckpointError: in a sentence, before training.
    """

    def __init__(
        self,
        config: PPOConfig,
        *,
        reward_model: Any = None,
        model: LanguageModel | None = None,
        tokenizer: TokenizerWrapper | None = None,
        policy: PolicyModel | None = None,
        value_model: ValueModel | None = None,
        reference: FrozenPolicy | None = None,
        algorithm: Algorithm | None = None,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        self.algorithm = algorithm or find_algorithm(config.algorithm)
        self.config = config = resolve_config(config, self.algorithm)
        # Everything that can be refused is refused before a weight is loaded.
        if reward_model is None:
            reward_model = config.rewards
        if reward_model is None:
            print(
                "reward: none given, so answers are judged by form alone: not empty, not repetitive, not cut off "
                "(rewards/default_reward.py)"
            )
        rewards_asked_for = reward_model if reward_model is not None else "well_formed"
        check_outcome_reward(config, build_rewards(rewards_asked_for, config).names)
        self.callbacks = list(callbacks)
        Callbacks(self.callbacks)
        if value_model is not None and not self.algorithm.needs_critic:
            raise InvalidConfigurationError(f"value_model: {self.algorithm.name} has no critic; leave it out")
        if tokenizer is not None and policy is not None:
            raise InvalidConfigurationError(
                "tokenizer: a policy that is given has its own; leave one of them out"
            )
        _check_folders(config, self.algorithm, model_is_given=model is not None or policy is not None)
        self._session = RunSession(
            config, STAGE, self._provenance, "ppo_config.json", name=self.algorithm.name
        )

        backend.seed_everything(config.seed)
        base = policy.base if policy is not None else model or load_language_model(config)
        if tokenizer is not None:
            check_vocabulary(tokenizer, vocabulary_size(base.model, base.config), "tokenizer")
            base = replace(base, tokenizer=tokenizer)
        _check_biased_tokens(config, vocabulary_size(base.model, base.config))
        config = within_memory(base.config, config, critic=self.algorithm.needs_critic)
        self.config = self._session.config = config
        self.policy = policy or PolicyModel(base, config)
        self.rewards = build_rewards(rewards_asked_for, config, base)
        self.value_model = self._build_value(value_model, base)
        self.reference = reference or build_reference(
            self.policy, config, fresh=policy is None and config.adapter_path is None
        )
        if self.reference is not None and config.reference_sync_every is not None:
            self.reference.check_can_follow(self.policy)
        self.kl_controller = self._build_controller()
        self.rollout_policy = RolloutPolicy(
            self.policy,
            copy=config.samples_from_copy,
            sync_every=config.rollout_sync_every,
            bits=config.rollout_bits if config.quantize_for_rollouts else None,
            group_size=config.rollout_quant_group_size,
        )
        self.generator = Generator(self.policy, config, self.rollout_policy)
        # Judged is the policy itself, whatever samples while it learns.
        self.evaluator = Evaluator(Generator(self.policy, config), self.rewards, self.reference, config)
        self._maker = ExperienceMaker(
            self.policy,
            self.value_model,
            self._kl_reference,
            self.rewards,
            self.algorithm,
            self.kl_controller,
            config,
        )
        self._group_scorer: GroupScorer | None = None
        if config.score_while_decoding:
            self._group_scorer = GroupScorer(lambda group: score_rollouts(self.rewards, group), self.rewards)
        self._updater: Updater | None = None
        self.step = 0  # batches of rollouts so far
        self.learned_steps = 0  # those that have been learned from, one under way included
        self.episodes = 0  # completions so far
        self.epochs = 0  # passes over prompts so far
        self._reserve: Sequence[Prompt] = []  # all prompts of the run, for dynamic sampling

    # -- The loop -------------------------------------------------------------------------------------

    def train(
        self,
        prompts: Sequence[Any],
        num_epochs: int | None = None,
        callbacks: Iterable[Callback] = (),
        *,
        resume: bool | str | Path | None = None,
    ) -> dict[str, Any]:
        """Train on ``prompts`` for ``num_epochs`` passes; None = as config says, in passes or in steps.

        Called again, it goes on with the weights, counters and run folder of the last time, and with fresh
        optimisers.

        Args:
            prompts: strings, chat message lists, or mappings with a ``prompt`` whose other fields reach the
                reward as keyword lists.
            callbacks: functions ``f(epoch, metrics)`` called after each epoch, or objects with any of the
                moments of ``ppo_trainer/callbacks.py``. One that returns False stops the run.
            resume: go on from a checkpoint as if nothing had happened: True, the newest in ``output_dir``; a run
                folder; or one checkpoint. None = as config says.
        Returns:
            The last epoch's metrics (``avg_reward`` among them), ``history`` with one entry per epoch,
            and ``run_folder``, where metrics, samples, config and the trained weights are. Of a run that was ended by
            Ctrl-C, SIGTERM or a request also ``stopped`` (``sigint``, ``sigterm``, ``request``) and ``checkpoint``,
            where it can go on.
        Raises:
            ToolkitError: one sentence. Whatever had been learned is then in ``run_folder``/interrupted.
        """
        prepared = self._reserve = self._prepare(prompts)
        num_epochs, num_steps = self._planned(num_epochs, -(-len(prepared) // self.config.batch_size))
        session = self._session
        saved = session.find(resume)
        with session.open(saved) as stop:
            told = self._listeners([*self._printer(num_epochs), *callbacks])
            self._updater = self._build_updater(num_steps)
            progress = self._progress_at(session.begin(self._run_state(prepared), saved))
            with session.keeping_what_was_earned(self.save_model, lambda: self.learned_steps, in_words):
                if self.config.verbose:
                    print(describe_trainable(self.policy.model))
                told("on_train_begin", self)
                return self._run(prepared, num_epochs, num_steps, progress, told, stop)

    def _run(
        self,
        prepared: PreparedPrompts,
        num_epochs: int,
        num_steps: int,
        progress: Progress,
        told: Callbacks,
        stop: StopRequest,
    ) -> dict[str, Any]:
        """The epochs that are left, from wherever ``progress`` stands."""
        session, last = self._session, progress.started + num_steps
        while progress.epoch < num_epochs:
            with closing(self._batches(prepared, told, progress.batches)) as batches:
                for batch in islice(batches, last - self.step):
                    progress.add(self._train_step(batch, progress.epoch, told))
                    if self.step == last:
                        break  # the last one's checkpoint is made when all is told
                    if stop.reason is not None:
                        stopped = session.stop(stop.reason, *self._position(progress))
                        return self._result(progress, told, stopped)
                    if session.is_due(self.step):
                        session.save_on_the_way(*self._position(progress))
            epoch, metrics = progress.epoch, progress.end_epoch()
            told("on_epoch_end", epoch, metrics)
            if told.stop_requested:
                break
        self.save_model(session.path / "final")
        session.save_last(*self._position(progress))
        return self._result(progress, told)

    def _result(
        self, progress: Progress, told: Callbacks, stopped: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """What ``train`` returns, once everybody has been told."""
        result = {
            **progress.so_far(),
            "history": progress.history,
            "run_folder": str(self._session.path),
            **(stopped or {}),
        }
        told("on_train_end", result)
        return result

    def _planned(self, num_epochs: int | None, batches: int) -> tuple[int, int]:
        """Epochs, the last one perhaps cut short, and steps of a run with so many batches in an epoch."""
        if num_epochs is None and self.config.num_steps is not None:
            return -(-self.config.num_steps // batches), self.config.num_steps
        num_epochs = self.config.num_epochs if num_epochs is None else num_epochs
        if not isinstance(num_epochs, int) or num_epochs < 1:
            raise InvalidConfigurationError(
                f"num_epochs: at least 1 is expected, found {num_epochs}; give a whole number"
            )
        return num_epochs, num_epochs * batches

    def _train_step(self, prompts: Sequence[Prompt], epoch: int, told: Callbacks) -> dict[str, float]:
        """One batch of rollouts, from sampling to the last of its updates."""
        clock = Clock()
        rollouts, scored, collected = self._collect(prompts, clock)
        # A batch of dead groups alone teaches nothing, although penalties may tell its completions apart.
        teaches = collected.get("dynamic_sampling/live_groups") != 0
        first = self._critic_learns_first(len(rollouts)) and teaches
        experience, metrics = self._make_experience(
            rollouts, scored, teaches=teaches, critic_learns_first=first
        )
        clock.lap("time/score")
        metrics = self.update(experience) | metrics  # KL of the policy that sampled, where both have one
        clock.lap("time/update")
        self._adapt_kl(metrics, len(rollouts))
        self._refresh_reference()
        metrics |= {"step": self.step, "epoch": epoch, "episode": self.episodes, **collected, **clock.laps}
        if not self.rollout_policy.is_current:
            metrics["sampling/policy_age"] = self.step - self.rollout_policy.synced_at
        metrics |= speed(rollouts, clock.laps)
        told("on_step_end", self.step, metrics)
        told("on_samples", self.step, self._latest_samples)
        return metrics

    def generate(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Sample this step's completions: ``group_size`` for each prompt."""
        self._begin_step()
        return self._sample(prompts)

    def score(self, rollouts: Sequence[Rollout]) -> ScoredBatch:
        """What the rewards say about each rollout."""
        scorer = self._group_scorer
        return score_rollouts(self.rewards, rollouts) if scorer is None else scorer.score(rollouts)

    def make_experience(
        self, rollouts: Sequence[Rollout], scored: ScoredBatch | None = None, *, teaches: bool = True
    ) -> tuple[Experience, dict[str, float]]:
        """Score rollouts, unless they are, and work out advantages; see :class:`ExperienceMaker`."""
        return self._make_experience(rollouts, scored or self.score(rollouts), teaches=teaches)

    def _make_experience(
        self,
        rollouts: Sequence[Rollout],
        scored: ScoredBatch,
        *,
        teaches: bool,
        critic_learns_first: bool = False,
    ) -> tuple[Experience, dict[str, float]]:
        self._latest_samples = sample_records(rollouts, scored, self.config.max_logged_samples)
        if critic_learns_first:
            self.learned_steps = self.step
        return self._maker.make(
            rollouts,
            scored,
            single_update=updates_per_batch(self.config, len(rollouts)) == 1,
            greedy_scores=self._greedy_scores(rollouts) if self.algorithm.needs_greedy else None,
            teaches=teaches,
            values_of_only_update=(
                self._current_updater.values_of_only_update if critic_learns_first else None
            ),
        )

    def _critic_learns_first(self, rows: int) -> bool:
        """Whether the critic can learn from a batch with the very forward that tells its values.

        One update follows; what the critic learns depends on a row alone, as in GAE; and all rows teach it, whatever
        the policy's part of the update turns out to be.
        """
        value, config = self.value_model, self.config
        return (
            value is not None
            and not value.shared
            and updates_per_batch(config, rows) == 1
            and self.algorithm.credit is from_critic
            and not config.mask_truncated_completions
            and config.target_kl is None
        )

    def update(self, experience: Experience) -> dict[str, float]:
        """All optimiser steps on one batch; see :class:`Updater`."""
        self.learned_steps = self.step
        return self._current_updater.update(experience, self.step)

    @property
    def _current_updater(self) -> Updater:
        if self._updater is None:
            self._updater = self._build_updater(1)
        return self._updater

    # -- Its parts ------------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        self.step += 1
        self.rewards.state.global_step = self.step  # before sampling: groups may be scored meanwhile
        self.rollout_policy.before_rollouts(self.step)

    def _sample(self, prompts: Sequence[Prompt], first_member: int = 0) -> list[Rollout]:
        on_group = self._group_scorer.begin if self._group_scorer is not None else None
        rollouts = self.generator.generate(prompts, self.step, first_member=first_member, on_group=on_group)
        self.episodes += len(rollouts)
        return rollouts

    def _collect(
        self, prompts: Sequence[Prompt], clock: Clock
    ) -> tuple[list[Rollout], ScoredBatch, dict[str, float]]:
        """Rollouts of this step and their scores, from further prompts too where groups turn out dead."""
        if not self.config.dynamic_sampling:
            rollouts = self.generate(prompts)
            clock.lap("time/rollout")
            scored = self.score(rollouts)
            clock.lap("time/score")
            return rollouts, scored, {}
        self._begin_step()

        def sample(some: Sequence[Prompt], first_member: int) -> list[Rollout]:
            rollouts = self._sample(some, first_member)
            clock.lap("time/rollout")
            return rollouts

        def judge(rollouts: Sequence[Rollout]) -> ScoredBatch:
            scored = self.score(rollouts)
            clock.lap("time/score")
            return scored

        order = np.random.default_rng([self.config.seed, self.step, len(self._reserve)])
        reserve = Reordered(self._reserve, order.permutation(len(self._reserve)).tolist())
        return collect_live_groups(prompts, reserve or prompts, sample, judge, self.config)

    def _greedy_scores(self, rollouts: Sequence[Rollout]) -> np.ndarray:
        """The score ``(B,)`` of the likeliest answer to each rollout's prompt; 0 where no reward applies to it."""
        prompts = {r.prompt.index: r.prompt for r in rollouts}
        greedy = self.generator.generate(list(prompts.values()), self.step, group_size=1, temperature=0.0)
        scores = np.nan_to_num(self.score(greedy).total)
        by_prompt = dict(zip(prompts, scores, strict=True))
        return np.array([by_prompt[r.prompt.index] for r in rollouts], dtype=np.float32)

    def _adapt_kl(self, metrics: Mapping[str, float], n_samples: int) -> None:
        """Move the coefficient, now that this batch has used the old one."""
        key = "objective/kl" if self.config.kl_unit == "sequence" else "objective/kl_per_token"
        # What is not finite belongs to an update that was skipped (max_skipped_steps); nothing can be steered by it.
        if math.isfinite(metrics.get(key, math.nan)):
            self.kl_controller.update(metrics[key], n_samples)

    def _refresh_reference(self) -> None:
        every = self.config.reference_sync_every
        if every is not None and self.reference is not None and self.step % every == 0:
            self.reference.follow(self.policy, self.config.reference_mixup)

    # -- Around the loop ------------------------------------------------------------------------------

    def evaluate(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """Sample and score one completion per prompt, without training; see :class:`Evaluator`."""
        metrics = self.evaluator.evaluate(self._prepare(prompts))
        recorder = self._session.recorder
        told = Callbacks([*([recorder] if recorder else []), *self.callbacks])
        told("on_evaluate", self.step, {k: v for k, v in metrics.items() if k != "samples"})
        return metrics

    def save_model(self, path: str | Path) -> None:
        """Write what was trained: an mlx-lm adapter folder, the value network in ``value/``, the config.

        A base model that has no folder of its own (embedded, grown, quantised on loading) is written too, to
        ``base/``, so that ``mlx_lm.load(path/base, adapter_path=path)`` works.
        """
        path = Path(path)
        self.policy.save(path)
        if self.value_model is not None:
            self.value_model.save(path / "value")
        write_json(path / "ppo_config.json", self._provenance())
        if self.policy.base.is_altered:
            save_language_model(self.policy.base, path / "base")

    def load_model(self, path: str | Path) -> None:
        """Read what :meth:`save_model` wrote for the same base model. The reference stays what it was."""
        path = Path(path)
        self.policy.load(path)
        if self.value_model is not None and (path / "value").is_dir():
            self.value_model.load(path / "value")

    def _prepare(self, prompts: Sequence[Any]) -> PreparedPrompts:
        prepared = PreparedPrompts(
            self.policy.tokenizer,
            prompts,
            max_prompt_length=self.config.max_prompt_length,
            overflow=self.config.prompt_overflow,
            on_bad_row=self.config.on_bad_row,
        )
        if str(prepared.fitting):
            print(prepared.fitting)  # what was cut or left out is never silent, whatever verbose says
        return prepared

    def _batches(
        self, prompts: PreparedPrompts, told: Callbacks, taken: int = 0
    ) -> Iteration[list[Prompt], None, None]:
        """The epoch's batches: every prompt once, in an order drawn from (seed, epochs before).

        ``taken``: batches of this epoch that have been learned from already, before a checkpoint.
        """
        if taken == 0:
            self.epochs += 1
        generator = np.random.default_rng([self.config.seed, self.epochs - 1])
        order = generator.permutation(len(prompts)) if self.config.shuffle_data else np.arange(len(prompts))
        left = order[taken * self.config.batch_size :].tolist()
        batches = prompts.batches(left, self.config.batch_size, self.config.prefetch_batches)
        with closing(batches):  # and with it the thread that reads ahead
            for number, batch in enumerate(batches, start=taken):
                if told.stop_requested and number > 0:
                    return
                yield batch

    # -- Building -------------------------------------------------------------------------------------

    @property
    def _kl_reference(self) -> FrozenPolicy | None:
        """The reference, where a KL to it enters what is optimised."""
        return self.reference if kl_is_used(self.config) else None

    def _build_value(self, given: ValueModel | None, base: LanguageModel) -> ValueModel | None:
        if given is not None or not self.algorithm.needs_critic:
            return given
        if self.config.value_network == "shared":
            return ValueModel.on_policy_trunk(self.policy)
        return ValueModel(base, self.config)

    def _build_controller(self) -> FixedKLController:
        config = self.config
        if config.kl_target is None:
            return FixedKLController(config.kl_coef, unit=config.kl_unit)
        return AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon, unit=config.kl_unit)

    def _build_updater(self, batches: int) -> Updater:
        return Updater(
            self.policy,
            self.value_model,
            self._kl_reference,
            self.kl_controller,
            self.config,
            total_steps=batches * updates_per_batch(self.config),
        )

    # -- Its run --------------------------------------------------------------------------------------

    @property
    def run_folder(self) -> Path | None:
        """Where metrics, samples, config, checkpoints and weights go; None until there is one."""
        return self._session.folder

    @property
    def store(self) -> CheckpointStore:
        """The checkpoints of this run."""
        return self._session.store

    def _run_state(self, prompts: PreparedPrompts) -> RunState:
        return RunState(
            policy=self.policy,
            value=self.value_model,
            reference=self.reference,
            rollout_policy=self.rollout_policy,
            kl_controller=self.kl_controller,
            moments=self._maker.shaper.moments,
            trainers=self._current_updater.trainers,
            rewards=self.rewards,
            config=self.config,
            prompts=prompts.fingerprint,
        )

    def _position(self, progress: Progress) -> tuple[dict[str, int], dict[str, Any], float]:
        """Where the run stands, as a checkpoint keeps it: counters, place in the data, mean reward of the epoch."""
        counters = {name: int(getattr(self, name)) for name in _COUNTERS}
        return counters, progress.state_dict(), progress.so_far().get("avg_reward", float("nan"))

    def _progress_at(self, position: tuple[dict[str, int], dict[str, Any]] | None) -> Progress:
        """Go on from what a checkpoint kept; None: from the trainer's own step."""
        if position is None:
            return Progress(self.step)
        counters, place = position
        for name in _COUNTERS:
            setattr(self, name, int(counters[name]))
        progress = Progress(self.step)
        progress.load_state_dict(place)
        return progress

    def _listeners(self, callbacks: Iterable[Callback]) -> Callbacks:
        """Everybody who is told of a run that is open."""
        assert self._session.recorder is not None
        return Callbacks([self._session.recorder, RunGuards(), *self.callbacks, *callbacks])

    def _printer(self, num_epochs: int) -> list[Callback]:
        return [EpochPrinter(num_epochs)] if self.config.verbose else []

    def _provenance(self) -> dict[str, Any]:
        trainable, total = count_parameters(self.policy.model)
        return {
            "config": self.config.as_dict(),
            "algorithm": self.algorithm.name,
            "rewards": dict(zip(self.rewards.names, self.rewards.weights, strict=True)),
            "reference": describe_reference(self.reference, self.config),
            "trainable_parameters": trainable,
            "total_parameters": total,
            "backend": backend.describe(),
            "versions": {name: version(name) for name in ("mlx", "mlx-lm", "numpy", "transformers")},
        }


#: The trainer's own counters, which a checkpoint keeps.
_COUNTERS = ("step", "learned_steps", "episodes", "epochs")


def _check_folders(config: PPOConfig, algorithm: Algorithm, *, model_is_given: bool) -> None:
    """Refuse an adapter or a reference that is not there, and a model on disk that memory does not hold."""
    if config.adapter_path is not None:
        read_description(Path(config.adapter_path).expanduser())
    check_reference_path(config)
    on_disk = not model_is_given and Path(config.model_name).expanduser().is_dir()
    if config.max_memory_gb is not None and on_disk:
        within_memory(read_config(config.model_name), config, critic=algorithm.needs_critic)


def _check_biased_tokens(config: PPOConfig, vocabulary: int) -> None:
    """Refuse a bias for a token that the model does not have, and one that leaves none to draw."""
    bias = config.logit_bias or {}
    if sum(amount == -math.inf for amount in bias.values()) >= vocabulary:
        raise InvalidConfigurationError(
            f"logit_bias: all of the model's {vocabulary} tokens are forbidden (-inf); leave at least one to draw"
        )
    for token in bias:
        if token >= vocabulary:
            raise InvalidConfigurationError(
                f"logit_bias: token {token} is not in the model's vocabulary of {vocabulary} tokens"
            )
