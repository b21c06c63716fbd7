"""How others take part in a run: a plain function per epoch, or an object with the moments it cares about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

#: The moments, with what each is called with.
MOMENTS = {
    "on_train_begin": "(trainer)",
    "on_step_end": "(step, metrics)",
    "on_samples": "(step, samples)",
    "on_evaluate": "(step, metrics)",
    "on_epoch_end": "(epoch, metrics)",
    "on_train_end": "(metrics)",
}

Callback = Callable[[int, Mapping[str, Any]], Any] | object


class Callbacks:
    """Calls everyone who has a method for the moment; a plain function is called at the end of each epoch.

    A callback that returns False asks the run to stop at the next step. Exceptions pass through: the run
    saves what it has and ends with them.
    """

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = list(callbacks)
        self.stop_requested = False
        for callback in self.callbacks:
            if not callable(callback) and not any(hasattr(callback, moment) for moment in MOMENTS):
                raise TypeError(
                    f"callbacks: {callback!r} is neither a function f(epoch, metrics) nor an object with one of "
                    f"{', '.join(name + signature for name, signature in MOMENTS.items())}"
                )

    def __call__(self, moment: str, *arguments: Any) -> None:
        """Tell everyone, in order."""
        for callback in self.callbacks:
            method = getattr(callback, moment, None)
            if method is None and moment == "on_epoch_end" and not self._has_moments(callback):
                method = callback
            if method is not None and method(*arguments) is False:
                self.stop_requested = True

    @staticmethod
    def _has_moments(callback: Callback) -> bool:
        return any(hasattr(callback, moment) for moment in MOMENTS)


class EpochPrinter:
    """One plain line per epoch, the default on the terminal."""

    def __init__(self, num_epochs: int) -> None:
        self.num_epochs = num_epochs

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Epoch (from 0), reward, KL, length."""
        parts = [f"epoch {epoch + 1}/{self.num_epochs}", f"reward {metrics['avg_reward']:.3f}"]
        for key, label in (("objective/kl", "kl"), ("completions/mean_length", "length")):
            if key in metrics:
                parts.append(f"{label} {metrics[key]:.3g}")
        print("  ".join(parts), flush=True)
