"""Answers to prompts: many side by side, or one as it comes.

Both draw from the same distribution with the same random numbers, so that ``--stream`` shows what a batch writes:

    logits → + bias → repetition, presence, frequency penalty → XTC → / temperature → top-k → top-p → min-p

A token is drawn by inverse transform from the numbers of (seed, prompt, member), as in rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.generate import stream_generate
from mlx_lm.sample_utils import apply_xtc, make_logits_processors

from base_setup.tokenizer_setup import end_token_ids
from config.decoding_config import DecodingConfig
from config.errors import InvalidConfigurationError
from models.decoding import complete
from models.sampling import FLOAT32_MAX, Sampling, draw, sampling_weights, uniforms_for
from models.sft_model import LanguageModel, vocabulary_size

ROWS = 64  # completions decoded side by side
COLDEST = 1e-5  # logits divided by less can be infinite, and infinities have no order


class Answer(NamedTuple):
    """One completion."""

    text: str
    ids: tuple[int, ...]  # the end token included
    finish: str  # "stop" or "length"


class Piece(NamedTuple):
    """A few letters of an answer as it comes; ``ids`` and ``finish`` are of the whole one, with the last piece."""

    text: str
    ids: tuple[int, ...] = ()
    finish: str | None = None
    tokens_per_second: float = 0.0


def check_decoding(base: LanguageModel, how: DecodingConfig) -> None:
    """Refuse a bias on tokens that the model has not, and numbers whose results float32 does not hold.

    Raises:
        InvalidConfigurationError: naming the option and what was found.
    """
    if 0 < how.temperature < COLDEST:
        raise InvalidConfigurationError(
            f"temperature: 0 (the likeliest token) or at least {COLDEST} is expected, found {how.temperature}"
        )
    size = vocabulary_size(base.model, base.config)
    for token, bias in (how.logit_bias or {}).items():
        if not 0 <= token < size:
            raise InvalidConfigurationError(
                f"logit_bias: token ids from 0 to {size - 1} are expected, found {token}"
            )
        if not bias <= FLOAT32_MAX:  # NaN too
            raise InvalidConfigurationError(
                f"logit_bias: a finite number or -inf is expected for token {token}, found {bias}"
            )


def generate(
    base: LanguageModel, prompts: Sequence[Sequence[int]], how: DecodingConfig, *, members: int = 1
) -> list[Answer]:
    """``members`` answers to each prompt, prompt by prompt.

    Args:
        prompts: token ids, none empty.
    """
    check_decoding(base, how)
    if _needs_one_by_one(how):
        return [
            answer_to(base, ids, how, prompt=i, member=m)
            for i, ids in enumerate(prompts)
            for m in range(members)
        ]
    rows = [(i, m) for i in range(len(prompts)) for m in range(members)]
    uniforms = [uniforms_for(how.seed, 0, i, m, how.max_tokens) for i, m in rows]
    completions = complete(
        base.model,
        prompts,
        [i for i, _ in rows],
        np.stack(uniforms),
        end_ids=end_token_ids(base.tokenizer),
        max_new_tokens=how.max_tokens,
        sampling=_sampling(how),
        max_rows=ROWS,
    )
    return [
        Answer(
            base.tokenizer.decode(one.ids, skip_special_tokens=True),
            tuple(one.ids),
            "stop" if one.terminated else "length",
        )
        for one in completions
    ]


def answer_to(
    base: LanguageModel, ids: Sequence[int], how: DecodingConfig, *, prompt: int = 0, member: int = 0
) -> Answer:
    """One answer, decoded by itself."""
    *_, last = stream(base, ids, how, prompt=prompt, member=member)
    text = base.tokenizer.decode(list(last.ids), skip_special_tokens=True)
    return Answer(text, last.ids, last.finish or "length")


def stream(
    base: LanguageModel,
    ids: Sequence[int],
    how: DecodingConfig,
    *,
    prompt: int = 0,
    member: int = 0,
    cache: list[Any] | None = None,
    seen: Sequence[int] = (),
) -> Iterator[Piece]:
    """One answer as it comes.

    Args:
        ids: the prompt's tokens; with ``cache``, those that it has not seen yet.
        prompt, member: which random numbers, see ``uniforms_for``. cache: mlx-lm's, of what stands before.
        seen: the tokens that the cache holds, for penalties to look at.
    """
    tokens: list[int] = []
    for response in stream_generate(
        base.model,
        base.tokenizer,
        mx.array(list(ids)),
        max_tokens=how.max_tokens,
        sampler=_sampler(base, how, uniforms_for(how.seed, 0, prompt, member, how.max_tokens)),
        logits_processors=_processors(how, seen),
        prompt_cache=cache,
    ):
        # The last response names its token a second time, unless it is the one that ended the answer.
        if response.generation_tokens > len(tokens):
            tokens.append(response.token)
        yield Piece(response.text, tuple(tokens), response.finish_reason, response.generation_tps)


# Samplers ------------------------------------------------------------------------------------------------


def _needs_one_by_one(how: DecodingConfig) -> bool:
    """What mlx-lm has for one answer at a time and the batch has not."""
    return bool(how.presence_penalty or how.frequency_penalty or how.xtc_probability)


def _sampling(how: DecodingConfig) -> Sampling:
    return Sampling(
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        min_p=how.min_p,
        logit_bias=tuple(sorted((how.logit_bias or {}).items())),
        repetition_penalty=how.repetition_penalty,
        repetition_context=how.penalty_context,
    )


def _processors(how: DecodingConfig, seen: Sequence[int] = ()) -> list[Any]:
    """mlx-lm's, which would see no token of the cache; it hands them those that it read and drew itself."""
    processors: list[Any] = make_logits_processors(
        how.logit_bias,
        how.repetition_penalty if how.repetition_penalty != 1 else None,
        how.penalty_context,
        how.presence_penalty or None,
        how.penalty_context,
        how.frequency_penalty or None,
        how.penalty_context,
    )
    if not seen:
        return processors
    past = mx.array(list(seen[-how.penalty_context :]))
    return [partial(_with_past, past, one) for one in processors]


def _with_past(past: mx.array, processor: Any, tokens: mx.array, logits: mx.array) -> mx.array:
    processed: mx.array = processor(mx.concatenate([past, tokens.astype(past.dtype)]), logits)
    return processed


def _sampler(
    base: LanguageModel, how: DecodingConfig, uniforms: np.ndarray
) -> Callable[[mx.array], mx.array]:
    """mlx-lm's kind: (1, V) log-probabilities to (1,) token. It is called once per token, in order."""
    sampling = _sampling(how)
    if how.xtc_probability:
        mx.random.seed(how.seed)  # XTC throws its coin from the global state
    spared = [*end_token_ids(base.tokenizer), *base.tokenizer.encode("\n", add_special_tokens=False)]
    column = 0

    def sampler(logprobs: mx.array) -> mx.array:
        nonlocal column
        if how.xtc_probability:
            logprobs = apply_xtc(logprobs, how.xtc_probability, how.xtc_threshold, spared)
        if how.temperature == 0:
            return mx.argmax(logprobs, axis=-1)
        uniform = float(
            uniforms[min(column, len(uniforms) - 1)]
        )  # mlx-lm launches one step more than it takes
        column += 1
        return draw(sampling_weights(logprobs, sampling), mx.array([uniform]))[0]

    return sampler
