"""The policy: the language model that reinforcement learning trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from base_setup.lora_setup import (
    adapters_off,
    prepare_trainable,
    restore_adapter,
    save_adapter,
    soft_prompt_length,
    strip_adapters,
)
from base_setup.parameters import named_arrays
from base_setup.tokenizer_setup import end_token_ids
from config.errors import InvalidConfigurationError
from config.training_config import TrainingConfig
from models.decoding import complete
from models.sampling import Sampling, uniforms_for
from models.sft_model import LanguageModel, share_weights
from token_attribution.extractor import pad_sequences
from token_attribution.logprob_computer import (
    TokenReading,
    TokenStatistics,
    read_tokens,
    token_logprobs,
    token_statistics,
)
from token_attribution.trunk import Trunk, find_trunk
from token_attribution.vocabulary import LOGPROBS, Wanted


class ModelOutput(NamedTuple):
    """What a forward pass gives."""

    logits: mx.array  # (B, T, V)
    hidden_states: mx.array | None  # (B, T, D), None where the architecture hides them


def right_padded_lengths(input_ids: mx.array, attention_mask: mx.array | None) -> np.ndarray:
    """Length of each row, ``(B,)``; refuses a mask with a hole or padding on the left.

    mlx-lm's models take no padding mask. With padding on the right none is needed, because causal attention
    never looks there; padding on the left would be attended to.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be (B, T), got {input_ids.shape}")
    if attention_mask is None:
        return np.full(input_ids.shape[0], input_ids.shape[1])
    real = np.array(attention_mask).astype(bool)
    if real.shape != input_ids.shape:
        raise ValueError(f"attention_mask {real.shape} must have the shape of input_ids {input_ids.shape}")
    lengths: np.ndarray = real.sum(axis=1)
    if (real != (np.arange(real.shape[1])[None] < lengths[:, None])).any():
        raise ValueError("attention_mask: pad rows on the right; a 0 stands before a 1 here")
    if (lengths == 0).any():
        raise ValueError(f"attention_mask: row {int(np.argmin(lengths))} has no real token")
    return lengths


class PolicyModel:
    """A language model of which the adapters (or all weights) train.

    Attributes:
        model: the mlx-lm module; its trainable parameters are what the optimiser moves.
        tokenizer: mlx-lm's wrapper. trunk: hidden states and head, see ``token_attribution.trunk``.
    """

    def __init__(self, base: LanguageModel, config: TrainingConfig) -> None:
        """Adapt a copy of ``base`` that shares its weights; ``base`` itself stays as it is."""
        self.base = base
        self.tokenizer: TokenizerWrapper = base.tokenizer
        self.model = share_weights(base.model)
        self.description = prepare_trainable(self.model, config, base.tokenizer)
        # Dropout is off: two passes over the same weights must give the same logprobs.
        self.model.eval()
        mx.eval(self.model.parameters())
        self.trunk: Trunk | None = find_trunk(self.model, checkpoint=config.gradient_checkpointing)
        if self.trunk is None and config.gradient_checkpointing:
            raise InvalidConfigurationError(
                "gradient_checkpointing: the blocks of this architecture "
                f"({type(self.model).__module__}) are not visible as .model.layers; leave it out"
            )
        self.end_ids = end_token_ids(base.tokenizer)

    def forward(self, input_ids: mx.array, attention_mask: mx.array | None = None) -> ModelOutput:
        """Logits ``(B, T, V)`` and hidden states for ``(B, T)`` ids, padded on the right if at all."""
        right_padded_lengths(input_ids, attention_mask)
        if self.trunk is None:
            return ModelOutput(self.model(input_ids), None)
        states = self.trunk.hidden(input_ids)
        return ModelOutput(self.trunk.head(states), states)

    __call__ = forward

    def generate(
        self,
        input_ids: mx.array,
        attention_mask: mx.array | None = None,
        *,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
    ) -> mx.array:
        """Sample one completion per row.

        Returns:
            ``(B, L)`` int32: prompt and completion of each row, then the padding id. Rows are right-padded,
            so a completion begins where its own prompt ends.
        """
        lengths = right_padded_lengths(input_ids, attention_mask)
        ids = np.array(input_ids).tolist()
        prompts = [row[:n] for row, n in zip(ids, lengths.tolist(), strict=True)]
        completions = complete(
            self.model,
            prompts,
            range(len(prompts)),
            np.stack([uniforms_for(seed, 0, row, 0, max_new_tokens) for row in range(len(prompts))]),
            end_ids=self.end_ids,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p, min_p),
            trunk=self.trunk,
        )
        tokens, _ = pad_sequences(prompts, [c.ids for c in completions])
        ends = mx.array([len(p) + len(c.ids) for p, c in zip(prompts, completions, strict=True)])
        padding = self.tokenizer.pad_token_id
        pad_id = padding if padding is not None else min(self.end_ids)
        return mx.where(mx.arange(tokens.shape[1])[None] < ends[:, None], tokens, pad_id)

    def logprobs(self, tokens: mx.array, mask: mx.array, temperature: float = 1.0) -> mx.array:
        """Token logprobs ``(B, T)``, see ``token_attribution.token_logprobs``."""
        return token_logprobs(self.model, tokens, mask, temperature, trunk=self.trunk)

    def statistics(
        self, tokens: mx.array, mask: mx.array, temperature: float = 1.0, *, entropy_gradient: bool = False
    ) -> TokenStatistics:
        """Token logprobs and entropies, each ``(B, T)``; entropies carry gradient only if asked to."""
        return token_statistics(
            self.model, tokens, mask, temperature, trunk=self.trunk, entropy_gradient=entropy_gradient
        )

    def read(
        self,
        tokens: mx.array,
        mask: mx.array,
        temperature: float = 1.0,
        *,
        wanted: Wanted = LOGPROBS,
        reference: FrozenPolicy | None = None,
        for_gradient: bool = False,
    ) -> TokenReading:
        """One forward pass and all that is wanted of it, see ``token_attribution.logprob_computer.read_tokens``."""
        return read_tokens(
            self.model,
            tokens,
            mask,
            temperature,
            trunk=self.trunk,
            wanted=wanted,
            reference=(reference.model, reference.trunk) if reference is not None else None,
            for_gradient=for_gradient,
        )

    @contextmanager
    def adapters_off(self) -> Iterator[nn.Module]:
        """Within the block the model is its base, bit for bit."""
        with adapters_off(self.model) as model:
            yield model

    def frozen_copy(self, *, with_adapter: bool = True, origin: str = "the policy") -> FrozenPolicy:
        """The policy as it is now, for good, over the same arrays: the reference costs no second copy.

        ``with_adapter=False``: the base model, which is cheaper to run and the same as long as the adapter's
        update is zero.
        """
        copy = share_weights(self.model)
        if not with_adapter:
            strip_adapters(copy)
        copy.freeze()
        copy.eval()
        return FrozenPolicy(copy, origin)

    @property
    def has_adapter(self) -> bool:
        """Whether something beside the base trains (adapters, a soft prompt), rather than every weight."""
        return self.description.get("fine_tune_type") != "full"

    @property
    def begins_as_base(self) -> bool:
        """Whether a fresh adapter of this kind computes what the base does, to the last bit: low-rank ones alone.

        A soft prompt changes every state at once, DoRA the order of sums, a whole module perhaps its precision.
        """
        plain = self.description.get("fine_tune_type", "lora") == "lora"
        return (
            plain and not soft_prompt_length(self.description) and "modules_to_save" not in self.description
        )

    def save(self, folder: Path) -> None:
        """Write the trained weights as an mlx-lm adapter folder."""
        save_adapter(self.model, self.description, folder)

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote for the same base model."""
        restore_adapter(self.model, self.description, folder)


class FrozenPolicy:
    """A policy that is only read: the reference.

    Attributes:
        origin: where it comes from, in words, for the record of a run.
    """

    def __init__(self, model: nn.Module, origin: str = "given") -> None:
        self.model = model
        self.trunk = find_trunk(model)
        self.origin = origin

    def logprobs(self, tokens: mx.array, mask: mx.array, temperature: float = 1.0) -> mx.array:
        """Token logprobs ``(B, T)``."""
        return token_logprobs(self.model, tokens, mask, temperature, trunk=self.trunk)

    def check_can_follow(self, policy: PolicyModel) -> None:
        """Refuse a policy that trains weights which this one does not have."""
        theirs = named_arrays(policy.model.trainable_parameters())
        missing = sorted(theirs.keys() - named_arrays(self.model.parameters()).keys())
        if missing:
            raise InvalidConfigurationError(
                f"reference_sync_every: the reference has no {missing[0]}, so it cannot follow this policy; give "
                "policy.frozen_copy(), or leave it out"
            )

    def follow(self, policy: PolicyModel, share: float) -> None:
        r"""Move towards the policy: ``reference ← share · policy + (1 − share) · reference``.

        ``share`` 1 makes it the policy as it is now; below 1, called every step, it is an exponential average
        (TR-DPO, https://arxiv.org/abs/2404.09656). Mixed are the weights that train: with adapters their two
        factors, each by itself, and not the product.
        """
        self.check_can_follow(policy)
        theirs = named_arrays(policy.model.trainable_parameters())
        mine = named_arrays(self.model.parameters())
        mixed = {
            name: array if share == 1 else share * array + (1 - share) * mine[name].astype(array.dtype)
            for name, array in theirs.items()
        }
        self.model.update(tree_unflatten(list(mixed.items())))
        mx.eval(self.model.parameters())  # or the graph of all earlier policies would be kept
