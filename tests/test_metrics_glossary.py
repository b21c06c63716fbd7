"""docs/metrics.md names every metric that anything reports, and nothing else; its advice names options that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from tabular import table_model

from base_setup.tokenizer_setup import byte_tokenizer
from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from config.supervised_config import PreferenceConfig, RewardModelConfig, SFTConfig
from models.sft_model import build_embedded
from monitoring.metrics_file import read_metrics
from ppo_trainer.ppo_trainer import PPOTrainer
from training.preference_trainer import PreferenceTrainer
from training.reward_trainer import RewardTrainer
from training.sft_trainer import SFTTrainer

GLOSSARY = (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
SMALLEST = ModelConfig(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_layers=1, intermediate_size=32
)
PROMPTS = ["a", "bc"]
#: Of a line of metrics.jsonl, beside its metrics.
FIELDS_OF_A_LINE = {"kind"}
#: What train() and evaluate() hand back beside metrics.
NOT_METRICS = {"history", "run_folder", "samples"}

#: Together they report everything there is. The first half has weights, the second is a table of logits.
EMBEDDED_RUNS: dict[str, dict[str, Any]] = {
    "ppo": {"num_epochs_per_rollout": 2, "minibatch_size": 1, "micro_batch_size": 1},
    "ppo, shared trunk": {"value_network": "shared", "num_epochs_per_rollout": 1},
    "grpo": {"algorithm": "grpo", "group_size": 2, "num_epochs_per_rollout": 2},
}
TABLE_RUNS: dict[str, dict[str, Any]] = {
    "dapo": {"algorithm": "dapo", "group_size": 3},
    "copy": {
        "algorithm": "grpo",
        "group_size": 2,
        "rollout_policy": "copy",
        "off_policy_mask_threshold": 0.5,
    },
    "remax": {"algorithm": "remax", "score_scaling": "norm"},
}
SUPERVISED = {"sft", "reward model", "dpo", "kto"}
#: What stands for the variable part of a name.
VARIABLE = {"NAME": "[^/]+", "STAGE": "(rollout|score|update)"}
#: Who reports what the glossary says is reported under a condition only.
CONDITIONAL = {
    "explained_variance": {"ppo", "ppo, shared trunk"},
    "value_grad_norm": {"ppo"},
    "frac_reward_zero_std": {"grpo", "dapo", "copy"},
    "rewards/vowels/frac_zero_std": {"grpo", "dapo", "copy"},
    "objective/rlhf_reward": {"ppo", "ppo, shared trunk", "remax"},
    "loss/kl_avg": {"grpo", "copy"},
    "kl": {"ppo", "ppo, shared trunk", "grpo", "copy", "remax"},
    "off_policy/dropped_fraction": {"copy"},
    "dynamic_sampling/live_groups": {"dapo"},
    "scores/running_mean": {"remax"},
}


class Entry(NamedTuple):
    """A row of a table: the name, CAPITALS for its variable part, and its two lines."""

    name: str
    theme: str
    meaning: str
    advice: str

    def covers(self, metric: str) -> bool:
        """Whether this row explains ``metric``."""
        pattern = re.sub("[A-Z]+", lambda part: VARIABLE[part[0]], self.name)
        return re.fullmatch(pattern, metric) is not None


def entries() -> Iterator[Entry]:
    theme = ""
    for line in GLOSSARY.splitlines():
        theme = line.removeprefix("## ") if line.startswith("## ") else theme
        row = re.fullmatch(r"\| `([^`]+)` \| (.+) \| (.+) \|", line)
        if row is not None:
            yield Entry(row[1], theme, row[2], row[3])


ENTRIES = list(entries())


def short(completions: Sequence[str], **columns: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


def vowels(completions: Sequence[str], **columns: Any) -> list[float]:
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, set[str]]:
    """By run: the names of everything it told its caller, its callbacks and its file."""
    found: dict[str, set[str]] = {}
    embedded = build_embedded(SMALLEST, seed=1)
    table = table_model({}, "ebu", elsewhere=0.5)
    # The end token is as likely as a letter, so some completions end and others are cut off.
    ends = mx.arange(table.config["vocab_size"]) == byte_tokenizer().eos_token_id
    table.model.lm_head.weight = mx.where(ends[:, None], 0.0, table.model.lm_head.weight)
    for runs, model in ((EMBEDDED_RUNS, embedded), (TABLE_RUNS, table)):
        for name, options in runs.items():
            folder = tmp_path_factory.mktemp("run") / "run"
            config = PPOConfig(
                **{
                    "model_name": "embedded",
                    "fine_tune_type": "full",
                    "output_dir": str(folder),
                    "max_new_tokens": 3,
                    "batch_size": 2,
                    "verbose": False,
                    "log_samples_every": 0,
                    **options,
                }
            )
            trainer = PPOTrainer(config, model=model, reward_model=[vowels, short])
            told = {*trainer.train(PROMPTS, num_epochs=1), *trainer.evaluate(PROMPTS)} - NOT_METRICS
            found[name] = told | _names_in_file(folder)
    pair = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": "e", "rejected": "f"}]
    one: dict[str, Any] = {"model_name": "embedded", "num_steps": 1}
    demonstrations = [{"prompt": "a", "completion": "b"}]
    found["sft"] = set(
        SFTTrainer(embedded, SFTConfig(**one)).train(demonstrations, validation=demonstrations)
    )
    found["reward model"] = set(
        RewardTrainer(embedded, RewardModelConfig(**one)).train(pair, validation=pair)
    )
    for name in ("dpo", "kto"):
        config = PreferenceConfig(**one, algorithm=name)
        found[name] = set(PreferenceTrainer(embedded, config).train(pair, validation=pair))
    return found


def _names_in_file(folder: Path) -> set[str]:
    """The names in ``metrics.jsonl``, without the prefix that the kind of their line gives them."""
    prefixes = {"evaluate": "eval/", "epoch": "epoch/", "end": "final/"}
    names: set[str] = set()
    for line in read_metrics(folder / "metrics.jsonl"):
        prefix = prefixes.get(line.get("kind", ""), "")
        names |= {name.removeprefix(prefix) for name in line}
    return names - NOT_METRICS - FIELDS_OF_A_LINE


def test_everything_reported_is_in_the_glossary(reported: Mapping[str, set[str]]) -> None:
    missing = {
        name for names in reported.values() for name in names if not any(e.covers(name) for e in ENTRIES)
    }
    assert not missing


def test_everything_in_the_glossary_was_reported(reported: Mapping[str, set[str]]) -> None:
    assert len(ENTRIES) > 50  # the tables were found
    for entry in ENTRIES:
        stages = SUPERVISED if entry.theme == "Supervised stages" else reported.keys() - SUPERVISED
        names = set().union(*(reported[stage] for stage in stages))
        assert any(entry.covers(name) for name in names), f"{entry.name} ({entry.theme})"


@pytest.mark.parametrize("name", CONDITIONAL)
def test_what_is_reported_under_a_condition(reported: Mapping[str, set[str]], name: str) -> None:
    assert {run for run, names in reported.items() if name in names} == CONDITIONAL[name]


def test_no_name_is_explained_twice() -> None:
    for supervised in (False, True):
        names = [e.name for e in ENTRIES if (e.theme == "Supervised stages") == supervised]
        assert len(names) == len(set(names))


def test_supervised_stages_report_what_their_own_table_says(reported: Mapping[str, set[str]]) -> None:
    table = {e.name for e in ENTRIES if e.theme == "Supervised stages"}
    assert set().union(*(reported[stage] for stage in SUPERVISED)) == table


def test_advice_names_options_and_metrics_that_exist() -> None:
    """Also in the pictures at the end: `option`, `option = value`, or the name of a metric."""
    options = {
        field.name
        for cls in (PPOConfig, SFTConfig, RewardModelConfig, PreferenceConfig)
        for field in fields(cls)
    }
    _, _, pictures = GLOSSARY.partition("## Pictures")
    assert pictures
    named = [
        name for text in (*(e.advice for e in ENTRIES), pictures) for name in re.findall("`([^`]+)`", text)
    ]
    assert len(named) > 50
    for name in named:
        assert name.split(" = ")[0] in options or any(e.name == name or e.covers(name) for e in ENTRIES), name


def test_every_name_compared_with_trl_is_in_a_table() -> None:
    compared = re.findall(r"^\| `([^`]+)` \| [^|]+ \|$", GLOSSARY, re.MULTILINE)
    assert len(compared) > 10
    assert set(compared) <= {entry.name for entry in ENTRIES}
