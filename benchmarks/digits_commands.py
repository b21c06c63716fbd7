"""The commands of docs/digits.md, one after the other: what ``benchmarks.digits_walkthrough`` runs over seeds."""

from __future__ import annotations

from typing import NamedTuple

#: The folder and the seed of the commands in the document.
FOLDER, SEED = "runs/digits", 0
REWARDS = {"true": "true score", "learned": "learned reward model"}


class Step(NamedTuple):
    """One line of the walk-through."""

    name: str
    command: str


class Mode(NamedTuple):
    """What trains, as flags of each stage."""

    title: str
    sft: str
    reward_model: str
    ppo: str


MODES = {
    "lora": Mode("LoRA", "--learning-rate 3e-3", "--learning-rate 3e-3", "--learning-rate 2e-3"),
    "soft": Mode(
        "soft prompt",
        "--fine-tune-type soft_prompt --learning-rate 1e-2",
        "--learning-rate 3e-3",  # a soft prompt makes a poor judge: 67 % of held-out pairs
        "--fine-tune-type soft_prompt --learning-rate 1e-2",
    ),
    "full": Mode(
        "every weight",
        "--fine-tune-type full --learning-rate 1e-3",
        "--fine-tune-type full --learning-rate 1.5e-3",
        "--fine-tune-type full --learning-rate 1e-3",
    ),
}


def beginning(folder: str = FOLDER, seed: int = SEED) -> list[Step]:
    """What all ways to train share: the data, and a small model from nothing."""
    return [
        Step("data", f"generate-digit-data --stages --folder {folder}/data --seed {seed}"),
        Step(
            "base",
            f"sft --config examples/digits/base.toml --train-path {folder}/data/base.jsonl "
            f"--output-dir {folder}/base --seed {seed}",
        ),
    ]


def steps(mode: str, folder: str = FOLDER, seed: int = SEED) -> list[Step]:
    """SFT, reward model, PPO against either reward, scores and answers."""
    how, place = MODES[mode], f"{folder}/{mode}"
    fused = [Step("fuse", f"fuse --adapter-path {place}/sft --save-path {place}/model")]
    found = [
        Step(
            "sft",
            f"sft --config examples/digits/sft.toml --model-name {folder}/base/model {how.sft} "
            f"--train-path {folder}/data/sft.jsonl --output-dir {place}/sft --seed {seed}",
        ),
        scores("sft", mode, folder),
        *(fused if mode == "lora" else []),
        Step(
            "reward_model",
            f"reward-model --config examples/digits/reward_model.toml --model-name {start_of(mode, folder)} "
            f"{how.reward_model} --train-path {folder}/data/preferences.jsonl "
            f"--val-path {folder}/data/pairs_held_out.jsonl --output-dir {place}/reward_model --seed {seed}",
        ),
    ]
    for reward in REWARDS:
        found += [
            ppo(mode, reward, folder, seed),
            scores(reward, mode, folder),
            _answers(reward, mode, folder),
        ]
        if mode != "soft":
            found.append(
                Step(
                    f"fuse {reward}",
                    f"fuse --adapter-path {place}/{reward} --save-path {place}/{reward}/fused",
                )
            )
    return found


def ppo(mode: str, reward: str, folder: str = FOLDER, seed: int = SEED, output: str | None = None) -> Step:
    """PPO from the SFT result; ``output``: another folder than the walk-through's."""
    place = f"{folder}/{mode}"
    name = "sequential_digits" if reward == "true" else f"learned:{place}/reward_model/final"
    adapter = f"--adapter-path {place}/sft/final " if mode == "soft" else ""
    return Step(
        f"ppo {reward}",
        f"train --config examples/digits/ppo.toml --model-name {start_of(mode, folder)} {adapter}{MODES[mode].ppo} "
        f"--train-path {folder}/data/prompts.jsonl --reward {name} --output-dir {output or f'{place}/{reward}'} "
        f"--seed {seed}",
    )


def start_of(mode: str, folder: str) -> str:
    """What the stages after SFT begin from; a soft prompt stays beside its base."""
    return {
        "lora": f"{folder}/lora/model",
        "soft": f"{folder}/base/model",
        "full": f"{folder}/full/sft/model",
    }[mode]


def scores(run: str, mode: str, folder: str, output: str | None = None) -> Step:
    """The true score of a run's answers to held-out prompts, and what the learned reward thinks of them."""
    place = f"{folder}/{mode}"
    proxy = "" if run == "sft" else f" --reward learned:{place}/reward_model/final=0"
    return Step(
        f"scores {run}",
        f"evaluate --config examples/digits/ppo.toml --checkpoint {output or f'{place}/{run}'} "
        f"--val-path {folder}/data/held_out.jsonl --reward sequential_digits{proxy} --output-dir {place}/scores",
    )


def _answers(reward: str, mode: str, folder: str) -> Step:
    place = f"{folder}/{mode}"
    return Step(
        f"answers {reward}",
        f"generate --model {start_of(mode, folder)} --adapter-path {place}/{reward} "
        f"--prompts {folder}/data/held_out.jsonl --temperature 0 --max-tokens 32 "
        f"--output {place}/{reward}/answers.jsonl",
    )
