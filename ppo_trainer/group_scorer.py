"""Finished groups are scored in a second thread while the rest is still being decoded.

It pays where a reward waits for something else than this machine's arithmetic: a server, a sandbox, a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from config.errors import InvalidConfigurationError
from experience_buffer.data_structures import Rollout
from models.reward_model import RewardModel
from models.sequence_classifier import SequenceClassifier
from rewards.composition import RewardSet
from rewards.scored_batch import ScoredBatch, joined


class GroupScorer:
    """Scores by group. Rewards therefore see a group at a time and not the whole batch."""

    def __init__(self, score: Callable[[Sequence[Rollout]], ScoredBatch], rewards: RewardSet) -> None:
        """Refuses a learned reward model: it would compute with MLX in one thread while another decodes."""
        for name, function in zip(rewards.names, rewards.rewards, strict=True):
            if isinstance(function, (RewardModel, SequenceClassifier)):
                raise InvalidConfigurationError(
                    f'score_while_decoding: the reward "{name}" is a model that computes on the device that is '
                    "decoding; leave score_while_decoding out"
                )
        self._score = score
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._pending: dict[tuple[int, int], tuple[int, Future[ScoredBatch]]] = {}

    def begin(self, group: Sequence[Rollout]) -> None:
        """Have a group scored."""
        first = group[0].prompt.index, group[0].member
        self._pending[first] = len(group), self._pool.submit(self._score, group)

    def score(self, rollouts: Sequence[Rollout]) -> ScoredBatch:
        """What the rewards say about groups that were begun, in the order of ``rollouts``; of others it asks now.

        Raises:
            RewardError: what the rewards raised, of the first group that failed.
        """
        parts: list[ScoredBatch] = []
        place = 0
        while place < len(rollouts):
            begun = self._pending.pop((rollouts[place].prompt.index, rollouts[place].member), None)
            if begun is None:
                parts.append(self._score(rollouts[place:]))
                break
            size, future = begun
            parts.append(future.result())
            place += size
        self._pending.clear()
        return joined(parts)
