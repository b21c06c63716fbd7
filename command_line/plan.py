"""What a run is going to do, in a few lines: rows, steps, tokens, memory. No weight is loaded for it."""

from __future__ import annotations

from collections.abc import Sequence

from base_setup.memory_estimate import GB, MemoryEstimate, describe, predict
from command_line.checks import model_config, row_lengths
from config.ppo_config import PPOConfig
from config.supervised_config import PreferenceConfig, RewardModelConfig, SupervisedConfig
from config.training_config import TrainingConfig
from data_loading.loading import DataSplits
from data_loading.prepared_prompts import PreparedPrompts
from ppo_trainer.algorithms import find_algorithm
from ppo_trainer.resolution import updates_per_batch
from rewards.composition import RewardSet


def memory_lines(config: PPOConfig) -> list[str]:
    """The estimate of ``base_setup.memory_estimate`` for a resolved config."""
    return describe(model_config(config), config, critic=find_algorithm(config.algorithm).needs_critic)


def usable(data: DataSplits, prompts: PreparedPrompts) -> int:
    """Prompts to train on: the rows without those that are left out, as far as ``prompts`` were looked at."""
    return len(data.train) - prompts.fitting.seen + len(prompts)


def steps_of(config: PPOConfig, prompts: int) -> int:
    """Batches of rollouts in the whole run."""
    return config.num_steps or config.num_epochs * -(-prompts // config.batch_size)


def training_plan(
    config: PPOConfig, data: DataSplits, prompts: PreparedPrompts, rewards: RewardSet, *, dry: bool
) -> list[str]:
    """The plan of ``train``, a line for each thing; with ``dry`` the memory in all its parts, and what was left out.

    Args:
        prompts: of ``data.train``, as ``command_line.checks.fitted_prompts`` has them.
    """
    lengths, count = [len(prompt.ids) for prompt in prompts], usable(data, prompts)
    measured = config.replace(max_prompt_length=max(lengths))
    steps, completions = steps_of(config, count), config.batch_size * config.group_size
    per_epoch = -(-count // config.batch_size)
    passes = f"{config.num_epochs} epochs × {per_epoch} = " if config.num_steps is None else ""
    updates = _counted(updates_per_batch(config), "update")
    lines = [
        ("run", f"{config.algorithm} on {config.model_name}, {_trained(config)}, seed {config.seed}"),
        ("data", _rows(data, lengths, "prompts", count=count, seen=prompts.fitting.seen)),
        ("rewards", ", ".join(f"{n} × {w:g}" for n, w in zip(rewards.names, rewards.weights, strict=True))),
        (
            "steps",
            f"{passes}{_counted(steps, 'step')} of {_counted(config.batch_size, 'prompt')} × "
            f"{_counted(config.group_size, 'completion')}, {updates} each",
        ),
        ("tokens", f"at most {steps * completions * config.max_new_tokens:,} sampled"),
    ]
    if dry:
        return [*_table(lines), *str(prompts.fitting).splitlines(), "", *memory_lines(measured)]
    critic = find_algorithm(config.algorithm).needs_critic
    return _table([*lines, ("memory", _memory(predict(model_config(config), measured, critic=critic)))])


def supervised_plan(stage: str, config: SupervisedConfig, data: DataSplits, *, dry: bool) -> list[str]:
    """The plan of ``sft``, ``reward-model`` and ``preference``.

    Raises:
        DataLoadError: a row cannot be used; with ``dry`` every one is looked at.
    """
    lengths = row_lengths(config, data.train, every=dry)
    if data.validation is not None:
        row_lengths(config, data.validation, every=dry)
    seen = config.num_steps * config.batch_size
    return _table(
        [
            ("run", f"{stage} on {config.model_name}, {_trained(config)}, seed {config.seed}"),
            ("data", _rows(data, lengths, "rows", count=len(data.train), seen=len(lengths))),
            (
                "steps",
                f"{_counted(config.num_steps, 'step')} of {_counted(config.batch_size, 'row')}, "
                f"{seen / len(data.train):.3g} passes over the rows",
            ),
            ("tokens", f"about {round(seen * sum(lengths) / len(lengths)):,}"),
            ("memory", _memory(supervised_memory(config, max(lengths)))),
        ]
    )


def supervised_memory(config: SupervisedConfig, longest: int) -> MemoryEstimate:
    """The estimate of a gradient pass over rows of ``longest`` tokens each: no rollouts, no reference.

    Half of a row is taken to be completion, whose logits are needed. A reward model's and a preference's rows are
    pairs (for ``micro_batch_size``, a reward model's count each side), and a reward model's head is one number wide.
    """
    preference = isinstance(config, PreferenceConfig)
    rows = config.batch_size * (2 if preference or isinstance(config, RewardModelConfig) else 1)
    at_once = (config.micro_batch_size or rows) * (2 if preference else 1)
    new = 1 if isinstance(config, RewardModelConfig) else max(1, longest // 2)
    shared = (
        *("fine_tune_type", "lora_r", "lora_layers", "lora_blocks", "soft_prompt_tokens", "soft_prompt_text"),
        *(
            "quantize_base",
            "quantize_group_size",
            "quantize_mode",
            "optimizer_bits",
            "gradient_checkpointing",
        ),
    )
    options = PPOConfig(
        algorithm="reinforce",
        batch_size=rows,
        group_size=1,
        micro_batch_size=min(at_once, rows),
        max_prompt_length=max(1, longest - new),
        max_new_tokens=new,
        reference="none",
        kl_coef=0.0,
        **{name: getattr(config, name) for name in shared},
    )
    whole = predict(model_config(config), options, critic=False)
    return MemoryEstimate(whole.lasting, {name: whole.phases[name] for name in ("gradient pass", "update")})


def _table(lines: Sequence[tuple[str, str]]) -> list[str]:
    return [f"  {label:9s}{text}" for label, text in lines]


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' if number != 1 else ''}"


def _trained(config: TrainingConfig) -> str:
    if config.fine_tune_type == "full":
        return "every weight trains"
    length = config.soft_prompt_length
    vectors = f"a soft prompt of {length if length else 'its text'}" + (" vectors" if length else "")
    if config.fine_tune_type == "soft_prompt":
        return f"{vectors} trains"
    kind = "DoRA adapters" if config.fine_tune_type == "dora" else "adapters"
    return " and ".join([f"{kind} of rank {config.lora_r}", *([vectors] if length != 0 else [])]) + " train"


def _rows(data: DataSplits, lengths: Sequence[int], what: str, *, count: int, seen: int) -> str:
    span = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else str(max(lengths))
    text = f"{count:,} {what} of {span} tokens"
    if len(data.train) > seen:
        text += f" (by the first {seen:,})"
    if data.validation is not None:
        text += f", {len(data.validation):,} for validation"
        if data.leaks:
            text += f", of which {data.leaks} have a prompt that is trained on, too"
    return text


def _memory(estimate: MemoryEstimate) -> str:
    size = f"{estimate.peak / GB:.3g} GB" if estimate.peak >= GB / 10 else f"{estimate.peak / 1e6:.3g} MB"
    return f"about {size} at the peak, in the {estimate.phase} (estimated)"
