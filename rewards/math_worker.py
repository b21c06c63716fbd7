"""A child process that checks answers with math-verify: a line of JSON in, a line of JSON out.

It is run as a script, with no other module of ours, by ``math_verified.py``, which kills it when it takes too long.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from typing import Any

GRACE = 10.0  # seconds of computing over what a task may take: two parses and two comparisons, each with its limit


def check(answer: str, gold: str, seconds: int) -> dict[str, Any]:
    """Whether ``answer`` equals ``gold``: ``equal`` True or False, or None where the gold answer is not read."""
    from math_verify import parse, verify

    def read(text: str, whole: bool) -> list[Any]:
        """``whole``: the text is nothing but the answer, perhaps LaTeX without its dollars."""
        forms = [f"${text.strip().strip('$').strip()}$", text] if whole else [text]
        for form in forms:
            found = parse(form, parsing_timeout=seconds)
            if found:
                return list(found)
        return []

    wanted = read(gold, whole="$" not in gold.strip().strip("$") and "\\boxed" not in gold)
    if not wanted:
        return {"equal": None}
    given = read(answer, whole=False)
    equal = bool(given) and verify(wanted, given, timeout_seconds=seconds)
    if not equal and len(answer) <= 200:
        bare = read(answer, whole=True)
        equal = bool(bare) and verify(wanted, bare, timeout_seconds=seconds)
        given = given or bare
    return {"equal": bool(equal), "read": str(given[0])[:80] if given else None}


def outlive_no_one(seconds: int) -> None:
    """Let the system end this process if a task computes on when whoever would have killed it for that is gone."""
    used = time.process_time()
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used + GRACE + 8 * seconds), hard))


def main() -> None:
    """Answer line after line until the input ends."""
    logging.disable(logging.CRITICAL)
    from math_verify import parse

    parse("1")  # what the first one would have to wait for
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        outlive_no_one(task["seconds"])
        try:
            result = check(task["answer"], task["gold"], task["seconds"])
        except Exception as error:  # of sympy, of the parser, their time limits
            result = {"equal": False, "problem": type(error).__name__}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
