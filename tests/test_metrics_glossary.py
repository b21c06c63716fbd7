"""docs/metrics.md names every metric that anything reports, and nothing else; its advice names options that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tabular import table_model

from config.declaration import Declaration
from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from config.supervised_config import RewardModelConfig, SFTConfig
from models.sft_model import build_embedded
from monitoring.metrics_file import read_metrics
from ppo_trainer.ppo_trainer import PPOTrainer
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
SUPERVISED = {"sft", "reward model"}


class Entry(NamedTuple):
    """A row of a table: the name, CAPITALS for its variable part, and its two lines."""

    name: str
    theme: str
    meaning: str
    advice: str

    def covers(self, metric: str) -> bool:
        return re.fullmatch(re.sub(r"[A-Z]+", "[^/]+", self.name), metric) is not None


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
    # "e" is an answer as good as the end token is likely, so some completions end and others are cut off.
    table = table_model({"a": [1, 0, 0], "c": [1, 0, 0]}, "eu\n", elsewhere=0.5)
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
    found["sft"] = set(
        SFTTrainer(embedded, SFTConfig(model_name="embedded", num_steps=1)).train(
            [{"prompt": "a", "completion": "b"}]
        )
    )
    found["reward model"] = set(
        RewardTrainer(embedded, RewardModelConfig(model_name="embedded", num_steps=1)).train(
            [{"prompt": "a", "chosen": "b", "rejected": "c"}]
        )
    )
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


def test_no_name_is_explained_twice() -> None:
    for supervised in (False, True):
        names = [e.name for e in ENTRIES if (e.theme == "Supervised stages") == supervised]
        assert len(names) == len(set(names))


def test_supervised_stages_report_what_their_own_table_says(reported: Mapping[str, set[str]]) -> None:
    table = {e.name for e in ENTRIES if e.theme == "Supervised stages"}
    assert reported["sft"] | reported["reward model"] == table


def test_advice_names_options_and_metrics_that_exist() -> None:
    """Also in the pictures at the end: `option`, `option = value`, or the name of a metric."""
    options = {name for cls in (PPOConfig, SFTConfig, RewardModelConfig) for name in _options_of(cls)} | set(
        _options_of(ModelConfig)
    )
    _, _, pictures = GLOSSARY.partition("## Pictures")
    assert pictures
    named = [
        name for text in (*(e.advice for e in ENTRIES), pictures) for name in re.findall("`([^`]+)`", text)
    ]
    assert len(named) > 50
    for name in named:
        assert name.split(" = ")[0] in options or any(e.name == name or e.covers(name) for e in ENTRIES), name


def _options_of(cls: type[Declaration]) -> Sequence[str]:
    return list(cls.model_fields)
