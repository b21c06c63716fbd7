"""Data for the digit task: sequences to imitate, scored sequences to learn a reward from, and prompts.

    python -m examples.digits_data --increasing --multiple-of 2 --num-samples 150 --noise 0

writes ``increasing_mult_2_train.jsonl``, ``…_valid.jsonl`` and ``…_test.jsonl`` with lines such as

    {"text": "8 20 22 30 36 38 50 60 68", "reward": "1.0"}

(the reward is text in this file format, as others who use it expect). Without noise every sequence is
perfect and serves for supervised fine-tuning: the first number is the prompt, the rest the completion.
With ``--noise 0.2`` a fifth of the numbers is arbitrary, the scores differ, and the same files serve
for training a reward model. The reward is ``rewards.sequential_digits.digit_score`` of the whole line.

How a sequence is drawn, with m = multiple_of and x mod m never negative:

    first        x = randint(0, 200), or randint(100, 1000) if decreasing;  x + m − x mod m
                 (largest_first replaces the 200 or the 1000: prompts go up to 300, and a model that never
                 saw a first number above 202 guesses there)
    increasing   x = randint(last, last + 50);                              x + m − x mod m
    decreasing   x = randint(last − 10, last − 1);                          x − x mod m
    noise        with this probability, instead: randint(-100, 100)
                 or, with noise_around="last": randint(last − 50, last + 50)

Why two kinds of noise: a number from -100 to 100 in a growing sequence is nearly always too small, so data
with it show order broken far more often than parity. A reward model learned from such data ranks held-out
pairs well and still cannot tell odd from even where the order is right, which is what the policy gets wrong.
Noise around the last number breaks either about as often.

Everything is drawn from one seed: the same flags write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from config.errors import DataLoadError, InvalidConfigurationError, ToolkitError
from rewards.sequential_digits import digit_score

NoiseAround = Literal["zero", "last"]

SPLITS = ("train", "valid", "test")
DIFFERENT_PROMPTS = 151  # 0, 2, …, 300
#: How the three files are drawn unless flags say otherwise.
DRAWING = {
    "num_samples": 100,
    "min_length": 5,
    "max_length": 15,
    "noise": 0.2,
    "noise_around": "zero",
    "largest_first": None,
    "multiple_of": 1,
}


# Sequences -------------------------------------------------------------------------------------------


def generate_sequences(
    n: int,
    *,
    increasing: bool = True,
    multiple_of: int = 1,
    noise: float = 0.0,
    noise_around: NoiseAround = "zero",
    largest_first: int | None = None,
    min_length: int = 5,
    max_length: int = 15,
    seed: int = 0,
) -> list[str]:
    """``n`` sequences: a first number, then ``min_length`` to ``max_length`` more. Two may be the same."""
    _check(n, multiple_of, noise, min_length, max_length)
    rng = random.Random(seed)
    return [
        _sequence(rng, increasing, multiple_of, noise, noise_around, largest_first, min_length, max_length)
        for _ in range(n)
    ]


def scored_sequences(
    n: int,
    *,
    increasing: bool = True,
    multiple_of: int = 1,
    noise: float = 0.2,
    noise_around: NoiseAround = "zero",
    largest_first: int | None = None,
    min_length: int = 5,
    max_length: int = 15,
    seed: int = 0,
) -> list[dict[str, str]]:
    """``n`` rows ``{"text": …, "reward": …}``, the reward written as text."""
    texts = generate_sequences(
        n,
        increasing=increasing,
        multiple_of=multiple_of,
        noise=noise,
        noise_around=noise_around,
        largest_first=largest_first,
        min_length=min_length,
        max_length=max_length,
        seed=seed,
    )
    return [_scored(text, increasing, multiple_of) for text in texts]


def write_splits(
    folder: str | Path,
    *,
    num_samples: int = 100,
    increasing: bool = True,
    multiple_of: int = 1,
    noise: float = 0.2,
    noise_around: NoiseAround = "zero",
    largest_first: int | None = None,
    min_length: int = 5,
    max_length: int = 15,
    seed: int = 0,
) -> dict[str, Path]:
    """Write train, valid and test files of ``num_samples`` lines each; every sequence is there once."""
    _check(num_samples, multiple_of, noise, min_length, max_length)
    rng = random.Random(seed)
    texts: dict[str, None] = {}  # a set that remembers the order
    for _ in range(100 * len(SPLITS) * max(num_samples, 1)):
        if len(texts) == len(SPLITS) * num_samples:
            break
        texts[
            _sequence(
                rng, increasing, multiple_of, noise, noise_around, largest_first, min_length, max_length
            )
        ] = None
    else:
        raise InvalidConfigurationError(
            f"Only {len(texts)} different sequences turned up, but {len(SPLITS)} x {num_samples} are needed: "
            f"ask for fewer samples or a larger max_length than {max_length}."
        )

    direction = "increasing" if increasing else "decreasing"
    rows = [_scored(text, increasing, multiple_of) for text in texts]
    paths = {}
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for index, split in enumerate(SPLITS):
            path = Path(folder) / f"{direction}_mult_{multiple_of}_{split}.jsonl"
            part = rows[index * num_samples : (index + 1) * num_samples]
            path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
            paths[split] = path
    except OSError as error:
        raise DataLoadError(f"The digit data cannot be written to {folder}: {error}.") from error
    return paths


def split_query(text: str) -> tuple[str, str]:
    """The prompt (first number) and the completion (the rest, with its leading space) of a sequence.

    >>> split_query("8 20 22")
    ('8', ' 20 22')
    """
    query, space, rest = text.strip().partition(" ")
    if not query:
        raise DataLoadError(f"The sequence {text!r} is empty; expected numbers with spaces between them.")
    return query, space + rest


# Prompts ---------------------------------------------------------------------------------------------


def digit_prompts(n: int, seed: int = 0) -> list[str]:
    """``n`` different prompts ``str(randint(0, 150) * 2)``: even numbers from 0 to 300, as text."""
    if not 0 <= n <= DIFFERENT_PROMPTS:
        raise InvalidConfigurationError(
            f"There are {DIFFERENT_PROMPTS} different digit prompts, so n is between 0 and that, not {n}."
        )
    return [str(2 * half) for half in random.Random(seed).sample(range(DIFFERENT_PROMPTS), n)]


def digit_prompt_splits(n_train: int, n_held_out: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Prompts to train on and prompts to be judged by, with none in common."""
    if n_train < 0 or n_held_out < 0:
        raise InvalidConfigurationError(
            f"The numbers of prompts must not be negative: {n_train}, {n_held_out}."
        )
    prompts = digit_prompts(n_train + n_held_out, seed)
    return prompts[:n_train], prompts[n_train:]


# Drawing ---------------------------------------------------------------------------------------------


def _sequence(
    rng: random.Random,
    increasing: bool,
    multiple_of: int,
    noise: float,
    noise_around: NoiseAround,
    largest_first: int | None,
    min_length: int,
    max_length: int,
) -> str:
    length = rng.randint(min_length, max_length)
    smallest, largest = (0, 200) if increasing else (100, 1000)
    first = rng.randint(smallest, largest if largest_first is None else largest_first)
    numbers = [_next_multiple(first, multiple_of)]
    while len(numbers) < length + 1:
        last = numbers[-1]
        if rng.random() < noise:
            low, high = (-100, 100) if noise_around == "zero" else (last - 50, last + 50)
            numbers.append(rng.randint(low, high))
        elif increasing:
            numbers.append(_next_multiple(rng.randint(last, last + 50), multiple_of))
        else:
            # From last - 1, not last: a perfect sequence falls strictly, or the reward would stop at it.
            below = rng.randint(last - 10, last - 1)
            numbers.append(below - below % multiple_of)
    return " ".join(map(str, numbers))


def _next_multiple(number: int, multiple_of: int) -> int:
    """The smallest multiple that is greater than ``number`` (a multiple moves on to the next one)."""
    return number + multiple_of - number % multiple_of


def _scored(text: str, increasing: bool, multiple_of: int) -> dict[str, str]:
    return {"text": text, "reward": str(digit_score("", text, increasing=increasing, multiple=multiple_of))}


def _check(n: int, multiple_of: int, noise: float, min_length: int, max_length: int) -> None:
    if n < 0:
        raise InvalidConfigurationError(f"The number of samples must not be negative, but is {n}.")
    if multiple_of < 1:
        raise InvalidConfigurationError(f"multiple_of must be at least 1, but is {multiple_of}.")
    if not 0.0 <= noise <= 1.0:
        raise InvalidConfigurationError(f"noise is a probability between 0 and 1, but is {noise}.")
    if not 1 <= min_length <= max_length:
        raise InvalidConfigurationError(
            f"The lengths must satisfy 1 <= min_length <= max_length, but are {min_length} and {max_length}."
        )


# Command line ----------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """The flags, each with its default; those of which exactly one is given are returned."""
    parser.add_argument(
        "--num-samples",
        "-n",
        type=int,
        default=DRAWING["num_samples"],
        help="sequences in each of the three files (default 100)",
    )
    parser.add_argument(
        "--min-length",
        type=int,
        default=DRAWING["min_length"],
        help="fewest numbers after the first (default 5)",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=DRAWING["max_length"],
        help="most numbers after the first (default 15)",
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=DRAWING["noise"],
        help="probability that a number is arbitrary (default 0.2)",
    )
    parser.add_argument(
        "--largest-first", type=int, help="the first number is at most this, before it is moved to a multiple"
    )
    parser.add_argument(
        "--noise-around",
        choices=("zero", "last"),
        default=DRAWING["noise_around"],
        help="arbitrary numbers are drawn from -100 to 100 (zero, the default), or within 50 of the number before",
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument(
        "--increasing", "-i", action="store_true", help="each number greater than the last"
    )
    direction.add_argument("--decreasing", "-d", action="store_true", help="each number less than the last")
    parser.add_argument(
        "--multiple-of",
        type=int,
        default=DRAWING["multiple_of"],
        help="what every number is a multiple of (default 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same files (default 0)")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where to write them (default .)")
    return direction


def write(options: argparse.Namespace) -> dict[str, Path]:
    """Write the files that the flags describe; the path of each split."""
    return write_splits(
        options.folder,
        num_samples=options.num_samples,
        increasing=options.increasing,
        multiple_of=options.multiple_of,
        noise=options.noise,
        noise_around=options.noise_around,
        largest_first=options.largest_first,
        min_length=options.min_length,
        max_length=options.max_length,
        seed=options.seed,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files that the flags describe and say where they are."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits_data",
        description="Write train, valid and test files for the digit task.",
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        paths = write(options)
    except ToolkitError as error:
        parser.error(str(error))
    for path in paths.values():
        print(path)


if __name__ == "__main__":
    main()
