"""Published reward models: a trunk that mlx-lm knows and a head that it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from config.errors import InvalidConfigurationError, ModelLoadError
from models.sequence_classifier import SequenceClassifier, is_classifier
from models.sft_model import LanguageModel, save_language_model


@pytest.fixture
def checkpoint(tmp_path: Path, tiny: LanguageModel) -> Callable[..., Path]:
    """A folder as transformers would have written it: no vocabulary head, ``score.weight`` instead."""

    def write(labels: int = 1, drop: str = "") -> Path:
        folder = tmp_path / f"rm{labels}{drop}"
        save_language_model(tiny, folder)
        file = folder / "model.safetensors"
        weights: dict[str, mx.array] = dict(mx.load(str(file)))  # type: ignore[arg-type]
        mx.eval(weights)
        width = tiny.config["hidden_size"]
        weights["score.weight"] = mx.random.normal((labels, width), key=mx.random.key(5))
        weights = {name: x for name, x in weights.items() if not drop or drop not in name}
        mx.save_safetensors(str(file), weights)
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = ["Qwen3ForSequenceClassification"]
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


def test_the_score_is_the_head_at_the_last_token(
    checkpoint: Callable[..., Path], tiny: LanguageModel
) -> None:
    folder = checkpoint()
    assert is_classifier(folder)
    model = SequenceClassifier.load(folder)
    head = mx.random.normal((1, tiny.config["hidden_size"]), key=mx.random.key(5))
    prompts, completions = ["a question", "b"], ["an answer", "c"]
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        turn = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{completion}<|im_end|>\n"
        ids = tiny.tokenizer.encode(turn, add_special_tokens=False)
        states: Any = tiny.model.model(mx.array([ids]))  # type: ignore[operator]
        expected.append(float(mx.sum(states[0, -1] * head[0])))
    np.testing.assert_allclose(model(prompts, completions), expected, rtol=1e-4, atol=1e-5)
    messages = [{"role": "user", "content": "a question"}]
    [said] = model([messages], [[{"role": "assistant", "content": "an answer"}]])
    assert said == pytest.approx(expected[0], rel=1e-4, abs=1e-5)


def test_checkpoints_that_will_not_do(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"head with one label .*found one of shape \(3,"):
        SequenceClassifier.load(checkpoint(labels=3))
    with pytest.raises(ModelLoadError, match="found none"):
        SequenceClassifier.load(checkpoint(drop="score"))
    with pytest.raises(ModelLoadError, match=r"lacks \d+ weights of a qwen3, model\.layers"):
        SequenceClassifier.load(checkpoint(drop="layers.1"))
    assert not is_classifier(tmp_path / "nowhere")


def test_a_run_learns_from_it(checkpoint: Callable[..., Path], make_config: Callable[..., Any]) -> None:
    from config.ppo_config import PPOConfig
    from ppo_trainer.ppo_trainer import PPOTrainer

    folder = checkpoint()
    config = make_config(
        PPOConfig, algorithm="grpo", group_size=2, max_new_tokens=3, batch_size=1, verbose=False,
        output_dir=str(folder.parent / "run"), log_samples_every=1,
    )  # fmt: skip
    trainer = PPOTrainer(config, reward_model=[{"name": f"learned:{folder}", "weight": 2.0}, "default"])
    metrics = trainer.train(["a"], num_epochs=1)
    assert trainer.rewards.names == ["reward_model", "well_formed"]
    assert trainer.rewards.weights == [2.0, 1.0]
    sample = json.loads((folder.parent / "run" / "samples.jsonl").read_text().splitlines()[0])
    [again] = SequenceClassifier.load(folder)([sample["prompt"]], [sample["completion"]])
    assert sample["components"]["reward_model"] == pytest.approx(again, rel=1e-4, abs=1e-5)
    assert metrics["rewards/reward_model/applied"] == 1.0
    with pytest.raises(InvalidConfigurationError, match="score_while_decoding"):
        PPOTrainer(
            config.replace(score_while_decoding=True, output_dir=str(folder.parent / "run2")),
            reward_model=f"learned:{folder}",
        )
