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

import mlx.core as mx
import mlx.nn as nn

from token_attribution.logprob_computer import read_states, read_tokens
from token_attribution.sampled_states import picked_states
from token_attribution.trunk import Trunk
from token_attribution.vocabulary import Head, Reference, Wanted

_KL_ALONE = Wanted(kl=True, logprobs=False)


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
    reading, _, states, _ = read_tokens(
        model, tokens, mask, temperature, trunk=trunk, wanted=_KL_ALONE, reference=(ref_model, ref_trunk)
    )
    assert reading.kl is not None
    return states.back_in_place(reading.kl)


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
    sampled = picked_states(states, mask)
    found = read_states(
        sampled,
        Trunk(lambda ids: ids, head, None if head_module is None else lambda: head_module),
        mx.zeros((mask.shape[0], mask.shape[1] + 1), dtype=mx.int32),  # no token is asked for
        temperature,
        wanted=_KL_ALONE,
        reference=Reference(picked_states(ref_states, mask).rows, ref_head),
        chunk_elements=chunk_elements,
    )
    assert found.kl is not None
    return sampled.back_in_place(found.kl)
