"""The policy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from models.policy_model import PolicyModel
from models.sft_model import (
    LanguageModel,
    build_embedded,
)
from tests.small_models import BOLD, config, moved


def test_padding_on_the_right_changes_nothing_and_on_the_left_is_refused(base: LanguageModel) -> None:
    policy = PolicyModel(base, config())
    ids = mx.array([[1, 2, 3, 77, 77], [4, 5, 6, 7, 8]])
    real = mx.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded = np.array(policy.forward(ids, real).logits)
    np.testing.assert_allclose(padded[0, :3], np.array(policy.forward(ids[:1, :3]).logits)[0], atol=1e-5)
    np.testing.assert_allclose(padded[1], np.array(policy.forward(ids[1:]).logits)[0], atol=1e-5)
    with pytest.raises(ValueError, match="pad rows on the right"):
        policy.forward(ids, real[:, ::-1])
    with pytest.raises(ValueError, match="must have the shape of input_ids"):
        policy.forward(ids, real[:, :3])


def test_greedy_generation_is_the_argmax_of_full_forwards(base: LanguageModel) -> None:
    policy = moved(PolicyModel(base, config()))
    prompts = [[10, 20, 30, 40], [50, 60]]
    ids, real = mx.array([[10, 20, 30, 40], [50, 60, 0, 0]]), mx.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    together = policy.generate(ids, real, max_new_tokens=7, temperature=0)
    for row, prompt in enumerate(prompts):
        expected = list(prompt)
        while len(expected) < len(prompt) + 7 and expected[-1] not in policy.end_ids:
            expected.append(int(mx.argmax(policy.forward(mx.array([expected])).logits[0, -1])))
        assert together[row].tolist()[: len(expected)] == expected
        assert set(together[row].tolist()[len(expected) :]) <= {policy.tokenizer.pad_token_id}


def test_a_row_ends_at_its_end_token_and_padding_follows() -> None:
    policy = PolicyModel(build_embedded(BOLD, seed=1), config())
    ids, real = mx.array([[10, 20, 30, 40], [50, 60, 0, 0]]), mx.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    endless = policy.generate(ids, real, max_new_tokens=8, temperature=0).tolist()
    end = endless[0][4 + 2]  # the third token of the first row's completion
    policy.end_ids = frozenset({end})
    ended = policy.generate(ids, real, max_new_tokens=8, temperature=0).tolist()
    padding = policy.tokenizer.pad_token_id
    lengths = []
    for whole, row, prompt in zip(endless, ended, (4, 2), strict=True):
        completion = whole[prompt : prompt + 8]
        kept = prompt + (completion.index(end) + 1 if end in completion else 8)
        lengths.append(kept)
        assert row == whole[:kept] + [padding] * (len(row) - kept)
    assert len(ended[0]) == max(lengths)
    assert lengths[0] != lengths[1]
    assert ended[0][:4] == [10, 20, 30, 40]
    assert ended[1][:2] == [50, 60]
