"""Groups that teach nothing are replaced by further prompts' (DAPO, https://arxiv.org/abs/2503.14476, eq. 11)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from config.declaration import nearest
from config.errors import InvalidConfigurationError
from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Prompt, Rollout
from rewards.scored_batch import ScoredBatch, joined

#: (prompts, number of the first member) -> rollouts of their groups, group after group.
Generate = Callable[[Sequence[Prompt], int], list[Rollout]]
Score = Callable[[Sequence[Rollout]], ScoredBatch]


def collect_live_groups(
    prompts: Sequence[Prompt], reserve: Sequence[Prompt], generate: Generate, score: Score, config: PPOConfig
) -> tuple[list[Rollout], ScoredBatch, dict[str, float]]:
    """Sample until as many groups as ``prompts`` have scores that differ.

    A group is judged by what the rewards said, before any penalty for length or a missing end: shaped scores
    differ nearly always, and a group in which everything is wrong would pass and push the policy towards the
    shape alone. Not more than ``dynamic_sampling_max_batches`` batches are sampled; after that fewer groups are
    returned, and if none is live, the first batch as it was, from which nothing must be learned.

    Args:
        prompts: this step's. reserve: where replacements come from, in order; used again from the start if it
            runs out, with fresh random numbers each time.
    Returns:
        The rollouts of the live groups, what the rewards said about them, and metrics.
    """
    wanted = len(prompts)
    live: list[tuple[list[Rollout], ScoredBatch]] = []
    first: tuple[list[Rollout], ScoredBatch] | None = None
    sampled, batches, failed, members = 0, 0, 0, dict[int, int]()
    waiting, further = list(prompts), _again_and_again(reserve, {p.index for p in prompts})
    taken: set[int] = set()
    while waiting and batches < config.dynamic_sampling_max_batches:
        rollouts = []
        for offset, same in _by_first_member(waiting, members):
            rollouts += generate(same, offset)
        scored = score(rollouts)
        first = first or (rollouts, scored)
        failed += 0 if scored.failed is None else int(scored.failed.sum())
        for start in range(0, len(rollouts), config.group_size):
            rows = range(start, start + config.group_size)
            if _is_live(scored, rows, config.dynamic_sampling_reward) and len(live) < wanted:
                live.append(([rollouts[i] for i in rows], scored.rows(rows)))
                taken.add(rollouts[start].prompt.index)
        sampled += len(waiting)
        batches += 1
        for prompt in waiting:
            members[prompt.index] = members.get(prompt.index, 0) + config.group_size
        waiting = _take(further, wanted - len(live), taken, wanted)
    metrics = {
        "dynamic_sampling/acceptance_rate": len(live) / sampled,
        "dynamic_sampling/sampled_groups": float(sampled),
        "dynamic_sampling/live_groups": float(len(live)),
        # Of all that was sampled: a group on which a reward fails is dead, and would take its failures with it.
        "reward_errors": float(failed),
    }
    assert first is not None
    if not live:
        return *first, metrics
    return [r for group, _ in live for r in group], joined([scored for _, scored in live]), metrics


def check_outcome_reward(config: PPOConfig, names: Sequence[str]) -> None:
    """Refuse to judge groups by a reward that is not among ``names``."""
    wanted = config.dynamic_sampling_reward
    if wanted is not None and wanted not in names:
        raise InvalidConfigurationError(
            f'dynamic_sampling_reward: there is no reward "{wanted}"{nearest(wanted, names)} '
            f"(there are: {', '.join(names)})"
        )


def _is_live(scored: ScoredBatch, rows: range, component: str | None) -> bool:
    """Whether at least two scorable completions of the group have different outcomes."""
    group = list(rows)
    outcomes = (scored.total if component is None else scored.components[component])[group]
    # A row without a total has no score, whatever one of its rewards said: another one failed there.
    scorable = outcomes[~np.isnan(outcomes) & ~np.isnan(scored.total[group])]
    return bool(scorable.size and scorable.max() - scorable.min() > 1e-8)


def _again_and_again(reserve: Sequence[Prompt], used: set[int]) -> Iterator[Prompt]:
    """The reserve without what this step has used already, then all of it, for ever."""
    yield from (prompt for prompt in reserve if prompt.index not in used)
    while reserve:
        yield from reserve


def _take(further: Iterator[Prompt], count: int, taken: set[int], most: int) -> list[Prompt]:
    """The next prompts that have no live group yet; a group is its prompt's, so there is one of each."""
    found: dict[int, Prompt] = {}
    # All that is left may be taken already: look at no more than a bounded number of candidates.
    for _ in range(16 * (count + len(taken) + most)):
        if len(found) == count:
            break
        prompt = next(further, None)
        if prompt is not None and prompt.index not in taken:
            found.setdefault(prompt.index, prompt)
    return list(found.values())


def _by_first_member(
    prompts: Sequence[Prompt], members: dict[int, int]
) -> Iterator[tuple[int, list[Prompt]]]:
    """Prompts by the number that their next completion has: nobody gets the same random numbers twice."""
    offsets = [members.get(prompt.index, 0) for prompt in prompts]
    for offset in sorted(set(offsets)):
        yield offset, [p for p, mine in zip(prompts, offsets, strict=True) if mine == offset]
