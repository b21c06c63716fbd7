"""The whole pipeline on a task that a small model learns from nothing: count upwards in even numbers.

    python main.py            (or: python -m examples.sequential_digits)

The prompt is a number, the answer should be at least five growing even numbers. The stages are those of RLHF:

    SFT            a freshly made model imitates growing sequences, odd and even alike
    reward model   learns from scored, noisy sequences of even numbers which of two is better
    PPO            improves the SFT model against the learned reward model, with a value network
    GRPO           improves the SFT model against the true score, without a critic

The true score (``rewards/sequential_digits.py``) is the share of the answer up to its first mistake, so the SFT
model scores low: half of its numbers are odd. The task is that of the sequential-digits walk-through of
mlx-rlhf; the finding about the reward model's data is in ``examples/digits_data.py``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base_setup import backend
from base_setup.parameters import count_parameters
from config.errors import CheckpointError
from config.model_config import ModelConfig
from config.ppo_config import PPOConfig
from config.supervised_config import RewardModelConfig, SFTConfig
from examples.digits_data import digit_prompt_splits
from examples.digits_stages import imitation_rows, scored_rows
from models.policy_model import PolicyModel
from models.reward_model import RewardModel
from models.sft_model import LanguageModel, load_language_model, save_language_model
from monitoring.console import StageConsole
from monitoring.metrics_file import read_metrics
from monitoring.plots import plot_training
from monitoring.samples import before_after_table
from monitoring.step_log import StepLog, StepProgress
from ppo_trainer.ppo_trainer import PPOTrainer
from training.reward_trainer import RewardTrainer
from training.sft_trainer import SFTTrainer

MODEL = ModelConfig(
    hidden_size=128, num_attention_heads=4, num_key_value_heads=2, num_layers=2, intermediate_size=256
)
LONGEST_ANSWER = 32  # tokens; six three-digit numbers with their spaces and the end token are 25
TEMPERATURE = 0.7  # in rollouts, in every logprob, and in the evaluation of all models
NAMES = {"base": "base", "sft": "SFT", "ppo": "PPO, learned reward", "grpo": "GRPO, true score"}


@dataclass(frozen=True)
class Scale:
    """How long each stage takes."""

    sft_steps: int
    reward_steps: int
    ppo_epochs: int
    grpo_epochs: int


FULL = Scale(sft_steps=400, reward_steps=600, ppo_epochs=6, grpo_epochs=6)
FAST = Scale(sft_steps=100, reward_steps=40, ppo_epochs=1, grpo_epochs=1)


def sft_config(scale: Scale, seed: int) -> SFTConfig:
    """Every weight of a fresh model trains: there is nothing yet that an adapter could adapt."""
    return SFTConfig(
        model_name="embedded",
        embedded_model=MODEL,
        fine_tune_type="full",
        learning_rate=2.5e-3,
        lr_schedule="cosine",
        warmup_steps=40,
        batch_size=32,
        num_steps=scale.sft_steps,
        seed=seed,
    )


def reward_config(scale: Scale, seed: int) -> RewardModelConfig:
    """Every weight trains: odd and even play no part in SFT, so the features must be learned first."""
    return RewardModelConfig(
        fine_tune_type="full",
        learning_rate=1.5e-3,
        lr_schedule="cosine",
        warmup_steps=10,
        batch_size=32,
        list_size=32,
        num_steps=scale.reward_steps,
        seed=seed,
    )


def rl_config(algorithm: str, seed: int, output: Path) -> PPOConfig:
    """128 completions per step, in four minibatches. Every weight trains: the model is tiny.

    PPO's critic gets three steps to itself first. The KL holds PPO near the SFT model, where the learned reward
    model knows its way. GRPO's true score cannot be fooled, yet with a tenth of that weight it reached the same score
    at twice the KL, by answers that begin with the same two numbers whatever the prompt.
    """
    shared = PPOConfig(
        algorithm=algorithm,
        fine_tune_type="full",
        max_new_tokens=LONGEST_ANSWER,
        temperature=TEMPERATURE,
        batch_size=16,
        group_size=8,
        minibatch_size=32,
        num_epochs_per_rollout=1,
        learning_rate=1e-3,
        lr_schedule="linear",
        warmup_steps=20,  # Adam's first steps are as long as any: unwarmed, one batch moved the policy by 18 nats
        gamma=1.0,
        kl_coef=0.05,
        seed=seed,
        output_dir=str(output / algorithm),
        verbose=False,
    )
    if algorithm == "ppo":
        return shared.replace(lam=0.98, value_learning_rate=3e-3, value_warmup_steps=3)
    return shared


class Demo:
    """The stages in order; each leaves its result on disk and its numbers in ``results``."""

    def __init__(
        self, output: Path, *, seed: int = 0, scale: Scale = FULL, console: StageConsole | None = None
    ):
        self.output = _empty_folder(output)
        self.seed = seed
        self.scale = scale
        self.console = console or StageConsole()
        self.prompts, held_out = digit_prompt_splits(100, 51, seed)
        self.held_out = held_out * 4  # four answers each: a quarter of the noise
        self.results: dict[str, Any] = {"seed": seed}
        self.evaluations: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        """Everything; returns the numbers of the final table."""
        start = time.perf_counter()
        base = self.make_model()
        sft = self.fine_tune(base)
        reward_model = self.learn_reward(sft)
        self.reinforce("ppo", sft, reward_model, self.scale.ppo_epochs)
        self.reinforce("grpo", sft, "sequential_digits", self.scale.grpo_epochs)
        self.results["seconds"] = time.perf_counter() - start
        self.report()
        return self.results

    def make_model(self) -> LanguageModel:
        """A model and tokenizer from nothing."""
        base = load_language_model(sft_config(self.scale, self.seed))
        self.console.stage("Model", "a small Qwen3 with random weights and a byte tokenizer")
        self.console.note(f"{count_parameters(base.model)[1]:,} parameters on {backend.describe()}")
        return base

    def fine_tune(self, base: LanguageModel) -> LanguageModel:
        """Supervised fine-tuning, saved as a whole model."""
        config = sft_config(self.scale, self.seed)
        self.console.stage("SFT", "imitate growing sequences, odd and even alike")
        trainer = SFTTrainer(base, config)
        with self.console.progress(config.num_steps, "SFT") as progress:
            log = StepLog(self.output / "sft" / "metrics.jsonl", progress, {"loss": "loss"})
            trainer.train(imitation_rows(4000, self.seed), log)
        held_out = trainer.loss(imitation_rows(200, self.seed + 1_000_003))
        self.console.note(f"held-out loss {held_out:.3f} nats per token")
        self.results["sft_held_out_loss"] = held_out
        model = trainer.language_model
        save_language_model(model, self.output / "sft" / "model")
        self._evaluate("base", base, reference=None)
        self._evaluate("sft", model, reference=model)
        # From here on the SFT model is loaded from its folder by name, like any other.
        return load_language_model(self._model_config())

    def learn_reward(self, sft: LanguageModel) -> RewardModel:
        """The reward model, with its accuracy on sequences that it has not seen."""
        config = reward_config(self.scale, self.seed).replace(model_name=str(self.output / "sft" / "model"))
        self.console.stage("Reward model", "which of two noisy sequences is better?")
        trainer = RewardTrainer(sft, config)
        rows = scored_rows(12_000, self.seed)
        with self.console.progress(config.num_steps, "reward model") as progress:
            log = StepLog(
                self.output / "reward_model" / "metrics.jsonl",
                progress,
                {"loss": "loss", "accuracy": "accuracy"},
            )
            trainer.train(rows[400:], log)
        accuracy = trainer.accuracy(rows[:400])
        self.console.note(f"held-out pairs in the right order: {accuracy:.1%}")
        self.results["reward_model_accuracy"] = accuracy
        trainer.reward_model.save(self.output / "reward_model")
        return trainer.reward_model

    def reinforce(self, algorithm: str, sft: LanguageModel, reward: Any, epochs: int) -> None:
        """PPO or GRPO from the SFT model."""
        against = "the learned reward model" if algorithm == "ppo" else "the true score"
        self.console.stage(algorithm.upper(), f"reinforcement learning against {against}")
        config = rl_config(algorithm, self.seed, self.output).replace(
            model_name=str(self.output / "sft" / "model")
        )
        trainer = PPOTrainer(config, model=sft, reward_model=reward)
        total = epochs * -(-len(self.prompts) // config.batch_size)
        with self.console.progress(total, algorithm.upper()) as progress:
            result = trainer.train(self.prompts, num_epochs=epochs, callbacks=[StepProgress(progress)])
        records = [r for r in read_metrics(self.output / algorithm / "metrics.jsonl") if "kind" not in r]
        self.console.curve("reward", [r["reward"] for r in records])
        self._evaluate(algorithm, trainer.policy, reference=sft)
        self.results[f"{algorithm}_reward"] = [records[0]["reward"], result["avg_reward"]]

    def _model_config(self) -> PPOConfig:
        return PPOConfig(model_name=str(self.output / "sft" / "model"), seed=self.seed)

    def _evaluate(
        self, name: str, model: LanguageModel | PolicyModel, *, reference: LanguageModel | None
    ) -> None:
        """True score, KL to the SFT model and length on held-out prompts."""
        config = PPOConfig(
            algorithm="grpo",
            fine_tune_type="full",
            max_new_tokens=LONGEST_ANSWER,
            temperature=TEMPERATURE,
            seed=self.seed,
            verbose=False,
        )
        policy = model if isinstance(model, PolicyModel) else PolicyModel(model, config)
        against = PolicyModel(reference, config).frozen_copy() if reference is not None else None
        trainer = PPOTrainer(config, policy=policy, reference=against, reward_model="sequential_digits")
        metrics = trainer.evaluate(self.held_out)
        self.evaluations[name] = metrics
        self.results[name] = {
            "score": metrics["avg_reward"],
            "kl": metrics["objective/kl"] if reference is not None else None,
            "length": metrics["completions/mean_length"],
        }

    def report(self) -> None:
        """Samples side by side, the table, the picture, and where it all is."""
        console, names = self.console, ("sft", "ppo", "grpo")
        console.stage("Held-out prompts", "five answers before and after, with their true scores")
        samples = {name: self.evaluations[name]["samples"] for name in names}
        rows = [
            [
                samples["sft"][i]["prompt"],
                *((samples[n][i]["completion"], samples[n][i]["score"]) for n in names),
            ]
            for i in range(5)
        ]
        console.show(before_after_table(rows, ["prompt", *(NAMES[name] for name in names)]))
        console.summary_table([self._table_row(name) for name in NAMES])
        records = {NAMES[n]: read_metrics(self.output / n / "metrics.jsonl") for n in ("ppo", "grpo")}
        picture = plot_training(records, self.output / "training.png", "Counting in even numbers")
        (self.output / "results.json").write_text(json.dumps(self.results, indent=2) + "\n", encoding="utf-8")
        console.note("")
        console.note(f"{self.results['seconds']:.0f} seconds; everything is in {self.output}:")
        console.note(
            f"{picture.name} (curves), results.json, */metrics.jsonl, */samples.jsonl, */config.json,"
        )
        console.note("sft/model (mlx-lm model), ppo/final and grpo/final (mlx-lm adapters), reward_model")

    def _table_row(self, name: str) -> dict[str, Any]:
        row = self.results[name]
        return {
            "model": NAMES[name],
            "true score": f"{row['score']:.2f}",
            "KL to SFT (nats)": "–" if row["kl"] is None else f"{row['kl']:.1f}",
            "length (tokens)": f"{row['length']:.1f}",
        }


def _empty_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f'--output: "{folder}" cannot be used ({error.strerror or error})') from error
    if occupied:
        raise CheckpointError(f'--output: "{folder}" is not empty; choose a new folder or remove it')
    return folder


def improved(results: Mapping[str, Any]) -> bool:
    """Did both algorithms raise what they were trained on?"""
    pairs: Sequence[Sequence[float]] = [results["ppo_reward"], results["grpo_reward"]]
    return all(after > before for before, after in pairs)


def main(output: str | None = None, *, seed: int = 0, fast: bool = False) -> int:
    """Run the demo; 0 if both algorithms improved their reward."""
    folder = Path(output) if output else Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    console = StageConsole()
    results = Demo(folder, seed=seed, scale=FAST if fast else FULL, console=console).run()
    if not improved(results):
        console.note("PPO or GRPO did not raise its reward in this run.")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
