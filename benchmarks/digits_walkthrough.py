"""The walk-through of docs/digits.md, over seeds and ways to train: its table, and what makes it stable.

    ./run python -m benchmarks.digits_walkthrough --seeds 5 --modes lora soft full --out runs/digits-walkthrough

Runs the document's commands as they stand there but for folder and seed, each in a process of its own, and reads scores
from what they leave. The score that judges is always the true one, on held-out prompts. After each way to train
the result is loaded in a fresh process, by ``mlx_lm.load`` alone where mlx-lm can, and has to give the likeliest
answers that ``generate`` gives, token for token. ``--ablations`` switches off one choice at a time.

What is finished is not run again; a part that was interrupted begins anew. The tables are printed at the end, and
``--table`` prints those of what there is.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.digits_commands import MODES, REWARDS, Step, beginning, ppo, scores, start_of, steps

ROOT = Path(__file__).resolve().parent.parent
#: What is switched off → flags that come after PPO's own and so replace them.
ABLATIONS = {
    "no warm-up of the learning rate": "--warmup-steps 0",
    "no head start for the critic": "--value-warmup-steps 0",
    "a critic no faster than the policy": "--value-learning-rate 1e-3",
    "advantages not whitened": "--no-whiten-advantages",
    "four passes over each batch": "--num-epochs-per-rollout 4",
    "no KL": "--kl-coef 0",
}

# Running them --------------------------------------------------------------------------------------------


def run_steps(todo: Iterable[Step], log: Path) -> dict[str, float]:
    """Run commands in order, their output into ``log``; seconds of each.

    Raises:
        SystemExit: one failed; the sentence names it and ends with its last lines.
    """
    seconds = {}
    log.parent.mkdir(parents=True, exist_ok=True)
    for step in todo:
        begun = time.perf_counter()
        print(f"$ python main.py {step.command}", flush=True)
        done = subprocess.run(
            [sys.executable, "main.py", *shlex.split(step.command)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        seconds[step.name] = time.perf_counter() - begun
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ python main.py {step.command}\n{done.stdout}\n")
        if done.returncode:
            raise SystemExit(f"{step.name} ended with code {done.returncode}:\n{done.stdout[-2000:]}")
    return seconds


def once(folder: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` finds, from ``folder/results.json`` if it is there; what is half done there is thrown away."""
    results = folder / "results.json"
    if not results.exists():
        shutil.rmtree(folder, ignore_errors=True)
        found = work()
        results.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return dict(json.loads(results.read_text(encoding="utf-8")))


def run_beginning(folder: Path, seed: int) -> dict[str, Any]:
    """Data and base of a seed."""
    return once(
        folder / "base", lambda: {"seconds": run_steps(beginning(str(folder), seed), folder / "base.log")}
    )


def run_mode(mode: str, folder: Path, seed: int) -> dict[str, Any]:
    """One way to train with one seed: its numbers."""
    place = folder / mode

    def work() -> dict[str, Any]:
        seconds = run_steps(steps(mode, str(folder), seed), folder / f"{mode}.log")
        report = json.loads((place / "reward_model" / "reward_report.json").read_text(encoding="utf-8"))
        return {
            "mode": mode,
            "seed": seed,
            "seconds": seconds,
            "reward_model": report["accuracy"],
            "scores": {run: scores_of(place / "scores" / f"{run}.json") for run in ("sft", *REWARDS)},
            "same_tokens": {reward: fresh_answers(mode, reward, folder) for reward in REWARDS},
        }

    return once(place, work)


def scores_of(file: Path) -> dict[str, float | None]:
    """True score, the learned reward's own, KL in nats per answer and length, as ``evaluate`` wrote them down."""
    found = json.loads(file.read_text(encoding="utf-8"))["validation"]
    return {
        "score": found["rewards/sequential_digits/mean"],
        "proxy": found.get("rewards/reward_model/mean"),
        "kl": found.get("objective/kl"),
        "length": found["completions/mean_length"],
    }


# The same tokens in a fresh process ----------------------------------------------------------------------

#: Reads a model and texts, prints the likeliest answers' tokens; of ours only where mlx-lm cannot load it.
FRESH = """
import json, sys
model, adapter, prompts = json.load(sys.stdin)
import mlx_lm
from mlx_lm.generate import generate_step
import mlx.core as mx
{load}
for prompt in prompts:
    ids = []
    for token, _ in generate_step(mx.array(tokenizer.encode(prompt)), model, max_tokens=32):
        ids.append(int(token))
        if int(token) in tokenizer.eos_token_ids:
            break
    print(json.dumps([len(ids), tokenizer.decode([i for i in ids if i not in tokenizer.eos_token_ids])]))
"""
BY_MLX_LM = "model, tokenizer = mlx_lm.load(model, adapter_path=adapter)"
BY_US = """
from config.training_config import TrainingConfig
from models.policy_model import PolicyModel
from models.sft_model import load_language_model
config = TrainingConfig(model_name=model, adapter_path=adapter)
policy = PolicyModel(load_language_model(config), config)
model, tokenizer = policy.model, policy.tokenizer
"""


def fresh_answers(mode: str, reward: str, folder: Path) -> dict[str, str]:
    """Each way to load a result → how many of its answers are those of ``generate``, as ``"51 of 51"``."""
    place = folder / mode / reward
    written = [
        json.loads(line) for line in (place / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    answers = {row["prompt"]: [row["tokens"], row["completion"]] for row in written}
    final = str(place / "final")
    ways: dict[str, tuple[str, str, str | None]]
    if mode == "soft":
        ways = {"our loader": (BY_US, start_of(mode, str(folder)), final)}
    else:
        ways = {
            "mlx_lm.load with adapter_path": (BY_MLX_LM, start_of(mode, str(folder)), final),
            "mlx_lm.load of the fused model": (BY_MLX_LM, str(place / "fused"), None),
        }
    return {way: _agreement(answers, *how) for way, how in ways.items()}


def _agreement(answers: dict[str, list[Any]], load: str, model: str, adapter: str | None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", FRESH.replace("{load}", load)],
        input=json.dumps([model, adapter, list(answers)]),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{model}, {adapter}: the fresh process failed:\n{done.stderr[-2000:]}")
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    same = sum(one == other for one, other in zip(found, answers.values(), strict=True))
    return f"{same} of {len(answers)}"


# One choice at a time ------------------------------------------------------------------------------------


def run_ablation(number: int, mode: str, reward: str, folder: Path, seed: int) -> dict[str, Any]:
    """PPO of one mode and reward again with one choice switched off: its scores."""
    place = folder / "ablations" / f"{mode}-{reward}-{number}"
    flags = list(ABLATIONS.values())[number]

    def work() -> dict[str, Any]:
        train = ppo(mode, reward, str(folder), seed, output=str(place))
        judge = scores(reward, mode, str(folder), output=str(place))
        judge = judge._replace(command=judge.command.replace(f"{folder}/{mode}/scores", str(place)))
        run_steps(
            [train._replace(command=f"{train.command} {flags}".strip()), judge], place.with_suffix(".log")
        )
        return scores_of(place / f"{place.name}.json")

    return once(place, work)


# Tables --------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation, and in brackets the least and the most."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    low, high = min(values), max(values)
    return (
        f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
    )


def table(results: Sequence[dict[str, Any]]) -> str:
    """One row per way to train and reward, over seeds."""
    lines = [
        "| what trains | after SFT | pairs right | reward of PPO | true score | KL | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode in dict.fromkeys(one["mode"] for one in results):
        rows = [one for one in results if one["mode"] == mode]
        for reward, name in REWARDS.items():
            reached = [one["scores"][reward] for one in rows]
            cells = [
                MODES[mode].title,
                spread([one["scores"]["sft"]["score"] for one in rows]),
                spread([one["reward_model"] for one in rows]),
                name,
                f"**{statistics.mean(s['score'] for s in reached):.2f}**"
                + spread([s["score"] for s in reached])[4:],
                spread([s["kl"] for s in reached], 1),
                f"{statistics.mean(sum(one['seconds'].values()) for one in rows):.0f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ablation_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """One row per choice."""
    lines = ["| | true score | KL | learned reward |", "|---|---|---|---|"]
    for name, rows in found.items():
        cells = [
            spread([row["score"] for row in rows]),
            spread([row["kl"] for row in rows], 1),
            spread([row["proxy"] for row in rows]),
        ]
        flags = f" (`{ABLATIONS[name]}`)" if name in ABLATIONS else ""
        lines.append(f"| {name}{flags} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def agreement(results: Sequence[dict[str, Any]]) -> str:
    """A line per run whose fresh process said something else, or one that says that none did."""
    lines = [
        f"seed {one['seed']}, {one['mode']}, {reward}, {way}: {same}"
        for one in results
        for reward, ways in one["same_tokens"].items()
        for way, same in ways.items()
        if len(set(same.split(" of "))) > 1
    ]
    return (
        "\n".join(lines)
        or f"{len(results)} runs: in fresh processes all answers are those of generate, token by token"
    )


def finished(out: Path, modes: Sequence[str], seeds: Iterable[int]) -> list[dict[str, Any]]:
    """The results that are there."""
    files = [out / f"seed-{seed}" / mode / "results.json" for mode in modes for seed in seeds]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def finished_ablations(
    out: Path, mode: str, reward: str, seeds: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """Choice → the scores that are there; the first row is that of the walk-through itself, with the same seeds."""
    found = {}
    for number, name in enumerate(ABLATIONS):
        files = [
            out / f"seed-{s}" / "ablations" / f"{mode}-{reward}-{number}" / "results.json" for s in seeds
        ]
        rows = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
        if rows:
            found[name] = rows
    if not found:
        return {}
    as_it_is = [one["scores"][reward] for one in finished(out, [mode], seeds)]
    return {"as it is": as_it_is, **found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not done, print the tables."""
    parser = argparse.ArgumentParser(description="The digit walk-through over seeds.", allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 (default 5)")
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES))
    parser.add_argument("--out", type=Path, default=Path("runs/digits-walkthrough"))
    parser.add_argument(
        "--ablations", choices=tuple(MODES), help="then switch off one choice at a time in this mode"
    )
    parser.add_argument("--ablation-reward", choices=tuple(REWARDS), default="learned")
    parser.add_argument("--ablation-seeds", type=int, default=3, help="of how many seeds (default 3)")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables of what there is")
    options = parser.parse_args(arguments)
    seeds, out = range(options.seeds), options.out.absolute()
    if not options.table:
        for seed in seeds:
            folder = out / f"seed-{seed}"
            run_beginning(folder, seed)
            for mode in options.modes:
                run_mode(mode, folder, seed)
        for seed in range(options.ablation_seeds if options.ablations else 0):
            for number in range(len(ABLATIONS)):
                run_ablation(number, options.ablations, options.ablation_reward, out / f"seed-{seed}", seed)
    results = finished(out, options.modes, seeds)
    print(table(results), "", agreement(results), sep="\n")
    for mode in MODES:
        for reward in REWARDS:
            if found := finished_ablations(out, mode, reward, range(options.ablation_seeds)):
                print("", f"{MODES[mode].title}, {REWARDS[reward]}:", "", ablation_table(found), sep="\n")


if __name__ == "__main__":
    main()
