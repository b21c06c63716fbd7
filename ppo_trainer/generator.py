"""Prompts to rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Prompt, Rollout
from models.decoding import Completion, Sampling, complete, uniforms_for
from models.policy_model import PolicyModel


class Generator:
    """Samples ``group_size`` completions per prompt.

    A completion is a function of (seed, step, prompt, member): not of which prompts are sampled beside it,
    nor in how many batches.
    """

    def __init__(self, policy: PolicyModel, config: PPOConfig) -> None:
        self.policy = policy
        self.config = config
        self.sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p)

    def generate(
        self,
        prompts: Sequence[Prompt],
        step: int,
        *,
        group_size: int | None = None,
        temperature: float | None = None,
    ) -> list[Rollout]:
        """Rollouts of each prompt's group, in the order of ``prompts``."""
        config = self.config
        members = [(prompt, m) for prompt in prompts for m in range(group_size or config.group_size)]
        sampling = self.sampling if temperature is None else self.sampling._replace(temperature=temperature)
        rollouts: list[Rollout] = []
        for start in range(0, len(members), config.rollout_batch_size):
            part = members[start : start + config.rollout_batch_size]
            rollouts += self._sample(part, step, sampling)
        return rollouts

    def _sample(self, members: Sequence[tuple[Prompt, int]], step: int, sampling: Sampling) -> list[Rollout]:
        config, policy = self.config, self.policy
        distinct = {prompt.ids: None for prompt, _ in members}  # a dict keeps the order
        place = {ids: i for i, ids in enumerate(distinct)}
        completions = complete(
            policy.model,
            list(distinct),
            [place[prompt.ids] for prompt, _ in members],
            np.stack(
                [uniforms_for(config.seed, step, p.index, m, config.max_new_tokens) for p, m in members]
            ),
            end_ids=policy.end_ids,
            max_new_tokens=config.max_new_tokens,
            sampling=sampling,
            trunk=policy.trunk,
        )
        return [self._rollout(prompt, m, c) for (prompt, m), c in zip(members, completions, strict=True)]

    def _rollout(self, prompt: Prompt, member: int, completion: Completion) -> Rollout:
        text = self.policy.tokenizer.decode(completion.ids, skip_special_tokens=True)
        return Rollout(
            prompt, member, tuple(completion.ids), tuple(completion.logprobs), completion.terminated, text
        )
