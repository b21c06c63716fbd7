"""Reinforcement learning of a language model: the loop.

rollouts   = generate(prompts)           sample completions
experience = make_experience(rollouts)   score, compare with the reference, work out advantages
metrics    = update(experience)          epochs of minibatches through the algorithm's loss
"""

from __future__ import annotations

import time
from collections.abc import Generator as Iteration
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
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
from base_setup.parameters import count_parameters, describe_trainable
from base_setup.tokenizer_setup import check_vocabulary
from checkpointing.stopping import StopRequest
from checkpointing.store import CheckpointStore, Saved
from config.errors import (
    CheckpointError,
    InvalidConfigurationError,
    RewardError,
    ToolkitError,
    TrainingRuntimeError,
)
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
from monitoring.recorder import RunRecorder
from monitoring.run_folder import default_folder, prepare_folder, refuse_used, set_aside, write_json
from monitoring.run_lock import RunLock
from ppo_trainer.algorithms import Algorithm, find_algorithm
from ppo_trainer.callbacks import Callback, Callbacks, EpochPrinter
from ppo_trainer.credit import from_critic
from ppo_trainer.dynamic_sampling import check_outcome_reward, collect_live_groups
from ppo_trainer.evaluator import Evaluator, sample_records, score_rollouts
from ppo_trainer.experience_maker import ExperienceMaker
from ppo_trainer.generator import Generator
from ppo_trainer.group_scorer import GroupScorer
from ppo_trainer.out_of_memory import in_words
from ppo_trainer.progress import Progress
from ppo_trainer.reference import build_reference, check_reference_path, describe_reference
from ppo_trainer.resolution import kl_is_used, resolve_config, updates_per_batch
from ppo_trainer.resuming import LATEST, check_changes, find_resume, run_folder_of
from ppo_trainer.reward_sources import build_rewards
from ppo_trainer.run_state import RunState, config_of, plain_config, read_state
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
        named = build_rewards(rewards_asked_for, config)
        check_outcome_reward(config, named.names)
        self.callbacks = list(callbacks)
        Callbacks(self.callbacks)
        if value_model is not None and not self.algorithm.needs_critic:
            raise InvalidConfigurationError(f"value_model: {self.algorithm.name} has no critic; leave it out")
        if tokenizer is not None and policy is not None:
            raise InvalidConfigurationError(
                "tokenizer: a policy that is given has its own; leave one of them out"
            )
        if config.adapter_path is not None:
            read_description(Path(config.adapter_path).expanduser())
        check_reference_path(config)
        given = model is not None or policy is not None
        if config.max_memory_gb is not None and not given and Path(config.model_name).expanduser().is_dir():
            within_memory(read_config(config.model_name), config, critic=self.algorithm.needs_critic)
        self.run_folder: Path | None = None
        if config.output_dir:
            # With checkpoints in it, train(resume=True) may be meant; if it is not, train() refuses.
            stored = CheckpointStore(Path(config.output_dir).expanduser()).complete()
            self.run_folder = prepare_folder(config.output_dir, goes_on=bool(config.resume or stored))

        backend.seed_everything(config.seed)
        base = policy.base if policy is not None else model or load_language_model(config)
        if tokenizer is not None:
            check_vocabulary(tokenizer, vocabulary_size(base.model, base.config), "tokenizer")
            base = replace(base, tokenizer=tokenizer)
        _check_biased_tokens(config, vocabulary_size(base.model, base.config))
        self.config = config = within_memory(base.config, config, critic=self.algorithm.needs_critic)
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
        self._recorder: RunRecorder | None = None
        self._state: RunState | None = None
        self._saved_at = 0  # the step of the newest checkpoint

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
        saved = self._find_checkpoint(resume)
        folder = self._make_run_folder(saved)
        lock = RunLock(folder)
        lock.acquire()
        try:
            with StopRequest(folder) as stop:
                told = self._open_run(folder, saved, [*self._printer(num_epochs), *callbacks])
                self._updater = self._build_updater(num_steps)
                self._state = self._run_state(prepared)
                progress = self._go_on_from(saved) if saved is not None else Progress(self.step)
                with self._keeping_what_was_earned(folder):
                    if self.config.verbose:
                        print(describe_trainable(self.policy.model))
                    told("on_train_begin", self)
                    return self._run(prepared, num_epochs, num_steps, progress, told, stop)
        finally:
            lock.release()

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
        last = progress.started + num_steps
        while progress.epoch < num_epochs:
            with closing(self._batches(prepared, told, progress.batches)) as batches:
                for batch in islice(batches, last - self.step):
                    progress.add(self._train_step(batch, progress.epoch, told))
                    if self.step == last:
                        break  # the last one's checkpoint is made when all is told
                    if stop.reason is not None:
                        return self._stopped(stop.reason, progress, told)
                    if self.config.save_every and self.step % self.config.save_every == 0:
                        self._save_on_the_way(progress)
            epoch, metrics = progress.epoch, progress.end_epoch()
            told("on_epoch_end", epoch, metrics)
            if told.stop_requested:
                break
        folder = self._folder
        self.save_model(folder / "final")
        if self.config.save_every and self.step > self._saved_at:
            self.save_checkpoint("final", progress)
        result = {
            **progress.so_far(),
            "history": progress.history,
            "run_folder": str(folder),
        }
        told("on_train_end", result)
        return result

    def _stopped(self, reason: str, progress: Progress, told: Callbacks) -> dict[str, Any]:
        """Save where the run stands, say where, and end it."""
        path = self.save_checkpoint(reason, progress).path
        print(
            f"stopped after step {self.step} ({reason}); saved in {path}\ngo on from there: --resume {self._folder}"
        )
        result = {**progress.so_far(), "history": progress.history, "run_folder": str(self._folder)}
        result |= {"stopped": reason, "checkpoint": str(path)}
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
        clock = _Clock()
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
        metrics |= _speed(rollouts, clock.laps)
        told("on_step_end", self.step, metrics)
        told("on_samples", self.step, self._latest_samples)
        return metrics

    def generate(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Sample this step's completions: ``group_size`` for each prompt."""
        self._begin_step()
        return self._sample(prompts)

    def score(self, rollouts: Sequence[Rollout]) -> ScoredBatch:
        """What the rewards say about each rollout."""
        scorer, self.rewards.state.global_step = self._group_scorer, self.step
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
        self.rollout_policy.before_rollouts(self.step)

    def _sample(self, prompts: Sequence[Prompt], first_member: int = 0) -> list[Rollout]:
        on_group = self._group_scorer.begin if self._group_scorer is not None else None
        rollouts = self.generator.generate(prompts, self.step, first_member=first_member, on_group=on_group)
        self.episodes += len(rollouts)
        return rollouts

    def _collect(
        self, prompts: Sequence[Prompt], clock: _Clock
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
        if key in metrics:
            self.kl_controller.update(metrics[key], n_samples)

    def _refresh_reference(self) -> None:
        every = self.config.reference_sync_every
        if every is not None and self.reference is not None and self.step % every == 0:
            self.reference.follow(self.policy, self.config.reference_mixup)

    # -- Around the loop ------------------------------------------------------------------------------

    def evaluate(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """Sample and score one completion per prompt, without training; see :class:`Evaluator`."""
        metrics = self.evaluator.evaluate(self._prepare(prompts))
        told = Callbacks([*([self._recorder] if self._recorder else []), *self.callbacks])
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

    # -- Checkpoints ----------------------------------------------------------------------------------

    @property
    def store(self) -> CheckpointStore:
        """The checkpoints of this run."""
        config = self.config
        return CheckpointStore(
            self._folder,
            keep_last_n=config.keep_last_n,
            keep_best=config.keep_best,
            min_free_gb=config.min_free_gb,
        )

    def save_checkpoint(self, reason: str, progress: Progress) -> Saved:
        """Write everything that the rest of the run depends on; see ``ppo_trainer/run_state.py``.

        Raises:
            CheckpointError: it could not be written. The ones before it are untouched.
        """
        state, recorder = self._state, self._recorder
        assert state is not None
        assert recorder is not None
        position = {**progress.state_dict(), "files": recorder.sizes()}

        def fill(folder: Path) -> None:
            state.write(folder, {name: getattr(self, name) for name in _COUNTERS}, position)
            write_json(folder / "ppo_config.json", self._provenance())

        reward = progress.so_far().get("avg_reward", float("nan"))
        saved = self.store.save(
            reason, self.step, fill, size=state.size, score=None if np.isnan(reward) else reward
        )
        self._saved_at = self.step
        return saved

    def _save_on_the_way(self, progress: Progress) -> None:
        """A checkpoint that cannot be written is no reason to lose the run: it goes on, and says so."""
        try:
            self.save_checkpoint("periodic", progress)
        except CheckpointError as error:
            print(f"WARNING: {error}; the run goes on without it")

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

    def _check_resumed(self, folder: Path, saved: Saved) -> None:
        """Refuse a checkpoint that this config does not fit; say what else is not as it was."""
        for change in check_changes(config_of(saved.path), plain_config(self.config)):
            print(f"WARNING: resume: {change}; from here on the run is not the one that was interrupted")
        if run_folder_of(saved.path) != folder.resolve():
            refuse_used(folder)

    @staticmethod
    def _sizes_in(saved: Saved) -> dict[str, int]:
        sizes: dict[str, int] = read_state(saved.path)["progress"]["files"]
        return sizes

    def _go_on_from(self, saved: Saved) -> Progress:
        """Make everything what it was at the checkpoint."""
        assert self._state is not None
        counters, position = self._state.read(saved.path)
        for name in _COUNTERS:
            setattr(self, name, int(counters[name]))
        progress = Progress(self.step)
        progress.load_state_dict(position)
        self._saved_at = self.step
        if self.config.verbose:
            print(f"going on after step {self.step}, from {saved.path}")
        return progress

    # -- The run folder -------------------------------------------------------------------------------

    def _find_checkpoint(self, resume: bool | str | Path | None) -> Saved | None:
        """What to go on from, checked; None: from the beginning."""
        if resume is None and self._recorder is None:
            resume = self.config.resume
        if resume is None or resume is False:
            return None
        which = LATEST if resume is True else resume
        return find_resume(which, self.run_folder, fallback=self.config.resume_fallback)

    def _make_run_folder(self, saved: Saved | None) -> Path:
        if self.run_folder is None:
            folder = run_folder_of(saved.path) if saved is not None else default_folder(self.algorithm.name)
            self.run_folder = prepare_folder(folder, goes_on=saved is not None)
        return self.run_folder

    @property
    def _folder(self) -> Path:
        assert self.run_folder is not None
        return self.run_folder

    def _open_run(self, folder: Path, saved: Saved | None, callbacks: Sequence[Callback]) -> Callbacks:
        """The folder as this run begins or goes on in it, and everybody who is told; the lock is held."""
        if self._recorder is None and saved is None:
            if self.config.resume == LATEST:
                for path in set_aside(folder):
                    print(
                        f"resume: no checkpoint was complete yet, so the run begins anew; its lines are in {path}"
                    )
            refuse_used(folder)
        recorder = self._recorder or RunRecorder(
            folder, self.config.log_samples_every, self.config.max_logged_samples
        )
        if saved is not None:
            self._check_resumed(folder, saved)
            recorder.go_on_from(saved.update, self._sizes_in(saved), run_folder_of(saved.path))
        self._recorder = recorder
        self.store.clear_leftovers()
        write_json(folder / "config.json", self._provenance())
        return Callbacks([recorder, RunGuards(), *self.callbacks, *callbacks])

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

    @contextmanager
    def _keeping_what_was_earned(self, folder: Path) -> Iterator[None]:
        """Whatever ends the run early, the weights are saved first and the message says where."""
        try:
            yield
        except BaseException as caught:
            error = in_words(caught)
            if self.learned_steps == 0:
                if error is caught:
                    raise
                raise error from caught
            saved = self._save_interrupted(folder / "interrupted")
            if isinstance(error, RewardError):
                raise RewardError(f"{error} {saved}") from error
            if isinstance(error, ToolkitError):
                raise TrainingRuntimeError(f"{error} {saved}") from error
            print(saved)
            raise

    def _save_interrupted(self, folder: Path) -> str:
        """Save, and say so; a second failure must not hide the first."""
        try:
            self.save_model(folder)
        except (ToolkitError, OSError, MemoryError, RuntimeError) as error:
            why = str(error) or type(error).__name__
            return self._resumable(f"What was learned could not be saved either: {why}.", folder)
        return self._resumable(
            f"What was learned so far is in {folder} (after step {self.learned_steps}).", folder
        )

    def _resumable(self, sentence: str, folder: Path) -> str:
        if self._saved_at:
            sentence += f" With --resume {folder.parent} the run goes on after step {self._saved_at}."
        return sentence


#: The trainer's own counters, which a checkpoint keeps.
_COUNTERS = ("step", "learned_steps", "episodes", "epochs")


class _Clock:
    """Seconds between laps; laps of one name add up."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


def _speed(rollouts: Sequence[Rollout], laps: Mapping[str, float]) -> dict[str, float]:
    """Tokens of the batch that is learned from, per second of the whole step and of each of its stages."""
    n_tokens = sum(len(r.completion_ids) for r in rollouts)
    speed = {
        f"tokens_per_second/{name.removeprefix('time/')}": n_tokens / max(seconds, 1e-9)
        for name, seconds in laps.items()
    }
    return {
        "num_tokens": n_tokens,
        "tokens_per_second": n_tokens / max(sum(laps.values()), 1e-9),
        **speed,
    }


def _check_biased_tokens(config: PPOConfig, vocabulary: int) -> None:
    """Refuse a bias for a token that the model does not have."""
    for token in config.logit_bias or {}:
        if token >= vocabulary:
            raise InvalidConfigurationError(
                f"logit_bias: token {token} is not in the model's vocabulary of {vocabulary} tokens"
            )
