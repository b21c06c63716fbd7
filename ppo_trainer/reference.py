"""The reference: what the KL is measured from, where it comes from, and whether it follows the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from base_setup.lora_setup import read_description
from config.errors import InvalidConfigurationError
from config.ppo_config import PPOConfig
from models.policy_model import FrozenPolicy, PolicyModel
from models.sft_model import existing_model, load_language_model, vocabulary_size


def build_reference(policy: PolicyModel, config: PPOConfig, *, fresh: bool) -> FrozenPolicy | None:
    """The reference that the config asks for, over the policy's own weights wherever it can be.

    Args:
        fresh: the policy's adapter has not learned anything yet, so the base model alone is the same policy.
    """
    if config.reference == "none":
        return None
    if config.reference_path is not None:
        return _from_path(policy, config)
    name = policy.base.name
    follows = config.reference_sync_every is not None
    if config.reference == "base":
        if not policy.has_adapter:
            raise InvalidConfigurationError(
                'reference: "base" is the policy without its adapter, and here every weight trains; use "initial", '
                "or name a model in reference_path"
            )
        return policy.frozen_copy(with_adapter=False, origin=f"{name}, adapters off")
    if fresh and policy.begins_as_base and not follows:
        return policy.frozen_copy(with_adapter=False, origin=f"{name}, adapters off (a fresh one is 0)")
    kind = "a frozen second adapter" if policy.has_adapter else "a frozen copy of every weight"
    loaded = f", loaded from {config.adapter_path}" if config.adapter_path else ""
    return policy.frozen_copy(origin=f"{name} before the first update, {kind}{loaded}")


def check_reference_path(config: PPOConfig) -> None:
    """Refuse a reference that is not there before anything is loaded."""
    if config.reference_path is None:
        return
    path = Path(config.reference_path).expanduser()
    if _is_adapter(path):
        read_description(path)
    else:
        existing_model(config.reference_path, "reference_path", trust_remote_code=config.trust_remote_code)


def describe_reference(reference: FrozenPolicy | None, config: PPOConfig) -> dict[str, Any]:
    """Its provenance, for config.json."""
    if reference is None:
        return {"origin": "none"}
    described: dict[str, Any] = {"origin": reference.origin}
    if config.reference_sync_every is not None:
        described["refreshed_every_steps"] = config.reference_sync_every
        described["share_of_policy"] = config.reference_mixup
    return described


def _from_path(policy: PolicyModel, config: PPOConfig) -> FrozenPolicy:
    assert config.reference_path is not None
    path = Path(config.reference_path).expanduser()
    if _is_adapter(path):
        kind = read_description(path).get("fine_tune_type", "lora")  # whatever it is that trains here
        second = PolicyModel(policy.base, config.replace(adapter_path=str(path), fine_tune_type=kind))
        return second.frozen_copy(origin=f"{policy.base.name} with the adapter {path}")
    other = load_language_model(
        config.replace(model_name=config.reference_path, adapter_path=None), "reference_path"
    )
    mine = vocabulary_size(policy.base.model, policy.base.config)
    theirs = vocabulary_size(other.model, other.config)
    if mine != theirs:
        raise InvalidConfigurationError(
            f'reference_path: "{config.reference_path}" has a vocabulary of {theirs} tokens and the policy one of '
            f"{mine}; a KL needs the same tokens, so name a model of the same family"
        )
    other.model.freeze()
    other.model.eval()
    return FrozenPolicy(other.model, f"the model {config.reference_path}")


def _is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()
