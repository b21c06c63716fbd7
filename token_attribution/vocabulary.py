r"""What a language model's distribution says at chosen positions, without ever holding the vocabulary at all of them.

At each position: the logprob of a token, the entropy, and the exact KL to a reference, from one look at the logits.
The rows go through the vocabulary head a chunk at a time; only the results stay. In the backward pass a chunk's
logits are computed again and turned into their own gradient,

.. math:: \frac{\partial L}{\partial\,\text{logits}_v} = \frac{1}{\tau} \bigl[ g\,(1[v = y] - p_v)
          - h\,p_v\,(\log p_v + H) + k\,p_v\,(\log p_v - \log q_v - KL) \bigr]

with g, h, k the cotangents of logprob, entropy and KL. So memory does not grow with positions times vocabulary.

A frozen head (adapters leave it alone) needs no second look: the gradient of each logprob with respect to its own
hidden state, one row of width D, is computed beside it and waits for its cotangent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from token_attribution import host_math

Head = Callable[[mx.array], mx.array]
#: Logits held at once: 128 MiB of float32. Half as many are a few per cent slower with a vocabulary of 152k.
CHUNK_ELEMENTS = 1 << 25


class Wanted(NamedTuple):
    """What to compute beside the logprobs, and what of it carries gradient."""

    entropy: bool = False
    entropy_gradient: bool = False
    kl: bool = False
    logprobs: bool = True


LOGPROBS = Wanted()


class Reading(NamedTuple):
    """What was computed at each of N positions, float32; None where it was not wanted."""

    logprobs: mx.array  # (N,)
    entropy: mx.array | None  # (N,) nats
    kl: mx.array | None  # (N,) nats


class Reference(NamedTuple):
    """The other distribution of the KL: hidden states without gradient, and their head."""

    rows: mx.array  # (N, D'), its D' may differ
    head: Head


def read_vocabulary(
    rows: mx.array,
    head: Head,
    targets: mx.array,
    temperature: float = 1.0,
    *,
    wanted: Wanted = LOGPROBS,
    reference: Reference | None = None,
    head_module: nn.Module | None = None,
    for_gradient: bool = False,
    chunk_elements: int | None = None,
) -> Reading:
    """Logprobs, entropies and KL at N positions, differentiable in ``rows`` and in the head's weights.

    Args:
        rows: (N, D) hidden states; or logits (N, V), with the identity as ``head``.
        head: (n, D) -> (n, V). targets: (N,) integer ids in [0, V).
        temperature: tau > 0, for both distributions.
        reference: needed for ``wanted.kl``.
        head_module: the module that owns all the weights of ``head`` (``Trunk.head_module``). With it, logits are
            recomputed in the backward. Without it they are kept, because a recomputation reaches only weights
            that it is told of: right for the identity, wasteful for anything else.
        for_gradient: one backward pass will follow. Only speed depends on it.
        chunk_elements: logits to hold at once, at least those of one position; None: ``CHUNK_ELEMENTS``.
    """
    check_temperature(temperature)
    step = _rows_per_chunk(head, rows, chunk_elements)
    chunks = [slice(start, start + step) for start in range(0, rows.shape[0], step)]
    look = _Look(targets, temperature, wanted, reference, copies=head_module is None)
    if head_module is None:
        found = _kept(look, head, rows, chunks)
    elif (
        for_gradient
        and wanted == Wanted(wanted.entropy)
        and not tree_flatten(head_module.trainable_parameters())
    ):
        found = _with_slopes_ready(look, head, rows, chunks)
    elif for_gradient and wanted == Wanted(wanted.entropy) and len(chunks) == 1:
        found = _with_slopes_kept(look, head, rows)
    else:
        found = _recomputed(look, head, head_module, rows, chunks)
    return Reading(found[0], found[1] if wanted.entropy else None, found[3] if wanted.kl else None)


def check_temperature(temperature: float) -> None:
    """Refuse what no logprob can be had at."""
    if not temperature > 0:
        raise ValueError(
            f"temperature must be greater than 0, but it is {temperature}. Greedy decoding has no logprobs; "
            "give the temperature that the tokens were sampled at."
        )


def _rows_per_chunk(head: Head, rows: mx.array, chunk_elements: int | None) -> int:
    limit = CHUNK_ELEMENTS if chunk_elements is None else chunk_elements
    if limit < 1:
        raise ValueError(f"chunk_elements must be at least 1, but it is {limit}.")
    return max(1, limit // head(rows[:1]).shape[-1])  # only the shape: nothing is computed


class _Look:
    """One chunk's logits to numbers, and cotangents to the gradient of the logits; on the host where that is faster."""

    def __init__(
        self,
        targets: mx.array,
        temperature: float,
        wanted: Wanted,
        reference: Reference | None,
        *,
        copies: bool,
    ) -> None:
        """``copies``: the logits are somebody else's too, and must not be written over."""
        self.targets = targets
        self.temperature = temperature
        self.wanted = wanted
        self.reference = reference
        self.copies = copies
        self.width = 0  # of the vocabulary, once logits have been seen
        self.on_host = host_math.usable() and not wanted.kl

    def numbers(self, logits: mx.array, chunk: slice) -> mx.array:
        """(n, V) -> (4, n): logprob, entropy, logsumexp, KL; zeros for what is not wanted."""
        self.width = logits.shape[-1]
        targets = self.targets[chunk]
        if self.on_host:
            own = host_math.view(self._own(logits))
            return self._stacked(
                host_math.read_logits(
                    own, host_math.view(targets), self.temperature, entropy=self.wanted.entropy
                )
            )
        z = self._scaled(logits)
        normaliser = mx.logsumexp(z, axis=-1)
        nothing = mx.zeros(targets.shape)
        logprobs = entropy = kl = nothing
        if self.wanted.logprobs:
            logprobs = mx.take_along_axis(z, targets[:, None], axis=-1)[:, 0] - normaliser
        if self.wanted.entropy:
            entropy = -_expected(mx.softmax(z, axis=-1), z - normaliser[:, None])
        if self.wanted.kl:
            logp = z - normaliser[:, None]
            kl = _expected(mx.exp(logp), logp - self._ref_logp(chunk))
        return mx.stack([logprobs, entropy, normaliser, kl])

    def both(self, logits: mx.array, chunk: slice) -> tuple[mx.array, mx.array]:
        """Numbers, and the gradient (n, V) of each logprob with respect to its logits."""
        targets = self.targets[chunk]
        if self.on_host:
            own = self._own(logits)
            found = host_math.read_logits(
                host_math.view(own),
                host_math.view(targets),
                self.temperature,
                entropy=self.wanted.entropy,
                slopes=True,
            )
            return self._stacked(found), own.astype(logits.dtype)
        numbers = self.numbers(logits, chunk)
        unit = mx.zeros(numbers.shape).at[0].add(1.0)
        return numbers, self.slopes(logits, chunk, numbers, unit)

    @staticmethod
    def _stacked(found: tuple[np.ndarray, np.ndarray, np.ndarray]) -> mx.array:
        return mx.array(np.stack([*found, np.zeros_like(found[0])]))

    def slopes(self, logits: mx.array, chunk: slice, numbers: mx.array, cotangents: mx.array) -> mx.array:
        """Gradient (n, V) of ``sum(cotangents * numbers)``, each (4, n), with respect to the logits."""
        targets, wanted = self.targets[chunk], self.wanted
        if self.on_host:
            own = self._own(logits)
            entropy_slope = host_math.view(cotangents[1]) if wanted.entropy_gradient else None
            host_math.logit_slopes(
                host_math.view(own),
                host_math.view(targets),
                host_math.view(numbers[2]),
                self.temperature,
                host_math.view(cotangents[0]),
                entropy_slope,
            )
            return own.astype(logits.dtype)
        logp = self._scaled(logits) - numbers[2][:, None]  # (n, V)
        p = mx.exp(logp)
        slope = mx.zeros(())
        if wanted.entropy_gradient:
            entropy = -_expected(p, logp)
            slope = slope - cotangents[1][:, None] * p * (_finite(logp) + entropy[:, None])
        if wanted.kl:
            log_ratio = mx.where(logp == -mx.inf, 0.0, logp - self._ref_logp(chunk))
            # Its own KL, not the forward's: what that computed need not be computed again in a recomputation.
            kl = mx.sum(p * log_ratio, axis=-1, keepdims=True)
            slope = slope + cotangents[3][:, None] * p * (log_ratio - kl)
        if wanted.logprobs:
            chosen = mx.arange(logits.shape[-1]) == targets[:, None]
            slope = slope + cotangents[0][:, None] * (chosen - p)
        return (slope / self.temperature).astype(logits.dtype)

    def _scaled(self, logits: mx.array) -> mx.array:
        z = logits.astype(mx.float32)
        return z if self.temperature == 1.0 else z / self.temperature

    def _ref_logp(self, chunk: slice) -> mx.array:
        assert self.reference is not None
        z = self._scaled(mx.stop_gradient(self.reference.head(self.reference.rows[chunk])))
        if z.shape[-1] != self.width:
            raise ValueError(
                f"the reference has logits for {z.shape[-1]} tokens, the policy for {self.width}"
            )
        return z - mx.logsumexp(z, axis=-1, keepdims=True)

    def _own(self, logits: mx.array) -> mx.array:
        """Float32 logits that may be written over."""
        if logits.dtype != mx.float32:
            return logits.astype(mx.float32)
        return mx.array(host_math.view(logits)) if self.copies else logits


def _expected(p: mx.array, x: mx.array) -> mx.array:
    """Mean of ``x`` under ``p``, (n, V) -> (n,); a forbidden token (p = 0, x infinite) contributes nothing."""
    return mx.sum(p * mx.where(p == 0, 0.0, x), axis=-1)


def _finite(logp: mx.array) -> mx.array:
    return mx.where(logp == -mx.inf, 0.0, logp)


# Three ways through the rows, chunk by chunk. In each a chunk waits for the one before: MLX would otherwise be free to
# compute them side by side, and hold all their logits at once.


def _after(done: list[mx.array], x: mx.array) -> mx.array:
    return mx.depends([x], done[-1:])[0] if done else x


def _kept(look: _Look, head: Head, rows: mx.array, chunks: list[slice]) -> mx.array:
    """(N, D) -> (4, N); the logits stay for the backward, if there is one, and ``head`` is differentiated by MLX."""

    def numbers_of(chunk: slice, logits: mx.array) -> mx.array:
        @mx.custom_function
        def numbers(logits: mx.array) -> mx.array:
            return look.numbers(logits, chunk)

        @numbers.vjp
        def numbers_vjp(logits: mx.array, cotangents: mx.array, found: mx.array) -> mx.array:
            return look.slopes(logits, chunk, found, cotangents)

        return cast(mx.array, numbers(logits))

    done: list[mx.array] = []
    for chunk in chunks:
        done.append(numbers_of(chunk, head(_after(done, rows[chunk]))))
    return mx.concatenate(done, axis=1)


def _recomputed(look: _Look, head: Head, module: nn.Module, rows: mx.array, chunks: list[slice]) -> mx.array:
    """(N, D) -> (4, N); nothing stays: the backward computes each chunk's logits again, from ``module``'s weights."""

    @mx.custom_function
    def numbers(parameters: dict[str, Any], rows: mx.array) -> mx.array:
        done: list[mx.array] = []
        with _holding(module, parameters):
            for chunk in chunks:
                done.append(look.numbers(head(_after(done, rows[chunk])), chunk))
        return mx.concatenate(done, axis=1)

    @numbers.vjp
    def numbers_vjp(
        primals: tuple[dict[str, Any], mx.array], cotangents: mx.array, found: mx.array
    ) -> tuple[dict[str, Any], mx.array]:
        parameters, rows = primals

        def pulled(parameters: dict[str, Any], part: mx.array, chunk: slice) -> mx.array:
            with _holding(module, parameters):
                return _with_gradient(
                    head(part), lambda z: look.slopes(z, chunk, found[:, chunk], cotangents[:, chunk])
                )

        total: dict[str, Any] = {}
        by_row: list[mx.array] = []
        for chunk in chunks:
            so_far = [x for _, x in cast(list[tuple[str, mx.array]], tree_flatten(total))]
            part = mx.depends([rows[chunk]], [*by_row[-1:], *so_far])[0]
            gradient, row_gradient = mx.grad(pulled, argnums=(0, 1))(parameters, part, chunk)
            total = tree_map(mx.add, total, gradient) if by_row else gradient
            if look.on_host:  # slopes lie in memory already: let them go before the next chunk's
                total, row_gradient = tree_map(host_math.alone, (total, row_gradient))
            by_row.append(row_gradient)
        return total, mx.concatenate(by_row)

    return cast(mx.array, numbers(module.trainable_parameters(), rows))


def _with_slopes_ready(look: _Look, head: Head, rows: mx.array, chunks: list[slice]) -> mx.array:
    """(N, D) -> (4, N) where only logprobs carry gradient, and only to the rows: one look at each chunk's logits."""
    ready: list[mx.array] = []  # d logprob / d row, (n, D) a chunk

    @mx.custom_function
    def numbers(rows: mx.array) -> mx.array:
        ready.clear()
        done: list[mx.array] = []
        for chunk in chunks:

            def slopes(logits: mx.array, chunk: slice = chunk) -> mx.array:
                found, unit = look.both(logits, chunk)
                done.append(found)
                return unit

            gradient = mx.grad(lambda x: _with_gradient(head(x), slopes))(_after(ready, rows[chunk]))
            # On the host slopes lie in memory already: let them go before the next chunk's.
            ready.append(host_math.alone(gradient) if look.on_host else gradient)
        return mx.concatenate(done, axis=1)

    @numbers.vjp
    def numbers_vjp(rows: mx.array, cotangents: mx.array, _: mx.array) -> mx.array:
        return (cotangents[0][:, None] * mx.concatenate(ready)).astype(rows.dtype)

    return cast(mx.array, numbers(rows))


def _with_slopes_kept(look: _Look, head: Head, rows: mx.array) -> mx.array:
    """The same for a head that trains, where all logits are one chunk: their gradient stays in their place."""
    kept: list[mx.array] = []  # d logprob / d logits, (N, V)

    @mx.custom_function
    def numbers(logits: mx.array) -> mx.array:
        found, unit = look.both(logits, slice(0, rows.shape[0]))
        kept[:] = [unit]
        return found

    @numbers.vjp
    def numbers_vjp(_: mx.array, cotangents: mx.array, __: mx.array) -> mx.array:
        if not kept:
            raise RuntimeError("what was read with for_gradient=True can be differentiated once, not twice")
        slopes = kept.pop()
        if look.on_host and slopes.dtype == mx.float32:
            host_math.scale_rows(host_math.view(slopes), host_math.view(cotangents[0]))
            return slopes
        return (slopes * cotangents[0][:, None]).astype(slopes.dtype)

    return cast(mx.array, numbers(head(rows)))


def _with_gradient(logits: mx.array, slopes: Callable[[mx.array], mx.array]) -> mx.array:
    """A scalar whose gradient with respect to ``logits`` is ``slopes(logits)``: the end from which to differentiate."""

    @mx.custom_function
    def end(logits: mx.array) -> mx.array:
        return mx.zeros(())

    @end.vjp
    def end_vjp(logits: mx.array, _: mx.array, __: mx.array) -> mx.array:
        return slopes(logits)

    return cast(mx.array, end(logits))


@contextmanager
def _holding(module: nn.Module, parameters: dict[str, Any]) -> Iterator[None]:
    """Within the block ``module`` computes with these arrays; afterwards it has its own again."""
    own = module.trainable_parameters()
    module.update(parameters)
    try:
        yield
    finally:
        module.update(own)
