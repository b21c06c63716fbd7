"""Which architectures can hold several sequences in a row, against plain forwards; and how rows are filled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.conftest import ARCHITECTURES
from token_attribution.packed_rows import can_pack, fill_rows, packed_hidden
from token_attribution.trunk import find_trunk

#: Learned positions, recurrent states and convolutions cannot, and gemma2 shows no head.
CAN = {"llama": True, "qwen2": True, "gemma": True, "mixtral": True, "gemma3_text": True, "gpt2": False}
CAN |= {"mamba2": False, "lfm2": False, "gemma2": False}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_test_drive_knows_what_an_architecture_can_do(
    architecture: Callable[[str], Any], name: str
) -> None:
    model = architecture(name)
    trunk = find_trunk(model)
    assert can_pack(model, trunk) == CAN[name]
    if not CAN[name]:
        return
    assert trunk is not None
    lengths, rng = [7, 1, 12, 4], np.random.default_rng(0)
    tokens = rng.integers(61, size=sum(lengths))
    segments = np.repeat(np.arange(4), lengths)
    together = packed_hidden(trunk, len(model.layers), mx.array(tokens)[None], mx.array(segments)[None])[0]
    for i in range(4):
        alone = trunk.hidden(mx.array(tokens[segments == i])[None])[0]
        np.testing.assert_allclose(
            np.array(together[mx.array(np.flatnonzero(segments == i))]), np.array(alone), atol=2e-4, rtol=1e-3
        )


def test_a_change_in_one_sequence_moves_no_other(architecture: Callable[[str], Any]) -> None:
    model = architecture("llama")
    trunk = find_trunk(model)
    assert trunk is not None
    segments = mx.array([[0] * 4 + [1] * 4])
    one, other = (
        np.array(packed_hidden(trunk, 2, mx.array([[first, 2, 3, 4, 5, 6, 7, 8]]), segments))[0]
        for first in (1, 9)
    )
    assert one[4:].tobytes() == other[4:].tobytes()
    assert not np.allclose(one[:4], other[:4])


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_filled_and_never_too_full(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 40, size=30).tolist()
    rows = fill_rows(lengths, 40)
    assert sorted(i for row in rows for i in row) == list(range(30))
    loads = [sum(lengths[i] for i in row) for row in rows]
    assert max(loads) <= 40
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 40) + 2
    assert sum(load <= 20 for load in loads) <= 1  # two half-empty rows would be one
