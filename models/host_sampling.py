"""The distribution of ``models.sampling`` and its draw in NumPy, for machines whose accelerator is the host itself.

MLX's elementwise kernels are scalar on CPU: an exponential costs it 13 to 20 ns, NumPy 1 ns, and with a vocabulary
of 32 000 the draw took longer than the model. Evaluated arrays are read where they lie, without a copy. Threads
gained nothing: a draw for 32 rows of 32 768 logits takes 0.8 ms, a few hundredths of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from models.sampling import Sampling, bias_vector, recent_tokens

_BLOCK = 256  # columns summed as one before anybody looks at them singly
_CHUNK = 1 << 18  # weights computed at a time: 1 MB stays in a core's own cache


def host_view(x: mx.array) -> np.ndarray:
    """The values of an array as float32: its own memory where that is float32 already. Waits for them."""
    return np.array(x.astype(mx.float32), copy=False)


class HostSampler:
    """Draws on the host, at once; one for all the rows of a call, which are named by their numbers."""

    lag = 0  # a step is read before the next one is launched: it is known by then

    def __init__(
        self, sampling: Sampling, tails: Sequence[Sequence[int]], vocabulary: int, uniforms: np.ndarray
    ) -> None:
        """``tails``: each row's prompt; ``uniforms``: ``(rows, columns)``."""
        self.sampling, self.uniforms = sampling, uniforms
        self.bias = bias_vector(sampling, vocabulary)
        self.recent = recent_tokens(sampling, tails) if sampling.repetition_penalty != 1 else None  # (B, R)
        width = -(-vocabulary // _BLOCK) * _BLOCK
        # Columns past the vocabulary stay 0 and are never drawn.
        self._weights = np.zeros((max(1, _CHUNK // width), width), dtype=np.float32)
        self._vocabulary = vocabulary

    def draw(self, logits: mx.array, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ``columns[i]`` of row ``rows[i]`` from ``logits[i]``: ids and logprobs, each ``(n,)``."""
        z = host_view(logits)  # (n, V)
        tokens = np.empty(len(rows), dtype=np.int32)
        logprobs = np.zeros(len(rows), dtype=np.float32)
        uniforms = self.uniforms[rows, columns]
        size = len(self._weights)
        with np.errstate(invalid="ignore", divide="ignore"):  # NaN logits stay NaN logprobs, as in MLX
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                adjusted = self._adjusted(z[part], rows[part])
                if self.sampling.temperature == 0:
                    tokens[part] = np.argmax(adjusted, axis=1)
                else:
                    weights = self._weights[: len(adjusted)]
                    weigh(adjusted, self.sampling, out=weights[:, : self._vocabulary])
                    tokens[part], logprobs[part] = draw_blocks(weights, uniforms[part])
        if self.recent is not None:  # the oldest gives way
            self.recent[rows, columns % self.recent.shape[1]] = tokens
        return tokens, logprobs

    def _adjusted(self, z: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if self.bias is not None:
            z = z + self.bias
        if self.recent is not None:
            z = z.copy()
            recent = self.recent[rows]
            chosen = np.take_along_axis(z, recent, axis=1)  # (n, R)
            penalty = np.float32(self.sampling.repetition_penalty)
            np.put_along_axis(z, recent, np.where(chosen > 0, chosen / penalty, chosen * penalty), axis=1)
        return z


def weigh(logits: np.ndarray, sampling: Sampling, out: np.ndarray) -> None:
    """``models.sampling.sampling_weights`` of float32 ``logits`` ``(n, V)``, written to ``out`` of that shape."""
    np.multiply(logits, np.float32(1.0 / sampling.temperature), out=out)
    out -= out.max(axis=1, keepdims=True)
    np.exp(out, out=out)
    vocabulary = out.shape[1]
    if 0 < sampling.top_k < vocabulary:
        at = vocabulary - sampling.top_k
        kth = np.partition(out, at, axis=1)[:, at : at + 1]
        out[out < kth] = 0
    if sampling.top_p < 1:
        ascending = np.sort(out, axis=1)
        descending_mass = np.cumsum(ascending[:, ::-1], axis=1, dtype=np.float64)
        mass_above = descending_mass[:, ::-1] - ascending  # of the likelier ones
        dropped = (mass_above >= sampling.top_p * descending_mass[:, -1:]).sum(axis=1, keepdims=True)
        out[out < np.take_along_axis(ascending, dropped, axis=1)] = 0
    if sampling.min_p > 0:
        out[out < np.float32(sampling.min_p)] = 0


def draw_blocks(weights: np.ndarray, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``models.sampling.draw``, its cumulative sums over blocks first and then in the one block that is hit.

    Sums of blocks are float32, which adds pairs of pairs and so loses little; what is summed along the vocabulary is
    float64. The token has a weight: a cumulative sum passes the target only where something is added to it.

    Args:
        weights: ``(n, V)`` float32, V a multiple of 256. uniforms: ``(n,)`` in [0, 1).
    Returns:
        tokens ``(n,)`` int64 and their logprobs ``(n,)`` float64.
    """
    every = np.arange(len(weights))
    blocks = weights.reshape(len(weights), -1, _BLOCK)
    cumulative = np.cumsum(blocks.sum(axis=2), axis=1, dtype=np.float64)  # (n, V / 256)
    total = cumulative[:, -1]
    target = uniforms.astype(np.float64) * total  # below the total, u being a float32 below 1
    hit = (cumulative <= target[:, None]).sum(axis=1)
    before = np.where(hit > 0, cumulative[every, hit - 1], 0.0)
    inside = np.cumsum(blocks[every, hit], axis=1, dtype=np.float64)  # (n, 256)
    # How far into the block, of its float64 sum, and short of its end whatever was rounded on the way.
    share = (target - before) / (cumulative[every, hit] - before)
    place = np.minimum(share * inside[:, -1], np.nextafter(inside[:, -1], 0.0))
    tokens = hit * _BLOCK + (inside <= place[:, None]).sum(axis=1)
    return tokens, np.log(weights[every, tokens] / total)
