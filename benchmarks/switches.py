"""Optimisations that can be switched off, to measure what each is worth. For benchmarks and tests alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch


class Switch(NamedTuple):
    """How to do without."""

    meaning: str
    patches: Callable[[], list[tuple[Any, str, Any]]]  # (owner, name, what stands there instead)


def _sharing() -> list[tuple[Any, str, Any]]:
    from token_attribution import sampled_states

    return [(sampled_states, "_worth_sharing", lambda trunk, layout: False)]


def _host_math() -> list[tuple[Any, str, Any]]:
    from token_attribution import checkpointing, host_kernels, host_math

    return [(module, "usable", lambda: False) for module in (host_math, host_kernels, checkpointing)]


def _host_kernels() -> list[tuple[Any, str, Any]]:
    from token_attribution import host_kernels

    return [(host_kernels, "usable", lambda: False)]


def _pass_tokens() -> list[tuple[Any, str, Any]]:
    from ppo_trainer import updater

    return [(updater, "PASS_TOKENS", {})]


def _own_backward() -> list[tuple[Any, str, Any]]:
    from token_attribution import vocabulary

    def plain(look: Any, head: Any, rows: Any, *rest: Any) -> Any:
        return vocabulary._kept(look, head, rows, [slice(0, rows.shape[0])])

    return [(vocabulary, name, plain) for name in ("_recomputed", "_with_slopes_kept")] + [
        (vocabulary, "_with_slopes_ready", plain)
    ]


SWITCHES = {
    "sharing": Switch("prompts shared by their group in the gradient pass", _sharing),
    "host_math": Switch("exponentials in NumPy, all of them (CPU)", _host_math),
    "host_kernels": Switch("attention and gates in NumPy (CPU)", _host_kernels),
    "chunks": Switch("logits in chunks with their own backward", _own_backward),
    "pass_tokens": Switch("micro-batches of about 1,280 tokens (CPU)", _pass_tokens),
}


@contextmanager
def switched_off(name: str) -> Iterator[None]:
    """Within the block this optimisation is off; "" is none."""
    with ExitStack() as stack:
        for owner, attribute, instead in SWITCHES[name].patches() if name else []:
            stack.enter_context(patch.object(owner, attribute, instead))
        yield
