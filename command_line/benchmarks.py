"""Benchmarks over rows in a local file: perplexity, gsm8k and arc. Nothing is downloaded.

perplexity   exp of the mean −log π per answer token, the end token included; rows as ``sft`` reads them
gsm8k        {"question", "answer": "… #### 72"}; the likeliest answer's number after ####, else its last one, is 72
arc          {"question", "choices": {"text": […], "label": […]}, "answerKey"}; the first letter that stands alone

The prompts are zero-shot and plain: figures compare checkpoints of one model with each other, not with leaderboards
that show worked examples first.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

from config.errors import DataLoadError, InvalidConfigurationError
from config.ppo_config import PPOConfig
from data_loading.prepared_prompts import PreparedPrompts
from models.policy_model import PolicyModel
from ppo_trainer.evaluator import EVALUATION_STEP
from ppo_trainer.generator import Generator

#: Benchmarks that run programs which a model has written.
RUNS_CODE = ("human_eval", "mbpp")
SHOWN = 20  # answers that are written down with the result


class Task(NamedTuple):
    """A question and the answer that is right."""

    prompt: str
    gold: str


class Benchmark(NamedTuple):
    """One benchmark with its rows."""

    name: str
    rows: Any
    run: Callable[[PolicyModel, PPOConfig], dict[str, Any]]


def check_benchmarks(names: Sequence[str], data: Sequence[str], limit: int | None) -> list[Benchmark]:
    """The benchmarks that were asked for, their rows read and checked.

    Raises:
        InvalidConfigurationError: one needs a file that was not given, or something that is not there.
        DataLoadError: file, line and what is wrong with the row.
    """
    files = dict(_named_file(one) for one in data)
    if limit is not None and limit < 1:
        raise InvalidConfigurationError(f"--limit: at least 1 is expected, found {limit}")
    for name in names:
        if name in RUNS_CODE:
            raise InvalidConfigurationError(
                f"--benchmark {name}: it runs programs that the model wrote, and evaluate has no sandbox for them yet; "
                "perplexity, gsm8k and arc are there"
            )
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
        from data_loading.loading import load_pairs

        loaded = load_pairs(str(path))
        rows = [loaded[i] for i in range(min(limit or len(loaded), len(loaded)))]
        return Benchmark(name, rows, lambda policy, config: perplexity(policy, config, rows))
    read, found = {"gsm8k": (_gsm8k, final_number), "arc": (_arc, first_letter)}[name]
    tasks = _tasks(path, read, limit)
    return Benchmark(name, tasks, lambda policy, config: exact_match(policy, config, tasks, found))


# Rows ----------------------------------------------------------------------------------------------------


def _tasks(path: Path, read: Callable[[Mapping[str, Any]], Task], limit: int | None) -> list[Task]:
    tasks: list[Task] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                tasks.append(_task(f"{path}:{number}", line, read))
                if len(tasks) == limit:
                    break
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataLoadError(f"{path}: cannot be read ({reason}); give a JSONL file") from error
    if not tasks:
        raise DataLoadError(f"{path}: it is empty; a row per line is expected")
    return tasks


def _task(place: str, line: str, read: Callable[[Mapping[str, Any]], Task]) -> Task:
    try:
        row = json.loads(line)
        return read(row)
    except (ValueError, RecursionError) as error:
        raise DataLoadError(f"{place}: not valid JSON ({error})") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataLoadError(
            f"{place}: {error} is missing or of another kind, found {line.strip()!r:.100}"
        ) from error


def _gsm8k(row: Mapping[str, Any]) -> Task:
    gold = final_number(row["answer"])
    if gold is None:
        raise KeyError("a number in answer")
    return Task(f"{row['question']}\nGive the final answer after ####.\n", gold)


def _arc(row: Mapping[str, Any]) -> Task:
    choices = row["choices"]
    options = [f"{label}. {text}" for label, text in zip(choices["label"], choices["text"], strict=False)]
    if not options or row["answerKey"] not in choices["label"]:
        raise KeyError("an answerKey among the labels")
    return Task("\n".join([str(row["question"]), *options, "Answer:"]), str(row["answerKey"]))


# Answers -------------------------------------------------------------------------------------------------


def final_number(text: str) -> str | None:
    """The number after the last ####, else the last number, in one spelling: ``1,200.0`` is ``1200``.

    >>> final_number("6 * 12 = 72 #### 72.0")
    '72'
    """
    found = re.findall(r"-?\d[\d,]{0,40}(?:\.\d{1,40})?", text.rpartition("####")[2])
    if not found:
        return None
    try:
        number = Decimal(found[-1].replace(",", ""))
    except InvalidOperation:
        return None
    return f"{number:f}".rstrip("0").rstrip(".") if number != number.to_integral() else f"{number:.0f}"


def first_letter(text: str) -> str | None:
    """The first capital or digit that stands alone, as in ``(B)`` or ``Answer: 3.``; the article A is one, too.

    >>> first_letter("The answer is (B).")
    'B'
    """
    found = re.search(r"(?<![A-Za-z0-9])([A-H1-8])(?![A-Za-z0-9'])", text)
    return found[1] if found else None


# Measures ------------------------------------------------------------------------------------------------


def exact_match(
    policy: PolicyModel, config: PPOConfig, tasks: Sequence[Task], found: Callable[[str], str | None]
) -> dict[str, Any]:
    """Share of the tasks whose likeliest answer is right, and the first answers."""
    prompts = PreparedPrompts(
        policy.tokenizer, [task.prompt for task in tasks], max_prompt_length=config.max_prompt_length
    )
    rollouts = Generator(policy, config).generate(prompts, EVALUATION_STEP, group_size=1, temperature=0.0)
    right = [found(r.text) == task.gold for r, task in zip(rollouts, tasks, strict=True)]
    samples = [
        {"prompt": task.prompt, "completion": r.text, "found": found(r.text), "gold": task.gold}
        for r, task in zip(rollouts[:SHOWN], tasks, strict=False)
    ]
    return {
        "exact_match": sum(right) / len(right),
        "rows": len(right),
        "cut_off": sum(not r.terminated for r in rollouts) / len(rollouts),
        "samples": samples,
    }


def perplexity(policy: PolicyModel, config: PPOConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """exp of the mean negative logprob per answer token, in the policy's own distribution at temperature 1."""
    from config.supervised_config import SFTConfig
    from training.sft_trainer import SFTTrainer

    shared = SFTConfig.__dataclass_fields__.keys() & {"model_name", "batch_size", "micro_batch_size", "seed"}
    trainer = SFTTrainer(policy.base, SFTConfig(**{name: getattr(config, name) for name in shared}))
    trainer.policy = policy
    loss = trainer.loss(rows)
    return {"perplexity": math.exp(min(loss, 700.0)), "nats_per_token": loss, "rows": len(rows)}
