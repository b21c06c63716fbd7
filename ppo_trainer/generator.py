"""Prompts to rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Prompt, Rollout
from models.decoding import Completion, complete
from models.policy_model import PolicyModel
from models.rollout_policy import RolloutPolicy
from models.sampling import Sampling, uniforms_for


class Generator:
    """Samples ``group_size`` completions per prompt.

    A completion is a function of (seed, step, prompt, member): not of which prompts are sampled beside it,
    nor in how many batches.
    """

    def __init__(
        self, policy: PolicyModel, config: PPOConfig, rollout_policy: RolloutPolicy | None = None
    ) -> None:
        """``rollout_policy``: what samples in place of the policy itself."""
        self.policy = policy
        self.rollout_policy = rollout_policy or RolloutPolicy(policy)
        self.config = config
        self.sampling = Sampling(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            logit_bias=tuple(sorted((config.logit_bias or {}).items())),
            repetition_penalty=config.repetition_penalty,
            repetition_context=config.repetition_context,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        step: int,
        *,
        group_size: int | None = None,
        temperature: float | None = None,
        first_member: int = 0,
        on_group: Callable[[list[Rollout]], None] | None = None,
    ) -> list[Rollout]:
        """Rollouts of each prompt's group, in the order of ``prompts``, members counted from ``first_member``.

        ``on_group``: called with each group as soon as its last member has ended, while others are decoded.
        """
        config, policy, sampler = self.config, self.policy, self.rollout_policy
        if not prompts:
            return []
        count = group_size or config.group_size
        members = [(prompt, m) for prompt in prompts for m in range(first_member, first_member + count)]
        distinct = {prompt.ids: None for prompt in prompts}  # a dict keeps the order
        place = {ids: i for i, ids in enumerate(distinct)}
        rollouts: dict[int, Rollout] = {}
        missing = [count] * len(prompts)

        def on_done(row: int, completion: Completion) -> None:
            rollouts[row] = self._rollout(*members[row], completion)
            group = row // count
            missing[group] -= 1
            if on_group is not None and not missing[group]:
                on_group([rollouts[row] for row in range(group * count, (group + 1) * count)])

        complete(
            sampler.model,
            list(distinct),
            [place[prompt.ids] for prompt, _ in members],
            np.stack(
                [uniforms_for(config.seed, step, p.index, m, config.max_new_tokens) for p, m in members]
            ),
            end_ids=policy.end_ids,
            max_new_tokens=config.max_new_tokens,
            sampling=(
                self.sampling if temperature is None else self.sampling._replace(temperature=temperature)
            ),
            trunk=sampler.trunk,
            max_rows=config.rollout_batch_size,
            on_done=on_done,
        )
        return [rollouts[row] for row in range(len(members))]

    def _rollout(self, prompt: Prompt, member: int, completion: Completion) -> Rollout:
        text = self.policy.tokenizer.decode(completion.ids, skip_special_tokens=True)
        return Rollout(
            prompt, member, tuple(completion.ids), tuple(completion.logprobs), completion.terminated, text
        )
