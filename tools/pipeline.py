"""One file from a base model to a fused one: SFT → reward model → PPO or GRPO → evaluation → fuse.

The file has a heading for each stage that is wanted, with the options of that stage's command under it, and
``[pipeline]`` with what they share. Each stage begins from what the ones before it left:

    sft            from the base
    reward_model   from the base with the SFT adapter (or the SFT model)
    train          the same; its reward is the learned one where there is one and the file names no other
    evaluate       what train left
    fuse           base and last adapter as one model
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from base_setup.lora_setup import DESCRIPTION, WEIGHTS
from checkpointing.resuming import LATEST
from config.errors import CheckpointError, InvalidConfigurationError
from config.files import Setting, read_settings
from config.loader import STAGES as CONFIGS
from config.options import options_of
from models.sft_model import EMBEDDED
from monitoring.run_lock import RunLock, is_running
from tools.stage_folders import (
    begin,
    contents,
    inputs_hash,
    inputs_of,
    is_begun,
    is_complete,
    set_aside,
    stamp,
)

STAGES = ("sft", "reward_model", "train", "evaluate", "fuse")
#: Those that have checkpoints: interrupted, they go on. The others begin anew.
RESUMED = ("sft", "reward_model", "train")
SHARED = "pipeline"
#: Options of the stages that have no config class.
OWN = {"evaluate": {"benchmark", "benchmark_data", "limit"}, "fuse": {"de_quantize", "export_gguf"}}
#: Options that name files: a stage is done again when what is in them changes.
FILES = ("train_path", "val_path", "adapter_path", "reference_path", "model_name")
#: Options on which no result depends: a stage is done, or goes on, whatever they are now.
HOW = frozenset(
    {
        "save_every",
        "keep_last_n",
        "keep_best",
        "min_free_gb",
        "resume_fallback",
        "verbose",
        "prefetch_batches",
        "max_memory_gb",
    }
)

#: Carries out one stage with these settings, (name, value, place) each, in a folder.
Runner = Callable[[str, list[Setting], Path], None]


@dataclass(frozen=True)
class Plan:
    """The stages of a file, in order, each with its settings.

    Attributes:
        shared: settings of all stages. path: of the file, for sentences.
    """

    path: Path
    output_dir: Path
    shared: dict[str, Setting] = field(default_factory=dict)
    stages: dict[str, dict[str, Setting]] = field(default_factory=dict)

    def place(self, setting: Setting) -> str:
        """``file:line``."""
        return f"{self.path}:{setting.line}" if setting.line is not None else str(self.path)


def read_plan(path: str | Path) -> Plan:
    """The stages that a file asks for.

    Raises:
        InvalidConfigurationError: a heading that is no stage, a setting outside of them, no stage at all.
    """
    file = Path(path).expanduser()
    nested = {name for config in CONFIGS for name, one in options_of(config).items() if one.is_nested}
    stages: dict[str, dict[str, Setting]] = {}
    for one in read_settings(file, lambda name: name.replace("-", "_") in nested):
        heading = one.headings[0].replace("-", "_") if one.headings else ""
        place = f"{file}:{one.line}" if one.line is not None else str(file)
        if heading not in (SHARED, *STAGES):
            raise InvalidConfigurationError(
                f"{place}: {one.name} stands under [{heading}], and one of [{'], ['.join((SHARED, *STAGES))}] is "
                "expected"
            )
        stages.setdefault(heading, {})[one.name.replace("-", "_")] = one
    for one in read_settings(file, lambda name: True):  # a heading with nothing under it is a stage, too
        if isinstance(one.value, dict) and not one.value and one.name.replace("-", "_") in STAGES:
            stages.setdefault(one.name.replace("-", "_"), {})
    shared = stages.pop(SHARED, {})
    output = shared.pop("output_dir", None)
    if output is None or not isinstance(output.value, str):
        raise InvalidConfigurationError(
            f"{file}: [{SHARED}] has no output_dir; name the folder for all stages"
        )
    if not stages:
        raise InvalidConfigurationError(f"{file}: there is no stage; add a heading such as [sft] or [train]")
    for stage, settings in stages.items():
        for name in ("output_dir", "resume"):
            if name in settings:
                raise InvalidConfigurationError(
                    f"{file}:{settings[name].line}: {name} is the pipeline's own; leave it out of [{stage}]"
                )
    ordered = {stage: stages[stage] for stage in STAGES if stage in stages}
    if "evaluate" in ordered and not {"train", "sft"} & ordered.keys():
        raise InvalidConfigurationError(
            f"{file}: [evaluate] needs [train] or [sft], of which there is neither"
        )
    if "fuse" in ordered and not {"train", "sft"} & ordered.keys():
        raise InvalidConfigurationError(f"{file}: [fuse] needs [train] or [sft], of which there is neither")
    return Plan(file, Path(output.value).expanduser(), shared, ordered)


def run_pipeline(
    plan: Plan, run_stage: Runner, *, only: str | None = None, say: Callable[[str], None] = print
) -> None:
    """Carry out what is not done yet, in order.

    Args:
        run_stage: does the work of one stage. only: stop after this stage.
    Raises:
        CheckpointError: another pipeline, or another run of a stage, is at work in these folders.
    """
    plan.output_dir.mkdir(parents=True, exist_ok=True)
    lock = RunLock(plan.output_dir)
    lock.acquire()
    try:
        _run_stages(plan, run_stage, only, say)
    finally:
        lock.release()


def _run_stages(plan: Plan, run_stage: Runner, only: str | None, say: Callable[[str], None]) -> None:
    for number, stage in enumerate(plan.stages, start=1):
        folder = plan.output_dir / stage
        settings = list(settings_of(plan, stage))
        inputs = inputs_hash(_inputs(settings))
        title = f"── {number}/{len(plan.stages)} {stage}"
        if is_complete(folder, inputs):
            say(f"{title}: done already, in {folder}")
        else:
            if stage in RESUMED and is_begun(folder, inputs):
                say(f"{title}: interrupted, goes on in {folder}")
                settings.append(Setting((stage,), "resume", LATEST, None))
            else:
                if is_running(folder):  # it would go on writing, into what is made anew here
                    raise CheckpointError(
                        f'"{folder}" is in use by a run that is still going; wait for it, or stop it'
                    )
                old = set_aside(folder)
                say(title + (f" (what was in {folder} is in {old} now)" if old is not None else ""))
                if stage in RESUMED:
                    begin(folder, inputs)
            run_stage(stage, settings, folder)
            stamp(folder, inputs)
            _forget()
        if stage == only:
            return


def settings_of(plan: Plan, stage: str) -> Iterator[Setting]:
    """What a stage is run with: shared settings that it has, what the stages before it left, its own."""
    own, shared = plan.stages[stage], plan.shared
    derived = dict(_derived(plan, stage))
    names = {**shared, **derived, **own}
    yield from (one._replace(name=name) for name, one in names.items())


def _derived(plan: Plan, stage: str) -> Iterator[tuple[str, Setting]]:
    """Model, adapter, reward and checkpoint as the stages before this one leave them."""

    def made(name: str, value: Any) -> tuple[str, Setting]:
        return name, Setting((stage,), name, value, None)

    before = [one for one in ("sft", "train") if one in plan.stages and one != stage]
    if stage in ("reward_model", "train") and "sft" in plan.stages:
        yield from (made(name, value) for name, value in _weights(plan, "sft").items())
    if stage == "train" and "reward_model" in plan.stages and "rewards" not in plan.stages["train"]:
        yield made("rewards", [f"learned:{plan.output_dir / 'reward_model' / 'final'}"])
    if stage in ("evaluate", "fuse"):
        yield made("checkpoint", str(plan.output_dir / before[-1]))
        yield made("model_name", _base(plan, before[-1]))


def _weights(plan: Plan, stage: str) -> dict[str, str]:
    """``model_name`` and, for an adapter, ``adapter_path`` that a finished stage stands for."""
    folder = plan.output_dir / stage
    if (folder / "model").is_dir():
        return {"model_name": str(folder / "model")}
    return {"model_name": _base(plan, stage), "adapter_path": str(folder / "final")}


def _base(plan: Plan, stage: str) -> str:
    """The model that the adapter of a finished stage was trained on."""
    base = plan.output_dir / stage / "final" / "base"  # quantised or grown on loading, or made on the spot
    if base.is_dir():
        return str(base)
    named = plan.stages[stage].get("model_name")
    if named is None and stage == "train" and "sft" in plan.stages:
        return _weights(plan, "sft")["model_name"]
    named = named or plan.shared.get("model_name")
    return str(named.value) if named is not None else EMBEDDED


def _inputs(settings: list[Setting]) -> dict[str, Any]:
    """Settings by name, those that name files with what is in them."""
    inputs: dict[str, Any] = {one.name: one.value for one in settings if one.name not in HOW}
    files = {name: contents(inputs[name]) for name in FILES if isinstance(inputs.get(name), str)}
    files["benchmark_data"] = [
        contents(one.partition("=")[2]) for one in _texts(inputs.get("benchmark_data"))
    ]
    rewards = [_reward_contents(name) for name in _texts(inputs.get("rewards"))]
    checkpoint = inputs.get("checkpoint")
    if isinstance(checkpoint, str):
        weights = [
            Path(checkpoint) / "final" / WEIGHTS,
            Path(checkpoint) / "final" / DESCRIPTION,
            Path(checkpoint) / "model",
        ]
        # Evaluation goes by the rewards that the run wrote down, so the weights alone are not all it is made from.
        files["checkpoint"] = [inputs_of(Path(checkpoint)), *(contents(one) for one in weights)]
    return {"settings": inputs, "files": files, "rewards": rewards}


def _reward_contents(name: str) -> Any:
    """What is in the folder or the Python file that a reward is read from; its name for one of the package."""
    if name.startswith("learned:"):
        return contents(name.removeprefix("learned:"))
    file, colon, _ = name.rpartition(":")
    return contents(file) if colon and file.endswith(".py") else name


def _texts(value: Any) -> list[str]:
    parts = value if isinstance(value, list) else [value]
    return [str(part.get("name") if isinstance(part, dict) else part) for part in parts if part]


def _forget() -> None:
    """Give back a stage's memory before the next one takes its own."""
    import mlx.core as mx

    gc.collect()
    mx.clear_cache()
