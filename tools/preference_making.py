"""Preference data from demonstrations: what somebody wrote is better than what a language model writes in its place.

The rejected answers are sampled from a model here, or asked of one behind an OpenAI-compatible endpoint. What is done
stands in the output file, row by row, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from base_setup.tokenizer_setup import check_length, encode_prompt
from config.decoding_config import DecodingConfig
from config.errors import DataLoadError, TrainingRuntimeError
from data_loading.json_text import to_json
from data_loading.loading import load_pairs
from data_loading.normalising import normalised
from models.sft_model import LanguageModel
from rewards.chat_endpoint import ChatEndpoint, NoAnswerError
from tools.generating import generate

#: Prompts (of a row each) to as many lists of answers.
Sampler = Callable[[Sequence[tuple[int, Any]]], list[list[str]]]
CHUNK = 32  # rows between two writes

INSTRUCTION = (
    "Answer the last message as a plausible but generic assistant would: fluent, on topic, and without anything that "
    "only the person who is asked could know. Reply with the answer alone."
)


class Made(NamedTuple):
    """What came of it."""

    written: int
    known: int  # rows that the file had already
    equal: int  # answers that were the demonstrated one, or one that was there

    def __str__(self) -> str:
        parts = [f"{self.written} pairs written"]
        parts += [f"{self.known} rows were there already"] if self.known else []
        parts += [f"{self.equal} answers left out as no different"] if self.equal else []
        return ", ".join(parts)


def make_preferences(rows: Sequence[Any], sample: Sampler, output: Path) -> Made:
    """Write ``{"prompt", "chosen", "rejected"}`` rows to ``output``, a chunk of rows at a time.

    Args:
        rows: with ``prompt`` and ``completion``. sample: rejected answers to some of them.
    Raises:
        DataLoadError: ``output`` is the file of something else.
    """
    done = _rows_in(output, rows)
    missing = [number for number in range(len(rows)) if number not in done]
    written = equal = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as file:
        for start in range(0, len(missing), CHUNK):
            numbers = missing[start : start + CHUNK]
            answers = sample([(number, rows[number]["prompt"]) for number in numbers])
            for number, texts in zip(numbers, answers, strict=True):
                lines, same = _pairs(number, rows[number], texts)
                file.writelines(lines)
                written, equal = written + len(lines), equal + same
            file.flush()
    return Made(written, len(done), equal)


def _pairs(number: int, row: Any, texts: Sequence[str]) -> tuple[list[str], int]:
    """The lines for one row and how many answers were no different from the demonstration or each other."""
    seen = {normalised(row["completion"])}
    lines = []
    for text in texts:
        if normalised(text) not in seen:
            seen.add(normalised(text))
            # Demonstrations of lines begin with a space after "name:"; the model's answer gets the same one.
            rejected = f" {text.lstrip()}" if row["completion"].startswith(" ") else text
            pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected, "row": number}
            lines.append(to_json(pair, f"row {number}") + "\n")
    return lines, len(texts) - len(lines)


def _rows_in(output: Path, rows: Sequence[Any]) -> set[int]:
    """Which rows a file of an earlier run has; an unfinished last line is cut off."""
    if not output.exists():
        return set()
    done: set[int] = set()
    content = output.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    # Not splitlines of a text: that parts a line at U+2028, too, which JSON may hold as it is.
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            pair = json.loads(line)
            row = int(pair["row"])
            known = (pair["prompt"], pair["chosen"])
        except (ValueError, KeyError, TypeError):
            raise DataLoadError(
                f"{output}:{number}: this line is not of an earlier make-preferences, so nothing is added to the file; "
                "name another one"
            ) from None
        if row < len(rows) and known != _as_written(row, rows[row]):
            raise DataLoadError(
                f"{output}:{number}: this line was made from other data, whose row {row} is another one; name another "
                "--output"
            )
        done.add(row)
    if complete != content:
        output.write_bytes(complete)
    return done


def _as_written(number: int, row: Any) -> tuple[Any, str]:
    """Prompt and demonstration as a line of the file gives them back."""
    pair = json.loads(to_json({"prompt": row["prompt"], "chosen": row["completion"]}, f"row {number}"))
    return pair["prompt"], pair["chosen"]


def demonstrations(path: str, limit: int | None) -> list[Any]:
    """The rows of a file that have a prompt and its completion.

    Raises:
        DataLoadError: for a file of whole texts, of which no part is an answer.
    """
    loaded = load_pairs(path)
    rows = [loaded[number] for number in range(min(limit or len(loaded), len(loaded)))]
    for number, row in enumerate(rows):
        if "prompt" not in row:
            raise DataLoadError(
                f"{loaded.place(number)}: prompt and completion are expected, found one text; a rejected answer needs "
                "something that it answers"
            )
    return rows


# Who answers ---------------------------------------------------------------------------------------------


def from_model(base: LanguageModel, how: DecodingConfig, members: int, max_prompt: int) -> Sampler:
    """Answers of a model in this process."""

    def sample(asked: Sequence[tuple[int, Any]]) -> list[list[str]]:
        prompts = []
        for number, prompt in asked:
            ids = encode_prompt(base.tokenizer, prompt)
            check_length(len(ids), f"row {number}", max_prompt)
            prompts.append(ids)
        # A chunk has random numbers of its own, so that a run that goes on repeats none of the earlier ones.
        seeded = how.replace(seed=(how.seed * 1_000_003 + asked[0][0]) % (1 << 63))
        answers = iter(generate(base, prompts, seeded, members=members))
        return [[next(answers).text for _ in range(members)] for _ in prompts]

    return sample


def from_endpoint(
    endpoint: ChatEndpoint,
    model: str,
    how: DecodingConfig,
    members: int,
    *,
    instruction: str = INSTRUCTION,
    concurrency: int = 8,
) -> Sampler:
    """Answers of a model elsewhere; the prompts go there in full."""

    def ask(job: tuple[int, Any, int]) -> str:
        number, prompt, member = job
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        body = {
            "model": model,
            "messages": [{"role": "system", "content": instruction}, *messages] if instruction else messages,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "max_tokens": how.max_tokens,
            "seed": how.seed + number * members + member,
        }
        try:
            return endpoint.ask(body, _not_empty)
        except NoAnswerError as error:
            raise TrainingRuntimeError(
                f"--url: {endpoint.url} gave no answer to row {number} {error}; what was answered before is in the "
                "output file, and the same command goes on from there"
            ) from error

    def sample(asked: Sequence[tuple[int, Any]]) -> list[list[str]]:
        jobs = [(number, prompt, member) for number, prompt in asked for member in range(members)]
        with ThreadPoolExecutor(concurrency, "ask") as pool:
            answers: Iterator[str] = iter(list(pool.map(ask, jobs)))
        return [[next(answers) for _ in range(members)] for _ in asked]

    return sample


def _not_empty(reply: str) -> str:
    if not reply.strip():
        raise ValueError("the reply is empty")
    return reply.strip()
