"""Reward models as Hugging Face publishes them: ``…ForSequenceClassification`` checkpoints with one label.

mlx-lm has no such architectures. Their trunk is that of the language model of the same type, though, which mlx-lm
loads; the head is one matrix beside it (``score.weight``), which is read here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, load_tokenizer

from base_setup.parameters import named_arrays
from base_setup.tokenizer_setup import encode
from base_setup.untrusted import check_model_folder
from config.errors import ModelLoadError
from models.scalar_head import require_trunk
from rewards.text_utils import prompt_text_of, text_of
from token_attribution.extractor import pad_sequences
from token_attribution.trunk import Trunk

HEADS = ("score.weight", "classifier.weight", "v_head.weight")


def is_classifier(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint that says it is a sequence classifier."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return any("ForSequenceClassification" in name for name in config.get("architectures") or ())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


class SequenceClassifier:
    """Scores prompt + answer with a published reward model: its head at the last token, in float32.

    A reward like any other. The conversation goes through the checkpoint's chat template where it has one; a prompt
    that is a text is the user's only message then. Without a template, prompt and answer are joined as they are.
    """

    reward_name = "reward_model"

    def __init__(
        self, trunk: Trunk, head: mx.array, tokenizer: TokenizerWrapper, batch_rows: int = 16
    ) -> None:
        """``head``: ``(1, D)``."""
        self.trunk = trunk
        self.head = head.astype(mx.float32)
        self.tokenizer = tokenizer
        self.batch_rows = batch_rows

    @classmethod
    def load(cls, folder: str | Path) -> SequenceClassifier:
        """Read a checkpoint folder (``config.json``, ``*.safetensors``, tokenizer).

        Raises:
            ModelLoadError: in a sentence, where something of it is missing or it has more than one label.
        """
        folder = Path(folder)
        check_model_folder(folder, trust_remote_code=False, field="reward")
        try:
            model, config = load_model(folder, lazy=True, strict=False)
            tokenizer = load_tokenizer(folder, {"trust_remote_code": False})
            weights: dict[str, mx.array] = {}
            for file in sorted(folder.glob("model*.safetensors")):
                weights |= cast(dict[str, mx.array], mx.load(str(file)))
        except Exception as error:  # mlx-lm, transformers and MLX each raise their own kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelLoadError(
                f"{folder}: the reward model could not be loaded ({type(error).__name__}: {reason})"
            ) from error
        head = next((weights[name] for name in HEADS if name in weights), None)
        if head is None or head.ndim != 2 or head.shape[0] != 1:
            found = "none" if head is None else f"one of shape {tuple(head.shape)}"
            raise ModelLoadError(
                f"{folder}: a reward model has a head with one label ({' or '.join(HEADS)}, shape (1, D)), "
                f"found {found}"
            )
        sanitized = model.sanitize(dict(weights)) if hasattr(model, "sanitize") else weights
        missing = sorted(
            name
            for name in named_arrays(model.parameters())
            if name not in sanitized and "lm_head" not in name
        )
        if missing:  # strict=False, which the absent vocabulary head needs, would leave them random
            raise ModelLoadError(
                f"{folder}: the checkpoint lacks {len(missing)} weights of a {config.get('model_type')}, "
                f"{missing[0]} the first; give the folder of a whole one"
            )
        model.eval()
        return cls(require_trunk(model, "a reward model"), head, tokenizer)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """One score per completion."""
        return self.score_ids([self.ids(p, c) for p, c in zip(prompts, completions, strict=True)])

    def ids(self, prompt: Any, completion: Any) -> list[int]:
        """The tokens that are read for a prompt and its answer."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            whole = prompt_text_of(prompt) + text_of(completion)
            return encode(self.tokenizer, whole, special=True)
        # As for prompts: control tokens that a text spells out stay text.
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        turns.append({"role": "assistant", "content": text_of(completion)})
        ids = self.tokenizer.apply_chat_template(turns, tokenize=True, sanitize_control_tokens=True)
        return list(ids["input_ids"] if isinstance(ids, dict) else ids)

    def score_ids(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Scores of token sequences, a batch at a time; the head is read at each one's last token."""
        scores: list[float] = []
        for start in range(0, len(sequences), self.batch_rows):
            batch = sequences[start : start + self.batch_rows]
            tokens, _ = pad_sequences([s[:1] for s in batch], [s[1:] for s in batch])
            states = self.trunk.hidden(tokens)  # (B, T, D)
            last = mx.array([len(s) - 1 for s in batch])[:, None, None]
            states = mx.take_along_axis(states, last, axis=1)[:, 0].astype(mx.float32)  # (B, D)
            scores += cast(list[float], (states @ self.head.T)[:, 0].tolist())
        return scores
