"""What a check says: a verdict, the numbers that it saw, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

Verdict = Literal["ok", "warning", "fault"]


class Finding(NamedTuple):
    """The outcome of one check.

    ``seen``: what was measured, in numbers, whatever the verdict. ``advice``: what to do; empty where all is well.
    """

    check: str
    verdict: Verdict
    seen: str
    advice: str = ""


def judged(check: str, sound: bool, seen: str, advice: str, otherwise: Verdict = "fault") -> Finding:
    """``ok`` where ``sound``, else ``otherwise`` with the advice."""
    return Finding(check, "ok", seen) if sound else Finding(check, otherwise, seen, advice)


def as_lines(finding: Finding) -> list[str]:
    """The finding as it is printed: verdict, name, numbers; the advice on a line of its own."""
    shown = finding.verdict.upper() if finding.verdict == "fault" else finding.verdict
    lines = [f"{shown:9s}{finding.check:20s}{finding.seen}"]
    return [*lines, f"{'':29s}→ {finding.advice}"] if finding.advice else lines


def summary(findings: Sequence[Finding], seconds: float) -> str:
    """One line: how many checks, warnings, faults."""
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in ("ok", "warning", "fault")}
    warnings, faults = counts["warning"], counts["fault"]
    return (
        f"{len(findings)} checks: {counts['ok']} ok, {warnings} warning{'' if warnings == 1 else 's'}, "
        f"{faults} fault{'' if faults == 1 else 's'} ({seconds:.1f} s)"
    )
