"""What rollouts are sampled from: the policy itself, or a copy of it that lags behind or is quantised."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from base_setup.lora_setup import fuse_adapters
from config.errors import InvalidConfigurationError
from models.policy_model import PolicyModel
from models.sft_model import share_weights
from token_attribution.trunk import Trunk, find_trunk


class RolloutPolicy:
    """The model that samples.

    A copy shares the policy's arrays until the policy moves: MLX arrays are references, and an optimiser
    replaces them. A quantised copy has its adapters fused and is made anew at each synchronisation.

    Attributes:
        model, trunk: what ``models.decoding.complete`` needs.
        synced_at: the step of the last synchronisation.
    """

    def __init__(
        self,
        policy: PolicyModel,
        *,
        copy: bool = False,
        sync_every: int = 1,
        bits: int | None = None,
        group_size: int = 64,
    ) -> None:
        """``bits``: quantise the copy; it is then one whether ``copy`` says so or not."""
        self.policy = policy
        self.is_current = not copy and bits is None
        self.sync_every = sync_every
        self.bits = bits
        self.group_size = group_size
        self.synced_at = 0
        self.model: nn.Module = policy.model
        self.trunk: Trunk | None = policy.trunk
        if not self.is_current:
            self.sync()

    def before_rollouts(self, step: int) -> None:
        """Synchronise if it is time to: at steps 1, 1 + ``sync_every``, 1 + 2 ``sync_every`` …"""
        if not self.is_current and self.synchronises_before(step):
            self.sync()
            self.synced_at = step

    def synchronises_before(self, step: int) -> bool:
        """Whether what samples at ``step`` is the policy as it is then, so that nothing older needs to be kept."""
        return self.is_current or (step - 1) % self.sync_every == 0

    def sync(self) -> None:
        """Make the copy the policy as it is now. The policy stays what it was, bit for bit."""
        copy = share_weights(self.policy.model)
        if self.bits is not None:
            self._quantise(fuse_adapters(copy), self.bits)
        copy.freeze()
        copy.eval()
        mx.eval(copy.parameters())
        self.model, self.trunk = copy, find_trunk(copy)

    def _quantise(self, model: nn.Module, bits: int) -> None:
        widths = set[int]()
        # What mlx-lm's own quantisation leaves out, or keeps at more bits, for this architecture (routers).
        exceptions = getattr(model, "quant_predicate", None) or (lambda path, module: True)

        def fits(path: str, module: nn.Module) -> bool | dict[str, Any]:
            if not hasattr(module, "to_quantized"):
                return False
            width = int(module["weight"].shape[-1])
            widths.add(width)
            if width % self.group_size != 0:
                return False
            chosen: bool | dict[str, Any] = exceptions(path, module)
            if isinstance(chosen, dict):
                return {"group_size": self.group_size, "bits": max(bits, chosen.get("bits", bits))}
            return chosen

        before = len([m for m in model.modules() if _is_quantised(m)])
        nn.quantize(model, group_size=self.group_size, bits=bits, class_predicate=fits)
        after = len([m for m in model.modules() if _is_quantised(m)])
        if after == before == 0:
            raise InvalidConfigurationError(
                f"quantize_for_rollouts: no layer of the model has an input width that is a multiple of "
                f"rollout_quant_group_size = {self.group_size} (there are {', '.join(map(str, sorted(widths)))}); "
                "choose a smaller one"
            )


def _is_quantised(module: nn.Module) -> bool:
    return "scales" in module
