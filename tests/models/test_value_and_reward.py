"""Value and reward models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.tokenizer_utils import TokenizerWrapper

from base_setup.tokenizer_setup import (
    byte_tokenizer,
    encode,
    end_token_ids,
)
from config.errors import CheckpointError
from models.custom_reward_model import CustomRewardModel
from models.policy_model import PolicyModel
from models.reward_model import RewardModel
from models.sft_model import (
    LanguageModel,
    load_language_model,
    save_language_model,
)
from models.value_model import ValueModel
from tests.small_models import IDS, config, moved, numbers


def test_a_value_network_begins_at_zero_and_moves_no_policy_array(
    base: LanguageModel, tmp_path: Path
) -> None:
    policy, value = PolicyModel(base, config()), ValueModel(base, config())
    assert value.forward(IDS).shape == (1, 5)
    assert not np.array(value.forward(IDS)).any()
    before = numbers(policy.model), numbers(base.model)
    value.module.update(tree_map(lambda x: x + 0.1, value.module.trainable_parameters()))
    assert np.array(value.forward(IDS)).any()
    assert (numbers(policy.model), numbers(base.model)) == before
    value.save(tmp_path)
    other = ValueModel(base, config())
    other.load(tmp_path)
    assert np.array_equal(np.array(other.forward(IDS)), np.array(value.forward(IDS)))


def test_a_shared_value_head_reads_the_policys_own_trunk(base: LanguageModel) -> None:
    policy = PolicyModel(base, config())
    value = ValueModel.on_policy_trunk(policy)
    assert value.module.model is policy.model
    value.module.head.weight = mx.ones((1, 32))
    expected = np.array(policy.forward(IDS).hidden_states).sum(axis=-1)
    np.testing.assert_allclose(np.array(value.forward(IDS)), expected, atol=1e-4)
    before = np.array(value.forward(IDS))
    moved(policy)
    assert not np.allclose(np.array(value.forward(IDS)), before)


def test_a_score_is_read_at_the_last_real_token_whatever_stands_beside_it(base: LanguageModel) -> None:
    judge = RewardModel(base, config())
    short, long = [1, 2, 3], [4, 5, 6, 7, 8, 9, 10]
    alone = [judge.score_ids([row])[0] for row in (short, long)]
    assert judge.score_ids([short, long]) == pytest.approx(alone, abs=1e-5)
    ids = mx.array([[*short, 9, 9], [4, 5, 6, 7, 8]])
    padded = judge.forward(ids, mx.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    assert padded.shape == (2,)
    assert float(padded[0]) == pytest.approx(alone[0], abs=1e-5)
    states = judge.trunk.hidden(mx.array([short]))[0, 2]
    by_hand = float(mx.sum(states * judge.module.head.weight[0]) + judge.module.head.bias[0])
    assert alone[0] == pytest.approx(by_hand, abs=1e-5)


def test_scores_are_the_same_in_a_fresh_process(base: LanguageModel, tmp_path: Path) -> None:
    save_language_model(base, tmp_path / "base")
    settings = config().replace(model_name=str(tmp_path / "base"))
    judge = RewardModel(load_language_model(settings), settings)
    judge.normalise([[1, 2, 3], [4, 5], [6, 7, 8, 9]])
    scores = np.array(judge.score_ids([[1, 2, 3], [4, 5], [6, 7, 8, 9]]))
    assert scores.mean() == pytest.approx(0, abs=1e-5)
    assert scores.std() == pytest.approx(1, abs=1e-4)
    judge.save(tmp_path / "judge")
    folder = str(tmp_path / "judge")
    code = f"from models.reward_model import RewardModel; print(RewardModel.load({folder!r})(['ab'], ['cd']))"
    root = Path(__file__).resolve().parents[2]
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == str(judge(["ab"], ["cd"]))
    end = min(end_token_ids(base.tokenizer))
    prompt, answer = encode(base.tokenizer, "ab"), [*encode(base.tokenizer, "cd"), end]
    assert judge(["x"], ["y"], prompt_ids=[prompt], completion_ids=[answer]) == judge(["ab"], ["cd"])
    with pytest.raises(CheckpointError, match=r"no readable reward_config\.json"):
        RewardModel.load(tmp_path / "base")


def test_a_tokenizer_with_other_ids_has_its_texts_read(base: LanguageModel) -> None:
    judge = RewardModel(base, config())
    assert judge.for_tokenizer(TokenizerWrapper(byte_tokenizer())) is judge  # the same ids, another object
    other = byte_tokenizer()
    other.add_tokens(["answer"])
    reward = judge.for_tokenizer(TokenizerWrapper(other))
    foreign = {"prompt_ids": [[259], [259, 1]], "completion_ids": [[259], [259]]}  # past our embedding
    assert reward(["ab", "c"], ["answer", "no"], **foreign) == judge(["ab", "c"], ["answer", "no"])


def test_equal_scores_are_centred_and_not_divided_by_zero(base: LanguageModel) -> None:
    judge = RewardModel(base, config())
    judge.normalise([[1, 2, 3]])
    assert judge.gain == 1
    assert judge.score_ids([[1, 2, 3]]) == pytest.approx([0], abs=1e-6)


def test_the_worked_custom_reward_is_its_formula() -> None:
    """Target 4: three different words 3/4; six 4/4 - 2/4; cut off, half a point less; nothing, 0."""
    judge = CustomRewardModel(target_words=4)
    texts = ["a b c", "a b c d e f", "a b c", ""]
    assert judge(["p"] * 4, texts, terminated=[True, True, False, True]) == [0.75, 0.5, 0.25, 0.0]
    assert judge(["p"], ["a b c d"]) == [1.0]
    assert judge(["p"], ["A a B b"]) == [0.5]  # two different words, whatever their case
    assert CustomRewardModel(4, cut_off_penalty=0.25)(["p"], ["a b"], terminated=[False]) == [0.25]
    with pytest.raises(ValueError, match="target_words: at least 1 is expected, found 0"):
        CustomRewardModel(target_words=0)
