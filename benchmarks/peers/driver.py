"""The same GRPO step, PPO step and rollout in several systems, side by side: ``./run bench-peers``.

    ./run bench-peers                                           everything, which takes an hour or two
    ./run bench-peers --sizes tiny --prompts 64                 a few minutes, once the environments are made
    ./run bench-peers --systems ours trl --reference-blas       some of it; the MLX ones without a fast BLAS too

The work is fixed: 4 prompts of exactly ``--prompts`` tokens, 8 completions of each of exactly 64 tokens (every system
is kept from ending one earlier, and the tokens are counted), a reward that counts even tokens, KL weight 0, one AdamW
update of all weights per batch, temperature 1, float32. All load the same folder of random weights and read the same
prompts; the samples differ, since each draws its own. Every system otherwise runs as it comes, and what it does
differently stands under the table.

A system runs in an environment of its own (``.venv-peers``, made at its first use by ``./run peer NAME``), and each
measurement in a process of its own. Rounds go through all systems in turn, each round in another order, so that
whatever else the machine does hits all of them. Reported are medians over the timed steps of all rounds, their range,
the peak of resident memory, and how many cores anything else kept busy meanwhile: where that is not near 0, the
fastest steps say more than the medians, and a quiet hour more than both. A system that cannot be installed or run
gets a line that says why.

Left out: quality. All weights are random and nobody learns anything here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from base_setup import backend
from benchmarks.peers.record import Job, busy_time
from benchmarks.workload import SIZES, make_prompts, save_model

ROOT = Path(__file__).resolve().parents[2]
PROMPTS, GROUP, COMPLETION = 4, 8, 64
ROLLOUT_ROWS = [1, 8, 32, 64]
LEARNING_RATE = 1e-6

#: For every worker. A thread that waits by spinning takes cycles from everything else, and where another program wants
#: them the one it waits for may be the one that is held up: TRL's step, 1.2 s alone, took 10 to 40 s beside a second
#: busy process, and 2 s with the spin count that libgomp itself takes when there are more threads than processors.
SPINNING = {"KMP_BLOCKTIME": "1", "GOMP_SPINCOUNT": "1000", "OPENBLAS_THREAD_TIMEOUT": "20"}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
TITLES = {"grpo": "GRPO step", "ppo": "PPO step", "rollout": "Rollout alone"}


class System(NamedTuple):
    """A row: which worker measures it, where, and what a reader must know about it."""

    kind: str
    worker: str
    environment: str | None  # of requirements-peers-NAME.txt; None: ours
    mlx: bool
    title: str
    remark: str = ""


SYSTEMS = {
    "ours": System("grpo", "ours", None, True, "mlx-ppo"),
    "trl": System(
        "grpo",
        "trl",
        "trl",
        False,
        "TRL `GRPOTrainer`, torch on the CPU",
        "gradient checkpointing, on by default, is switched off; torch brings a BLAS of its own.",
    ),
    "mlx-lm-lora": System(
        "grpo",
        "mlx_lm_lora",
        "mlx-lm-lora",
        True,
        "mlx-lm-lora",
        "decodes and differentiates as many rows at a time as the batch has prompts (4), not all 32, and works out "
        "logprobs on the completion alone.",
    ),
    "inductive-mlxrl": System(
        "grpo",
        "inductive_mlxrl",
        "inductive-mlxrl",
        True,
        "inductive-mlxrl",
        "its rollout starts again, one completion at a time, once any row meets an end token, so forced lengths are "
        "its best case; its own command line decodes one completion at a time. It always makes a pass for the old "
        "logprobs.",
    ),
    "ours-ppo": System(
        "ppo",
        "ours",
        None,
        True,
        "mlx-ppo, value network of the policy's size",
    ),
    "trl-ppo": System(
        "ppo",
        "trl_ppo",
        "trl-ppo",
        False,
        "TRL `PPOTrainer`, torch on the CPU",
        "the last release that has it; the value network is of the policy's size and the reward free. It always scores "
        "with a reference model and works out the entropy; gradient checkpointing, on by default, is switched off.",
    ),
    "ours-rollout": System("rollout", "ours", None, True, "mlx-ppo"),
    "batch-generator": System(
        "rollout", "batch_generator", None, True, "mlx-lm `BatchGenerator`, as it comes"
    ),
    "batch-generator-wide": System(
        "rollout",
        "batch_generator",
        None,
        True,
        "mlx-lm `BatchGenerator`, all rows at once",
        "reads a prompt as often as it has completions, like the row above it.",
    ),
}
OURS = {"grpo": "ours", "ppo": "ours-ppo", "rollout": "ours-rollout"}


class Cell(NamedTuple):
    """What is compared with each other: one kind of work on one model at one prompt length."""

    kind: str
    size: str
    prompt: int


class Entry(NamedTuple):
    """A system as it runs: with the fast BLAS or, for a second look, the reference one."""

    system: str
    blas: str  # fast, reference or own

    @property
    def title(self) -> str:
        suffix = ", reference BLAS" if self.blas == "reference" else ""
        return SYSTEMS[self.system].title + suffix


@dataclass(frozen=True)
class Run:
    """What one process came back with: a worker's result, or the sentence that says why there is none."""

    cell: Cell
    entry: Entry
    round: int
    load: float  # of the machine when it started
    result: Mapping[str, Any] | None = None
    failure: str = ""


@dataclass(frozen=True)
class Row:
    """One number of rows of one entry in one cell, over all rounds."""

    cell: Cell
    entry: Entry
    rows: int
    seconds: float = 0.0  # medians
    rollout: float | None = None
    rest: float | None = None
    fastest: float = 0.0
    slowest: float = 0.0
    steps: int = 0
    tokens: int = 0
    kernel_share: float = 0.0
    others: float = 0.0  # cores that others used meanwhile, mean
    peak_bytes: int = 0
    complaint: str = ""  # a failure, or tokens that were not as asked

    @property
    def measured(self) -> bool:
        return self.steps > 0


# -- Running ------------------------------------------------------------------------------------------


def worker_environment(
    base: Mapping[str, str], entry: Entry, library: str | None, threads: int | None = None
) -> dict[str, str]:
    """The variables of one worker: nothing that tunes OpenBLAS or MLX from outside, and the BLAS that is asked for.

    What our own backend has put into this process, MLX_DISABLE_COMPILE above all, is not handed on either.
    """
    kept = {
        name: value
        for name, value in base.items()
        if not name.startswith(
            ("OPENBLAS_", "LD_PRELOAD", "MLX_PPO_BLAS", "MLX_DISABLE_COMPILE", "PYTHONPATH")
        )
    }
    kept |= SPINNING | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }
    if threads is not None:
        kept |= dict.fromkeys(THREADS, str(threads))
    if entry.blas == "fast" and library:
        kept["LD_PRELOAD"] = library
    if entry.blas == "reference":
        kept["MLX_PPO_BLAS"] = "none"
    return kept


def fast_library() -> str | None:
    """The BLAS for every MLX row, or None where MLX has its own: on a GPU, or on a Mac."""
    if backend.installed_build() != "cpu":
        return None
    return next((path for path in backend.blas_candidates() if Path(path).is_file()), None)


def interpreter(environment: str | None) -> tuple[str, str]:
    """The Python of a system's environment, made if need be, and a sentence if it cannot be."""
    if environment is None:
        return sys.executable, ""
    folder = ROOT / ".venv-peers" / environment
    if not (folder / "set-up").is_file():
        say(f"making {folder.relative_to(ROOT)}, which may take minutes …")
    done = subprocess.run(
        [str(ROOT / "run"), "peer", environment],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode == 0:
        return str(folder / "bin" / "python"), ""
    return "", f"its environment could not be made: {last_words(done.stderr, 2)}"


def last_words(text: str, lines: int = 1, longest: int = 300) -> str:
    """The end of what a program wrote to stderr, on one line."""
    written = [line.strip().removeprefix("run: ") for line in text.splitlines() if line.strip()]
    words = " – ".join(written[-lines:]) or "it said nothing"
    return words if len(words) <= longest else "…" + words[-longest:]


def run_worker(
    python: str, worker: str, job: Job, variables: Mapping[str, str], timeout: float
) -> tuple[Mapping[str, Any] | None, str]:
    """One process: its result, or why there is none in a sentence."""
    description = Path(job.scratch) / "job.json"
    description.write_text(json.dumps(asdict(job)), encoding="utf-8")
    command = [python, "-m", f"benchmarks.peers.worker_{worker}", str(description)]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=dict(variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return None, f"it was not done within {timeout:.0f} seconds"
    if done.returncode < 0:
        return None, f"signal {-done.returncode} ended it (9: often for want of memory)"
    if done.returncode > 0:
        return None, f"it failed: {last_words(done.stderr)}"
    try:
        return json.loads(Path(job.result).read_text(encoding="utf-8")), ""
    except (OSError, ValueError) as error:
        return None, f"it left no result that can be read: {error}"


def wait_for_quiet(patience: float, share: float = 0.15, look: float = 2.0) -> None:
    """Until everything else together uses no more than this share of a core, or for ``patience`` seconds."""
    give_up = time.monotonic() + patience
    while time.monotonic() < give_up:
        busy, start = busy_time(), time.monotonic()
        time.sleep(look)
        if busy_time() - busy <= share * (time.monotonic() - start):
            return


def entries_of(kind: str, wanted: Sequence[str], reference_too: bool) -> list[Entry]:
    """The systems of one kind, as the table has them."""
    entries = []
    for name in wanted:
        system = SYSTEMS[name]
        if system.kind == kind:
            entries.append(Entry(name, "fast" if system.mlx else "own"))
            if reference_too and system.mlx:
                entries.append(Entry(name, "reference"))
    return entries


def rotated(items: Sequence[Entry], by: int) -> list[Entry]:
    """The same in another order: no system always goes first."""
    by %= max(len(items), 1)
    return [*items[by:], *items[:by]]


def make_job(cell: Cell, system: str, models: Path, scratch: Path, options: argparse.Namespace) -> Job:
    """What a worker is told."""
    size = SIZES[cell.size]
    count = max(ROLLOUT_ROWS) // GROUP if cell.kind == "rollout" else PROMPTS
    return Job(
        system=system,
        kind=cell.kind,
        model=str(save_model(size, models / cell.size)),
        prompts=make_prompts(count, cell.prompt, size.vocabulary),
        completion=COMPLETION,
        group=GROUP,
        warm_up=options.warm_up,
        steps=options.steps,
        learning_rate=LEARNING_RATE,
        seed=0,
        scratch=str(scratch),
        result=str(scratch / "result.json"),
        rows=ROLLOUT_ROWS if cell.kind == "rollout" else [],
    )


def measure(options: argparse.Namespace, output: Path) -> list[Run]:
    """Everything asked for; what has been measured so far is on disk after each process."""
    library = fast_library()
    kinds = [kind for kind in TITLES if any(SYSTEMS[name].kind == kind for name in options.systems)]
    cells = [Cell(k, s, p) for k in kinds for p in options.prompts for s in options.sizes]
    interpreters = {
        environment: interpreter(environment)
        for environment in dict.fromkeys(SYSTEMS[name].environment for name in options.systems)
    }
    runs: list[Run] = []
    given_up: set[tuple[Cell, Entry]] = set()  # what failed once is not tried again
    for turn in range(options.rounds):
        for cell in cells:
            for entry in rotated(entries_of(cell.kind, options.systems, options.reference_blas), turn):
                if (cell, entry) in given_up:
                    continue
                system = SYSTEMS[entry.system]
                python, failure = interpreters[system.environment]
                load, result = os.getloadavg()[0], None
                if not failure:
                    wait_for_quiet(options.patience)
                    with tempfile.TemporaryDirectory(prefix="bench-peers-") as scratch:
                        job = make_job(cell, entry.system, output / "models", Path(scratch), options)
                        variables = worker_environment(os.environ, entry, library, options.threads)
                        result, failure = run_worker(python, system.worker, job, variables, options.timeout)
                if failure:
                    given_up.add((cell, entry))
                runs.append(Run(cell, entry, turn, load, result, failure))
                say(progress(runs[-1], options))
                save(runs, options, library, output)
    return runs


def progress(run: Run, options: argparse.Namespace) -> str:
    """One line about one process."""
    at = f"round {run.round + 1}/{options.rounds}, {run.cell.kind} {run.cell.size} P={run.cell.prompt}"
    if run.result is None:
        return f"{at}, {run.entry.title}: {run.failure}"
    seconds = " ".join(f"{step['seconds']:.2f}" for step in run.result["steps"])
    return f"{at}, {run.entry.title}: {seconds} s (load {run.load:.1f})"


# -- What it comes to ---------------------------------------------------------------------------------


def timed_steps(steps: Sequence[Mapping[str, Any]], warm_up: int) -> dict[int, list[Mapping[str, Any]]]:
    """The steps of each number of rows, its first ``warm_up`` left out."""
    by_rows: dict[int, list[Mapping[str, Any]]] = {}
    for step in steps:
        by_rows.setdefault(step["rows"], []).append(step)
    return {rows: found[warm_up:] for rows, found in by_rows.items()}


def aggregate(runs: Iterable[Run], warm_up: int, completion: int = COMPLETION) -> list[Row]:
    """A row per cell, entry and number of rows; one without numbers where every process failed."""
    grouped: dict[tuple[Cell, Entry], list[Run]] = {}
    for run in runs:
        grouped.setdefault((run.cell, run.entry), []).append(run)
    table = []
    for (cell, entry), group in grouped.items():
        steps: dict[int, list[Mapping[str, Any]]] = {}
        for run in group:
            if run.result is not None:
                for rows, found in timed_steps(run.result["steps"], warm_up).items():
                    steps.setdefault(rows, []).extend(found)
        failure = next((run.failure for run in group if run.failure), "")
        peak = max((run.result["peak_bytes"] for run in group if run.result is not None), default=0)
        if not steps:
            table.append(Row(cell, entry, 0, complaint=failure))
        for rows, found in steps.items():
            table.append(one_row(cell, entry, rows, found, peak, failure, completion))
    return table


def one_row(
    cell: Cell,
    entry: Entry,
    rows: int,
    steps: Sequence[Mapping[str, Any]],
    peak: int,
    failure: str,
    completion: int,
) -> Row:
    """The medians of these steps."""
    seconds = [step["seconds"] for step in steps]
    shown = [step for step in steps if step["rollout"] is not None]
    narrow, wide = min(step["narrowest"] for step in steps), max(step["widest"] for step in steps)
    if not failure and (narrow, wide) != (completion, completion):
        failure = f"completions of {narrow} to {wide} tokens, where {completion} were asked for"
    return Row(
        cell,
        entry,
        rows,
        seconds=statistics.median(seconds),
        rollout=statistics.median([step["rollout"] for step in shown]) if shown else None,
        rest=statistics.median([step["seconds"] - step["rollout"] for step in shown]) if shown else None,
        fastest=min(seconds),
        slowest=max(seconds),
        steps=len(steps),
        tokens=round(statistics.median([step["tokens"] for step in steps])),
        kernel_share=sum(s["kernel"] for s in steps) / max(sum(s["cpu"] for s in steps), 1e-9),
        others=statistics.mean([step["others"] for step in steps]),
        peak_bytes=peak,
        complaint=failure,
    )


def ours_beside(row: Row, table: Sequence[Row]) -> Row | None:
    """Our row for the same work, if both were measured."""
    key = (row.cell, Entry(OURS[row.cell.kind], "fast"), row.rows)
    found = (other for other in table if (other.cell, other.entry, other.rows) == key and other.measured)
    return next(found, None) if row.measured else None


def ratio_to_ours(row: Row, table: Sequence[Row]) -> float | None:
    """How many times as long as ours the same work takes; None where either is missing."""
    ours = ours_beside(row, table)
    return row.seconds / ours.seconds if ours else None


# -- Telling ------------------------------------------------------------------------------------------


def seconds_text(seconds: float) -> str:
    """Three figures at most: 0.62, 4.5, 15.2."""
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}"


def step_text(row: Row) -> str:
    """``15.2 s (2.7 + 12.5), 14.9–16.0``."""
    if not row.measured:
        return "–"
    parts = ""
    if row.rollout is not None and row.rest is not None:
        parts = f" ({seconds_text(row.rollout)} + {seconds_text(row.rest)})"
    return f"{seconds_text(row.seconds)} s{parts}, {seconds_text(row.fastest)}–{seconds_text(row.slowest)}"


def ratio_text(row: Row, table: Sequence[Row]) -> str:
    """By the medians, and by the fastest steps, which say more where others were at work too."""
    ours = ours_beside(row, table)
    return f"{row.seconds / ours.seconds:.2f} / {row.fastest / ours.fastest:.2f}" if ours else "–"


def speed_text(row: Row | None, table: Sequence[Row]) -> str:
    """Tokens per second, and how our speed compares."""
    if row is None or not row.measured:
        return "–"
    ratio = ratio_to_ours(row, table)
    compared = "" if ratio is None or row.entry.system in OURS.values() else f" ({ratio:.2f}×)"
    return f"{row.tokens / row.seconds:,.0f}{compared}"


def markdown(table: Sequence[Row]) -> str:
    """All tables, with what must be said about their rows."""
    parts = []
    for kind, title in TITLES.items():
        for prompt in dict.fromkeys(row.cell.prompt for row in table if row.cell.kind == kind):
            of_it = [row for row in table if row.cell.kind == kind and row.cell.prompt == prompt]
            tell = rollout_tables if kind == "rollout" else step_table
            parts.append(tell(f"{title}, P = {prompt}, C = {COMPLETION}", of_it))
    return "\n\n".join(parts)


def step_table(title: str, table: Sequence[Row]) -> str:
    """Systems down, model sizes across."""
    sizes = list(dict.fromkeys(row.cell.size for row in table))
    columns = [
        part
        for size in sizes
        for part in (
            f"{size}: step (rollout + rest), range",
            "times ours, by medians / fastest",
            "peak memory",
            "cores busy with others",
        )
    ]
    lines = [f"### {title}", "", *header(["", *columns])]
    for entry in dict.fromkeys(row.entry for row in table):
        cells = [entry.title]
        for size in sizes:
            found = [row for row in table if row.entry == entry and row.cell.size == size]
            if not found or not found[0].measured:
                cells += ["–", "–", "–", "–"]
                continue
            row = found[0]
            cells += [
                step_text(row),
                ratio_text(row, table),
                f"{row.peak_bytes / 1e9:.1f} GB",
                f"{row.others:.1f}",
            ]
        lines.append(line(cells))
    return "\n".join([*lines, *remarks(table)])


def rollout_tables(title: str, table: Sequence[Row]) -> str:
    """Systems down, rows at once across, a table for each size."""
    parts = []
    for size in dict.fromkeys(row.cell.size for row in table):
        of_size = [row for row in table if row.cell.size == size]
        widths = sorted({row.rows for row in of_size if row.measured})
        names = [f"{rows} row{'s' * (rows > 1)}" for rows in widths]
        lines = [
            f"### {title}, {size}: tokens per second (seconds as a multiple of ours)",
            "",
            *header(["", *names]),
        ]
        for entry in dict.fromkeys(row.entry for row in of_size):
            by_rows = {row.rows: row for row in of_size if row.entry == entry}
            lines.append(line([entry.title, *(speed_text(by_rows.get(rows), of_size) for rows in widths)]))
        parts.append("\n".join([*lines, *remarks(of_size)]))
    return "\n\n".join(parts)


def header(names: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [line(names), line(["---"] * len(names))]


def line(cells: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def remarks(table: Sequence[Row]) -> list[str]:
    """What is different about a system, then what went wrong, each once."""
    said = {
        f"- {SYSTEMS[row.entry.system].title}: {SYSTEMS[row.entry.system].remark}": None
        for row in table
        if SYSTEMS[row.entry.system].remark
    }
    said |= {
        f"- {row.entry.title} ({row.cell.size}): {row.complaint}.": None for row in table if row.complaint
    }
    return ["", *said] if said else []


def versions(runs: Iterable[Run]) -> dict[str, dict[str, str]]:
    """What each system ran on, and the BLAS libraries seen in its process."""
    found: dict[str, dict[str, str]] = {}
    for run in runs:
        if run.result is not None:
            name = run.entry.system + ("" if run.entry.blas != "reference" else ", reference BLAS")
            found[name] = {**run.result["versions"], "blas": ", ".join(run.result["blas"])}
    return found


def conditions(library: str | None) -> dict[str, Any]:
    """The machine, and what the workers' environment was made to be."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "preloaded_blas": Path(library).name if library else None,
        "openblas": backend.describe_library(library) if library else None,
        "variables_removed": sorted(name for name in os.environ if name.startswith("OPENBLAS_")),
        "variables_set": SPINNING,
    }


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [row.split(":", 1)[1].strip() for row in text.splitlines() if row.startswith("model name")]
    return names[0] if names else platform.processor()


def save(runs: Sequence[Run], options: argparse.Namespace, library: str | None, output: Path) -> None:
    """Everything measured so far, with every single step."""
    table = aggregate(runs, options.warm_up)
    content = {
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "work": {
            "prompts": PROMPTS,
            "group": GROUP,
            "completion": COMPLETION,
            "learning_rate": LEARNING_RATE,
        },
        "conditions": conditions(library),
        "versions": versions(runs),
        "rows": [flat(row, table) for row in table],
        "runs": [asdict(run) | {"cell": run.cell._asdict(), "entry": run.entry._asdict()} for run in runs],
    }
    waiting = output / "results.json.new"
    waiting.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    waiting.replace(output / "results.json")
    (output / "table.md").write_text(markdown(table) + "\n", encoding="utf-8")


def flat(row: Row, table: Sequence[Row]) -> dict[str, Any]:
    """A row as JSON has it."""
    own = {name: value for name, value in asdict(row).items() if name not in ("cell", "entry")}
    return {**row.cell._asdict(), **row.entry._asdict(), **own, "times_ours": ratio_to_ours(row, table)}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="./run bench-peers", description="The same RL step in several systems, side by side."
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["tiny", "small"])
    parser.add_argument(
        "--prompts", nargs="+", type=positive, default=[64, 512], help="prompt lengths in tokens"
    )
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument(
        "--kinds", nargs="+", choices=list(TITLES), default=list(TITLES), help="of those systems"
    )
    parser.add_argument("--rounds", type=positive, default=2, help="processes per system and case")
    parser.add_argument("--steps", type=positive, default=3, help="timed steps in each")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before them")
    parser.add_argument(
        "--reference-blas", action="store_true", help="the MLX systems without a fast BLAS too"
    )
    parser.add_argument(
        "--threads", type=positive, help="of each worker's BLAS and OpenMP (default: their own choice)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=0.0,
        help="seconds to wait before each process for others to be idle",
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one process may take")
    parser.add_argument("--output", type=Path, help="a folder (default: runs/bench-peers-DATE)")
    options = parser.parse_args(arguments)
    options.systems = [
        name for name in SYSTEMS if name in options.systems and SYSTEMS[name].kind in options.kinds
    ]
    if not options.systems:
        parser.error("none of these systems does any of these kinds of work")
    if options.warm_up < 0:
        parser.error("--warm-up: 0 or more is expected")
    return options


def positive(text: str) -> int:
    """For argparse: a whole number from 1 up."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 up is expected, found {text}")
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write, and print the tables."""
    options = parse(arguments)
    output = options.output or ROOT / "runs" / f"bench-peers-{time.strftime('%Y%m%d-%H%M%S')}"
    output.mkdir(parents=True, exist_ok=True)
    runs = measure(options, output)
    print(markdown(aggregate(runs, options.warm_up)))
    say(f"written to {output}")


if __name__ == "__main__":
    main()
