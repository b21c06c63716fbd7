"""One pass over each distinct prompt, shared by all its completions: two caches in mlx-lm's protocol, and a test drive.

A first pass over the prompts leaves its keys and values in :class:`PromptKeys`; a second, over the completions,
attends to them through :class:`ContinuedKeys`. Both passes belong to one graph, so gradients flow from every
completion of a group back into its prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache

from token_attribution import host_kernels
from token_attribution.host_attention import Grouping, SharedPast

_SHORT_WINDOW = 64  # a sliding window that the test drive can look beyond


class PromptKeys:
    """One layer's keys and values of N prompts, right-padded to P columns, as they are computed."""

    def __init__(self) -> None:
        self.offset = 0
        self.keys: mx.array | None = None  # (N, H, P, D)
        self.values: mx.array | None = None
        self.lead = 0  # columns before each prompt's first token: a soft prompt's

    def empty(self) -> bool:
        """Whether nothing has been computed yet."""
        return self.keys is None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep them and hand them back."""
        self.keys, self.values = keys, values
        return keys, values

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """As for a model without a cache."""
        if n == 1:
            return None
        if return_array or (window_size is not None and n > window_size):
            return create_causal_mask(n, window_size=window_size)
        return "causal"


class ContinuedKeys:
    """One layer's keys and values for completions that continue these prompts, one prompt a row."""

    def __init__(
        self, prompts: PromptKeys, rows: np.ndarray, lengths: np.ndarray, grouping: Grouping | None = None
    ) -> None:
        """``rows`` (b,): each row's prompt among ``prompts``; ``lengths`` (b,): how long that is.

        ``grouping``: of the rows by prompt, where ``host_kernels.attention_with_cache`` looks at prompts itself.
        """
        assert prompts.keys is not None
        assert prompts.values is not None
        lengths = lengths + prompts.lead
        self._width = prompts.keys.shape[2]
        self._grouping = grouping
        self.past_keys, self.past_values = prompts.keys, prompts.values  # (N, H, P, D)
        if grouping is None:
            self.past_keys, self.past_values = (
                x[mx.array(rows)] for x in (prompts.keys, prompts.values)
            )  # (b, …)
        ragged = bool((lengths != self._width).any())
        self._lengths = mx.array(lengths)[:, None, None] if ragged else None  # (b, 1, 1)
        self.offset: Any = mx.array(lengths) if ragged else self._width

    def continuing(self, keys: mx.array, values: mx.array) -> ContinuedKeys:
        """The same rows after other keys and values of their prompts."""
        other = copy(self)
        other.past_keys, other.past_values = keys, values
        return other

    @property
    def past(self) -> SharedPast | None:
        """What rows have in common, if that is not repeated for each."""
        return (
            None if self._grouping is None else SharedPast(self.past_keys, self.past_values, self._grouping)
        )

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The prompt's columns, then the completion's: each (b, H, P + C, D). With a ``past`` the latter alone."""
        past = self.past
        if past is not None:
            return (keys, values) if host_kernels.installed() else past.before(keys, values)
        return (
            mx.concatenate([self.past_keys, keys], axis=2),
            mx.concatenate([self.past_values, values], axis=2),
        )

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Which of the P + C columns each of C new tokens may see."""
        width = self._width
        within = window_size is None or width + n <= window_size
        if self._lengths is None and within:
            if return_array:
                return create_causal_mask(n, offset=width)
            return None if n == 1 else "causal"
        column = mx.arange(width + n)[None, None]  # (1, 1, P + C)
        length = width if self._lengths is None else self._lengths
        in_prompt = column < width
        position = mx.where(in_prompt, column, column - width + length)  # (b, 1, P + C)
        own = mx.arange(n)[None, :, None] + length  # (b, C, 1)
        seen = (position <= own) & (~in_prompt | (column < length))
        if window_size is not None:
            seen = seen & (own < position + window_size)
        return seen[:, None]  # (b, 1, C, P + C)


class Ability(NamedTuple):
    """What of prompt sharing an architecture can do."""

    even: bool = False  # prompts of one length in a pass
    ragged: bool = False  # prompts of different lengths in a pass
    up_to: int | None = None  # longest prompt and completion together, in tokens; None: any

    def covers(self, longest: int) -> bool:
        """Whether sequences of this length can be computed so."""
        return self.even and (self.up_to is None or longest <= self.up_to)


class PromptSharing:
    """Whether a model's prompts can be shared, tried out on two tiny ones when somebody first asks."""

    def __init__(self, hidden: Callable[..., mx.array], make_cache: Callable[[], list[Any]]) -> None:
        self._hidden = hidden
        self._make_cache = make_cache
        self._lead = 0  # as the test drive finds it

    def new_keys(self) -> list[PromptKeys]:
        """One for each layer."""
        return [PromptKeys() for _ in range(self._n_layers)]

    @cached_property
    def _kinds(self) -> list[Any]:
        return self._make_cache()

    @property
    def _n_layers(self) -> int:
        return len(self._kinds)

    @cached_property
    def ability(self) -> Ability:
        """Found by comparing with the plain forward, so an architecture that does otherwise is noticed."""
        windows = [int(c.max_size) for c in self._kinds if isinstance(c, RotatingKVCache)]
        if not all(type(c) in (KVCache, RotatingKVCache) for c in self._kinds):
            return Ability()  # a recurrent state, or keys that are packed in some way
        narrowest = min(windows, default=0)
        short = narrowest if 0 < narrowest <= _SHORT_WINDOW else 0
        longest = 4 + short
        if not self._agrees([longest, longest]):
            return Ability()
        beyond = [w - self._lead for w in windows if w > _SHORT_WINDOW]
        return Ability(True, self._agrees([longest, 1]), min(beyond, default=None))

    @cached_property
    def takes_groups(self) -> bool:
        """Whether attention can read a prompt once for all its rows. To be asked where ``host_math`` is usable."""
        return self._agrees([4, 4], Grouping(np.arange(2), 2))

    def _agrees(self, lengths: list[int], grouping: Grouping | None = None) -> bool:
        """Whether two prompts of these lengths, continued by three tokens, come out as from a plain forward."""
        width, continued = max(lengths), 3
        tokens = (np.arange(2 * (width + continued)).reshape(2, -1) * 7 + 1) % 5
        keys = self.new_keys()
        prompts = np.where(np.arange(width) < np.array(lengths)[:, None], tokens[:, :width], 0)
        try:
            self._hidden(mx.array(prompts), cache=keys)
            self._lead = keys[0].lead
            caches = [ContinuedKeys(k, np.arange(2), np.array(lengths), grouping) for k in keys]
            following = mx.array(tokens[:, width:])
            shared = self._hidden(following, cache=caches).astype(mx.float32)  # (2, 3, D)
            plain = [
                self._hidden(mx.concatenate([mx.array(tokens[i, :n]), following[i]])[None])[0, n:]
                for i, n in enumerate(lengths)
            ]
            alone = mx.stack(plain).astype(mx.float32)
            mx.eval(shared, alone)
        except (ValueError, TypeError, AttributeError, IndexError, AssertionError):
            return False
        # 16-bit rounding comes to a hundredth of the states' spread; a token wrongly hidden or seen, to far more.
        return bool(mx.mean(mx.abs(shared - alone)) < 0.05 * mx.std(alone))
