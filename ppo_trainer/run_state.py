"""Everything that the rest of a run depends on, as files: arrays in safetensors, the rest in JSON.

| file | what |
|---|---|
| ``adapters.safetensors``, ``adapter_config.json`` | the policy, as mlx-lm reads it |
| ``value/`` | the value network's adapter and head, or the head alone |
| ``optimizer.safetensors`` | both optimisers: moments, steps, learning rate |
| ``frozen.safetensors`` | a reference that follows the policy, a sampler that lags behind it, where there is one |
| ``state.json`` | counters, position in the data, KL coefficient, running moments, random generators, config, origins |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from base_setup.parameters import named_arrays
from base_setup.tokenizer_setup import fingerprint
from checkpointing.durable import read_strict_json, write_strict_json
from config.errors import CheckpointError
from config.ppo_config import PPOConfig
from models.fingerprint import weights_fingerprint
from models.policy_model import FrozenPolicy, PolicyModel
from models.rollout_policy import RolloutPolicy
from models.value_model import ValueModel
from reward_kl.kl_divergence import FixedKLController
from reward_kl.running_moments import RunningMoments
from rewards.composition import RewardSet
from training.model_trainer import ModelTrainer
from training.randomness import random_state, set_random_state

STATE, OPTIMIZER, FROZEN = "state.json", "optimizer.safetensors", "frozen.safetensors"


class RunState:
    """Writes the parts of a run to a folder and reads them back."""

    def __init__(
        self,
        *,
        policy: PolicyModel,
        value: ValueModel | None,
        reference: FrozenPolicy | None,
        rollout_policy: RolloutPolicy,
        kl_controller: FixedKLController,
        moments: RunningMoments,
        trainers: Mapping[str, ModelTrainer],
        rewards: RewardSet,
        config: PPOConfig,
        prompts: str,
    ) -> None:
        """``prompts``: the fingerprint of what is trained on."""
        self.policy, self.value, self.reference = policy, value, reference
        self.rollout_policy, self.kl_controller, self.moments = rollout_policy, kl_controller, moments
        self.trainers, self.rewards, self.config = trainers, rewards, config
        self.origins = {
            "model": weights_fingerprint(policy.base.model),
            "tokenizer": fingerprint(policy.tokenizer),
            "prompts": prompts,
        }
        if reference is not None and config.reference_sync_every is None:
            self.origins["reference"] = weights_fingerprint(reference.model)

    @property
    def size(self) -> int:
        """About how many bytes :meth:`write` writes."""
        modules = [trainer.module.trainable_parameters() for trainer in self.trainers.values()]
        weights = sum(x.nbytes for module in modules for x in named_arrays(module).values())
        others = [*self._optimizers().values(), *self._frozen(0).values()]
        return weights + sum(x.nbytes for x in others) + 1_000_000

    # -- Writing --------------------------------------------------------------------------------------

    def write(self, folder: Path, counters: Mapping[str, int], progress: Mapping[str, Any]) -> None:
        """All but the description of the run, which is its caller's."""
        self.policy.save(folder)
        if self.value is not None:
            self.value.save(folder / "value")
        mx.save_safetensors(str(folder / OPTIMIZER), self._optimizers())
        if frozen := self._frozen(counters["step"]):
            mx.save_safetensors(str(folder / FROZEN), frozen)
        state = {
            "counters": dict(counters),
            "progress": dict(progress),
            "kl_controller": self.kl_controller.state_dict(),
            "running_moments": self.moments.state_dict(),
            "skipped_in_a_row": {name: t.skipped_in_a_row for name, t in self.trainers.items()},
            "sampler_synced_at": self.rollout_policy.synced_at,
            "rewards": {name: reward.state_dict() for name, reward in self._stateful_rewards().items()},
            "random": random_state(),
            "origins": self.origins,
            "config": self.config.as_dict(),
        }
        try:
            write_strict_json(folder / STATE, state)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / STATE}: something in the run's state is not JSON ({error}); what state_dict() of a reward "
                "gives must be numbers, texts, lists and mappings"
            ) from error

    def _optimizers(self) -> dict[str, mx.array]:
        return {
            f"{name}.{path}": array
            for name, trainer in self.trainers.items()
            for path, array in trainer.state_arrays().items()
        }

    def _frozen(self, step: int) -> dict[str, mx.array]:
        """What neither the config nor the policy as it is now can tell: weights of an earlier policy."""
        arrays: dict[str, mx.array] = {}
        trained = named_arrays(self.policy.model.trainable_parameters()).keys()
        if self.reference is not None and self.config.reference_sync_every is not None:
            theirs = named_arrays(self.reference.model.parameters())
            arrays |= {f"reference.{name}": theirs[name] for name in trained}
        if not self.rollout_policy.synchronises_before(step + 1):
            base = {id(x) for x in named_arrays(self.policy.base.model.parameters()).values()}
            theirs = named_arrays(self.rollout_policy.model.parameters())
            arrays |= {
                f"sampler.{name}": x for name, x in theirs.items() if name in trained or id(x) not in base
            }
        return arrays

    def _stateful_rewards(self) -> dict[str, Any]:
        """Rewards that keep something from batch to batch say so by two methods."""
        both = ("state_dict", "load_state_dict")
        named = zip(self.rewards.names, self.rewards.rewards, strict=True)
        return {
            name: one for name, one in named if all(callable(getattr(one, method, None)) for method in both)
        }

    # -- Reading --------------------------------------------------------------------------------------

    def read(self, folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
        """Make everything what it was; returns the counters and the progress.

        Raises:
            CheckpointError: the checkpoint is of another model, or cannot be read; naming what differs.
        """
        state = read_state(folder)
        self._check_origins(folder, state["origins"])
        self.policy.load(folder)
        if self.value is not None:
            self.value.load(folder / "value")
        arrays = _load(folder / OPTIMIZER)
        for name, trainer in self.trainers.items():
            trainer.load_state_arrays(_under(arrays, name))
            trainer.skipped_in_a_row = int(state["skipped_in_a_row"][name])
        self._read_frozen(folder, int(state["counters"]["step"]))
        self.rollout_policy.synced_at = int(state["sampler_synced_at"])
        self.kl_controller.load_state_dict(state["kl_controller"])
        self.moments.load_state_dict(state["running_moments"])
        for name, reward in self._stateful_rewards().items():
            reward.load_state_dict(state["rewards"][name])
        set_random_state(state["random"])
        return dict(state["counters"]), dict(state["progress"])

    def _read_frozen(self, folder: Path, step: int) -> None:
        arrays = _load(folder / FROZEN) if (folder / FROZEN).is_file() else {}
        if self.reference is not None and self.config.reference_sync_every is not None:
            self.reference.model.update(tree_unflatten(list(_under(arrays, "reference").items())))
            mx.eval(self.reference.model.parameters())
        sampler = _under(arrays, "sampler")
        if sampler:
            self.rollout_policy.model.update(tree_unflatten(list(sampler.items())))
            mx.eval(self.rollout_policy.model.parameters())
        elif not self.rollout_policy.synchronises_before(step + 1):
            self.rollout_policy.sync()

    def _check_origins(self, folder: Path, saved: Mapping[str, str]) -> None:
        words = {
            "model": "model_name: the base model's weights are not those that this run trained on",
            "tokenizer": "tokenizer: it is not the one that this run trained with (its vocabulary, chat template or "
            "ids differ), so the tokens that were learned would mean something else",
            "reference": "reference: its weights are not those that this run was measured from",
            "prompts": "prompts: they are not those that this run trained on (their number, tokens or columns differ), "
            "and its place among them would mean nothing",
        }
        for name, sentence in words.items():
            if name in self.origins and name in saved and saved[name] != self.origins[name]:
                raise CheckpointError(
                    f"{sentence}; give what {folder.name} was made with, or start a new run from its weights "
                    f"(--adapter-path {folder})"
                )


def read_state(folder: Path) -> dict[str, Any]:
    """The parsed ``state.json`` of a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        state = read_strict_json(folder / STATE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE}: it cannot be read ({error})") from error
    if not isinstance(state, dict) or "counters" not in state:
        raise CheckpointError(f"{folder / STATE}: this is not the state of a run of PPOTrainer")
    return state


def config_of(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint, as plain values."""
    config: dict[str, Any] = read_state(folder)["config"]
    return config


def plain_config(config: PPOConfig) -> dict[str, Any]:
    """A config as a checkpoint has it."""
    plain: dict[str, Any] = json.loads(json.dumps(config.as_dict()))
    return plain


def _load(path: Path) -> dict[str, mx.array]:
    try:
        arrays = named_arrays(mx.load(str(path)))
        mx.eval(arrays)  # the file may be deleted later, and loading is lazy
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: it cannot be read ({error})") from error
    return arrays


def _under(arrays: Mapping[str, mx.array], name: str) -> dict[str, mx.array]:
    return {path.removeprefix(name + "."): x for path, x in arrays.items() if path.startswith(name + ".")}
