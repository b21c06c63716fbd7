"""The reward model: one score for a whole answer, learned from comparisons."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from base_setup.lora_setup import prepare_trainable, restore_adapter, save_adapter
from base_setup.tokenizer_setup import answer_end_id, encode
from config.errors import CheckpointError, TrainingRuntimeError
from config.training_config import TrainingConfig
from models.policy_model import right_padded_lengths
from models.scalar_head import ScalarHead, load_head, require_trunk, save_head, trunk_width
from models.sft_model import LanguageModel, load_language_model, share_weights
from rewards.text_utils import prompt_text_of, text_of
from token_attribution.extractor import pad_sequences

HEAD, SETTINGS = "reward_head.safetensors", "reward_config.json"
KIND = "reward_model"


class RewardModel:
    """A scalar head on a language model, read at the last real token of prompt + answer.

    It is a reward function like any other: ``reward_model(prompts, completions, **columns)``. Scores leave it
    as ``gain · head + bias`` (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2), which
    :meth:`normalise` sets so that a sample of answers scores 0 on average with standard deviation 1.

    Attributes:
        module: what trains (adapters or weights, and the head, drawn from N(0, 1/(D+1))).
    """

    reward_name = "reward_model"

    def __init__(self, base: LanguageModel, config: TrainingConfig) -> None:
        self.base = base
        self.tokenizer = base.tokenizer
        self.config = config
        model = share_weights(base.model)
        self.description = prepare_trainable(model, config, base.tokenizer)
        model.eval()  # before anything is computed: dropout would tell the trunk's two halves from the whole
        self.trunk = require_trunk(model, "a reward model", checkpoint=config.gradient_checkpointing)
        width = trunk_width(self.trunk)
        self.module = ScalarHead(model, width, (width + 1) ** -0.5, mx.random.key(config.seed))
        self.module.eval()
        mx.eval(self.module.parameters())
        self.gain, self.bias = 1.0, 0.0
        self.batch_rows = 64

    def forward(self, input_ids: mx.array, attention_mask: mx.array | None = None) -> mx.array:
        """Scores ``(B,)`` float32 of right-padded rows ``(B, T)``, each read at its last real token."""
        lengths = right_padded_lengths(input_ids, attention_mask)
        return self.gain * self.raw_scores(input_ids, mx.array(lengths)) + self.bias

    def raw_scores(self, tokens: mx.array, lengths: mx.array) -> mx.array:
        """What the head says at position ``lengths - 1`` of each row: ``(B,)`` float32, before gain and bias."""
        states = self.trunk.hidden(tokens)  # (B, T, D)
        last = mx.take_along_axis(states, lengths[:, None, None] - 1, axis=1)[:, 0]  # (B, D)
        return self.module.head(last.astype(mx.float32))[:, 0]

    def score_ids(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Scores of token sequences, a batch at a time."""
        scores: list[float] = []
        for start in range(0, len(sequences), self.batch_rows):
            batch = sequences[start : start + self.batch_rows]
            tokens, _ = pad_sequences([s[:1] for s in batch], [s[1:] for s in batch])
            raw = self.raw_scores(tokens, mx.array([len(s) for s in batch]))
            scores += cast(list[float], (self.gain * raw + self.bias).tolist())
        return scores

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Score answers: their own tokens where given, else the texts, encoded and closed by an end token."""
        if prompt_ids is None or completion_ids is None:
            return self.score_texts(
                [prompt_text_of(prompt) for prompt in prompts], [text_of(text) for text in completions]
            )
        return self.score_ids([[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)])

    def score_texts(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Score texts, each answer closed by the tokenizer's end token."""
        end = answer_end_id(self.tokenizer)
        return self.score_ids(
            [
                [*encode(self.tokenizer, p, special=True), *encode(self.tokenizer, c), end]
                for p, c in zip(prompts, completions, strict=True)
            ]
        )

    def for_tokenizer(self, tokenizer: TokenizerWrapper) -> Callable[..., list[float]]:
        """A reward for answers in ``tokenizer``'s ids: this model itself, or a reader of texts where ids differ."""
        if tokenizer.get_vocab() == self.tokenizer.get_vocab():
            return self

        def reward_model(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
            return self.score_texts(
                [prompt_text_of(prompt) for prompt in prompts], [text_of(text) for text in completions]
            )

        return reward_model

    def normalise(self, sequences: Sequence[Sequence[int]]) -> None:
        """Set gain and bias so that these sequences score mean 0 and standard deviation 1.

        Raises:
            TrainingRuntimeError: a score is not finite.
        """
        self.gain, self.bias = 1.0, 0.0
        raw = mx.array(self.score_ids(sequences))
        check_finite(np.array(raw))
        spread = float(mx.std(raw))
        self.gain = 1.0 / spread if spread > 0 else 1.0
        self.bias = -float(mx.mean(raw)) * self.gain

    def save(self, folder: str | Path, kind: str = KIND, **settings: Any) -> None:
        """Write adapter, head and settings; :meth:`load` needs nothing else but the base model.

        ``kind`` says what reads the folder, and ``settings`` are its own.
        """
        folder = Path(folder)
        save_adapter(self.module.model, self.description, folder)
        save_head(self.module.head, folder / HEAD)
        settings = {"kind": kind, **settings, "gain": self.gain, "bias": self.bias}
        settings["config"] = self.config.as_dict()
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def restore(self, folder: str | Path) -> None:
        """Read what :meth:`save` wrote for the same base model into this one."""
        folder = Path(folder)
        restore_adapter(self.module.model, self.description, folder)
        load_head(self.module.head, folder / HEAD)
        _, self.gain, self.bias = _read_config(folder, read_settings(folder))

    @classmethod
    def load(cls, folder: str | Path, base: LanguageModel | None = None) -> RewardModel:
        """Read what :meth:`save` wrote; ``base`` spares loading the base model again.

        Raises:
            CheckpointError: in a sentence, where the folder is not one of a reward model for whole answers.
        """
        settings = read_settings(folder)
        if settings.get("kind", KIND) != KIND:
            raise CheckpointError(
                f"{folder}: a {str(settings['kind']).replace('_', ' ')}, whose head is read at the end of each step; "
                "load it with ProcessRewardModel.load"
            )
        return cls.restored(folder, settings, base)

    @classmethod
    def restored(
        cls, folder: str | Path, settings: Mapping[str, Any], base: LanguageModel | None
    ) -> RewardModel:
        """Trunk and head of a folder whose settings have been read, whatever is made of them."""
        folder = Path(folder)
        config, gain, bias = _read_config(folder, settings)
        # The folder's own adapter, whose rank and scale need not be the config's: it may have begun elsewhere.
        model = cls(base or load_language_model(config), config.replace(adapter_path=str(folder)))
        model.config = config
        load_head(model.module.head, folder / HEAD)
        model.gain, model.bias = gain, bias
        return model


def check_finite(scores: np.ndarray) -> None:
    """Refuse scores that say nothing of the answers.

    Raises:
        TrainingRuntimeError: one is not a finite number.
    """
    bad = int(np.sum(~np.isfinite(scores)))
    if bad:
        raise TrainingRuntimeError(
            f"the reward model's scores of {bad} of {scores.size} answers are not finite: its weights have diverged; "
            "lower learning_rate"
        )


def read_settings(folder: str | Path) -> dict[str, Any]:
    """What a saved reward model says of itself.

    Raises:
        CheckpointError: where there is no such file, or none that can be read.
    """
    try:
        settings = json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no readable {SETTINGS} of a reward model ({error})") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{folder}: no readable {SETTINGS} of a reward model (an object is expected)")
    return settings


def _read_config(folder: str | Path, settings: Mapping[str, Any]) -> tuple[TrainingConfig, float, float]:
    """Config, gain and bias of a saved reward model."""
    try:
        # A file gives neither consent nor a run to go on from.
        known = TrainingConfig.__dataclass_fields__.keys() - {"trust_remote_code", "output_dir", "resume"}
        config = TrainingConfig(**{k: v for k, v in settings["config"].items() if k in known})
        return config, float(settings["gain"]), float(settings["bias"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: no readable {SETTINGS} of a reward model ({error})") from error
