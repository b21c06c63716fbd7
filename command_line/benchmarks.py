"""Benchmarks over rows in a local file: perplexity, gsm8k, arc, human_eval and mbpp. Nothing is downloaded.

perplexity          exp of the mean −log π per answer token, the end token included; rows as ``sft`` reads them
gsm8k, arc          the share of likeliest answers that are right
human_eval, mbpp    the share of likeliest answers whose program passes all tests (pass@1), run in a sandbox

The prompts are zero-shot and plain: figures compare checkpoints of one model with each other, not with leaderboards
that show worked examples first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from command_line.benchmark_rows import (
    Task,
    arc,
    final_number,
    first_letter,
    gsm8k,
    human_eval,
    mbpp,
    program,
    read_tasks,
)
from config.errors import InvalidConfigurationError
from config.ppo_config import PPOConfig
from config.supervised_config import SFTConfig
from data_loading.loading import load_pairs
from data_loading.prepared_prompts import PreparedPrompts
from experience_buffer.data_structures import Rollout
from models.policy_model import PolicyModel
from ppo_trainer.evaluator import EVALUATION_STEP
from ppo_trainer.generator import Generator
from rewards.code_execution import CodeExecution
from training.sft_trainer import SFTTrainer

SHOWN = 20  # answers that are written down with the result
QUESTIONS = {"gsm8k": (gsm8k, final_number), "arc": (arc, first_letter)}
PROGRAMS = {"human_eval": human_eval, "mbpp": mbpp}


class Benchmark(NamedTuple):
    """One benchmark with its rows."""

    name: str
    rows: Sequence[Any]
    run: Callable[[PolicyModel, PPOConfig], dict[str, Any]]


def check_benchmarks(names: Sequence[str], data: Sequence[str], limit: int | None) -> list[Benchmark]:
    """The benchmarks that were asked for, their rows read and checked, their sandbox proved.

    Raises:
        InvalidConfigurationError: one needs a file that was not given, or a sandbox that this machine has not.
        DataLoadError: file, line and what is wrong with the row.
    """
    files = dict(_named_file(one) for one in data)
    if limit is not None and limit < 1:
        raise InvalidConfigurationError(f"--limit: at least 1 is expected, found {limit}")
    for name in names:
        if name not in files:
            raise InvalidConfigurationError(
                f"--benchmark {name}: its rows are read from a local file and nothing is downloaded; give "
                f"--benchmark-data {name}=FILE"
            )
    unused = [name for name in files if name not in names]
    if unused:
        raise InvalidConfigurationError(
            f"--benchmark-data {unused[0]}: add --benchmark {unused[0]}, or leave it out"
        )
    return [_benchmark(name, files[name], limit) for name in dict.fromkeys(names)]


def _named_file(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not path:
        raise InvalidConfigurationError(f"--benchmark-data: NAME=FILE is expected, found {text!r}")
    return name, Path(path).expanduser()


def _benchmark(name: str, path: Path, limit: int | None) -> Benchmark:
    if name == "perplexity":
        loaded = load_pairs(str(path))
        rows = [loaded[i] for i in range(min(limit or len(loaded), len(loaded)))]
        return Benchmark(name, rows, lambda policy, config: perplexity(policy, config, rows))
    if name in PROGRAMS:
        tasks = read_tasks(path, PROGRAMS[name], limit)
        judge = CodeExecution()
        return Benchmark(name, tasks, lambda policy, config: pass_at_1(policy, config, tasks, judge))
    read, found = QUESTIONS[name]
    tasks = read_tasks(path, read, limit)
    return Benchmark(name, tasks, lambda policy, config: exact_match(policy, config, tasks, found))


# Measures ------------------------------------------------------------------------------------------------


def exact_match(
    policy: PolicyModel, config: PPOConfig, tasks: Sequence[Task], found: Callable[[str], str | None]
) -> dict[str, Any]:
    """Share of the tasks whose likeliest answer is right, and the first answers."""
    rollouts = _answers(policy, config, tasks)
    answers = [{"found": found(r.text), "gold": task.gold} for r, task in zip(rollouts, tasks, strict=True)]
    right = [answer["found"] == answer["gold"] for answer in answers]
    return _result("exact_match", right, tasks, rollouts, answers)


def pass_at_1(
    policy: PolicyModel, config: PPOConfig, tasks: Sequence[Task], judge: CodeExecution
) -> dict[str, Any]:
    """Share of the tasks whose likeliest answer is a program that passes all of its tests."""
    rollouts = _answers(policy, config, tasks)
    programs = [program(task, r.text) for r, task in zip(rollouts, tasks, strict=True)]
    scores = judge(programs, test_cases=[list(task.cases) for task in tasks])
    right = [score > 1 - 1e-6 for score in scores]
    return _result("pass@1", right, tasks, rollouts, [{"passed": one} for one in right])


def _answers(policy: PolicyModel, config: PPOConfig, tasks: Sequence[Task]) -> list[Rollout]:
    prompts = PreparedPrompts(
        policy.tokenizer, [task.prompt for task in tasks], max_prompt_length=config.max_prompt_length
    )
    return Generator(policy, config).generate(prompts, EVALUATION_STEP, group_size=1, temperature=0.0)


def _result(
    name: str,
    right: Sequence[bool],
    tasks: Sequence[Task],
    rollouts: Sequence[Rollout],
    answers: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    samples = [
        {"prompt": task.prompt, "completion": r.text, **answer}
        for task, r, answer in zip(tasks[:SHOWN], rollouts, answers, strict=False)
    ]
    cut_off = sum(not r.terminated for r in rollouts) / len(rollouts)
    return {name: sum(right) / len(right), "rows": len(right), "cut_off": cut_off, "samples": samples}


def perplexity(policy: PolicyModel, config: PPOConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """exp of the mean negative logprob per answer token, in the policy's own distribution at temperature 1."""
    shared = ("model_name", "batch_size", "micro_batch_size", "seed")
    trainer = SFTTrainer(policy.base, SFTConfig(**{name: getattr(config, name) for name in shared}))
    trainer.policy = policy
    loss = trainer.loss(rows)
    return {"perplexity": math.exp(min(loss, 700.0)), "nats_per_token": loss, "rows": len(rows)}
