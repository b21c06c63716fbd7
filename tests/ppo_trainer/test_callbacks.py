"""Callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ppo_trainer.callbacks import MOMENTS, Callbacks


class Listener:
    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.heard.append(("step", step))

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, Any]) -> None:
        self.heard.append(("epoch", epoch))


def test_an_object_hears_its_moments_and_a_function_the_end_of_each_epoch() -> None:
    heard: list[tuple[int, Mapping[str, Any]]] = []
    listener = Listener()
    told = Callbacks([listener, lambda epoch, metrics: heard.append((epoch, metrics))])
    told("on_train_begin", object())
    told("on_step_end", 1, {})
    told("on_epoch_end", 0, {"avg_reward": 1.0})
    told("on_train_end", {})
    assert listener.heard == [("step", 1), ("epoch", 0)]
    assert heard == [(0, {"avg_reward": 1.0})]
    assert not told.stop_requested


def test_a_callable_object_with_moments_is_told_its_moments_alone() -> None:
    class Both(Listener):
        def __call__(self, epoch: int, metrics: Mapping[str, Any]) -> None:
            self.heard.append(("called", epoch))

    both = Both()
    Callbacks([both])("on_epoch_end", 2, {})
    assert both.heard == [("epoch", 2)]


@pytest.mark.parametrize(("answer", "stops"), [(False, True), (None, False), (0, False), (True, False)])
def test_only_the_answer_false_stops(answer: Any, stops: bool) -> None:
    told = Callbacks([lambda epoch, metrics: answer, lambda epoch, metrics: None])
    told("on_epoch_end", 0, {})
    assert told.stop_requested is stops


def test_everyone_is_told_even_after_someone_asked_to_stop_and_exceptions_pass_through() -> None:
    heard = []
    told = Callbacks([lambda *_: False, lambda epoch, _: heard.append(epoch)])
    told("on_epoch_end", 3, {})
    assert heard == [3]

    def broken(epoch: int, metrics: Mapping[str, Any]) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Callbacks([broken])("on_epoch_end", 0, {})


@pytest.mark.parametrize("wrong", [3, "print", object(), {"on_step_end": print}])
def test_what_is_no_callback_is_refused_with_the_moments_there_are(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"callbacks: .* neither a function f\(epoch, metrics\)") as caught:
        Callbacks([wrong])
    assert all(moment in str(caught.value) for moment in MOMENTS)
