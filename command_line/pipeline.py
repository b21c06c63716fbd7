"""``pipeline``: SFT, reward model, reinforcement learning, evaluation and fusing from one file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line.config_options import add_override
from command_line.evaluate import BENCHMARKS, EVALUATE
from command_line.parsing import Command, Parser, one_of
from command_line.supervised import REWARD_MODEL, SFT
from command_line.train import TRAIN
from config.declaration import nearest
from config.errors import InvalidConfigurationError, ToolkitError, TrainingRuntimeError

if TYPE_CHECKING:
    from config.files import Setting
    from tools.pipeline import Plan

COMMANDS = {"sft": SFT, "reward_model": REWARD_MODEL, "train": TRAIN, "evaluate": EVALUATE}
STAGES = (*COMMANDS, "fuse")


def _options(parser: Parser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="TOML, YAML or JSON with a heading per stage (docs/pipeline.md)",
    )
    parser.add_argument("--until", type=one_of(STAGES), metavar="STAGE", help="stop after this one")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the file and the settings of each stage, run nothing"
    )


def run(options: argparse.Namespace) -> int:
    """Run what is not done yet."""
    from tools.pipeline import read_plan, run_pipeline

    plan = read_plan(options.config)
    if options.until is not None and options.until not in plan.stages:
        raise InvalidConfigurationError(f"--until: {plan.path} has no [{options.until}]")
    _check(plan)
    if options.dry_run:
        print(f"{plan.path}: {' → '.join(plan.stages)}, in {plan.output_dir}")
        return 0
    run_pipeline(
        plan, lambda stage, settings, folder: run_stage(plan, stage, settings, folder), only=options.until
    )
    print(f"done: {plan.output_dir}")
    return 0


def run_stage(plan: Plan, stage: str, settings: list[Setting], folder: Path) -> None:
    """One stage by its command, as if its settings had been typed.

    Raises:
        ToolkitError: what the command raises, the stage before it.
    """
    try:
        code = _fuse(settings, folder) if stage == "fuse" else _by_command(stage, settings, folder)
    except InvalidConfigurationError as error:
        raise InvalidConfigurationError(_located(plan, stage, str(error))) from error
    except ToolkitError as error:
        raise TrainingRuntimeError(_located(plan, stage, str(error))) from error
    if code:
        raise TrainingRuntimeError(
            f"{plan.path}: [{stage}] failed; the stages before it are done, and stay so"
        )


def _by_command(stage: str, settings: list[Setting], folder: Path) -> int:
    command = COMMANDS[stage]
    named = {one.name: one.value for one in settings}
    words = []
    if stage == "evaluate":
        words = ["--checkpoint", str(named.pop("checkpoint")), "--output-dir", str(folder)]
        words += [word for name in _listed(named.pop("benchmark", [])) for word in ("--benchmark", name)]
        words += [
            word for name in _listed(named.pop("benchmark_data", [])) for word in ("--benchmark-data", name)
        ]
        words += ["--limit", str(named.pop("limit"))] if "limit" in named else []
    else:
        named["output_dir"] = str(folder)
    parsed = command.parser().parse_args(words)
    for name, value in _known(stage, named).items():
        add_override(parsed, name, value)
    return command.run(parsed)


def _listed(value: Any) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def _known(stage: str, named: dict[str, Any]) -> dict[str, Any]:
    """Without the shared settings that this stage has no use for."""
    from config.loader import STAGES as CONFIGS
    from config.options import options_of

    elsewhere = {name for config in CONFIGS for name in options_of(config)}
    mine = set(options_of(config_of(stage)))
    return {name: value for name, value in named.items() if name in mine or name not in elsewhere}


def config_of(stage: str) -> Any:
    """The config class of a stage's command; evaluate reads train's."""
    from config.ppo_config import PPOConfig
    from config.supervised_config import RewardModelConfig, SFTConfig

    return {"sft": SFTConfig, "reward_model": RewardModelConfig}.get(stage, PPOConfig)


def _fuse(settings: list[Setting], folder: Path) -> int:
    from tools.fusing import GGUF_FILE, fuse

    named = {one.name: one.value for one in settings}
    run_folder = Path(named["checkpoint"])
    if (run_folder / "model").is_dir():
        print(f"{run_folder / 'model'} is a whole model already; there is nothing to fuse")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "whole_model.txt").write_text(f"{run_folder / 'model'}\n", encoding="utf-8")
        return 0
    from tools.loading import base_of

    print(
        fuse(
            str(named.get("model_name") or base_of(str(run_folder))),
            str(run_folder),
            folder,
            de_quantize=bool(named.get("de_quantize", False)),
            gguf=GGUF_FILE if named.get("export_gguf") else None,
        )
    )
    return 0


# Checking ------------------------------------------------------------------------------------------------


def _check(plan: Plan) -> None:
    """Every setting of every stage, before the first one runs.

    Raises:
        InvalidConfigurationError: file, line, the name, what was found.
    """
    from config.loader import load_config
    from tools.pipeline import OWN

    configs: dict[str, Any] = {}
    for stage, own in plan.stages.items():
        if stage == "fuse":
            _check_fuse(plan, configs)
            continue
        if stage == "evaluate":
            _check_evaluate(plan)
        _check_data(plan, stage)
        shared = _known(stage, {name: one.value for name, one in plan.shared.items()})
        mine = {name: one.value for name, one in own.items() if name not in OWN.get(stage, set())}
        try:
            loaded = load_config(config_of(stage), overrides=list({**shared, **mine}.items()), environ={})
            configs[stage] = loaded.config
        except InvalidConfigurationError as error:
            raise InvalidConfigurationError(_located(plan, stage, str(error))) from error


def _check_data(plan: Plan, stage: str) -> None:
    """Whether the data are there, so that nobody waits for the stages before to hear that they are not."""
    from data_loading.token_files import prefix_of

    for name in ("train_path", "val_path"):
        one = plan.stages[stage].get(name) or plan.shared.get(name)
        if one is None or not isinstance(one.value, str) or prefix_of(one.value) is not None:
            continue
        if not Path(one.value).expanduser().exists():
            raise InvalidConfigurationError(
                f'{plan.place(one)}: [{stage}] {name}: there is no file or folder "{one.value}"; check the path'
            )


def _check_evaluate(plan: Plan) -> None:
    """Its benchmarks: their names, their rows, and how many of these."""
    from command_line.benchmarks import check_benchmarks

    own = plan.stages["evaluate"]
    values = {name: own[name].value for name in ("benchmark", "benchmark_data", "limit") if name in own}
    names, limit = _listed(values.get("benchmark", [])), values.get("limit")
    for name in names:
        if name not in BENCHMARKS:
            raise InvalidConfigurationError(
                f"{plan.place(own['benchmark'])}: [evaluate] benchmark: one of {', '.join(BENCHMARKS)} is expected, "
                f"found {name!r}{nearest(name, BENCHMARKS)}"
            )
    if limit is not None and type(limit) is not int:
        raise InvalidConfigurationError(
            f"{plan.place(own['limit'])}: [evaluate] limit: a whole number is expected, found {limit!r}"
        )
    try:
        check_benchmarks(names, _listed(values.get("benchmark_data", [])), limit)
    except ToolkitError as error:
        raise InvalidConfigurationError(f"{plan.path}: [evaluate] {error}") from error


def _check_fuse(plan: Plan, configs: dict[str, Any]) -> None:
    """Its settings, and whether what the stages before it leave can be fused; ``configs`` are theirs."""
    from tools.fusing import GGUF_FILE, check_gguf
    from tools.loading import is_quantized
    from tools.pipeline import OWN

    own = plan.stages["fuse"]
    for name, one in own.items():
        if name not in OWN["fuse"] | {"model_name"}:
            raise InvalidConfigurationError(
                f"{plan.place(one)}: [fuse] has no {name}; {', '.join(sorted(OWN['fuse']))} are expected"
            )
        if name in OWN["fuse"] and not isinstance(one.value, bool):
            raise InvalidConfigurationError(
                f"{plan.place(one)}: [fuse] {name}: true or false is expected, found {one.value!r}"
            )
    trained = [stage for stage in ("sft", "train") if stage in configs]
    for stage in trained:
        if configs[stage].soft_prompt_length != 0:
            raise InvalidConfigurationError(
                f"{plan.path}: [fuse] [{stage}] trains a soft prompt, which is no part of any weight, so there is "
                "nothing to fuse; leave [fuse] out: generate, chat and train take the adapter by --adapter-path"
            )
    if "export_gguf" in own and own["export_gguf"].value:
        first = configs[trained[0]]
        packed = first.quantize_base is not None or is_quantized(first.model_name)
        unpacked = "de_quantize" in own and own["de_quantize"].value
        try:
            check_gguf(first.model_name, GGUF_FILE, packed and not unpacked)
        except ToolkitError as error:
            raise InvalidConfigurationError(f"{plan.place(own['export_gguf'])}: [fuse] {error}") from error


def _located(plan: Plan, stage: str, sentence: str) -> str:
    """A command's sentence with the line of the option that it begins with, in place of a flag."""
    for name, one in {**plan.shared, **plan.stages[stage]}.items():
        flag = f"command line --{name.replace('_', '-')}"
        if flag in sentence:
            return sentence.replace(flag, f"{plan.place(one)}: [{stage}] {name}")
    return f"{plan.path}: [{stage}] {sentence}"


PIPELINE = Command(
    "pipeline",
    "SFT, reward model, reinforcement learning, evaluation and fusing from one file",
    _options,
    run,
    ["pipeline --config pipeline.toml --dry-run", "pipeline --config pipeline.toml"],
)
