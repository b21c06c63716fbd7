"""AdamW whose two moments are kept in 8 bits each, in blocks of 256 numbers with one scale per block.

After Dettmers et al. 2022 (8-bit optimizers via block-wise quantization, https://arxiv.org/abs/2110.02861): per
parameter 2.03 bytes of state in place of 8. The step itself is computed from float32 moments; only what is kept
from one step to the next is coded.

The code. A linear one would make most second moments of a block 0 and their steps infinite. Here a level q of
Q = 127 (first moment, with a sign) or 255 (second) stands for

    m = (q / 127)² · scale        v = (q / 255)⁴ · scale        scale = the block's largest

so that within a block the root of v reaches from 1 down to 1.5e-5 with a relative precision of 2/q. The second
moment is never coded as 0, so small numbers make small steps.

The rounding. The second moment moves by a thousandth per step (beta 2 = 0.999), levels lie some hundredths apart:
to the nearest level it would never move at all. So a number between two levels becomes one of them with the
probability that makes its expectation exact. The probability is compared with a sequence that fills [0, 1) evenly
in time for each number (multiples of the golden ratio), which has less noise than a random generator, needs no
state but the step's count, and is the same after a restart.
"""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

BLOCK = 256  # numbers that share a scale
CHUNK = 1 << 20  # numbers worked on at a time: what is alive in float32 beside weight and gradient
SMALLEST = 4096  # arrays of fewer numbers keep float32 moments: norms, biases, heads of one output
LEAST_SCALE = 1e-30  # below it a moment is lost beside epsilon, and its inverse would overflow

_FIRST, _SECOND = 127, 255  # levels
#: Odd numbers near 2³² over the golden ratio and its like in more dimensions: their multiples fill [0, 2³²) evenly.
_IN_TIME, _IN_BLOCK, _OVER_BLOCKS = 2654435769, 3242174889, 2447445413


class BlockwiseAdamW(optim.AdamW):
    """``mlx.optimizers.AdamW`` with moments in 8 bits; ``state`` is a tree of arrays, as there.

    A large parameter's state is ``m``, ``v`` (lists of int8 and uint8 arrays, ``CHUNK`` numbers each) and
    ``m_scale``, ``v_scale`` (lists of float32, one number per block). It is evaluated as it goes, chunk by
    chunk, so it must not be called inside a compiled function.
    """

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        """Moments of zero."""
        if parameter.size < SMALLEST:
            super().init_single(parameter, state)
            return
        counts = [_blocks(min(CHUNK, parameter.size - start)) for start in range(0, parameter.size, CHUNK)]
        state["m"] = [mx.zeros((count, BLOCK), mx.int8) for count in counts]
        state["v"] = [mx.zeros((count, BLOCK), mx.uint8) for count in counts]
        state["m_scale"] = [mx.zeros((count, 1)) for count in counts]
        state["v_scale"] = [mx.zeros((count, 1)) for count in counts]

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        """The new parameter; its moments are written into ``state``."""
        if parameter.size < SMALLEST:
            new: mx.array = super().apply_single(gradient, parameter, state)
            return new
        dither_of = _even_sequence(self.step)
        flat_gradient, flat, parts = gradient.reshape(-1), parameter.reshape(-1), []
        for i, start in enumerate(range(0, parameter.size, CHUNK)):
            part, g = flat[start : start + CHUNK], flat_gradient[start : start + CHUNK]
            moments: dict[str, Any] = {
                "m": decode_first(state["m"][i], state["m_scale"][i]).reshape(-1)[: part.size],
                "v": decode_second(state["v"][i], state["v_scale"][i]).reshape(-1)[: part.size],
            }
            parts.append(super().apply_single(g, part, moments))
            dither = dither_of(len(state["m"][i]), start // BLOCK)
            state["m"][i], state["m_scale"][i] = encode_first(_in_blocks(moments["m"]), dither)
            state["v"][i], state["v_scale"][i] = encode_second(_in_blocks(moments["v"]), dither)
            # Now, or the float32 numbers of all chunks would be alive together.
            mx.eval(parts[-1], [state[name][i] for name in ("m", "m_scale", "v", "v_scale")])
        return (mx.concatenate(parts) if len(parts) > 1 else parts[0]).reshape(parameter.shape)


def encode_first(x: mx.array, dither: mx.array) -> tuple[mx.array, mx.array]:
    """Blocks ``(N, BLOCK)`` as signed levels, int8, and scales ``(N, 1)``; ``dither`` in [0, 1), like ``x``."""
    size = mx.abs(x)
    scale = mx.maximum(mx.max(size, axis=1, keepdims=True), LEAST_SCALE)  # (N, 1)
    exact = size * (_FIRST**2 / scale)  # (N, BLOCK), in units of the smallest level
    below = _whole(mx.sqrt(exact))
    square = mx.square(below)
    up = dither * (2 * below + 1) < exact - square  # the next level is (below + 1)² = square + 2·below + 1
    level = mx.minimum(below + up, _FIRST)
    return (level * mx.sign(x)).astype(mx.int8), scale


def decode_first(level: mx.array, scale: mx.array) -> mx.array:
    """What ``encode_first`` coded, ``(N, BLOCK)`` float32."""
    level = level.astype(mx.float32)
    return level * mx.abs(level) * (scale * (1 / _FIRST**2))


def encode_second(x: mx.array, dither: mx.array) -> tuple[mx.array, mx.array]:
    """Blocks of numbers from 0 up as levels from 1 up, uint8, and scales ``(N, 1)``."""
    scale = mx.maximum(mx.max(x, axis=1, keepdims=True), LEAST_SCALE)  # (N, 1)
    exact = x * (_SECOND**4 / scale)  # (N, BLOCK)
    below = _whole(mx.sqrt(mx.sqrt(exact)))
    fourth = mx.square(mx.square(below))
    up = dither * (mx.square(mx.square(below + 1)) - fourth) < exact - fourth
    return mx.clip(below + up, 1, _SECOND).astype(mx.uint8), scale


def decode_second(level: mx.array, scale: mx.array) -> mx.array:
    """What ``encode_second`` coded, ``(N, BLOCK)`` float32."""
    return mx.square(mx.square(level.astype(mx.float32))) * (scale * (1 / _SECOND**4))


def _whole(x: mx.array) -> mx.array:
    """Rounded down, for 0 ≤ x < 256: on CPU a sixth of the price of ``mx.floor``."""
    return x.astype(mx.uint8).astype(mx.float32)


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _in_blocks(x: mx.array) -> mx.array:
    """A flat array as ``(N, BLOCK)``, the last block filled up with zeros."""
    missing = -x.size % BLOCK
    return (mx.pad(x, (0, missing)) if missing else x).reshape(-1, BLOCK)


def _even_sequence(step: mx.array) -> Any:
    """``f(blocks, first)``: the numbers ``(blocks, BLOCK)`` in [0, 1) of this step, from block ``first`` on."""
    now = step.astype(mx.uint32) * mx.array(_IN_TIME, mx.uint32)  # all of it modulo 2³²
    row = mx.arange(BLOCK, dtype=mx.uint32)[None] * mx.array(_IN_BLOCK, mx.uint32) + now  # (1, BLOCK)

    def numbers(blocks: int, first: int) -> mx.array:
        column = mx.arange(first, first + blocks, dtype=mx.uint32)[:, None] * mx.array(
            _OVER_BLOCKS, mx.uint32
        )
        return (row + column).astype(mx.float32) * 2.0**-32

    return numbers
