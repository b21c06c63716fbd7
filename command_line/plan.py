"""What a run is going to do, worked out from config, data and ``config.json``: no weight is loaded.

Everything that a run could be refused for is looked at here, so that a dry run and a run fail alike and early.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base_setup.lora_setup import read_description
from base_setup.memory_estimate import GB, MemoryEstimate, describe, predict, read_config
from base_setup.tokenizer_setup import byte_tokenizer, encode, encode_prompt
from config.errors import CheckpointError, DataLoadError, InvalidConfigurationError, ModelLoadError
from config.ppo_config import PPOConfig
from config.supervised_config import RewardModelConfig, SFTConfig
from config.training_config import TrainingConfig
from data_loading.loading import DataSplits, load_data
from data_loading.schemas import Kind
from models.sft_model import EMBEDDED, build_embedded, existing_model
from ppo_trainer.algorithms import find_algorithm
from ppo_trainer.resolution import updates_per_batch

if TYPE_CHECKING:
    from rewards.composition import RewardSet

#: Rows whose tokens are counted for a plan; a million would take minutes.
COUNTED_ROWS = 1000


# What is checked -----------------------------------------------------------------------------------------


def model_config(config: TrainingConfig) -> Mapping[str, Any]:
    """The contents of the model's ``config.json``; nothing else of it is read, or fetched."""
    if config.model_name == EMBEDDED:
        return build_embedded(config.embedded_model, config.seed).config
    return read_config(config.model_name)


def check_model(config: TrainingConfig) -> None:
    """Refuse a model or an adapter that is not there."""
    if config.model_name != EMBEDDED:
        existing_model(config.model_name)
    if config.adapter_path is not None:
        read_description(Path(config.adapter_path).expanduser())


def check_output(folder: str | None) -> None:
    """Refuse, without making it, a run folder that cannot be made or is taken."""
    path = Path(folder or "runs").expanduser()
    if (path / "metrics.jsonl").exists():
        raise CheckpointError(
            f'output_dir: "{path}" already holds a run (metrics.jsonl); choose another folder or remove it'
        )
    above = next((one for one in (path, *path.absolute().parents) if one.exists()), Path("/"))
    if not above.is_dir():
        raise CheckpointError(f'output_dir: "{path}" cannot be made, since {above} is a file; choose another')
    if not _writable(above):
        raise CheckpointError(f'output_dir: "{path}" cannot be written to; choose another folder')


def _writable(folder: Path) -> bool:
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def read_rows(config: TrainingConfig, kind: Kind) -> DataSplits:
    """The rows that the config names.

    Raises:
        DataLoadError: file, line and what was found. InvalidConfigurationError: no data are named at all.
    """
    if config.train_path is None and config.dataset_name is None:
        raise InvalidConfigurationError(
            "train_path: no data are named; give --train-path FILE, or --dataset-name NAME of a Hugging Face data set"
        )
    return load_data(config, kind)


def load_tokenizer(config: TrainingConfig) -> Any:
    """The model's tokenizer alone."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    if config.model_name == EMBEDDED:
        tokenizer = byte_tokenizer()
        return TokenizerWrapper(tokenizer, eos_token_ids=[tokenizer.eos_token_id])
    from mlx_lm.utils import load_tokenizer as load

    try:
        name = Path(config.model_name).expanduser()
        return load(name if name.is_dir() else config.model_name)
    except Exception as error:  # transformers and the hub client each raise their own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelLoadError(
            f'model_name: the tokenizer of "{config.model_name}" could not be loaded ({reason}); give a folder with '
            "tokenizer.json, or a Hugging Face name that can be reached"
        ) from error


# What is told --------------------------------------------------------------------------------------------


def memory_lines(config: PPOConfig) -> list[str]:
    """The estimate of ``base_setup.memory_estimate`` for a resolved config."""
    return describe(model_config(config), config, critic=find_algorithm(config.algorithm).needs_critic)


def training_plan(
    config: PPOConfig, data: DataSplits, rewards: RewardSet, epochs: int, dry: bool
) -> list[str]:
    """The plan of ``train``, a line for each thing; with ``dry`` the memory in all its parts."""
    critic = find_algorithm(config.algorithm).needs_critic
    per_epoch = -(-len(data.train) // config.batch_size)
    steps, completions = epochs * per_epoch, config.batch_size * config.group_size
    updates = updates_per_batch(config)
    lengths = _lengths(config, data.train, "prompt")
    named = zip(rewards.names, rewards.weights, strict=True)
    most = steps * completions * config.max_new_tokens
    lines = [
        ("run", f"{config.algorithm} on {config.model_name}, {_trained(config)}, seed {config.seed}"),
        ("data", _rows(data, lengths, "prompts")),
        ("rewards", ", ".join(f"{name} × {weight:g}" for name, weight in named)),
        (
            "steps",
            f"{epochs} epochs × {per_epoch} = {steps} steps of {config.batch_size} prompts × {config.group_size} "
            f"completions, {updates} update{'s' * (updates > 1)} each",
        ),
        ("tokens", f"at most {most:,} sampled, {config.max_new_tokens} per completion"),
    ]
    if not dry:
        estimate = predict(model_config(config), config, critic=critic, prompt_length=max(lengths))
        lines.append(("memory", _memory(estimate)))
        return _table(lines)
    return [*_table(lines), "", *memory_lines(config)]


def supervised_plan(stage: str, config: SFTConfig | RewardModelConfig, data: DataSplits) -> list[str]:
    """The plan of ``sft`` and ``reward-model``."""
    lengths = _lengths(config, data.train, None)
    longest = min(max(lengths), config.max_sequence_length)
    passes = config.num_steps * config.batch_size / len(data.train)
    estimate = supervised_memory(stage, config, longest)
    return _table(
        [
            ("run", f"{stage} on {config.model_name}, {_trained(config)}, seed {config.seed}"),
            ("data", _rows(data, lengths, "rows")),
            (
                "steps",
                f"{config.num_steps} steps of {config.batch_size} rows, {passes:.3g} passes over the rows",
            ),
            (
                "tokens",
                f"about {round(config.num_steps * config.batch_size * sum(lengths) / len(lengths)):,}",
            ),
            ("memory", _memory(estimate)),
        ]
    )


def supervised_memory(stage: str, config: SFTConfig | RewardModelConfig, longest: int) -> MemoryEstimate:
    """The estimate of a gradient pass over whole rows of ``longest`` tokens: no rollouts, no reference.

    Rows are taken to be prompt for a reward model, whose head is one number wide, and half of them completion in SFT.
    """
    rows = config.batch_size * (1 if stage == "sft" else 2)
    new = max(1, longest // 2) if stage == "sft" else 1
    same = {
        name: getattr(config, name)
        for name in (
            "fine_tune_type",
            "lora_r",
            "lora_layers",
            "optimizer_bits",
            "gradient_checkpointing",
        )
    }
    options = PPOConfig(
        algorithm="reinforce",
        batch_size=rows,
        group_size=1,
        micro_batch_size=min(config.micro_batch_size or rows, rows),
        max_prompt_length=max(1, longest - new),
        max_new_tokens=new,
        reference="none",
        kl_coef=0.0,
        **same,
    )
    whole = predict(model_config(config), options, critic=False)
    return MemoryEstimate(whole.lasting, {name: whole.phases[name] for name in ("gradient pass", "update")})


# Parts of it ---------------------------------------------------------------------------------------------


def _table(lines: Sequence[tuple[str, str]]) -> list[str]:
    return [f"  {label:9s}{text}" for label, text in lines]


def _trained(config: TrainingConfig) -> str:
    if config.fine_tune_type == "full":
        return "every weight trains"
    return f"adapters of rank {config.lora_r} train"


def _rows(data: DataSplits, lengths: Sequence[int], what: str) -> str:
    text = f"{len(data.train):,} {what} of {min(lengths)} to {max(lengths)} tokens"
    if len(lengths) < len(data.train):
        text += f" (by {len(lengths):,} of them)"
    if data.validation is not None:
        text += f", {len(data.validation):,} for validation"
        if data.leaks:
            text += f", of which {data.leaks} have a prompt that is trained on, too"
    return text


def _memory(estimate: MemoryEstimate) -> str:
    return f"about {estimate.peak / GB:.3g} GB at the peak, in the {estimate.phase} (estimated)"


def _lengths(config: TrainingConfig, rows: Any, column: str | None) -> list[int]:
    """Tokens of one column, or of all of a row that is learned from, of up to ``COUNTED_ROWS`` rows."""
    if len(rows) == 0:
        raise DataLoadError(f"{config.train_path or config.dataset_name}: there are no rows to train on")
    tokenizer = load_tokenizer(config)
    stride = max(1, len(rows) // COUNTED_ROWS)
    counted = (rows[i] for i in range(0, len(rows), stride))
    return [_length(tokenizer, row, column) for row in counted]


def _length(tokenizer: Any, row: Mapping[str, Any], column: str | None) -> int:
    names = (column,) if column else ("prompt", "text", "completion", "chosen", "rejected")
    values = {name: row[name] for name in names if row.get(name) is not None}
    counts = {name: _tokens(tokenizer, value, prompt=name == "prompt") for name, value in values.items()}
    answers = [counts.pop(name) for name in ("chosen", "rejected") if name in counts]
    return sum(counts.values()) + max(answers, default=0)


def _tokens(tokenizer: Any, value: Any, *, prompt: bool) -> int:
    if isinstance(value, str):
        return len(encode(tokenizer, value, special=prompt))
    if isinstance(value, Iterable) and all(isinstance(one, int) for one in value):
        return len(list(value))
    return len(encode_prompt(tokenizer, value))
