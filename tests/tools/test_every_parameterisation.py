"""Everything that can train, over a dense model and a mixture of experts: trained, saved, read elsewhere, fused.

All rows of a speed go through one fresh process, which knows nothing but folders.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.utils import _get_classes

from base_setup.parameters import named_arrays
from base_setup.soft_prompt import soft_prompt_of
from base_setup.tokenizer_setup import byte_tokenizer
from config.errors import InvalidConfigurationError
from models.policy_model import PolicyModel
from models.sft_model import LanguageModel, load_language_model, save_language_model
from tests.conftest import ARCHITECTURES, SHAPE
from token_attribution.extractor import pad_sequences
from tools.fusing import fuse
from training.model_trainer import ModelTrainer

ROOT = Path(__file__).parents[2]
IDS = [72, 101, 108, 108, 111]
BATCH = pad_sequences([[72, 101], [72, 101], [40]], [[108, 7, 9], [3], [5, 200, 31, 8]])
BASES = {"dense": "llama", "experts": "mixtral"}

PACKED: dict[str, Any] = {"quantize_group_size": 32}
FLOATS: dict[str, Any] = {"quantize_base": 4, "quantize_mode": "mxfp4"}
#: What trains, and the leaves of the tree that have to move.
KINDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "full": ({"fine_tune_type": "full"}, {"weight"}),
    "lora": ({}, {"lora_a", "lora_b"}),
    "dora": ({"fine_tune_type": "dora"}, {"lora_a", "lora_b", "m"}),
    "rank-stabilised": ({"lora_rslora": True}, {"lora_a", "lora_b"}),
    **{f"{bits} bits": ({"quantize_base": bits, **PACKED}, {"lora_a", "lora_b"}) for bits in (2, 3, 4, 6, 8)},
    "mxfp4": (FLOATS, {"lora_a", "lora_b"}),
    "dora over 4 bits": (
        {"fine_tune_type": "dora", "quantize_base": 4, **PACKED},
        {"lora_a", "lora_b", "m"},
    ),
    "soft prompt": ({"fine_tune_type": "soft_prompt", "soft_prompt_text": "Say"}, {"soft_prompt"}),
    "soft prompt and lora": ({"soft_prompt_tokens": 3}, {"soft_prompt", "lora_a", "lora_b"}),
    "whole modules": ({"modules_to_save": ["norm", "lm_head"]}, {"weight", "lora_a", "lora_b"}),
    "new tokens": ({"new_special_tokens": ["<a>", "<b>"]}, {"lora_a", "lora_b"}),
    "new tokens that train": (
        {"new_special_tokens": ["<a>"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"weight", "lora_a", "lora_b"},
    ),
}
FAST = ("lora", "dora", "4 bits", "soft prompt and lora", "new tokens that train")
ROWS = [(base, kind) for base in BASES for kind in KINDS]
TABLE = [
    pytest.param(base, kind, id=f"{kind}, {base}", marks=[] if kind in FAST else [pytest.mark.slow])
    for base, kind in ROWS
]
FRESH = """
import json, sys
import base_setup.backend
import mlx.core as mx, mlx_lm
from tools.loading import load_for_use

ids, jobs, output = json.loads(sys.argv[1])
found, said = {}, {}
for name, (how, base, adapter) in jobs.items():
    model = mlx_lm.load(base, adapter_path=adapter)[0] if how == "mlx_lm" else load_for_use(base, adapter).model
    model.eval()
    found[name] = model(mx.array([ids]))
    tokens = list(ids)
    for _ in range(8):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1])))
    said[name] = tokens[len(ids):]
mx.savez(output, **found)
print(json.dumps(said))
"""


class Trained(NamedTuple):
    """A row: the policy after training and what it was before."""

    policy: PolicyModel
    before: dict[str, np.ndarray]  # all numbers, before a step was made
    at_first: nn.Module  # a frozen copy from then
    base_logits: np.ndarray  # of the base, before anything was added to it
    folder: Path  # of the adapter
    base: str  # what mlx-lm loads as its base
    config: Any

    def logits(self) -> np.ndarray:
        return logits(self.policy.model)

    def greedy(self) -> list[int]:
        """Up to its end token, where there is one among the first 8."""
        ids = mx.array([IDS])
        return self.policy.generate(ids, max_new_tokens=8, temperature=0).tolist()[0][len(IDS) :]


def logits(model: nn.Module) -> np.ndarray:
    return np.array(model(mx.array([IDS])))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each kind in a folder, its predictions far from uniform."""
    folders = {}
    for name, kind in BASES.items():
        tokenizer = byte_tokenizer()
        sizes = {"vocab_size": len(tokenizer), "intermediate_size": 64, "torch_dtype": "float32"}
        config = {**SHAPE, **ARCHITECTURES[kind], **sizes, "model_type": kind}
        model_class, args_class = _get_classes(config)
        mx.random.seed(4)
        model = model_class(args_class.from_dict(config))
        model.update(tree_map(lambda x: 2 * x if x.ndim > 1 else x, model.parameters()))
        folders[name] = tmp_path_factory.mktemp("bases") / name
        save_language_model(LanguageModel(model, tokenizer, config, name), folders[name])
    return folders


@pytest.fixture(scope="module")
def trained(
    bases: dict[str, Path], make_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Trained]:
    """A row after two optimiser steps: at the first one the update's second factor is zero, so only it moves."""

    @cache
    def train(base: str, kind: str) -> Trained:
        config = make_config(
            model_name=str(bases[base]), learning_rate=0.02, lora_dropout=0.0, **KINDS[kind][0]
        )
        loaded = load_language_model(config)
        untouched = logits(loaded.model)
        policy = PolicyModel(loaded, config)
        before = {name: np.array(x) for name, x in named_arrays(policy.model.parameters()).items()}
        at_first = policy.frozen_copy().model
        trainer = ModelTrainer(policy.model, config, total_steps=2)
        for _ in range(2):
            report = trainer.step(lambda batch: (-mx.sum(policy.logprobs(*batch)), mx.zeros(())), [BATCH])
            assert not report.skipped
        folder = tmp_path_factory.mktemp("adapters") / "adapter"
        policy.save(folder)
        if loaded.is_altered:
            save_language_model(loaded, folder / "base")
        name = str(folder / "base" if loaded.is_altered else bases[base])
        return Trained(policy, before, at_first, untouched, folder, name, config)

    return train


def reads(kind: str) -> bool:
    """Whether mlx-lm knows this kind of adapter."""
    return not any("soft_prompt" in option or option == "modules_to_save" for option in KINDS[kind][0])


def fuses(kind: str) -> bool:
    """Whether all of it is weights of a plain model, and the result is not one already."""
    return not any("soft_prompt" in str(word) for word in (*KINDS[kind][0], *KINDS[kind][0].values()))


@pytest.fixture(scope="module")
def elsewhere(
    trained: Callable[[str, str], Trained], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool], tuple[dict[str, np.ndarray], dict[str, list[int]]]]:
    """Logits and greedy tokens of all fast or all slow rows, in a fresh process, by each way of reading them."""

    @cache
    def ask(fast: bool) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
        jobs = {}
        for base, kind in ROWS:
            if (kind in FAST) != fast:
                continue
            row, name = trained(base, kind), f"{kind}, {base}"
            jobs[f"{name}: ours"] = ("ours", row.base, str(row.folder))
            if reads(kind):
                jobs[f"{name}: mlx_lm"] = ("mlx_lm", row.base, str(row.folder))
            if fuses(kind):
                target = tmp_path_factory.mktemp("fused") / "model"
                fuse(row.base, str(row.folder), target, de_quantize="quantize_base" in KINDS[kind][0])
                jobs[f"{name}: fused"] = ("mlx_lm", str(target), None)
        output = tmp_path_factory.mktemp("logits") / "found.npz"
        words = [sys.executable, "-c", FRESH, json.dumps([IDS, jobs, str(output)])]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return dict(np.load(output)), json.loads(done.stdout.splitlines()[-1])

    return ask


@pytest.mark.parametrize(("base", "kind"), TABLE)
def test_it_trains_and_nothing_else_does(
    trained: Callable[[str, str], Trained], base: str, kind: str
) -> None:
    row = trained(base, kind)
    after = named_arrays(row.policy.model.parameters())
    trains = named_arrays(row.policy.model.trainable_parameters()).keys()
    moved = {name for name, x in after.items() if not np.array_equal(np.array(x), row.before[name])}
    assert {name.rsplit(".", 1)[-1] for name in moved} == KINDS[kind][1]
    assert moved <= trains
    if base == "dense":  # of experts only those that a token went to
        assert moved == trains
    assert not np.allclose(row.logits(), row.base_logits, atol=1e-2)


@pytest.mark.parametrize(("base", "kind"), TABLE)
def test_the_reference_is_the_base_to_the_last_bit(
    trained: Callable[[str, str], Trained], base: str, kind: str
) -> None:
    row = trained(base, kind)
    if kind == "full":  # the reference is the copy that was made before the first step
        assert np.array_equal(logits(row.at_first), row.base_logits)
        return
    now = row.logits()
    assert np.array_equal(logits(row.policy.frozen_copy(with_adapter=False).model), row.base_logits)
    with row.policy.adapters_off() as bare:
        assert np.array_equal(logits(bare), row.base_logits)
        assert soft_prompt_of(bare) is None
    assert np.array_equal(row.logits(), now)
    if row.policy.begins_as_base:
        assert np.array_equal(logits(row.at_first), row.base_logits)


@pytest.mark.parametrize(("base", "kind"), TABLE)
def test_checkpointing_changes_no_gradient(
    trained: Callable[[str, str], Trained], base: str, kind: str
) -> None:
    row = trained(base, kind)
    config = row.config.replace(adapter_path=str(row.folder))
    gradients = []
    for checkpoint in (False, True):
        policy = PolicyModel(row.policy.base, config.replace(gradient_checkpointing=checkpoint))

        def loss(policy: PolicyModel = policy) -> mx.array:
            return mx.sum(policy.logprobs(*BATCH))

        gradients.append(named_arrays(nn.value_and_grad(policy.model, loss)()[1]))
    kept, again = gradients
    assert kept.keys() == again.keys() == named_arrays(row.policy.model.trainable_parameters()).keys()
    for name, exact in kept.items():
        size = max(float(mx.abs(exact).max()), 1e-3)
        np.testing.assert_allclose(np.array(again[name]), np.array(exact), atol=5e-5 * size, err_msg=name)
    assert any(bool(mx.any(x)) for x in kept.values())


@pytest.mark.parametrize(("base", "kind"), TABLE)
def test_a_fresh_process_says_the_same(
    trained: Callable[[str, str], Trained], elsewhere: Callable[[bool], Any], base: str, kind: str
) -> None:
    row, name = trained(base, kind), f"{kind}, {base}"
    found, said = elsewhere(kind in FAST)
    for how in ("ours", "mlx_lm") if reads(kind) else ("ours",):
        assert np.array_equal(found[f"{name}: {how}"], row.logits()), how
        own = row.greedy()
        assert said[f"{name}: {how}"][: len(own)] == own, how


@pytest.mark.parametrize(("base", "kind"), TABLE)
def test_fused_it_is_a_plain_model_that_says_the_same(
    trained: Callable[[str, str], Trained],
    elsewhere: Callable[[bool], Any],
    tmp_path: Path,
    base: str,
    kind: str,
) -> None:
    """In float32: sums in another order, over a base that is unpacked where it was packed."""
    row, name = trained(base, kind), f"{kind}, {base}: fused"
    if not fuses(kind):
        with pytest.raises(InvalidConfigurationError, match="has a soft prompt"):
            fuse(row.base, str(row.folder), tmp_path / "fused")
        return
    found, said = elsewhere(kind in FAST)
    expected = row.logits()
    np.testing.assert_allclose(found[name], expected, atol=3e-5 * np.abs(expected).max())
    own = row.greedy()
    assert said[name][: len(own)] == own
