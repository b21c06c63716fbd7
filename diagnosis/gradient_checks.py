"""Gradients of the run's own loss: they reach every weight that trains, and nothing that is masked has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from base_setup.backend import device_kind
from base_setup.lora_setup import adapter_layers
from base_setup.parameters import named_arrays
from diagnosis.findings import Finding, judged
from diagnosis.tolerance import at_mask, largest, logprob_tolerance
from experience_buffer.buffer_manager import ExperienceBuffer
from experience_buffer.data_structures import Experience
from models.policy_model import FrozenPolicy, PolicyModel
from ppo_trainer.objective import PolicyObjective
from ppo_trainer.ppo_trainer import PPOTrainer
from training.model_trainer import global_norm

Gradients = dict[str, mx.array]


def trained_module(trainer: PPOTrainer) -> nn.Module:
    """What the policy's optimiser moves: the policy, with the critic's head where they share a trunk."""
    value = trainer.value_model
    return value.module if value is not None and value.shared else trainer.policy.model


def with_probe_advantages(experience: Experience) -> Experience:
    """Advantages of +1 and −1 by turns, row by row: a gradient whatever the rewards said."""
    signs = mx.where(mx.arange(experience.size) % 2 == 0, 1.0, -1.0)[:, None]
    return experience._replace(advantages=mx.where(experience.mask, signs, 0.0))


def loss_gradients(trainer: PPOTrainer, experience: Experience) -> Gradients:
    """Gradient of the run's loss on one batch, as its first optimiser step has it, by parameter."""
    config = trainer.config
    objective = PolicyObjective(
        trainer.policy, trainer.value_model, trainer.reference, trainer.kl_controller, config
    )
    buffer = ExperienceBuffer(experience, micro_batch_size=config.micro_batch_size)
    (minibatch,) = buffer.minibatches()
    differentiate = nn.value_and_grad(
        trained_module(trainer), lambda part: objective(part, minibatch, first=True)[0]
    )
    total: Gradients = {}
    for part in minibatch.micro_batches:
        _, gradients = differentiate(part)
        for name, array in named_arrays(gradients).items():
            total[name] = total[name] + array if name in total else array
        mx.eval(total)
    return total


def check_gradients(module: nn.Module, gradients: Mapping[str, mx.array]) -> Finding:
    """A finite, non-zero gradient in every adapter layer, or, where every weight trains, in every weight.

    An adapter layer counts as one: the gradient of a fresh one's first factor is 0 because its second still is.
    """
    name = "gradients"
    layers = [path for path, _ in adapter_layers(module)]
    unit = "adapter layers" if layers else "weights"
    places = layers or list(named_arrays(module.parameters()))
    norms = {place: _norm_below(place, gradients, layer=bool(layers)) for place in places}
    dead = [place for place, norm in norms.items() if not norm > 0]  # NaN too
    broken = [place for place, norm in norms.items() if not np.isfinite(norm)]
    if not norms:
        return Finding(
            name,
            "fault",
            "nothing trains",
            "look at fine_tune_type and lora_layers: no weight has a gradient",
        )
    if dead or broken:
        worst = (broken or dead)[0]
        seen = f"{len(dead)} of {len(norms)} {unit} without one, {worst} the first ({norms[worst]:.2g})"
        advice = (
            "weights without a gradient do not learn: they are frozen, or the loss does not depend on them; look at "
            "lora_layers, and at what was frozen after the model was prepared"
        )
        if broken:
            seen = f"{len(broken)} of {len(norms)} {unit} with one that is not finite, {worst} the first"
            advice = (
                "look for rewards of enormous size, a checkpoint with NaN in it, or a dtype that overflows"
            )
        return Finding(name, "fault", seen, advice)
    least = min(norms, key=lambda place: norms[place])
    return Finding(
        name, "ok", f"{len(norms)} {unit}, norms {norms[least]:.2g} ({least}) to {max(norms.values()):.2g}"
    )


def _norm_below(place: str, gradients: Mapping[str, mx.array], *, layer: bool) -> float:
    prefix = place + "."
    mine = [x for name, x in gradients.items() if (name.startswith(prefix) if layer else name == place)]
    return global_norm(mine) if mine else 0.0


def check_padding(gradients_of: Callable[[Experience], Gradients], experience: Experience) -> Finding:
    """What stands at masked and padded positions changes no gradient at all.

    Padding is filled with other tokens, and advantages, values and logprobs there with enormous numbers; a
    position whose gradient is not exactly 0 would show.
    """
    rows, width = experience.mask.shape
    last = mx.max(experience.mask * mx.arange(1, width + 1), axis=1)[
        :, None
    ]  # (B, 1): sampled tokens end there
    padding = mx.arange(width + 1)[None] > last  # (B, T+1)
    filled = experience._replace(tokens=mx.where(padding, 1, experience.tokens))
    hidden = {
        field: mx.where(experience.mask, array, 1e4)
        for field in ("advantages", "sampler_logprobs", "old_logprobs", "ref_logprobs", "values", "returns")
        if (array := getattr(experience, field)) is not None
    }
    clean, planted = gradients_of(experience), gradients_of(filled._replace(**hidden))
    scale = max((float(mx.max(mx.abs(x))) for x in clean.values()), default=0.0)
    worst = max((float(mx.max(mx.abs(clean[name] - planted[name]))) for name in clean), default=0.0)
    # Sums on a GPU need not be made in the same order twice.
    limit = 0.0 if device_kind() == "cpu" else 1e-6 * scale
    n_masked = int(mx.sum(~experience.mask))
    return judged(
        "masked positions",
        worst <= limit,
        f"{n_masked} of {rows * width} positions masked, {int(mx.sum(padding[:, 1:]))} of them padding: what stands "
        f"there changes the gradient by {worst:.2g} (its largest number is {scale:.2g})",
        "prompt or padding tokens are learned from: a loss that forgets the mask, or a mean over all positions",
    )


def check_ratio(policy: PolicyModel, experience: Experience, temperature: float) -> Finding:
    """Two passes over the same weights agree: the first step's ratio is 1 and its KL to the old policy 0.

    One pass is that for the old logprobs, the other the one that is differentiated. Dropout would tell them apart.
    """
    old = at_mask(policy.logprobs(experience.tokens, experience.mask, temperature), experience.mask)
    read = policy.read(experience.tokens, experience.mask, temperature, for_gradient=True)
    new = at_mask(read.states.back_in_place(read.reading.logprobs), experience.mask)
    log_ratio, limit = new - old, logprob_tolerance(policy, experience.tokens, temperature)
    return judged(
        "ratio at step 0",
        bool(largest(log_ratio) <= limit),
        f"{np.exp(log_ratio).min():.6f} to {np.exp(log_ratio).max():.6f} over {log_ratio.size} tokens, approximate KL "
        f"{np.mean(0.5 * log_ratio**2):.2g}",
        "the pass that is differentiated is not the one that old logprobs come from: dropout in one of them, another "
        "temperature, or an architecture that computes differently in training mode",
    )


def check_kl(
    policy: PolicyModel, reference: FrozenPolicy, experience: Experience, temperature: float, *, same: bool
) -> Finding:
    """The KL to the reference is 0 before the first update.

    ``same``: the reference is the policy as it begins; otherwise it is told and may be anything finite.
    """
    mine = at_mask(policy.logprobs(experience.tokens, experience.mask, temperature), experience.mask)
    theirs = at_mask(reference.logprobs(experience.tokens, experience.mask, temperature), experience.mask)
    difference, limit = mine - theirs, logprob_tolerance(policy, experience.tokens, temperature)
    per_sequence = float(difference.sum()) / max(experience.size, 1)
    seen = (
        f"{per_sequence:.3g} nats per completion, {largest(difference):.2g} at most for a token; "
        f"reference: {reference.origin}"
    )
    if not same:
        return judged(
            "KL at step 0",
            bool(np.isfinite(difference).all()),
            f"{seen} (another model than the policy, so it need not be 0)",
            "the reference gives numbers that are not finite: look at its checkpoint",
        )
    return judged(
        "KL at step 0",
        bool(largest(difference) <= limit),
        seen,
        "policy and reference should be the same model before the first update, and are not: another checkpoint, "
        "another temperature, or an adapter that is not zero; see reference and reference_path",
    )
