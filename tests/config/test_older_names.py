"""What the files and flags of older systems become: by hand, setting by setting, and nothing dropped in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from config.errors import InvalidConfigurationError
from config.loader import Loaded, load_config
from config.older.names import Renamed
from config.older.systems import SYSTEMS, find_system, older_flags
from config.options import options_of
from config.ppo_config import PPOConfig
from config.supervised_config import PreferenceConfig, RewardModelConfig, SFTConfig
from ppo_trainer.algorithms import find_algorithm
from ppo_trainer.resolution import resolve_config

FILES = Path(__file__).with_name("files")
STAGES = (PPOConfig, SFTConfig, RewardModelConfig, PreferenceConfig)


def load(system: str | None = None, cls: Any = PPOConfig, **theirs: Any) -> Loaded[Any]:
    return load_config(cls, environ={}, older=system, overrides=list(theirs.items()))


def given(loaded: Loaded[Any]) -> dict[str, Any]:
    """What the flags or the file set, the system's own defaults left out."""
    return {
        name: getattr(loaded.config, name)
        for name, origin in loaded.origins.items()
        if origin.kind in ("file", "command line")
    }


# MLX RL Trainer ------------------------------------------------------------------------------------------


def test_the_documented_yaml_of_mlx_rl_trainer_loads_as_it_is() -> None:
    loaded = load_config(PPOConfig, files=FILES / "mlx_rl_trainer.yaml", environ={})
    found = given(loaded)
    rewards, seed = found.pop("rewards"), found.pop("seed")
    assert found == {
        "algorithm": "grpo",
        "surrogate": "unclipped",
        "output_dir": "./outputs/full_finetune_run_01",
        "num_steps": 2500,
        "save_every": 500,
        "keep_last_n": 3,
        "learning_rate": 1e-5,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.01,
        "lr_schedule": "cosine",
        "lr_decay_steps": 1000,
        "lr_end": 1e-6,
        "warmup_steps": 250,
        "batch_size": 8,  # 1 prompt per pass × 8 passes
        "micro_batch_size": 1,
        "group_size": 2,
        "kl_coef": 0.0015,
        "model_name": "/path/to/model",
        "reference_path": "/path/to/reference/model",
        "fine_tune_type": "full",
        "train_path": "/path/to/train.jsonl",
        "max_prompt_length": 150,
        "prompt_overflow": "keep_end",
        "max_new_tokens": 128,
        "shuffle_data": True,
        "log_samples_every": 1,
        "max_logged_samples": 50,
    }
    assert [(one["name"], one["weight"]) for one in rewards] == [
        ("format_structure", 0.05),
        ("thinking_quality", 0.2),
        ("answer_quality", 0.1),
        ("semantic_similarity", 0.65),
    ]
    assert rewards[1]["config"]["excessive_length_threshold"] == 120
    assert 0 <= seed < 1 << 31
    resolve_config(loaded.config, find_algorithm("grpo"))


def test_what_that_yaml_asks_for_and_is_not_there_is_said_and_refused_if_strict() -> None:
    file = FILES / "mlx_rl_trainer.yaml"
    notes = load_config(PPOConfig, files=file, environ={}).notes
    loud = [note for note in notes if note.startswith("WARNING: ")]
    for names in (
        "num_rollout_samples: a group of 1",
        "use_dual_gradients, thinking_layer_start, thinking_layer_end, answer_layer_start, answer_layer_end, "
        "answer_gradient_weight: gradients",
        "use_sft_on_answer, sft_mode: a supervised loss",
        "bias_close_think, bias_answer_start, punish_extra_think_end, min_think_tokens, think_end_early_bias: biases",
    ):
        assert sum(names in note for note in loud) == 1
    assert len(loud) == 4
    for names in ("use_wandb, wandb_project: ", "checkpoint_dir: ", "seed: -1 asks"):
        assert sum(names in note and note not in loud for note in notes) == 1
    with pytest.raises(InvalidConfigurationError, match=r"mlx_rl_trainer\.yaml:31: use_dual_gradients"):
        load_config(PPOConfig, files=file, environ={}, strict=True)


def test_no_setting_of_that_yaml_disappears(tmp_path: Path) -> None:
    """Each becomes one of ours, or is named in a note, unless it is switched off."""
    import yaml

    content = yaml.safe_load((FILES / "mlx_rl_trainer.yaml").read_text(encoding="utf-8"))
    loaded = load_config(PPOConfig, files=FILES / "mlx_rl_trainer.yaml", environ={})
    said = " ".join([*loaded.notes, *(str(origin) for origin in loaded.origins.values())])
    names = {name for heading in content.values() if isinstance(heading, dict) for name in heading}
    unsaid = {name for name in names if name not in said and name not in given(loaded)}
    # The tags are the usual ones; nothing is saved of an optimiser, as asked for.
    assert unsaid == {"think_start_tag", "think_end_tag", "save_optimizer_state"}


def test_its_ppo_is_clipped_as_ours_is(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("trainer:\n  algorithm: ppo\n  grpo_beta: 0.1\n", encoding="utf-8")
    config = load_config(PPOConfig, files=file, environ={}).config
    assert resolve_config(config, find_algorithm("ppo")).surrogate == "clipped"


def test_a_schedule_says_all_of_itself(tmp_path: Path) -> None:
    """Of its default (preset) nothing is left: 100 steps to 0, no warm-up."""
    given_ = '{"name": "cosine_decay", "arguments": [2e-5, 100]}'
    config = load("mlx-grpo", lr_schedule_config=given_).config
    assert (config.lr_schedule, config.learning_rate, config.lr_decay_steps) == ("cosine", 2e-5, 100)
    assert (config.lr_end, config.warmup_steps) == (0.0, 0)


def test_other_tags_are_not_lost(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text('trainer:\n  algorithm: grpo\ngeneration:\n  think_start_tag: "<t>"\n', encoding="utf-8")
    notes = load_config(PPOConfig, files=file, environ={}).notes
    assert any(note.startswith("WARNING") and "think_start_tag" in note and "<t>" in note for note in notes)


# mlx-grpo ------------------------------------------------------------------------------------------------


def test_the_documented_flags_of_mlx_grpo() -> None:
    loaded = load(
        "mlx-grpo",
        output_dir="./output_model",
        model_path="./base_model",
        train_dataset_path="./data/train.jsonl",
        val_dataset_path="./data/valid.jsonl",
        num_training_steps="10000",
        reward_content_type="math_eval",
        reward_format_weight="0.4",
        reward_content_weight="0.6",
    )
    assert given(loaded) == {
        "output_dir": "./output_model",
        "model_name": "./base_model",
        "train_path": "./data/train.jsonl",
        "val_path": "./data/valid.jsonl",
        "num_steps": 10000,
        "rewards": [{"name": "format", "weight": 0.4}, {"name": "math_eval", "weight": 0.6}],
    }
    # Its own defaults hold for the rest.
    assert (loaded.config.kl_coef, loaded.config.advantage_epsilon, loaded.config.max_prompt_length) == (
        0.15,
        1e-8,
        100,
    )
    assert str(loaded.origins["kl_coef"]) == "mlx-grpo's default (preset mlx_grpo)"


def test_the_further_flags_of_mlx_grpo() -> None:
    loaded = load(
        "mlx-grpo",
        ppo_batch_size="3",
        grad_accum_steps="4",
        num_rollout_samples="5",
        lr_schedule_config='{"name": "linear_schedule", "arguments": [3e-5, 1e-7, 500], "warmup": 10}',
        grad_clip_norm="0",
        grpo_beta="0.15",
        sampling_temperature="0.8",
        sampling_top_p="0.9",
        max_prompt_len="100",
        use_grad_checkpointing=True,
        answer_start_tag="<a>",
        kv_bits="4",
        seed="-1",
    )
    tags = {
        "think_start": "<think>",
        "think_end": "</think>",
        "answer_start": "<a>",
        "answer_end": "</answer>",
    }
    found = given(loaded)
    assert 0 <= found.pop("seed") < 1 << 31
    assert found == {
        "batch_size": 12,
        "micro_batch_size": 15,  # 3 prompts × 5 completions
        "group_size": 5,
        "learning_rate": 3e-5,
        "lr_schedule": "linear",
        "lr_end": 1e-7,
        "lr_decay_steps": 500,
        "warmup_steps": 10,
        "max_grad_norm": None,
        "kl_coef": 0.15,
        "temperature": 0.8,
        "top_p": 0.9,
        "importance_correction": "token_truncate",
        "max_prompt_length": 100,
        "prompt_overflow": "keep_end",
        "gradient_checkpointing": True,
        "rewards": [
            {"name": "format", "weight": 0.5, "config": {"tags": tags}},
            {"name": "jaccard", "weight": 0.5, "config": {"tags": tags}},
        ],
    }
    assert any("WARNING: command line --kv-bits: kv_bits" in note for note in loaded.notes)


# MLX-GRPO (GSM8K) ----------------------------------------------------------------------------------------

FIELDS = """\
model_name = "some/model"
output_dir = "outputs/a"
run_name = "b"
learning_rate = 2e-6
batch_size = 2
gradient_accumulation_steps = 3
num_epochs = 2
max_train_samples = 0
warmup_ratio = 0.2
max_grad_norm = 0.3
logging_steps = 1
num_generations = 16
max_prompt_length = 500
max_completion_length = 1024
max_new_tokens = 256
temperature = 0.6
clip_eps = 0.1
kl_coeff = 0.02
adam_beta1 = 0.8
adam_beta2 = 0.9
weight_decay = 0.1
lr_scheduler_type = "linear"
save_steps = 100
eval_steps = 50
eval_samples = 200
seed = 3
use_compile = true
quantize_for_rollouts = false
eval_every_updates = 25
eval_subset_size = 200
eval_max_new_tokens = 128
log_jsonl = true
"""


@pytest.mark.parametrize("head", ["", "[mlx_grpo]\n"], ids=["flat", "in its table"])
def test_the_toml_fields_of_mlx_grpo(tmp_path: Path, head: str) -> None:
    file = tmp_path / "prod.toml"
    file.write_text(head + FIELDS, encoding="utf-8")
    loaded = load_config(PPOConfig, files=file, environ={}, overrides=["max_samples=7"])
    assert given(loaded) == {
        "model_name": "some/model",
        "output_dir": "outputs/a/b",
        "learning_rate": 2e-6,
        "batch_size": 6,
        "micro_batch_size": 32,
        "num_epochs": 2,
        "max_samples": 7,  # the command line's
        "warmup_ratio": 0.2,
        "max_grad_norm": 0.3,
        "group_size": 16,
        "max_prompt_length": 500,
        "max_new_tokens": 256,
        "temperature": 0.6,
        "clip_epsilon": 0.1,
        "kl_coef": 0.02,
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "weight_decay": 0.1,
        "lr_schedule": "linear",
        "seed": 3,
        "quantize_for_rollouts": False,
        "save_every": 100,
    }
    assert not any(note.startswith("WARNING") for note in loaded.notes)
    # Every field of the file is ours now, or in a note.
    said = " ".join([*loaded.notes, *(str(origin) for origin in loaded.origins.values())])
    names = [line.split(" = ")[0] for line in FIELDS.splitlines()]
    assert [name for name in names if name not in said and name not in given(loaded)] == ["max_train_samples"]


def test_a_short_file_of_mlx_grpo_takes_that_systems_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[mlx_grpo]\nnum_generations = 4\nbatch_size = 2\n", encoding="utf-8")
    config = load_config(PPOConfig, files=file, environ={}).config
    assert (config.group_size, config.batch_size) == (4, 8)  # 2 × its 4 accumulated passes
    assert (config.algorithm, config.temperature, config.prompt_column) == ("grpo", 0.7, "question")
    assert config.rewards == ["correctness", "int", "soft_format", "strict_format", "xmlcount"]


# mlx-rlhf ------------------------------------------------------------------------------------------------


def test_the_documented_run_of_mlx_rlhf() -> None:
    loaded = load(
        "mlx-rlhf",
        model="andrewsilva/increasing_even_digit_fine_tune",
        ground_truth_reward=True,
        batch_size="32",
        mini_batch_size="32",
        ppo_epochs="4",
        num_steps="500",
        adap_kl_ctrl="True",
        init_kl_coef="0.2",
        seed="7",
        log_with="wandb",
    )
    assert given(loaded) == {
        "model_name": "andrewsilva/increasing_even_digit_fine_tune",
        "rewards": ["sequential_digits"],
        "batch_size": 32,
        "minibatch_size": 32,
        "micro_batch_size": 32,
        "num_epochs_per_rollout": 4,
        "num_steps": 500,
        "kl_target": 6.0,
        "kl_coef": 0.2,
        "seed": 7,
    }
    assert (loaded.config.gamma, loaded.config.lam, loaded.config.value_network) == (1.0, 0.95, "shared")
    resolve_config(loaded.config, find_algorithm("ppo"))


def test_the_ppo_options_of_mlx_rlhf() -> None:
    found = given(
        load(
            "mlx-rlhf",
            batch_size="16",
            mini_batch_size="4",
            gradient_accumulation_steps="2",
            adap_kl_ctrl="False",
            kl_penalty="full",
            cliprange="0.1",
            cliprange_value="0.3",
            early_stopping=True,
            target_kl="2",
            use_score_scaling=True,
            use_score_norm=True,
            reward_model="rm",
            score_clip="5",
        )
    )
    assert found == {
        "batch_size": 16,
        "minibatch_size": 8,
        "micro_batch_size": 4,
        "kl_target": None,
        "kl_estimator": "full",
        "allow_biased_kl": True,
        "clip_epsilon": 0.1,
        "clip_range_value": 0.3,
        "target_kl": 3.0,  # it stops at 1.5 × the target
        "score_scaling": "norm",
        "rewards": ["learned:rm"],
        "score_clip": 5.0,
    }
    with pytest.raises(
        InvalidConfigurationError, match=r"batch_size: a batch_size \(10\) that mini_batch_size"
    ):
        load("mlx-rlhf", batch_size="10", mini_batch_size="4")


def test_the_flags_of_its_sft() -> None:
    loaded = load(
        "mlx-rlhf",
        SFTConfig,
        model="m",
        data="data/",
        data_base="increasing_mult_2_",
        iters="600",
        batch_size="2",
    )
    assert given(loaded) == {
        "model_name": "m",
        "train_path": "data/increasing_mult_2_train.jsonl",
        "val_path": "data/increasing_mult_2_valid.jsonl",
        "num_steps": 600,
        "batch_size": 2,
    }
    assert loaded.config.learning_rate == SFTConfig().learning_rate  # the preset is that of its RL


# TRL, mlx-lm ---------------------------------------------------------------------------------------------


def test_trls_names(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "model_name_or_path: m\nnum_generations: 8\nmax_completion_length: 512\nbeta: 0.04\nepsilon: 0.1\n"
        "epsilon_high: 0.3\nloss_type: dr_grpo\nscale_rewards: false\nnum_iterations: 2\n"
        "per_device_train_batch_size: 4\ngradient_accumulation_steps: 8\nlearning_rate: 1e-6\n"
        "reward_funcs: [jaccard]\nmax_steps: -1\nnum_train_epochs: 3\nreport_to: wandb\n",
        encoding="utf-8",
    )
    loaded = load_config(PPOConfig, files=file, environ={})
    assert given(loaded) == {
        "model_name": "m",
        "group_size": 8,
        "max_new_tokens": 512,
        "kl_coef": 0.04,
        "clip_epsilon": 0.1,
        "clip_epsilon_high": 0.3,
        "algorithm": "dr_grpo",
        "scale_rewards": "none",
        "num_epochs_per_rollout": 2,
        "batch_size": 4,  # 4 completions × 8 passes / 8 per prompt
        "micro_batch_size": 4,
        "learning_rate": 1e-6,
        "rewards": ["jaccard"],
        "num_steps": None,
        "num_epochs": 3,
    }


def test_mlx_lms_yaml(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "model: m\ntrain: true\ndata: d\niters: 100\nnum_layers: 16\nbatch_size: 4\nmax_seq_length: 2048\n"
        "lora_parameters: {rank: 8, scale: 20.0, dropout: 0.05}\ngrad_checkpoint: false\nadapter_path: out\n"
        "lr_schedule: {name: cosine_decay, warmup: 10, arguments: [1e-5, 1000, 1e-7]}\nseed: 3\n",
        encoding="utf-8",
    )
    assert given(load_config(SFTConfig, files=file, environ={})) == {
        "model_name": "m",
        "train_path": "d",
        "num_steps": 100,
        "lora_layers": 16,
        "batch_size": 4,
        "max_sequence_length": 2048,
        "lora_r": 8,
        "lora_alpha": 160.0,  # scale · rank
        "lora_dropout": 0.05,
        "gradient_checkpointing": False,
        "output_dir": "out",
        "lr_schedule": "cosine",
        "learning_rate": 1e-5,
        "lr_decay_steps": 1000,
        "lr_end": 1e-7,
        "warmup_steps": 10,
        "seed": 3,
    }


# TRL's preference trainers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"beta": "0.2", "loss_type": "sigmoid"}, {"preference_beta": 0.2}),
        (
            {"loss_type": "['ipo']".replace("'", '"'), "beta": "0.1"},
            {"algorithm": "ipo", "preference_beta": 0.1},
        ),
        ({"reference_free": "true"}, {"algorithm": "cpo", "nll_weight": 0.0}),
        (
            {"algorithm": "kto", "desirable_weight": "1.3", "undesirable_weight": "0.7"},
            {"algorithm": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.7},
        ),
        ({"algorithm": "orpo", "beta": "0.1"}, {"algorithm": "orpo", "preference_beta": 0.1}),
        ({"cpo_alpha": "0.5", "loss_type": "sigmoid"}, {"algorithm": "cpo", "nll_weight": 0.5}),
        (
            {"loss_type": "simpo", "cpo_alpha": "0", "simpo_gamma": "0.7", "beta": "2.5"},
            {"algorithm": "simpo", "target_margin": 0.7, "preference_beta": 2.5},
        ),
        (
            {"loss_type": "simpo", "cpo_alpha": "0"},  # TRL's own defaults, which are not the paper's
            {"algorithm": "simpo", "target_margin": 0.5, "preference_beta": 0.1},
        ),
        (
            {"per_device_train_batch_size": "2", "gradient_accumulation_steps": "8", "max_steps": "50"},
            {"batch_size": 16, "micro_batch_size": 2, "num_steps": 50},
        ),
        (
            {"use_peft": "true", "load_in_4bit": "true", "disable_dropout": "true", "max_length": "256"},
            {"fine_tune_type": "lora", "quantize_base": 4, "lora_dropout": 0.0, "max_sequence_length": 256},
        ),
        ({"label_smoothing": "0.1", "use_dora": "true"}, {"label_smoothing": 0.1, "fine_tune_type": "dora"}),
    ],
)
def test_flags_of_trls_preference_trainers(flags: dict[str, str], expected: dict[str, Any]) -> None:
    assert given(load("trl", PreferenceConfig, **flags)) == expected


def test_what_they_have_and_preference_has_not_is_said() -> None:
    def notes(**flags: Any) -> str:
        return " ".join(load("trl", PreferenceConfig, **flags).notes)

    assert "WARNING: command line --rpo-alpha: rpo_alpha: a loss beside DPO's is not there" in notes(
        rpo_alpha="1"
    )
    assert "WARNING: command line --num-train-epochs" in notes(num_train_epochs="3")
    assert "WARNING: command line --cpo-alpha: cpo_alpha: the answer's own" in notes(
        loss_type="simpo", cpo_alpha="1"
    )
    assert "no row is cut here" in notes(max_prompt_length="512")
    assert "β is another one" in notes(loss_type="ipo")
    assert "averages" not in notes(loss_type="sigmoid")
    with pytest.raises(
        InvalidConfigurationError, match=r"loss_type: one of sigmoid, .* is expected, found \W*hinge"
    ):
        load("trl", PreferenceConfig, loss_type="hinge")
    with pytest.raises(
        InvalidConfigurationError, match='"trl-preference" has names for PreferenceConfig alone'
    ):
        load("trl-preference", PPOConfig, beta="0.1")


def test_a_file_for_dpo_is_recognised_where_preferences_are_learned(tmp_path: Path) -> None:
    file = tmp_path / "dpo.yaml"
    file.write_text("model_name_or_path: m\nbeta: 0.3\nloss_type: ipo\nrun_name: r\n", encoding="utf-8")
    loaded = load_config(PreferenceConfig, files=file, environ={})
    assert given(loaded) == {"model_name": "m", "algorithm": "ipo", "preference_beta": 0.3}
    file.write_text("model_name_or_path: m\nbeta: 0.3\nnum_generations: 4\n", encoding="utf-8")
    assert load_config(PPOConfig, files=file, environ={}).config.kl_coef == 0.3


# The tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_name_of_a_table_leads_somewhere(system: str) -> None:
    ours = {name for stage in STAGES for name in options_of(stage)}
    for name, meaning in SYSTEMS[system].settings.items():
        if isinstance(meaning, Renamed):
            assert meaning.ours in ours, name
        assert name == name.lower().replace("-", "_")
    for name, flag in older_flags(system).items():
        assert find_system(system).knows(name) or name in ours, name
        assert flag.meaning


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(
    "value", ["", "x", -1, 10**400, float("nan"), [], [None], {}, {"name": 3}, True, None]
)
def test_nonsense_gives_a_config_or_a_sentence(system: str, value: Any) -> None:
    for name in SYSTEMS[system].settings:
        for found in (value, str(value)[:20]):
            try:
                load(system, PreferenceConfig if SYSTEMS[system].stage else PPOConfig, **{name: found})
            except InvalidConfigurationError as error:
                assert "command line" in str(error) or "(" in str(error)  # noqa: PT017


def test_ours_and_theirs_for_one_option_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("beta: 0.1\nkl_coef: 0.2\n", encoding="utf-8")
    with pytest.raises(InvalidConfigurationError, match=r"sets kl_coef, which .* sets too"):
        load_config(PPOConfig, files=file, environ={})


def test_a_supervised_stage_has_rows_and_no_groups() -> None:
    """8 rows a pass × 2 passes are 16 rows a step; TRL's default of 8 completions to a prompt is GRPO's alone."""
    theirs = {"per_device_train_batch_size": "8", "gradient_accumulation_steps": "2"}
    for cls in (SFTConfig, RewardModelConfig, PreferenceConfig):
        config = load("trl", cls, **theirs).config
        assert (config.batch_size, config.micro_batch_size) == (16, 8)
    assert load("mlx-grpo-gsm8k", SFTConfig, batch_size="2").config.micro_batch_size == 2
    config = load("trl", **theirs).config  # its PPO has no groups either
    assert (config.batch_size, config.micro_batch_size, config.group_size) == (16, 8, 1)
    assert load("trl", **theirs, loss_type="grpo").config.batch_size == 2  # 16 completions, 8 to a prompt


def test_half_a_group_is_refused() -> None:
    with pytest.raises(InvalidConfigurationError, match=r"whole groups \(.* = 6 completions, .* = 4\)"):
        load("trl", per_device_train_batch_size="6", num_generations="4")


def test_what_an_mlx_lm_file_leaves_out_is_mlx_lms_where_it_counts_together() -> None:
    """Its batch is 4 rows and its rank 8: 2 passes are 8 rows, and a scale of 20 is alpha 160 over 8."""
    assert load("mlx-lm", SFTConfig, grad_accumulation_steps="2").config.batch_size == 8
    config = load("mlx-lm", SFTConfig, lora_parameters='{"scale": 20.0}').config
    assert (config.lora_r, config.lora_alpha, config.lora_scale) == (8, 160.0, 20.0)


@pytest.mark.parametrize(("value", "learned"), [("false", "text"), ("true", "completion")])
def test_mlx_lms_mask_prompt_says_what_is_learned(value: str, learned: str) -> None:
    assert load("mlx-lm", SFTConfig, mask_prompt=value).config.loss_on == learned


def test_validations_of_a_supervised_stage_are_kept() -> None:
    for system in ("mlx-lm", "mlx-rlhf"):
        assert load(system, SFTConfig, steps_per_eval="200").config.eval_every == 200


def test_another_optimiser_is_said_loudly() -> None:
    assert not any(n.startswith("WARNING") for n in load("mlx-lm", SFTConfig, optimizer="adamw").notes)
    (loud,) = (n for n in load("mlx-lm", SFTConfig, optimizer="sgd").notes if n.startswith("WARNING"))
    assert "in place of sgd" in loud


def test_one_name_of_theirs_does_not_make_a_file_theirs(tmp_path: Path) -> None:
    """With MLX RL Trainer's defaults would come its rewards and its unclipped surrogate."""
    file = tmp_path / "a.yaml"
    file.write_text("train_path: a\ngroup_size: 4\nalgorithm: grpo\nlora_rank: 8\n", encoding="utf-8")
    with pytest.raises(
        InvalidConfigurationError, match=r'a\.yaml:4: .* mean "lora_r"\?; a name of mlx-rl-trainer'
    ):
        load_config(PPOConfig, files=file, environ={})


def test_the_variable_that_names_mlx_grpos_file(tmp_path: Path) -> None:
    file, other = tmp_path / "prod.toml", tmp_path / "other.toml"
    file.write_text("num_generations = 16\n", encoding="utf-8")
    other.write_text("num_generations = 4\n", encoding="utf-8")
    environ = {"MLX_GRPO_CONFIG": str(file)}

    def read(older: str | None = "mlx-grpo-gsm8k", **more: Any) -> Loaded[PPOConfig]:
        return load_config(PPOConfig, environ=environ, older=older, **more)

    loaded = read()
    assert (loaded.config.group_size, str(loaded.origins["group_size"])) == (
        16,
        f"{file}:1 (num_generations)",
    )
    assert loaded.notes[0] == f"environment MLX_GRPO_CONFIG: no other file is named, so {file} is read"
    assert read(overrides=["num_generations=8"]).config.group_size == 8
    assert read(files=other).config.group_size == 4  # a file that is named
    assert not any("MLX_GRPO_CONFIG" in note for note in read(files=other).notes)
    assert read(older=None).config.group_size == 1  # of another system, it is nobody's
    assert read(older="mlx-grpo").config.group_size == 2
    environ["MLX_GRPO_CONFIG"] = ""
    assert read().config.group_size == 64
    environ["MLX_GRPO_CONFIG"] = str(tmp_path / "gone.toml")
    with pytest.raises(
        InvalidConfigurationError, match=r"MLX_GRPO_CONFIG: .*gone\.toml: there is no such file"
    ):
        read()


@pytest.mark.parametrize("system", ["mlx-grpo", "mlx-grpo-gsm8k", "mlx-rlhf", "mlx-rl-trainer"])
def test_a_system_that_is_named_alone_has_its_defaults(system: str) -> None:
    """``train --from mlx-grpo-gsm8k`` is a whole command line."""
    loaded = load_config(PPOConfig, environ={}, older=system)
    preset = load_config(PPOConfig, environ={}, preset=system.replace("-", "_")).config
    assert loaded.config == preset
    assert len(loaded.notes) == 1
