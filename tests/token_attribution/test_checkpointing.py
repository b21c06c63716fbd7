"""Blocks that forget what they compute: the same values, the same gradients, less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from base_setup.lora_setup import prepare_trainable
from config.errors import InvalidConfigurationError, ModelLoadError
from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from config.supervised_config import RewardModelConfig, SFTConfig
from models.policy_model import PolicyModel
from models.reward_model import RewardModel
from models.sft_model import LanguageModel, build_embedded, share_weights
from models.value_model import ValueModel
from tests.token_attribution.test_sampled_states import BATCHES, Counting, a_pass_costs, found
from token_attribution import checkpointing, host_math
from token_attribution.checkpointing import checkpointed
from token_attribution.logprob_computer import token_statistics
from token_attribution.trunk import Trunk, find_trunk
from training.sft_trainer import SFTTrainer

#: Those that show their blocks: dense, learned positions, sparse, sliding, and with convolutions.
VISIBLE = ["llama", "qwen2", "gemma", "gpt2", "mixtral", "gemma3_text", "lfm2"]
SHALLOW = ModelConfig(
    hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_layers=2, intermediate_size=128
)


@pytest.fixture(params=["host", "mlx"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the exponentials are computed."""
    if request.param == "mlx":
        for module in (host_math, checkpointing):
            monkeypatch.setattr(module, "usable", lambda: False)
        monkeypatch.setattr("token_attribution.host_kernels.usable", lambda: False)
    elif not host_math.usable():
        pytest.skip("MLX does not compute on the CPU here, or it compiles")
    return str(request.param)


def forgetting(model: nn.Module) -> Trunk:
    trunk = find_trunk(model, checkpoint=True)
    assert trunk is not None
    return trunk


def loss_and_gradient(model: nn.Module, trunk: Trunk, kind: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logprobs, and the gradient of a weighted sum of them and of the entropies."""
    batch = BATCHES[kind]
    weights = mx.array(np.random.default_rng(1).normal(size=batch.mask.shape).astype(np.float32))

    def loss() -> tuple[mx.array, mx.array]:
        tokens, mask = mx.array(batch.tokens), mx.array(batch.mask)
        read = token_statistics(model, tokens, mask, 0.7, trunk=trunk, entropy_gradient=True)
        return mx.sum(weights * (read.logprobs + 0.5 * read.entropy)), read.logprobs

    (_, logprobs), gradient = nn.value_and_grad(model, loss)()
    return np.array(logprobs), {name: np.array(g) for name, g in list(tree_flatten(gradient))}


def adapted(model: nn.Module, config: Any) -> nn.Module:
    """With adapters that have learned something: fresh ones have a gradient in one of their factors alone."""
    prepare_trainable(model, config)
    key = mx.random.key(0)
    model.update(
        tree_map(lambda x: x + 0.05 * mx.random.normal(x.shape, key=key), model.trainable_parameters())
    )
    return model.eval()


@pytest.mark.parametrize("trained", ["adapters", "every weight"])
@pytest.mark.parametrize("shares", [True, False], ids=["prompts shared", "each row alone"])
@pytest.mark.parametrize("name", VISIBLE)
def test_values_and_gradients_are_the_same(
    architecture: Callable[[str], nn.Module],
    make_config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    shares: bool,
    trained: str,
) -> None:
    a_pass_costs(monkeypatch, 10)
    model = share_weights(architecture(name))
    if trained == "adapters":
        adapted(model, make_config(lora_dropout=0.0))
    else:
        model.unfreeze()
    plain, forgetful = Counting(found(model)), Counting(forgetting(model))
    halves = [
        counting.trunk if shares else counting.trunk._replace(sharing=None) for counting in (plain, forgetful)
    ]
    (expected, slopes), (logprobs, gradient) = (loss_and_gradient(model, t, "ragged") for t in halves)
    assert bool(forgetful.prompt_passes) == bool(plain.prompt_passes) == (shares and name != "lfm2")
    assert np.array_equal(logprobs, expected)
    assert gradient.keys() == slopes.keys()
    for which, exact in slopes.items():
        assert np.isfinite(exact).all()
        assert exact.any() or "experts" in which or "switch_mlp" in which, which
        size = max(np.abs(exact).max(), 1e-3)
        np.testing.assert_allclose(gradient[which], exact, atol=2e-5 * size, err_msg=which)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_on_either_path_the_gradients_are_the_same(
    architecture: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch, path: str, name: str
) -> None:
    a_pass_costs(monkeypatch, 0)
    model = share_weights(architecture(name)).unfreeze()
    expected, slopes = loss_and_gradient(model, found(model)._replace(sharing=None), "holes")
    logprobs, gradient = loss_and_gradient(model, forgetting(model), "holes")
    np.testing.assert_allclose(logprobs, expected, atol=1e-4)
    for which, exact in slopes.items():
        np.testing.assert_allclose(gradient[which], exact, atol=2e-4 * np.abs(exact).max(), err_msg=which)


def test_sixteen_bit_models_are_the_same_too(architecture: Callable[[str], nn.Module]) -> None:
    model = share_weights(architecture("llama"))
    model.set_dtype(mx.bfloat16)
    model.unfreeze()
    batch = BATCHES["even"]
    results = []
    for trunk in (found(model), forgetting(model)):
        _, gradient = nn.value_and_grad(
            model,
            lambda trunk=trunk: mx.sum(
                token_statistics(model, mx.array(batch.tokens), mx.array(batch.mask), trunk=trunk).logprobs
            ),
        )()
        results.append(dict(tree_flatten(tree_map(lambda g: np.array(g.astype(mx.float32)), gradient))))
    for name, exact in results[0].items():
        np.testing.assert_allclose(results[1][name], exact, atol=0.03 * np.abs(exact).max(), err_msg=name)


def test_less_memory_is_held_and_hardly_more_for_further_blocks(path: str) -> None:
    tokens = mx.random.randint(1, 200, (8, 64), key=mx.random.key(0))

    def peak(layers: int, *, forgets: bool) -> int:
        model = build_embedded(SHALLOW.replace(num_layers=layers), seed=1).model
        trunk = forgetting(model) if forgets else found(model)
        for _ in range(2):  # the first time something may be made that stays
            mx.eval(model.parameters(), tokens)
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(nn.value_and_grad(model, lambda: mx.sum(trunk.hidden(tokens) ** 2))())
            most = mx.get_peak_memory() - before
        return most

    plain, forgetful = ([peak(n, forgets=flag) for n in (4, 8)] for flag in (False, True))
    assert forgetful[1] < 0.75 * plain[1]
    assert forgetful[1] - forgetful[0] < 0.2 * (plain[1] - plain[0])
    weights = sum(x.nbytes for _, x in tree_flatten(build_embedded(SHALLOW, seed=1).model.layers))
    assert plain[1] - plain[0] > 2 * weights  # it is not the gradients that are measured here


# Dropout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [True, False], ids=["prompts shared", "each row alone"])
def test_with_dropout_the_gradient_is_that_of_the_loss_that_was_returned(
    tiny: LanguageModel,
    make_config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    shares: bool,
) -> None:
    """Against small steps: if the second computation dropped anything else, it would be another loss's."""
    a_pass_costs(monkeypatch, 10)
    model = adapted(share_weights(tiny.model), make_config(lora_dropout=0.5))
    trunk = forgetting(model)
    assert trunk.sharing is not None
    assert trunk.sharing.ability.even  # tried out before anything is dropped
    trunk = trunk if shares else trunk._replace(sharing=None)
    model.train()
    batch = BATCHES["ragged"]

    def loss(seed: int | None = 3) -> mx.array:
        if seed is not None:
            mx.random.seed(seed)
        read = token_statistics(
            model, mx.array(batch.tokens), mx.array(batch.mask), trunk=trunk, entropy=False
        )
        return mx.sum(read.logprobs)

    value, gradient = nn.value_and_grad(model, loss)()
    mx.eval(value, gradient)
    own = model.trainable_parameters()
    flat = dict(tree_flatten(gradient))
    squared = sum(float(mx.sum(g * g)) for g in flat.values())
    step = 0.002 / squared**0.5

    def rise(steps: int) -> float:
        """Of the loss, from as many steps against the gradient to as many along it."""
        ends = []
        for sign in (steps, -steps):
            model.update(tree_map(lambda x, g: x + sign * step * g, own, gradient))  # noqa: B023
            ends.append(float(loss()))
        model.update(own)
        return ends[0] - ends[1]

    slope = (8 * rise(1) - rise(2)) / (12 * step)  # exact up to the fifth derivative
    assert slope == pytest.approx(squared, rel=0.005)
    # The same seed drops the same; the next pass drops something else, and so does the one after a gradient pass.
    assert float(loss()) == float(value)
    assert len({float(loss()), float(loss(None)), float(loss(None)), float(loss(4))}) == 4
    nn.value_and_grad(model, loss)()
    assert float(loss(None)) not in (float(value), float(loss()))


def test_no_block_of_any_pass_drops_what_another_did(
    tiny: LanguageModel, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes of two blocks: each block's two computations from one seed, and four seeds in all."""
    seeds: list[int | None] = []
    own = checkpointing._drawing_from

    def noted(seed: int | None) -> Any:
        seeds.append(seed)
        return own(seed)

    monkeypatch.setattr(checkpointing, "_drawing_from", noted)
    model = adapted(share_weights(tiny.model), make_config(lora_dropout=0.5))
    trunk = forgetting(model)._replace(sharing=None)
    model.train()
    a_pass_costs(monkeypatch, 10**6)
    seeds.clear()
    mx.random.seed(3)
    for _ in range(2):
        loss_and_gradient(model, trunk, "first tokens alone")
    assert len(seeds) == 8
    assert sorted(seeds.count(seed) for seed in set(seeds)) == [2, 2, 2, 2]


def test_what_evaluation_computes_draws_no_random_number(tiny: LanguageModel) -> None:
    model = share_weights(tiny.model).eval()
    trunk = forgetting(model)
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(3,)).tolist()
    mx.random.seed(5)
    loss_and_gradient(model.unfreeze().eval(), trunk, "even")
    assert mx.random.uniform(shape=(3,)).tolist() == expected


# Where it is in force ----------------------------------------------------------------------------------


def test_the_blocks_have_their_own_class_again_also_after_an_exception(
    architecture: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = share_weights(architecture("llama"))
    layers = model.model.layers
    kinds = [type(layer) for layer in layers]
    trunk = forgetting(model)
    trunk.hidden(mx.array([[1, 2]]))
    assert [type(layer) for layer in layers] == kinds
    with checkpointed(layers):
        assert all(type(x) is not kind and isinstance(x, kind) for x, kind in zip(layers, kinds, strict=True))
    assert [type(layer) for layer in layers] == kinds

    def fail(*_: Any) -> mx.array:
        raise KeyError("inside a block")

    monkeypatch.setattr(type(layers[1].mlp), "__call__", fail)
    with pytest.raises(KeyError):
        trunk.hidden(mx.array([[1, 2]]))
    assert [type(layer) for layer in layers] == kinds


def test_a_failure_while_a_block_computes_again_leaves_its_own_weights(
    architecture: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = share_weights(architecture("llama")).unfreeze()
    trunk = forgetting(model)
    before = {name: np.array(x) for name, x in list(tree_flatten(model.parameters()))}
    attention, calls = model.model.layers[0].self_attn, []
    own = type(attention).__call__

    def fails_the_second_time(layer: Any, *more: Any, **named: Any) -> mx.array:
        if layer is attention:
            calls.append(layer)
            if len(calls) == 2:
                raise KeyError("in the backward pass")
        result: mx.array = own(layer, *more, **named)
        return result

    monkeypatch.setattr(type(attention), "__call__", fails_the_second_time)
    with pytest.raises(KeyError):
        loss_and_gradient(model, trunk._replace(sharing=None), "first tokens alone")
    assert len(calls) == 2
    assert all(np.array_equal(np.array(x), before[name]) for name, x in tree_flatten(model.parameters()))


def test_generation_is_the_same(tiny: LanguageModel, make_config: Callable[..., Any]) -> None:
    ids, real = mx.array([[5, 6, 7], [8, 9, 0]]), mx.array([[1, 1, 1], [1, 1, 0]])
    completions = [
        PolicyModel(tiny, make_config(gradient_checkpointing=flag)).generate(
            ids, real, max_new_tokens=6, seed=2
        )
        for flag in (True, False)
    ]
    assert completions[0].tolist() == completions[1].tolist()


@pytest.mark.parametrize("asked", [True, False])
def test_the_option_reaches_every_model_that_trains(
    tiny: LanguageModel, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    calls: list[str] = []
    own = checkpointing._call

    def noted(*more: Any) -> mx.array:
        calls.append("a block")
        return own(*more)

    def blocks_that_forgot(run: Callable[[], mx.array]) -> int:
        calls.clear()
        mx.eval(run())
        return len(calls)

    monkeypatch.setattr(checkpointing, "_call", noted)
    tokens, mask = mx.array([[1, 2, 3, 4]]), mx.array([[False, True, True]])
    policy = PolicyModel(tiny, make_config(PPOConfig, gradient_checkpointing=asked))
    value = ValueModel(tiny, make_config(PPOConfig, gradient_checkpointing=asked))
    shared = ValueModel.on_policy_trunk(policy)
    reward = RewardModel(tiny, make_config(RewardModelConfig, gradient_checkpointing=asked))
    sft = SFTTrainer(tiny, make_config(SFTConfig, gradient_checkpointing=asked))
    row = {"prompt": "ab", "completion": "c"}
    expected = 2 if asked else 0  # the model has two blocks
    assert blocks_that_forgot(lambda: policy.logprobs(tokens, mask)) == expected
    assert blocks_that_forgot(lambda: value.values(tokens, mask)) == expected
    assert blocks_that_forgot(lambda: shared.values(tokens, mask)) == expected
    assert blocks_that_forgot(lambda: reward.raw_scores(tokens, mx.array([4]))) == expected
    assert blocks_that_forgot(lambda: mx.array(sft.loss([row]))) == expected
    # A reference is never differentiated.
    assert blocks_that_forgot(lambda: policy.frozen_copy().logprobs(tokens, mask)) == 0


def test_it_is_refused_where_the_blocks_do_not_show(
    architecture: Callable[[str], nn.Module], tiny: LanguageModel, make_config: Callable[..., Any]
) -> None:
    hidden = LanguageModel(architecture("gemma2"), tiny.tokenizer, {}, "gemma2")
    with pytest.raises(InvalidConfigurationError, match=r"gradient_checkpointing.*gemma2"):
        PolicyModel(hidden, make_config(gradient_checkpointing=True))
    with pytest.raises(ModelLoadError, match="gemma2"):
        ValueModel(hidden, make_config(gradient_checkpointing=True))


def test_supervised_training_with_it_ends_at_the_same_weights(
    tiny: LanguageModel, make_config: Callable[..., Any]
) -> None:
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "ab", "completion": "xyz"}]
    weights = []
    for flag in (True, False):
        trainer = SFTTrainer(
            tiny,
            make_config(
                SFTConfig, gradient_checkpointing=flag, lora_dropout=0.0, num_steps=3, learning_rate=1e-3
            ),
        )
        trainer.train(rows)
        weights.append(dict(tree_flatten(trainer.policy.model.trainable_parameters())))
    assert weights[0].keys() == weights[1].keys()
    for name, x in weights[0].items():
        np.testing.assert_allclose(np.array(x), np.array(weights[1][name]), atol=1e-5, err_msg=name)
