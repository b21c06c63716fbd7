"""Everything that the rest of a run of ``PPOTrainer`` depends on, as files: what every stage has, and beside it

| file | what |
|---|---|
| ``value/`` | the value network's adapter and head, or the head alone |
| ``frozen.safetensors`` | a reference that follows the policy, a sampler that lags behind it, where there is one |
| ``state.json`` | also: KL coefficient, running moments, what rewards keep |
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from base_setup.parameters import named_arrays
from base_setup.tokenizer_setup import fingerprint
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
from training.training_state import TrainingState, load_arrays, under

STAGE, FROZEN = "train", "frozen.safetensors"


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
        self.rewards, self.config = rewards, config
        origins = {
            "model": weights_fingerprint(policy.base.model),
            "tokenizer": fingerprint(policy.tokenizer),
            "prompts": prompts,
        }
        if reference is not None and config.reference_sync_every is None:
            origins["reference"] = weights_fingerprint(reference.model)
        self._common = TrainingState(
            stage=STAGE,
            config=config,
            trainers=trainers,
            save=policy.save,
            load=policy.load,
            origins=origins,
        )

    @property
    def size(self) -> int:
        """About how many bytes :meth:`write` writes."""
        return self._common.size + sum(x.nbytes for x in self._frozen(0).values())

    # -- Writing --------------------------------------------------------------------------------------

    def write(self, folder: Path, counters: Mapping[str, int], progress: Mapping[str, Any]) -> None:
        """All but the description of the run, which is its caller's."""
        if self.value is not None:
            self.value.save(folder / "value")
        if frozen := self._frozen(counters["step"]):
            mx.save_safetensors(str(folder / FROZEN), frozen)
        further = {
            "kl_controller": self.kl_controller.state_dict(),
            "running_moments": self.moments.state_dict(),
            "sampler_synced_at": self.rollout_policy.synced_at,
            "rewards": {name: reward.state_dict() for name, reward in self._stateful_rewards().items()},
        }
        self._common.write(folder, counters, progress, further)

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
        state = self._common.read(folder)
        if self.value is not None:
            self.value.load(folder / "value")
        self._read_frozen(folder, int(state["counters"]["step"]))
        self.rollout_policy.synced_at = int(state["sampler_synced_at"])
        self.kl_controller.load_state_dict(state["kl_controller"])
        self.moments.load_state_dict(state["running_moments"])
        for name, reward in self._stateful_rewards().items():
            if name not in state["rewards"]:
                raise CheckpointError(
                    f'rewards: "{name}" keeps something from batch to batch, and {folder} has nothing of it; give the '
                    f"rewards that the run began with, or start a new run from its weights (--adapter-path {folder})"
                )
            reward.load_state_dict(state["rewards"][name])
        return dict(state["counters"]), dict(state["progress"])

    def _read_frozen(self, folder: Path, step: int) -> None:
        arrays = load_arrays(folder / FROZEN) if (folder / FROZEN).is_file() else {}
        if self.reference is not None and self.config.reference_sync_every is not None:
            self.reference.model.update(tree_unflatten(list(under(arrays, "reference").items())))
            mx.eval(self.reference.model.parameters())
        sampler = under(arrays, "sampler")
        if sampler:
            self.rollout_policy.model.update(tree_unflatten(list(sampler.items())))
            mx.eval(self.rollout_policy.model.parameters())
        elif not self.rollout_policy.synchronises_before(step + 1):
            self.rollout_policy.sync()
