"""The value network: how well each unfinished answer is expected to end."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from base_setup.lora_setup import prepare_trainable, restore_adapter, save_adapter
from config.training_config import TrainingConfig
from models.policy_model import PolicyModel, right_padded_lengths
from models.scalar_head import ScalarHead, load_head, require_trunk, save_head, trunk_width
from models.sft_model import LanguageModel, share_weights
from token_attribution.sampled_states import SampledStates, sampled_states
from token_attribution.trunk import Trunk

HEAD = "value_head.safetensors"


class ValueModel:
    """V(s_t) for the state before each token.

    Separate (default): adapters of its own over the base weights that it shares with the policy, so the two
    losses never pull at the same parameters. Shared trunk: a head on the policy's hidden states, trained in
    the policy's step (:meth:`on_policy_trunk`). The head starts at zero: before it has learned anything it
    predicts 0 rather than noise.

    Attributes:
        module: what trains (adapters or weights, and the head).
    """

    def __init__(self, base: LanguageModel, config: TrainingConfig) -> None:
        """A separate value network over ``base``, which stays as it is."""
        model = share_weights(base.model)
        self.description = prepare_trainable(model, config.replace(adapter_path=None), base.tokenizer)
        model.eval()  # before anything is computed: dropout would tell the trunk's two halves from the whole
        self._attach(model, require_trunk(model, "a value network", checkpoint=config.gradient_checkpointing))
        self.shared = False

    @classmethod
    def on_policy_trunk(cls, policy: PolicyModel) -> ValueModel:
        """A value head on the policy's own trunk; ``module`` then contains the policy's weights too."""
        value = cls.__new__(cls)
        value.description = policy.description
        value._attach(policy.model, policy.trunk or require_trunk(policy.model, "a value network"))
        value.shared = True
        return value

    def _attach(self, model: object, trunk: Trunk) -> None:
        self.trunk = trunk
        self.module = ScalarHead(model, trunk_width(self.trunk), 0.0, mx.random.key(0))  # type: ignore[arg-type]
        self.module.eval()
        mx.eval(self.module.parameters())

    def forward(self, input_ids: mx.array, attention_mask: mx.array | None = None) -> mx.array:
        """Values ``(B, T)`` float32: entry t has seen ``input_ids[:, : t + 1]``."""
        right_padded_lengths(input_ids, attention_mask)
        return self.from_hidden(self.trunk.hidden(input_ids))

    __call__ = forward

    def from_hidden(self, states: mx.array) -> mx.array:
        """Values of hidden states, ``(..., D)`` to ``(...)``, in float32."""
        return self.module.head(states.astype(mx.float32))[..., 0]

    def values(self, tokens: mx.array, mask: mx.array) -> mx.array:
        """Values ``(B, T)`` in the pipeline's alignment: entry t is V before ``tokens[:, t + 1]`` is chosen.

        Exactly 0 where the mask is False: nothing is computed there that nobody asks for.
        """
        return self.at_sampled(sampled_states(self.trunk, tokens, mask))

    def at_sampled(self, states: SampledStates) -> mx.array:
        """The same from the trunk's states."""
        if states.positions.size == 0:
            return mx.zeros(states.shape)
        return states.back_in_place(self.from_hidden(states.rows))

    def save(self, folder: Path) -> None:
        """Write the head, and the adapters unless they are the policy's."""
        save_head(self.module.head, folder / HEAD)
        if not self.shared:
            save_adapter(self.module.model, self.description, folder)

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote."""
        if not self.shared:
            restore_adapter(self.module.model, self.description, folder)
        load_head(self.module.head, folder / HEAD)
