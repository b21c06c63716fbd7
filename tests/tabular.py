"""A language model that is a table: the logits of the next token are a row of numbers chosen by the last token.

Everything about it can be worked out with pencil and paper, and a whole run of the trainer takes a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from base_setup.tokenizer_setup import byte_tokenizer
from config.ppo_config import PPOConfig
from models.sft_model import LanguageModel
from ppo_trainer.ppo_trainer import PPOTrainer

NEVER = -30.0  # logit of a token that is not among the actions: a probability of 1e-13


class _LastToken(nn.Module):
    """Hidden states that say which token was last."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self._one_hot = mx.eye(size, width)  # the underscore keeps it out of the parameters

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        return self._one_hot[tokens]


class Table(nn.Module):
    """``lm_head.weight[v, u]`` is the logit of token v after token u: all there is to train."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.model = _LastToken(*logits.shape)
        self.lm_head = nn.Linear(*logits.shape, bias=False)
        self.lm_head.weight = mx.array(logits, dtype=mx.float32)
        self.layers: list[nn.Module] = []

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        return self.lm_head(self.model(tokens))


def token_id(character: str) -> int:
    """The byte tokenizer's id of one character."""
    (found,) = byte_tokenizer().encode(character, add_special_tokens=False)
    return int(found)


def table_model(
    logits: Mapping[str, Sequence[float]], actions: str, *, elsewhere: float = 0.0, seed: int = 0
) -> LanguageModel:
    """A table in which ``logits[u]`` are the logits of ``actions`` after the character u.

    After any other character they are drawn from N(0, ``elsewhere``²). Its width is a multiple of 64, so that it
    can be quantised.
    """
    plain = byte_tokenizer()
    tokenizer = TokenizerWrapper(plain, eos_token_ids=[plain.eos_token_id])
    size = len(plain)
    width = -(-size // 64) * 64
    table = np.full((size, width), NEVER)
    random = np.random.default_rng(seed)
    for action in actions:
        table[token_id(action)] = elsewhere * random.normal(size=width)
    for before, row in logits.items():
        for action, logit in zip(actions, row, strict=True):
            table[token_id(action), token_id(before)] = logit
    return LanguageModel(Table(table), tokenizer, {"vocab_size": size, "model_type": "table"}, "table")


def action_probabilities(model: nn.Module, before: str, actions: str) -> np.ndarray:
    """Softmax over the whole vocabulary, at ``actions``."""
    logits = np.array(model(mx.array([[token_id(before)]])))[0, 0].astype(np.float64)
    probabilities = np.exp(logits - logits.max())
    return (probabilities / probabilities.sum())[[token_id(action) for action in actions]]


class Bandit:
    """One prompt, answers of one token, a score for each: a run of the trainer whose end can be written down."""

    actions = "uvwxyz"

    def __init__(self, reference: Sequence[float], scores: Sequence[float]) -> None:
        """``reference``: logits of the first policy; ``scores``: one for each action."""
        self.reference = np.array(reference)
        self.scores = np.array(scores)
        self.actions = Bandit.actions[: len(reference)]

    def reward(self, completions: Sequence[str], **columns: Any) -> list[float]:
        """The score of the action; 0 for anything else."""
        table = dict(zip(self.actions, self.scores.tolist(), strict=True))
        return [table.get(text, 0.0) for text in completions]

    def optimum(self, beta: float) -> np.ndarray:
        """The policy of largest E[score] - beta KL: ref exp(score / beta) / Z."""
        logits = self.reference + self.scores / beta
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    def learn(
        self, folder: Path, algorithm: str, steps: int = 70, elsewhere: float = 0.0, **options: Any
    ) -> PPOTrainer:
        """The trainer after ``steps`` batches of 128 answers."""
        config = PPOConfig(
            algorithm=algorithm,
            model_name="embedded",
            fine_tune_type="full",
            output_dir=str(folder / f"run-{len(list(folder.iterdir()))}"),
            verbose=False,
            log_samples_every=0,
            **{
                "max_new_tokens": 1,
                "batch_size": 1,
                "group_size": 128,
                "learning_rate": 0.2,
                "lr_schedule": "linear",
                "gamma": 1.0,
                "num_epochs_per_rollout": 1,
                "dynamic_sampling": False,
                "overlong_buffer": 0.0,
                "max_grad_norm": None,
                **options,
            },
        )
        model = table_model({"?": self.reference.tolist()}, self.actions, elsewhere=elsewhere)
        trainer = PPOTrainer(config, model=model, reward_model=self.reward)
        trainer.train(["?"], num_epochs=steps)
        return trainer

    def probabilities(self, trainer: PPOTrainer) -> np.ndarray:
        """What the trained policy does."""
        return action_probabilities(trainer.policy.model, "?", self.actions)
