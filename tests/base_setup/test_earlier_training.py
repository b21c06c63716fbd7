"""What earlier training left behind: adapters to go on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from base_setup.parameters import named_arrays
from config.errors import CheckpointError, InvalidConfigurationError
from models.policy_model import PolicyModel
from models.reward_model import RewardModel
from models.sft_model import (
    LanguageModel,
)
from models.value_model import ValueModel
from tests.small_models import IDS, config, logits, moved
from token_attribution.extractor import pad_sequences
from training.model_trainer import ModelTrainer


def trained_adapter(base: LanguageModel, folder: Path, **options: Any) -> PolicyModel:
    policy = moved(PolicyModel(base, config(**options)))
    policy.save(folder)
    return policy


def test_after_real_steps_the_base_is_still_there_and_the_adapter_comes_back(base: LanguageModel) -> None:
    policy, batch = PolicyModel(base, config(learning_rate=1e-2)), pad_sequences([[1, 2]], [[3, 4, 5]])
    reference = policy.frozen_copy(with_adapter=False)
    before = np.array(reference.logprobs(*batch))
    assert np.array_equal(np.array(policy.logprobs(*batch)), before)
    steps = ModelTrainer(policy.model, config(learning_rate=1e-2), total_steps=3)
    for _ in range(3):
        steps.step(lambda b: (-mx.sum(policy.logprobs(*b)), None), [batch])
    after = np.array(policy.logprobs(*batch))
    assert (after - before)[np.array(batch[1])].min() > 0.01
    with policy.adapters_off():
        assert np.array_equal(np.array(policy.logprobs(*batch)), before)
    assert np.array_equal(np.array(policy.logprobs(*batch)), after)
    assert np.array_equal(np.array(reference.logprobs(*batch)), before)
    assert set(named_arrays(policy.model.trainable_parameters())) == set(
        named_arrays(steps.module.trainable_parameters())
    )


def test_training_goes_on_from_an_adapter_in_float32_whatever_it_was_saved_in(
    base: LanguageModel, tmp_path: Path
) -> None:
    policy = trained_adapter(base, tmp_path)
    resumed = PolicyModel(base, config(adapter_path=str(tmp_path)))
    assert np.array_equal(np.array(resumed.forward(IDS).logits), np.array(policy.forward(IDS).logits))
    weights = named_arrays(mx.load(str(tmp_path / "adapters.safetensors")))
    mx.eval(weights)
    half = {name: x.astype(mx.bfloat16) for name, x in weights.items()}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), half)
    resumed = PolicyModel(base, config(adapter_path=str(tmp_path)))
    trainable = named_arrays(resumed.model.trainable_parameters())
    assert trainable.keys() == weights.keys()
    assert {x.dtype for x in trainable.values()} == {mx.float32}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_reward_model_that_began_from_an_adapter_is_saved_and_read(
    base: LanguageModel, tmp_path: Path, kind: str
) -> None:
    """Its adapter's rank (2) is not its config's (4), and the dropout of its training is off in both."""
    options: dict[str, Any] = {"lora_dropout": 0.5, "fine_tune_type": kind}
    policy = moved(PolicyModel(base, config(**options).replace(lora_r=2)))
    policy.save(tmp_path / "start")
    judge = RewardModel(base, config(**options, adapter_path=str(tmp_path / "start")))
    states = np.array(policy.forward(IDS).hidden_states)
    assert np.array_equal(np.array(judge.trunk.hidden(IDS)), states)
    judge.save(tmp_path / "judge")
    again = RewardModel.load(tmp_path / "judge", base)
    assert again.score_ids([[1, 2, 3], [4]]) == judge.score_ids([[1, 2, 3], [4]])
    assert again.config == judge.config
    trainable = [named_arrays(model.module.trainable_parameters()) for model in (judge, again)]
    assert trainable[0].keys() == trainable[1].keys()


def test_a_frozen_copy_of_a_policy_in_training_has_no_dropout(base: LanguageModel) -> None:
    policy = moved(PolicyModel(base, config(lora_dropout=0.5)))
    expected = logits(policy.model)
    policy.model.train()
    assert np.array_equal(logits(policy.frozen_copy().model), expected)
    assert policy.model.training


def damaged(what: str, folder: Path) -> None:
    adapter, description, head = (
        folder / name for name in ("adapters.safetensors", "adapter_config.json", "value_head.safetensors")
    )
    if what == "no adapter":
        adapter.unlink()
    elif what == "cut adapter":
        adapter.write_bytes(adapter.read_bytes()[:-1])
    elif what == "no JSON":
        description.write_text("{")
    elif what == "a list":
        description.write_text("[]")
    elif what == "another rank":
        fields = json.loads(description.read_text())
        fields["lora_parameters"]["rank"] = 8
        description.write_text(json.dumps(fields))
    elif what == "no head":
        head.unlink()
    elif what == "cut head":
        head.write_bytes(head.read_bytes()[:-1])
    elif what == "another head":
        mx.save_safetensors(str(head), {"weight": mx.zeros((1, 8)), "bias": mx.zeros((1,))})
    elif what == "half a head":
        mx.save_safetensors(str(head), {"weight": mx.zeros((1, 32))})


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("no adapter", r"adapters\.safetensors is missing"),
        ("cut adapter", "this adapter does not fit the model"),
        ("no JSON", "not valid JSON"),
        ("a list", "a JSON object is expected"),
        ("another rank", r"lora_parameters is .*'rank': 8.* here it is .*'rank': 4"),
        ("no head", r"value_head\.safetensors: there is no such file"),
        ("cut head", "the head could not be read"),
        ("another head", r"\(1, 8\)"),
        ("half a head", "a head with the shapes"),
    ],
)
def test_a_damaged_value_network_is_refused_in_a_sentence(
    base: LanguageModel, tmp_path: Path, what: str, sentence: str
) -> None:
    ValueModel(base, config()).save(tmp_path)
    damaged(what, tmp_path)
    with pytest.raises(CheckpointError, match=sentence):
        ValueModel(base, config()).load(tmp_path)


def test_more_layers_than_there_are_cannot_be_adapted(base: LanguageModel) -> None:
    with pytest.raises(InvalidConfigurationError, match="lora_layers: 3 is more than the model's 2 blocks"):
        PolicyModel(base, config(lora_layers=3))
    last = named_arrays(PolicyModel(base, config(lora_layers=1)).model.trainable_parameters())
    assert {name.split(".")[2] for name in last} == {"1"}


def test_scores_do_not_depend_on_how_many_are_read_together(base: LanguageModel) -> None:
    judge = RewardModel(base, config())
    rows = [[i, *range(i)] for i in range(1, 12)]
    together = judge.score_ids(rows)
    judge.batch_rows = 3
    assert judge.score_ids(rows) == pytest.approx(together, abs=1e-5)
    assert judge.score_ids([]) == []


def test_what_cannot_be_generated_is_refused(base: LanguageModel) -> None:
    policy = PolicyModel(base, config())
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        policy.generate(IDS, max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature must not be negative"):
        policy.generate(IDS, temperature=-0.1)
    with pytest.raises(ValueError, match="row 1 has no real token"):
        policy.generate(mx.array([[1, 2], [3, 4]]), mx.array([[1, 1], [0, 0]]))
    with pytest.raises(ValueError, match=r"input_ids must be \(B, T\)"):
        policy.generate(mx.array([1, 2]))


def test_generation_follows_from_its_seed(base: LanguageModel) -> None:
    policy = PolicyModel(base, config())
    mx.random.seed(0)
    first = policy.generate(IDS, max_new_tokens=8, seed=3).tolist()
    mx.random.seed(1)
    assert policy.generate(IDS, max_new_tokens=8, seed=3).tolist() == first
    assert policy.generate(IDS, max_new_tokens=8, seed=4).tolist() != first
