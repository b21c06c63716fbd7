"""The files of the walk-through in docs/digits.md: what each stage of RLHF learns from, one file per stage.

    python main.py generate-digit-data --stages --folder runs/digits/data --seed 0

    base.jsonl           growing numbers, to make a small model from nothing: of any parity, or of the one
                         that a word before them names
    sft.jsonl            demonstrations: growing even numbers, two fifths of them arbitrary
    preferences.jsonl    noisy answers with the score of each, as text, for the reward model
    pairs_held_out.jsonl the same, to judge it by
    prompts.jsonl        first numbers to learn from by trial
    held_out.jsonl       other first numbers, to be judged by, each four times

Demonstrations are imperfect on purpose: what nobody shows a model, the reward has to teach it. The base model
knows more than it shows, as a large one does: asked for "even 8" it counts in even numbers, given "8" alone in
any. A soft prompt changes no weight, so it can only bring out what is there. No prompt to learn from is one to be
judged by. Everything is drawn from one seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from config.errors import DataLoadError
from examples.digits_data import digit_prompt_splits, generate_sequences, split_query
from rewards.sequential_digits import digit_score

#: Rows of each file that is learned from, and of those that judge.
BASE, DEMONSTRATIONS, SCORED, SCORED_HELD_OUT, PROMPTS, HELD_OUT = 4000, 600, 16_000, 400, 100, 51
#: Answers to each held-out prompt: four of them have half the noise of one.
ANSWERS = 4


def imitation_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Growing sequences of any parity, each as a prompt (its first number) and a completion."""
    texts = generate_sequences(count, largest_first=300, min_length=5, max_length=6, seed=seed)
    return [dict(zip(("prompt", "completion"), split_query(text), strict=True)) for text in texts]


def base_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Growing sequences: half of any parity, a quarter each even after the word ``even`` and odd after ``odd``."""
    rows = imitation_rows(count, seed)
    evens = generate_sequences(
        count // 4, multiple_of=2, largest_first=300, min_length=5, max_length=6, seed=seed + 1
    )
    for number, text in enumerate(evens):
        even, odd = text, " ".join(str(int(word) - 1) for word in text.split())
        for place, word, sequence in ((4 * number, "even", even), (4 * number + 1, "odd", odd)):
            prompt, completion = split_query(sequence)
            rows[place] = {"prompt": f"{word} {prompt}", "completion": completion}
    return rows


def demonstration_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Growing sequences of even numbers in which two numbers in five are whatever lies within 50 of the last."""
    texts = generate_sequences(
        count,
        multiple_of=2,
        noise=0.4,
        noise_around="last",
        largest_first=300,
        min_length=5,
        max_length=6,
        seed=seed,
    )
    return [dict(zip(("prompt", "completion"), split_query(text), strict=True)) for text in texts]


def scored_rows(count: int, seed: int, *, stuck: bool = False) -> list[dict[str, str]]:
    """Noisy sequences of even numbers with the true score of their continuation, as text.

    Answers of every length, the empty one included: what a reward model has not seen, a policy will find.
    ``stuck``: one in eight stays at a number that it has said, to its end.
    """
    texts = generate_sequences(
        count,
        multiple_of=2,
        noise=0.2,
        noise_around="last",
        largest_first=300,
        min_length=1,
        max_length=7,
        seed=seed,
    )
    rows, draw = [], random.Random(seed)
    for number, text in enumerate(texts):
        prompt, completion = split_query(text)
        if stuck and number % 8 == 1:
            words = completion.split()
            place = draw.randrange(len(words))
            completion = " ".join([*words[:place], *[words[place]] * (len(words) - place)])
        if number % 25 == 0:
            completion = ""
        rows.append(
            {"prompt": prompt, "completion": completion, "reward": str(digit_score(prompt, completion))}
        )
    return rows


def stage_rows(seed: int) -> dict[str, list[dict[str, str]]]:
    """The rows of each file, by its name."""
    scored = scored_rows(SCORED + SCORED_HELD_OUT, seed, stuck=True)
    prompts, held_out = digit_prompt_splits(PROMPTS, HELD_OUT, seed)
    return {
        "base.jsonl": base_rows(BASE, seed),
        "sft.jsonl": demonstration_rows(DEMONSTRATIONS, seed + 1_000_003),
        "preferences.jsonl": scored[SCORED_HELD_OUT:],
        "pairs_held_out.jsonl": scored[:SCORED_HELD_OUT],
        "prompts.jsonl": [{"prompt": prompt} for prompt in prompts],
        "held_out.jsonl": [{"prompt": prompt} for prompt in held_out * ANSWERS],
    }


def write_stages(folder: str | Path, seed: int) -> dict[str, Path]:
    """Write all files; the path of each.

    Raises:
        DataLoadError: they cannot be written.
    """
    paths = {}
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, rows in stage_rows(seed).items():
            paths[name] = Path(folder) / name
            paths[name].write_text(_lines(rows), encoding="utf-8")
    except OSError as error:
        raise DataLoadError(f"The digit data cannot be written to {folder}: {error}.") from error
    return paths


def _lines(rows: Sequence[Mapping[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
