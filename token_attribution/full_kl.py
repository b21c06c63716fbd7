r"""The exact KL to a reference at every sampled token, summed over the vocabulary without ever holding it all.

.. math:: KL_t = \sum_v p_t[v]\,(\log p_t[v] - \log q_t[v]), \qquad
          \frac{\partial KL_t}{\partial\, \text{logits}_t[v]}
              = \frac{p_t[v]\,(\log p_t[v] - \log q_t[v] - KL_t)}{\tau}

with p the policy and q the reference, both at temperature tau. It has no variance, unlike the estimators of
``reward_kl.kl_divergence``, and its price is both models' logits at every sampled token. So the rows go
through the vocabulary heads a few at a time, and in a gradient pass once more in the backward: logits are
recomputed, not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from reward_kl.kl_divergence import kl_full
from token_attribution.logprob_computer import back_in_place, true_positions
from token_attribution.trunk import Trunk, find_trunk

Head = Callable[[mx.array], mx.array]


def full_kl(
    model: nn.Module,
    ref_model: nn.Module,
    tokens: mx.array,
    mask: mx.array,
    temperature: float = 1.0,
    *,
    trunk: Trunk | None = None,
    ref_trunk: Trunk | None = None,
) -> mx.array:
    """Exact KL of ``model`` to ``ref_model`` at each sampled token, differentiable in ``model``'s parameters.

    Args:
        model, ref_model: mlx-lm language models (or any callables from ids to logits) over one vocabulary.
        tokens: (B, T+1) int32, right-padded.
        mask: (B, T) bool, its values known (see ``token_logprobs``).
        temperature: the one that the tokens were sampled at.
        trunk, ref_trunk: ``find_trunk`` of the two, if the caller has them already.

    Returns:
        (B, T) float32; exactly 0, with a gradient of exactly 0, where the mask is False.
    """
    if tokens.ndim != 2 or mask.shape != (tokens.shape[0], tokens.shape[1] - 1):
        raise ValueError(f"tokens {tokens.shape} must be (B, T+1) and mask {mask.shape} must be (B, T).")
    ours, theirs = _halves(model, trunk), _halves(ref_model, ref_trunk)
    seen = tokens[:, :-1]  # (B, T)
    return full_kl_from_states(
        ours.hidden(seen),
        ours.head,
        theirs.hidden(seen),
        theirs.head,
        mask,
        temperature,
        head_module=ours.head_module() if ours.head_module is not None else None,
    )


def full_kl_from_states(
    states: mx.array,
    head: Head,
    ref_states: mx.array,
    ref_head: Head,
    mask: mx.array,
    temperature: float = 1.0,
    *,
    head_module: nn.Module | None = None,
    chunk_elements: int = 1 << 23,
) -> mx.array:
    """The same from hidden states, for callers that need those for something else too.

    Args:
        states: (B, T, D) of the policy's trunk; or its logits, with the identity as ``head``.
        head: (..., D) -> (..., V). ref_states, ref_head: the reference's, without gradient; its D may differ.
        mask: (B, T) bool. Where it is False nothing is computed from ``states``, not even garbage.
        head_module: the module that owns all the weights of ``head`` (``Trunk.head_module``). With it, the
            logits are recomputed in the backward. Without it they are kept, because a recomputation reaches
            only weights that it is told of: right for the identity, wasteful for anything else.
        chunk_elements: how many logits of each model to hold at once, at least those of one token. Half as
            many are slower with a vocabulary of 152k, twice as many slower with one of 32k (measured on a CPU).

    Returns:
        (B, T) float32.
    """
    if states.shape[:2] != mask.shape or ref_states.shape[:2] != mask.shape:
        raise ValueError(
            f"states {states.shape} and ref_states {ref_states.shape} must begin with mask {mask.shape}."
        )
    if chunk_elements < 1:
        raise ValueError(f"chunk_elements must be at least 1, but it is {chunk_elements}.")
    positions = true_positions(mask)  # (N,)
    if positions.size == 0:
        return mx.zeros(mask.shape)
    rows = states.reshape(-1, states.shape[-1])[positions]  # (N, D)
    ref_rows = ref_states.reshape(-1, ref_states.shape[-1])[positions]
    step = max(1, chunk_elements // head(rows[:1]).shape[-1])  # only the shape: nothing is computed
    chunks = [slice(start, start + step) for start in range(0, rows.shape[0], step)]

    def kl_of(rows: mx.array, chunk: slice) -> mx.array:  # (n, D) -> (n,)
        theirs = _after([rows], ref_rows[chunk])  # the reference waits for its chunk too
        return _kl(head(rows), mx.stop_gradient(ref_head(theirs)), temperature)

    chunked = _kept if head_module is None else _recomputed(head_module)
    return back_in_place(chunked(kl_of, rows, chunks), positions, mask.shape)


def _halves(model: nn.Module, trunk: Trunk | None) -> Trunk:
    """Trunk and head; a model that does not show them is all trunk."""
    if trunk is None and isinstance(model, nn.Module):
        trunk = find_trunk(model)
    return trunk or Trunk(model, lambda logits: logits)


def _kl(logits: mx.array, ref_logits: mx.array, temperature: float) -> mx.array:
    """``kl_full`` with the gradient of the module docstring, (n, V) -> (n,).

    Differentiating the sum term by term gives ``p - p * sum(p)`` on top of it, which is 0 but for rounding, and
    rounding is all there is where the policy still is its reference.
    """

    @mx.custom_function
    def kl(logits: mx.array) -> mx.array:
        return kl_full(logits, ref_logits, temperature)

    @kl.vjp
    def kl_vjp(logits: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        z, z_ref = (x.astype(mx.float32) / temperature for x in (logits, ref_logits))
        logp = z - mx.logsumexp(z, axis=-1, keepdims=True)  # (n, V)
        log_ratio = logp - (z_ref - mx.logsumexp(z_ref, axis=-1, keepdims=True))
        log_ratio = mx.where(logp == -mx.inf, 0.0, log_ratio)  # as in kl_full
        p = mx.exp(logp)
        # Its own KL, not the forward's: what the forward computed need not be computed again in a recomputation.
        slope = p * (log_ratio - mx.sum(p * log_ratio, axis=-1, keepdims=True))
        return (slope * (cotangent / temperature)[:, None]).astype(logits.dtype)

    return cast(mx.array, kl(logits))


# Two ways to go through the rows chunk by chunk. In each a chunk waits for the one before: MLX would otherwise be
# free to compute them side by side, and hold all their logits at once.

KLOf = Callable[[mx.array, slice], mx.array]


def _after(done: list[mx.array], x: mx.array) -> mx.array:
    return mx.depends([x], done)[0]


def _kept(kl_of: KLOf, rows: mx.array, chunks: list[slice]) -> mx.array:
    """(N, D) -> (N,); what a chunk computed stays for the backward, if there is one."""
    done: list[mx.array] = []
    for chunk in chunks:
        done.append(kl_of(_after(done[-1:], rows[chunk]), chunk))
    return mx.concatenate(done)


def _recomputed(module: nn.Module) -> Callable[[KLOf, mx.array, list[slice]], mx.array]:
    """The same, but nothing stays: the backward computes each chunk again, from the weights of ``module``.

    ``mx.checkpoint`` on each chunk would do but for the order of the backward: all chunks could be recomputed
    side by side, each with a gradient of the whole head in its hands.
    """

    def through(kl_of: KLOf, rows: mx.array, chunks: list[slice]) -> mx.array:
        @mx.custom_function
        def kl(parameters: dict[str, Any], rows: mx.array) -> mx.array:
            with _holding(module, parameters):
                return _kept(kl_of, rows, chunks)

        @kl.vjp
        def kl_vjp(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[dict[str, Any], mx.array]:
            parameters, rows = primals

            def pulled(parameters: dict[str, Any], rows: mx.array, chunk: slice) -> mx.array:
                with _holding(module, parameters):
                    return mx.sum(cotangent[chunk] * kl_of(rows, chunk))

            total: dict[str, Any] = {}
            by_row: list[mx.array] = []
            for chunk in chunks:
                so_far = cast(list[tuple[str, mx.array]], tree_flatten(total))
                part = _after([*by_row[-1:], *(x for _, x in so_far)], rows[chunk])
                gradient, row_gradient = mx.grad(pulled, argnums=(0, 1))(parameters, part, chunk)
                total = tree_map(mx.add, total, gradient) if by_row else gradient
                by_row.append(row_gradient)
            return total, mx.concatenate(by_row)

        return cast(mx.array, kl(module.trainable_parameters(), rows))

    return through


@contextmanager
def _holding(module: nn.Module, parameters: dict[str, Any]) -> Iterator[None]:
    """Within the block ``module`` computes with these arrays; afterwards it has its own again."""
    own = module.trainable_parameters()
    module.update(parameters)
    try:
        yield
    finally:
        module.update(own)
