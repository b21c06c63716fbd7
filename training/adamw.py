"""AdamW that works in parts, and may keep its two moments in 8 bits each.

Memory. ``mlx.optimizers.AdamW`` makes all new weights and moments while the old ones are still there. Here
:meth:`AdamW.update` goes through the arrays part by part: a part's gradient is scaled, its weights and moments are
written where the old ones stood, and what was needed in between is given back before the next part's turn.

Eight bits, in blocks of 256 numbers with one scale per block: after Dettmers et al. 2022 (8-bit optimizers via
block-wise quantization, https://arxiv.org/abs/2110.02861), 2.03 bytes of state per parameter in place of 8. The step
itself is computed in float32; only what is kept from one step to the next is coded.

The code. A linear one would make most second moments of a block 0 and their steps enormous. Here a level q stands for

    m = ± (q / 127)² · scale        v = (q / 255)⁴ · scale        scale = the block's largest

so that within a block the root of v reaches from 1 down to 1.5e-5, with a relative precision of 2/q. The second
moment is never coded as 0, so what is too small to tell makes small steps.

The rounding. The second moment moves by a thousandth per step (beta 2 = 0.999) and the levels lie some hundredths
apart: to the nearest level it would stand still. So a number between two levels becomes one of them, with the
probability that makes its expectation exact. What stands in for a random number is a sequence that fills [0, 1)
evenly in time for each number (multiples of the golden ratio): it has less noise than a generator, no state but the
count of steps, and is the same after a restart.
"""

from __future__ import annotations

import base_setup.backend  # noqa: F401  (a fast BLAS must be in the process before MLX)

# isort: split

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_unflatten

from token_attribution import host_math

CHUNK = 1 << 19  # numbers worked on at a time, with about ten arrays of that size in float32 alive
BLOCK = 256  # numbers that share a scale
SMALLEST = 4096  # arrays of fewer numbers keep float32 moments: norms, biases, heads of one output
LEAST_SCALE = 1e-30  # below it a moment is lost beside epsilon, and its inverse would overflow

_FIRST, _SECOND = 127, 255  # levels
#: Odd numbers near 2³² over the golden ratio and its like in more dimensions: their multiples fill [0, 2³²) evenly.
_IN_TIME, _IN_BLOCK, _OVER_BLOCKS, _OVER_PARTS = 2654435769, 3242174889, 2447445413, 1640531527


class AdamW(optim.AdamW):
    """``mlx.optimizers.AdamW`` with bias correction, in parts, with moments of 32 or 8 bits.

    ``state`` is a tree of arrays as there, which :meth:`update` writes into. With 8 bits a large array's ``m`` and
    ``v`` are lists with one entry per part, each of ``codes`` (int8 and uint8) and ``scales`` (float32).
    """

    def __init__(
        self,
        learning_rate: float | Callable[..., Any],
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        bits: int = 32,
    ) -> None:
        self.bits = bits
        super().__init__(learning_rate, list(betas), eps, weight_decay, bias_correction=True)

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        """Moments of zero."""
        if self.bits == 32 or parameter.size < SMALLEST:
            super().init_single(parameter, state)
            return
        counts = [-(-parameter[part].size // BLOCK) for part in _parts(parameter)]
        for name, dtype in (("m", mx.int8), ("v", mx.uint8)):
            state[name] = [
                {"codes": mx.zeros((count, BLOCK), dtype), "scales": mx.zeros((count, 1))} for count in counts
            ]

    def update(self, model: nn.Module, gradients: dict[str, mx.array], factor: float = 1.0) -> None:
        """One step of ``model``, evaluated, from ``factor`` times the gradients.

        Args:
            gradients: by dotted path, as ``named_arrays`` gives them. The dictionary is emptied on the way, so that
                the memory of each can be given back when it has been used.
        """
        self.apply_gradients({}, {})  # the counter and the schedule, once for all arrays
        waiting: list[Any] = []  # small arrays are evaluated together
        size = 0
        for name in list(gradients):
            gradient, state = gradients.pop(name), _descend(self.state, name)
            parameter = _descend(model, name)
            on_host = self._fits_the_host(gradient, parameter, state)
            if on_host or parameter.size > CHUNK:
                parameter = mx.stop_gradient(
                    parameter
                )  # another object over the same numbers takes its place
                model.update(tree_unflatten([(name, parameter)]))
                update = self._update_on_host if on_host else self._update_in_parts
                update(gradient, parameter, state, factor)
                continue
            new = self._part(gradient, parameter, state, 0, slice(None), factor)
            model.update(tree_unflatten([(name, new)]))
            waiting += [new, state]
            size += new.size
            if size > CHUNK:
                mx.eval(waiting)
                waiting, size = [], 0
        mx.eval(waiting, self.state["step"], self.learning_rate)

    def _update_in_parts(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any], factor: float
    ) -> None:
        """Write into ``parameter`` and ``state``: in place, or if others share the numbers into a copy."""
        for i, part in enumerate(_parts(parameter)):
            new = self._part(gradient, parameter, state, i, part, factor)
            parameter[part] = new
            mx.eval(parameter, state)

    def _fits_the_host(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> bool:
        """Whether NumPy can do it, in one pass through memory where MLX on CPU makes a dozen: a tenth of the time."""
        plain = not isinstance(state["m"], list) and gradient.dtype == parameter.dtype == mx.float32
        return plain and parameter.size >= SMALLEST and host_math.usable()

    def _update_on_host(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any], factor: float
    ) -> None:
        arrays = [parameter, state["m"], state["v"]]
        for array in arrays:
            start = array[:1] + 0.0
            mx.eval(start)
            # From here on nobody else shares the numbers: MLX copies them if it has to.
            array[:1] = start
            mx.eval(array)
        weights, first, second = (host_math.view(array) for array in arrays)
        if not all(numbers.flags.c_contiguous for numbers in (weights, first, second)):
            self._update_in_parts(gradient, parameter, state, factor)
            return
        rate, step = float(self.learning_rate), int(self.step)
        beta1, beta2 = self.betas
        host_math.adamw(
            weights,
            first,
            second,
            host_math.view(gradient),
            factor=factor,
            beta1=beta1,
            beta2=beta2,
            step_size=rate / (1 - beta1**step),
            root_scale=(1 - beta2**step) ** -0.5,
            eps=self.eps,
            keep=1 - rate * self.weight_decay,
        )

    def _part(
        self,
        gradient: mx.array,
        parameter: mx.array,
        state: dict[str, Any],
        i: int,
        part: slice,
        factor: float,
    ) -> mx.array:
        """The new numbers of part ``i``; their moments go into ``state``."""
        gradient = gradient[part] if factor == 1 else gradient[part] * factor
        coded, in_parts = isinstance(state["m"], list), gradient.shape != parameter.shape
        moments: dict[str, Any] = {name: state[name][part] for name in ("m", "v")} if not coded else {}
        if coded:
            for name, decode in (("m", decode_first), ("v", decode_second)):
                moments[name] = decode(**state[name][i]).reshape(-1)[: gradient.size].reshape(gradient.shape)
        new: mx.array = self.apply_single(gradient, parameter[part], moments)
        if in_parts:
            # Here the slices of the old moments are given back, so that what they were cut from can be written into.
            mx.eval(new, moments)
        if coded:
            dither = _evenly_spread(self.step, i, len(state["m"][i]["codes"]))
            for name, encode in (("m", encode_first), ("v", encode_second)):
                codes, scales = encode(_in_blocks(moments.pop(name)), dither)
                state[name][i] = {"codes": codes, "scales": scales}
        elif in_parts:
            for name in ("m", "v"):
                state[name][part] = moments[name]
        else:
            state |= moments
        return new


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


def decode_first(codes: mx.array, scales: mx.array) -> mx.array:
    """What ``encode_first`` coded, ``(N, BLOCK)`` float32."""
    level = codes.astype(mx.float32)
    return level * mx.abs(level) * (scales * (1 / _FIRST**2))


def encode_second(x: mx.array, dither: mx.array) -> tuple[mx.array, mx.array]:
    """Blocks of numbers from 0 up as levels from 1 up, uint8, and scales ``(N, 1)``."""
    scale = mx.maximum(mx.max(x, axis=1, keepdims=True), LEAST_SCALE)  # (N, 1)
    exact = x * (_SECOND**4 / scale)  # (N, BLOCK)
    below = _whole(mx.sqrt(mx.sqrt(exact)))
    fourth = mx.square(mx.square(below))
    up = dither * (mx.square(mx.square(below + 1)) - fourth) < exact - fourth
    return mx.clip(below + up, 1, _SECOND).astype(mx.uint8), scale


def decode_second(codes: mx.array, scales: mx.array) -> mx.array:
    """What ``encode_second`` coded, ``(N, BLOCK)`` float32."""
    return mx.square(mx.square(codes.astype(mx.float32))) * (scales * (1 / _SECOND**4))


def _whole(x: mx.array) -> mx.array:
    """Rounded down, for 0 ≤ x < 256: on CPU a sixth of the price of ``mx.floor``."""
    return x.astype(mx.uint8).astype(mx.float32)


def _in_blocks(x: mx.array) -> mx.array:
    """The numbers of ``x`` as ``(N, BLOCK)``, the last block filled up with zeros."""
    missing = -x.size % BLOCK
    return mx.pad(x.reshape(-1), (0, missing)).reshape(-1, BLOCK)


def _evenly_spread(step: mx.array, part: int, blocks: int) -> mx.array:
    """Numbers ``(blocks, BLOCK)`` in [0, 1] for this step and part: none repeats, and each fills it in time."""
    now = step.astype(mx.uint32) * _uint32(_IN_TIME) + _uint32(part * _OVER_PARTS)  # all of it modulo 2³²
    in_block = mx.arange(BLOCK, dtype=mx.uint32)[None] * _uint32(_IN_BLOCK)  # (1, BLOCK)
    of_block = mx.arange(blocks, dtype=mx.uint32)[:, None] * _uint32(_OVER_BLOCKS)  # (blocks, 1)
    return (in_block + now + of_block).astype(mx.float32) * 2.0**-32  # (blocks, BLOCK)


def _uint32(number: int) -> mx.array:
    return mx.array(number % 2**32, mx.uint32)


def _parts(parameter: mx.array) -> Iterator[slice]:
    """Rows of the first axis, as many as make about ``CHUNK`` numbers."""
    if parameter.size <= CHUNK:
        yield slice(None)
        return
    rows = max(1, CHUNK // (parameter.size // len(parameter)))
    for start in range(0, len(parameter), rows):
        yield slice(start, start + rows)


def _descend(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return tree
