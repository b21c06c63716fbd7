"""``--resume`` of the supervised stages as typed, with nothing said but the folder, or with something changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monitoring.metrics_file import read_metrics
from tests.command_line.conftest import TINY, write_rows

MODEL = ("--model-name", "embedded", "--embedded-model", json.dumps(TINY), "--learning-rate", "1e-2")
SHORT = (*MODEL, "--batch-size", "2", "--num-steps", "2", "--save-every", "1", "--no-verbose")
HELD_OUT = ("--validation-fraction", "0.3", "--output-dir", "run")
STEPS = [{"prompt": f"q{n}", "steps": ["a", "b"], "labels": [True, n % 2 == 0]} for n in range(8)]


@pytest.mark.parametrize("path", ["preferences.jsonl", "steps.jsonl"])
def test_a_reward_model_goes_on_by_its_folder_alone(
    path: str, workplace: Path, command: Callable[..., Any]
) -> None:
    """Its config.json names every option, also those that are for rows of the other kind."""
    write_rows(workplace / "steps.jsonl", STEPS)
    done = command("reward-model", *SHORT, "--train-path", path, *HELD_OUT)
    assert done.code == 0, done.err
    more = command("reward-model", "--resume", "run", "--num-steps", "3")
    assert more.code == 0, more.err
    assert [line["step"] for line in read_metrics(workplace / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_a_run_that_is_to_end_where_it_stands_is_validated_there(
    workplace: Path, command: Callable[..., Any]
) -> None:
    options = ("--train-path", "pairs.jsonl", *HELD_OUT, "--lora-dropout", "0")
    assert command("sft", *SHORT, *options).code == 0
    first = next(workplace.glob("run/checkpoint_*_update_1"))
    done = command("sft", "--resume", str(first), "--num-steps", "1")
    assert done.code == 0, done.err
    alone = command("sft", *SHORT, *options, "--num-steps", "1", "--output-dir", "alone")
    said = next(line for line in alone.out.splitlines() if "validation loss" in line)
    assert said in done.out


def test_another_learning_rate_is_taken(workplace: Path, command: Callable[..., Any]) -> None:
    command("sft", *SHORT, "--train-path", "pairs.jsonl", "--output-dir", "run")
    done = command("sft", "--resume", "run", "--num-steps", "3", "--learning-rate", "1e-4")
    assert done.code == 0, done.err
    rates = [line["lr"] for line in read_metrics(workplace / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-4])


def test_every_weight_and_an_adapter_are_not_trained_together(
    workplace: Path, command: Callable[..., Any]
) -> None:
    command("sft", *SHORT, "--train-path", "pairs.jsonl", "--output-dir", "run")
    done = command(
        *("sft", *SHORT, "--train-path", "pairs.jsonl", "--output-dir", "other"),
        *("--fine-tune-type", "full", "--adapter-path", "run/final"),
    )
    assert done.code != 0
    assert (
        'fine_tune_type: "full" trains every weight, and adapter_path (run/final) is an adapter' in done.err
    )
    assert not (workplace / "other").exists()


def test_scores_that_are_not_finite_end_the_run_in_a_sentence(
    workplace: Path, command: Callable[..., Any]
) -> None:
    done = command(
        *("reward-model", *SHORT, "--train-path", "preferences.jsonl", *HELD_OUT, "--eval-every", "1"),
        *("--learning-rate", "1e30", "--max-grad-norm", "1e30"),
    )
    assert done.code != 0
    assert "are not finite: its weights have diverged; lower learning_rate" in done.err


def test_an_empty_answer_is_a_bad_one_to_a_reward_model_and_to_kto_and_refused_by_sft(
    workplace: Path, command: Callable[..., Any]
) -> None:
    rows = [{"prompt": f"{n} ", "completion": "x" * n, "label": n > 0} for n in range(4)]
    write_rows(workplace / "labelled.jsonl", rows)
    write_rows(
        workplace / "scored.jsonl", [{**row, "reward": n, "label": None} for n, row in enumerate(rows)]
    )
    write_rows(workplace / "plain.jsonl", [{"prompt": "a", "completion": ""}])
    done = command("reward-model", *SHORT, "--train-path", "scored.jsonl", "--output-dir", "rm")
    assert done.code == 0, done.err
    kto = ("preference", "--algorithm", "kto")
    done = command(*kto, *SHORT, "--train-path", "labelled.jsonl", "--output-dir", "kto")
    assert done.code == 0, done.err
    for path in ("plain.jsonl", "scored.jsonl"):
        done = command("sft", *SHORT, "--train-path", path, "--output-dir", "sft")
        assert f'{path}:1: "completion" is empty' in done.err


def test_a_pair_the_wrong_way_round_is_refused_by_a_dry_run(
    workplace: Path, command: Callable[..., Any]
) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": margin} for margin in (1, -2)]
    write_rows(workplace / "margins.jsonl", rows)
    done = command("reward-model", *SHORT, "--train-path", "margins.jsonl", "--dry-run")
    assert 'margins.jsonl:2: "margin" must be above 0, found -2' in done.err
