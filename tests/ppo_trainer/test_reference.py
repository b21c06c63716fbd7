"""What the KL is measured from: where the reference comes from, that it stays, and how it follows if it is told to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

import ppo_trainer.ppo_trainer
import ppo_trainer.reference
from base_setup.lora_setup import adapter_layers
from config.errors import CheckpointError, InvalidConfigurationError, ModelLoadError, ToolkitError
from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from models.policy_model import PolicyModel
from models.sft_model import LanguageModel, build_embedded, save_language_model
from monitoring.metrics_file import read_metrics
from ppo_trainer.ppo_trainer import PPOTrainer
from tests.tabular import Bandit
from token_attribution.logprob_computer import token_logprobs

SMALLEST = ModelConfig(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=1, intermediate_size=32
)
TOKENS = mx.array([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
MASK = mx.array([[False, True, True, True], [True, True, True, False]])


def settings(folder: Path, **options: Any) -> PPOConfig:
    return PPOConfig(
        model_name="embedded",
        embedded_model=SMALLEST,
        output_dir=str(folder / f"run-{len(list(folder.iterdir()))}"),
        verbose=False,
        lora_r=4,
        lora_alpha=8,
        **{
            "algorithm": "grpo",
            "group_size": 2,
            "batch_size": 2,
            "max_new_tokens": 3,
            "learning_rate": 2e-2,
            **options,
        },
    )


def even_ids(completion_ids: Any, **columns: Any) -> list[float]:
    """Share of even token ids: it differs within nearly every group."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def trainer_of(folder: Path, **options: Any) -> PPOTrainer:
    return PPOTrainer(settings(folder, **options), reward_model=even_ids)


def says(model: Any) -> np.ndarray:
    """Logprobs of some tokens under a policy, a reference, or a bare module."""
    if hasattr(model, "logprobs"):
        return np.array(model.logprobs(TOKENS, MASK, 0.8))
    return np.array(token_logprobs(model, TOKENS, MASK, 0.8))


def far_apart(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).max() > 1e-3)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that has learned something."""
    folder = tmp_path_factory.mktemp("adapter")
    trainer = trainer_of(folder)
    trainer.train(["ab", "q"], num_epochs=2)
    trainer.save_model(folder / "saved")
    return folder / "saved"


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the policy's vocabulary and other weights."""
    folder = tmp_path_factory.mktemp("model") / "other"
    save_language_model(build_embedded(SMALLEST, seed=9), folder)
    return folder


def origin(trainer: PPOTrainer) -> str:
    assert trainer.reference is not None
    return trainer.reference.origin


# Where it comes from -------------------------------------------------------------------------------------


def test_under_a_fresh_adapter_the_reference_is_the_base_without_it(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    assert trainer.reference is not None
    assert trainer.policy.has_adapter
    assert not adapter_layers(trainer.reference.model)
    assert origin(trainer) == "embedded, adapters off (a fresh one is 0)"
    np.testing.assert_array_equal(says(trainer.reference), says(trainer.policy))
    np.testing.assert_array_equal(says(trainer.reference), says(trainer.policy.base.model))


def test_under_a_loaded_adapter_it_is_a_second_adapter_that_does_not_learn(
    tmp_path: Path, adapter: Path
) -> None:
    trainer = trainer_of(tmp_path, adapter_path=str(adapter))
    assert trainer.reference is not None
    first = says(trainer.policy)
    np.testing.assert_array_equal(says(trainer.reference), first)
    assert far_apart(first, says(trainer.policy.base.model))
    assert adapter_layers(trainer.reference.model)
    assert not tree_flatten(trainer.reference.model.trainable_parameters())
    assert "a frozen second adapter" in origin(trainer)
    assert str(adapter) in origin(trainer)
    trainer.train(["ab", "q"], num_epochs=2)
    np.testing.assert_array_equal(says(trainer.reference), first)
    assert far_apart(says(trainer.policy), first)


def test_where_every_weight_trains_it_is_a_copy_of_all_of_them(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, fine_tune_type="full")
    first = says(trainer.policy)
    assert "a frozen copy of every weight" in origin(trainer)
    trainer.train(["ab", "q"], num_epochs=1)
    np.testing.assert_array_equal(says(trainer.reference), first)
    assert far_apart(says(trainer.policy), first)


def test_base_is_the_base_although_an_adapter_was_loaded(tmp_path: Path, adapter: Path) -> None:
    trainer = trainer_of(tmp_path, adapter_path=str(adapter), reference="base")
    assert trainer.reference is not None
    np.testing.assert_array_equal(says(trainer.reference), says(trainer.policy.base.model))
    assert far_apart(says(trainer.reference), says(trainer.policy))
    assert origin(trainer) == "embedded, adapters off"
    # The policy has its adapter on still, and the KL is not 0 before the first update.
    assert adapter_layers(trainer.policy.model)
    assert abs(trainer.evaluate(["ab", "q"])["objective/kl"]) > 1e-3
    same = trainer_of(tmp_path, adapter_path=str(adapter))
    assert same.evaluate(["ab", "q"])["objective/kl"] == 0


def test_base_is_nothing_where_every_weight_trains(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidConfigurationError, match=r'^reference: "base" is the policy without its adapter'
    ):
        trainer_of(tmp_path, fine_tune_type="full", reference="base")


@pytest.mark.parametrize("fine_tune_type", ["lora", "full"])
def test_a_path_to_a_model_is_that_model(tmp_path: Path, other_model: Path, fine_tune_type: str) -> None:
    trainer = trainer_of(tmp_path, reference_path=str(other_model), fine_tune_type=fine_tune_type)
    expected = says(build_embedded(SMALLEST, seed=9).model)
    np.testing.assert_allclose(says(trainer.reference), expected, atol=1e-6)
    assert far_apart(expected, says(trainer.policy))
    assert origin(trainer) == f"the model {other_model}"
    assert trainer.reference is not None
    assert not tree_flatten(trainer.reference.model.trainable_parameters())
    trainer.train(["ab", "q"], num_epochs=1)
    np.testing.assert_allclose(says(trainer.reference), expected, atol=1e-6)


@pytest.mark.parametrize("fine_tune_type", ["lora", "full"])
def test_a_path_to_an_adapter_is_the_base_with_that_adapter(
    tmp_path: Path, adapter: Path, fine_tune_type: str
) -> None:
    trainer = trainer_of(tmp_path, reference_path=str(adapter), fine_tune_type=fine_tune_type)
    with_it = PolicyModel(build_embedded(SMALLEST, seed=0), settings(tmp_path, adapter_path=str(adapter)))
    np.testing.assert_array_equal(says(trainer.reference), says(with_it))
    # The policy itself starts without it.
    np.testing.assert_array_equal(says(trainer.policy), says(trainer.policy.base.model))
    assert far_apart(says(trainer.reference), says(trainer.policy))
    assert origin(trainer) == f"embedded with the adapter {adapter}"


def test_another_reference_than_the_policys_loaded_adapter(
    tmp_path: Path, adapter: Path, other_model: Path
) -> None:
    trainer = trainer_of(tmp_path, adapter_path=str(adapter), reference_path=str(other_model))
    np.testing.assert_allclose(
        says(trainer.reference), says(build_embedded(SMALLEST, seed=9).model), atol=1e-6
    )
    assert far_apart(says(trainer.policy), says(trainer.policy.base.model))


def test_the_kl_of_the_reward_is_measured_from_the_path(tmp_path: Path, other_model: Path) -> None:
    trainer = trainer_of(tmp_path, algorithm="rloo", reference_path=str(other_model))
    rollouts = trainer.generate(trainer._prepare(["ab", "q"]))
    experience, metrics = trainer.make_experience(rollouts)
    other = build_embedded(SMALLEST, seed=9).model
    theirs = np.array(token_logprobs(other, experience.tokens, experience.mask))
    own = np.array(trainer.policy.logprobs(experience.tokens, experience.mask))
    np.testing.assert_allclose(np.array(experience.ref_logprobs), theirs, atol=1e-6)
    assert metrics["objective/kl"] == pytest.approx((own - theirs).sum() / len(rollouts), rel=1e-4)


# What is refused -----------------------------------------------------------------------------------------


def of_another_vocabulary(folder: Path) -> Path:
    """The same architecture with 64 more rows in its embedding."""
    known = build_embedded(SMALLEST, seed=1)
    config = {**known.config, "vocab_size": known.config["vocab_size"] + 64}
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    save_language_model(LanguageModel(model, known.tokenizer, config, "wider"), folder)
    return folder


def test_a_model_of_another_vocabulary_is_refused_with_both_sizes(tmp_path: Path) -> None:
    folder = of_another_vocabulary(tmp_path / "wider")
    size = build_embedded(SMALLEST, seed=1).config["vocab_size"]
    with pytest.raises(
        InvalidConfigurationError, match=rf"^reference_path: .*wider.* {size + 64} tokens .* {size};"
    ):
        trainer_of(tmp_path, reference_path=str(folder))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test that reaches for a model."""

    def loaded(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr(ppo_trainer.ppo_trainer, "load_language_model", loaded)
    monkeypatch.setattr(ppo_trainer.reference, "load_language_model", loaded)


def make_nothing(folder: Path) -> None:
    """No folder at all."""


def make_empty(folder: Path) -> None:
    folder.mkdir()


def make_file(folder: Path) -> None:
    folder.write_text("a file")


def make_half_an_adapter(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")


def make_model_without_tokenizer(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (make_nothing, ModelLoadError, "^reference_path: there is no folder"),
        (make_empty, ModelLoadError, "^reference_path: .* has no config.json"),
        (make_file, ModelLoadError, "^reference_path: .* is a file"),
        (make_half_an_adapter, CheckpointError, "adapters.safetensors is missing"),
        (make_model_without_tokenizer, ModelLoadError, "^reference_path: .* has no tokenizer"),
    ],
)
def test_a_path_with_nothing_to_read_is_found_before_a_weight_is_loaded(
    tmp_path: Path, make: Callable[[Path], None], error: type, sentence: str
) -> None:
    make(tmp_path / "there")
    with pytest.raises(error, match=sentence):
        trainer_of(tmp_path, reference_path=str(tmp_path / "there"))


def test_a_reference_that_cannot_be_loaded_is_not_called_the_model(tmp_path: Path, other_model: Path) -> None:
    """The folder has everything but its weights."""
    folder = tmp_path / "broken"
    save_language_model(build_embedded(SMALLEST, seed=9), folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ModelLoadError, match=r"^reference_path: "):
        trainer_of(tmp_path, reference_path=str(folder))


# None ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_without_a_reference_no_kl_is_computed_or_told(tmp_path: Path, algorithm: str) -> None:
    trainer = trainer_of(tmp_path, algorithm=algorithm, reference="none")
    assert trainer.reference is None
    experience, metrics = trainer.make_experience(trainer.generate(trainer._prepare(["ab", "q"])))
    assert experience.ref_logprobs is None
    learned = trainer.update(experience)
    assert learned["num_updates"] == 1
    told = {*metrics, *learned, *trainer.evaluate(["ab"])}
    assert not told & {"objective/kl", "objective/kl_per_token", "kl", "loss/kl_avg"}
    assert trainer_of(tmp_path, algorithm=algorithm).evaluate(["ab"])["objective/kl"] == 0


def test_a_row_without_a_kl_has_no_reference_pass_but_evaluates_one(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, algorithm="dr_grpo")
    experience, _ = trainer.make_experience(trainer.generate(trainer._prepare(["ab", "q"])))
    assert experience.ref_logprobs is None
    assert "objective/kl" in trainer.evaluate(["ab"])


# Following the policy ------------------------------------------------------------------------------------


class Follow:
    """Keeps the weights of policy and reference after each step, those that train alone."""

    def __init__(self) -> None:
        self.policy: list[dict[str, np.ndarray]] = []
        self.reference: list[dict[str, np.ndarray]] = []
        self.trainer: PPOTrainer | None = None

    def on_train_begin(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer
        self._keep()

    def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._keep()

    def _keep(self) -> None:
        assert self.trainer is not None
        assert self.trainer.reference is not None
        mine = dict(tree_flatten(self.trainer.policy.model.trainable_parameters()))
        theirs = dict(tree_flatten(self.trainer.reference.model.parameters()))
        self.policy.append({name: np.array(x, dtype=np.float64) for name, x in mine.items()})
        self.reference.append({name: np.array(theirs[name], dtype=np.float64) for name in mine})


@pytest.mark.parametrize(("share", "every"), [(1.0, 1), (1.0, 3), (0.25, 1), (0.25, 2)])
@pytest.mark.parametrize("kind", ["lora", "full", "loaded"])
def test_the_reference_is_the_average_that_can_be_worked_out_by_hand(
    tmp_path: Path, adapter: Path, kind: str, share: float, every: int
) -> None:
    """After step k, where ``every`` divides k: share times the policy plus the rest of what it was."""
    options = {"full": {"fine_tune_type": "full"}, "loaded": {"adapter_path": str(adapter)}, "lora": {}}[kind]
    trainer = trainer_of(
        tmp_path, reference_sync_every=every, reference_mixup=share, batch_size=1, group_size=8, **options
    )
    untouched = {
        name: np.array(x)
        for name, x in tree_flatten(trainer.reference.model.parameters())
        if name not in dict(tree_flatten(trainer.policy.model.trainable_parameters()))
    }
    seen = Follow()
    trainer.train(["ab", "q", "x"], num_epochs=1, callbacks=[seen])
    trainer.train(["ab"], num_epochs=1, callbacks=[seen])  # the count goes on
    expected = seen.policy[0]
    steps = [0, 1, 2, 3, 3, 4]  # each training begins with a look
    for place, step in enumerate(steps):
        if place and step != steps[place - 1] and step % every == 0:
            policy = seen.policy[place]
            expected = {name: share * policy[name] + (1 - share) * x for name, x in expected.items()}
        for name, x in expected.items():
            np.testing.assert_allclose(seen.reference[place][name], x, atol=1e-6)
    assert max(np.abs(seen.policy[-1][n] - seen.policy[0][n]).max() for n in expected) > 1e-3
    now = dict(tree_flatten(trainer.reference.model.parameters()))
    for name, x in untouched.items():
        np.testing.assert_array_equal(np.array(now[name]), x)


@pytest.mark.parametrize("fine_tune_type", ["lora", "full"])
def test_a_reference_that_is_the_policy_again_says_what_it_says(tmp_path: Path, fine_tune_type: str) -> None:
    """Not only its parameters: the passes of the next step use them, so a first update has no KL."""
    trainer = trainer_of(tmp_path, reference_sync_every=1, fine_tune_type=fine_tune_type)
    base = says(trainer.policy)
    trainer.train(["ab", "q"], num_epochs=3)
    np.testing.assert_array_equal(says(trainer.reference), says(trainer.policy))
    assert far_apart(says(trainer.reference), base)
    assert [line["objective/kl"] for line in steps_of(trainer)] == [0, 0, 0]
    still = trainer_of(tmp_path, fine_tune_type=fine_tune_type)
    still.train(["ab", "q"], num_epochs=3)
    assert [line["objective/kl"] == 0 for line in steps_of(still)] == [True, False, False]


def test_it_follows_every_third_step_and_stays_in_between(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, reference_sync_every=3)
    trainer.train(["ab", "q"], num_epochs=7)
    zero = [line["objective/kl"] == 0 for line in steps_of(trainer)]
    assert zero == [True, False, False, True, False, False, True]


def test_half_of_a_policy_is_half_way(tmp_path: Path) -> None:
    """A bandit whose reference follows loses its anchor: it ends nearer to the best action than with a fixed one."""
    bandit = Bandit([0.0, 0.5], [1.0, 0.0])
    ends = []
    for options in ({}, {"reference_sync_every": 5, "reference_mixup": 0.5}):
        trainer = bandit.learn(tmp_path, "dr_grpo", kl_coef=1.0, steps=30, **options)
        ends.append(bandit.probabilities(trainer)[0])
    np.testing.assert_allclose(ends[0], bandit.optimum(1.0)[0], atol=0.03)
    assert ends[1] > ends[0] + 0.05


def test_a_given_reference_that_cannot_follow_is_refused_before_training(tmp_path: Path) -> None:
    """It has no adapter to be mixed with the policy's."""
    policy = PolicyModel(build_embedded(SMALLEST, seed=0), settings(tmp_path))
    with pytest.raises(ToolkitError, match="reference"):
        PPOTrainer(
            settings(tmp_path, reference_sync_every=1),
            reward_model=even_ids,
            policy=policy,
            reference=policy.frozen_copy(with_adapter=False),
        )


# What the run folder says of it --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"origin": "embedded, adapters off (a fresh one is 0)"}),
        ({"reference": "none"}, {"origin": "none"}),
        ({"reference": "base"}, {"origin": "embedded, adapters off"}),
        (
            {"fine_tune_type": "full"},
            {"origin": "embedded before the first update, a frozen copy of every weight"},
        ),
        (
            {"reference_sync_every": 4, "reference_mixup": 0.25},
            {
                "origin": "embedded before the first update, a frozen second adapter",
                "refreshed_every_steps": 4,
                "share_of_policy": 0.25,
            },
        ),
    ],
)
def test_the_run_folder_says_where_it_came_from(
    tmp_path: Path, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    trainer = trainer_of(tmp_path, **options)
    run = Path(trainer.train(["ab"], num_epochs=1)["run_folder"])
    assert json.loads((run / "config.json").read_text())["reference"] == expected


def test_it_names_paths_and_objects(tmp_path: Path, adapter: Path, other_model: Path) -> None:
    for path, words in ((adapter, "embedded with the adapter"), (other_model, "the model")):
        trainer = trainer_of(tmp_path, reference_path=str(path))
        run = Path(trainer.train(["ab"], num_epochs=1)["run_folder"])
        assert json.loads((run / "config.json").read_text())["reference"] == {"origin": f"{words} {path}"}


def steps_of(trainer: PPOTrainer) -> list[dict[str, Any]]:
    assert trainer.run_folder is not None
    return [line for line in read_metrics(trainer.run_folder / "metrics.jsonl") if "kind" not in line]
