"""From the sources to a config: who wins, where it came from, and what is said when something is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from config.errors import InvalidConfigurationError
from config.loader import load_config
from config.ppo_config import PPOConfig
from config.supervised_config import SFTConfig


def write(folder: Path, **files: str) -> list[Path]:
    paths = [folder / name.replace("_", ".") for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def test_each_source_wins_over_those_before_it(tmp_path: Path) -> None:
    files = write(
        tmp_path,
        a_toml="batch_size = 11\ntop_k = 11\ngamma = 0.11\nseed = 11\nallow_truncated_sampling = true\n",
        b_yaml="x:\n  top_k: 12\n  gamma: 0.12\n  seed: 12\n",
    )
    loaded = load_config(
        PPOConfig,
        preset="grpo",  # batch_size 8, group_size 8
        files=files,
        environ={"MLX_PPO_GAMMA": "0.13", "MLX_PPO_SEED": "13", "MLX_PPO_BLAS": "none", "HOME": "/"},
        overrides=["seed=14"],
    )
    config = loaded.config
    assert (config.lam, config.group_size, config.batch_size, config.top_k) == (0.95, 8, 11, 12)
    assert (config.gamma, config.seed) == (0.13, 14)
    origins = {
        name: str(loaded.origins[name])
        for name in ("lam", "group_size", "batch_size", "top_k", "gamma", "seed")
    }
    assert origins == {
        "lam": "default",
        "group_size": "preset grpo",
        "batch_size": f"{files[0]}:1",
        "top_k": f"{files[1]}:2",
        "gamma": "environment MLX_PPO_GAMMA",
        "seed": "command line --seed",
    }
    assert loaded.notes == []
    assert config.was_set("seed")
    assert not config.was_set("lam")


def test_several_presets_and_an_algorithms_own_values(tmp_path: Path) -> None:
    from ppo_trainer.algorithms import find_algorithm
    from ppo_trainer.resolution import resolve_config

    loaded = load_config(PPOConfig, preset="standard,dr-grpo", environ={})
    assert loaded.config.lr_schedule == "cosine"
    assert loaded.config.algorithm == "dr_grpo"
    resolved = loaded.resolved(resolve_config(loaded.config, find_algorithm("dr_grpo")))
    assert str(resolved.origins["scale_rewards"]) == "algorithm dr_grpo"
    assert str(resolved.origins["algorithm"]) == "preset dr-grpo"
    assert str(resolved.origins["lam"]) == "default"


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("learning-rate=1e-5", "learning_rate", 1e-5),
        ("learning_rate = 1e-5", "learning_rate", 1e-5),
        ("optimizer_bits=8", "optimizer_bits", 8),
        ("verbose=no", "verbose", False),
        ("max_grad_norm=none", "max_grad_norm", None),
        ("scale_rewards=none", "scale_rewards", "none"),
        ("kl_placement=none", "kl_placement", "none"),
        ("output_dir=None", "output_dir", None),
        ("model_name=none", "model_name", "none"),
        ("model_name=5", "model_name", "5"),
        ("rewards=jaccard, format", "rewards", ["jaccard", "format"]),
        ('rewards=[{"name": "jaccard", "weight": 2}]', "rewards", [{"name": "jaccard", "weight": 2}]),
        ("reward_weights=0.5,-1", "reward_weights", [0.5, -1.0]),
        ("filter_keywords=1,b", "filter_keywords", ["1", "b"]),
        ('logit_bias={"5": -2}', "logit_bias", {5: -2.0}),
        ("system_prompt=a=b", "system_prompt", "a=b"),
    ],
)
def test_text_means_what_the_options_type_makes_of_it(text: str, field: str, value: object) -> None:
    extra = ["allow_truncated_sampling=true"]
    for environ, overrides in [
        ({}, [text, *extra]),
        ({}, [(text.partition("=")[0].strip(), text.partition("=")[2].strip()), *extra]),
        ({f"MLX_PPO_{field.upper()}": text.partition("=")[2].strip()}, extra),
    ]:
        found = getattr(load_config(PPOConfig, environ=environ, overrides=overrides).config, field)
        assert found == value
        assert type(found) is type(value)


def test_what_is_set_in_place_of_something_else_replaces_it(tmp_path: Path) -> None:
    (file,) = write(
        tmp_path,
        a_toml="num_steps = 5\nwarmup_ratio = 0.1\ndelta = 4\nreward_weights = [1, 2]\nrewards = ['a', 'b']\n",
    )
    overrides = ["num_epochs=2", "warmup_steps=3", "dual_clip=3", "rewards=c"]
    config = load_config(PPOConfig, files=file, environ={}, overrides=overrides).config
    assert (config.num_epochs, config.num_steps) == (2, None)
    assert (config.warmup_steps, config.warmup_ratio) == (3, 0.0)
    assert (config.dual_clip, config.delta) == (3.0, None)
    assert (config.rewards, config.reward_weights) == (["c"], None)
    config = load_config(PPOConfig, files=file, environ={}, overrides=["reward_weights=3,4"]).config
    assert (config.rewards, config.reward_weights) == (["a", "b"], [3.0, 4.0])


def test_a_data_set_named_later_is_not_lost_to_a_file_named_before(tmp_path: Path) -> None:
    (file,) = write(tmp_path, a_toml="train_path = 'a.jsonl'\nlora_layers = 4\n")
    config = load_config(
        PPOConfig, files=file, environ={}, overrides=["dataset_name=a/b", "lora_blocks=0-3"]
    ).config
    assert (config.train_path, config.dataset_name) == (None, "a/b")
    assert (config.lora_layers, config.lora_blocks) == (-1, "0-3")
    both = load_config(PPOConfig, environ={}, overrides=["train_path=a.jsonl", "dataset_name=a/b"]).config
    assert both.train_path == "a.jsonl"  # of one command line the local file is trained on


def test_none_in_a_toml_file(tmp_path: Path) -> None:
    (file,) = write(tmp_path, a_toml='max_grad_norm = "none"\nkl_placement = "none"\n')
    config = load_config(PPOConfig, files=file, environ={}).config
    assert config.max_grad_norm is None
    assert config.kl_placement == "none"


def test_a_model_made_from_scratch_is_a_table_of_its_own(tmp_path: Path) -> None:
    (file,) = write(
        tmp_path, a_yaml="model:\n  embedded_model:\n    hidden_size: 64\n    num_attention_heads: 2\n"
    )
    config = load_config(PPOConfig, files=file, environ={}).config
    assert config.embedded_model.hidden_size == 64
    file.write_text("embedded_model: {hidden_sise: 64}\n", encoding="utf-8")
    with pytest.raises(
        InvalidConfigurationError, match=r'a\.yaml:1: embedded_model has no field "hidden_sise"; did'
    ):
        load_config(PPOConfig, files=file, environ={})


WRONG = [
    (
        "lerning_rate = 1",
        r'a\.toml:1: PPOConfig has no field "lerning_rate"; did you mean "learning_rate"\? \(found 1\)',
    ),
    (
        "\nlearning_rate = 'fast'",
        r"a\.toml:2: learning_rate: input should be a valid number.*\(found 'fast'\)",
    ),
    ("learning_rate = nan", r"a\.toml:1: learning_rate: input should be greater than 0 .found nan"),
    ("batch_size = true", r"a\.toml:1: batch_size: true/false where a number is expected"),
    ("batch_size = 1.5", r"a\.toml:1: batch_size: .* \(found 1\.5\)"),
    ("batch_size = 99999999999", r"a\.toml:1: batch_size: input should be less than 2147483648"),
    ("batch_size = [1]", r"a\.toml:1: batch_size: .* \(found \[1\]\)"),
    ("lr_schedule = 'cosin'", r"a\.toml:1: lr_schedule: input should be 'constant', 'linear' or 'cosine'"),
    ("[x]\nseed = 1\n[y]\nseed = 2", r'a\.toml:4: "seed" is given twice \(first at .*a\.toml:2\)'),
    ("learning-rate = 1\nlearning_rate = 2", r'a\.toml:2: "learning_rate" is given twice'),
    ("top_p = 0.5", r"top_p = 0\.5: the distribution .* \(top_p: .*a\.toml:1\)"),
    ("seed = 1\n\n[a]\nwarmup_steps = 3\nwarmup_ratio = 0.1", r"\(warmup_steps: .*:4, warmup_ratio: .*:5\)"),
    ("rewards = [{nam = 'x'}]", r'a\.toml:1: rewards: entry 1 has no "nam"; did you mean "name"'),
    ("rewards = [{name = 'x', weight = 'y'}]", r"""rewards: the weight of "x" is 'y', and a finite number"""),
    ("rewards = []", r"rewards: at least one reward is expected"),
]


@pytest.mark.parametrize(("text", "sentence"), WRONG, ids=[text[:20] for text, _ in WRONG])
def test_a_mistake_in_a_file_names_file_line_key_and_what_was_found(
    tmp_path: Path, text: str, sentence: str
) -> None:
    (file,) = write(tmp_path, a_toml=text)
    with pytest.raises(InvalidConfigurationError, match=sentence) as caught:
        load_config(PPOConfig, files=file, environ={})
    assert "\n" not in str(caught.value)


def test_a_mistake_elsewhere_names_its_place() -> None:
    for keywords, sentence in [
        ({"environ": {"MLX_PPO_LEARNING_RAT": "1"}}, "environment MLX_PPO_LEARNING_RAT: .* did you mean"),
        ({"environ": {"MLX_PPO_SEED": "x"}}, "environment MLX_PPO_SEED: seed: .*found 'x'"),
        ({"overrides": [("batch_siz", "1")]}, 'command line --batch-siz: .* did you mean "batch_size"'),
        ({"overrides": ["seed"]}, "command line: 'seed' is no setting; name=value is expected"),
        ({"overrides": ["seed=-1"]}, "command line --seed: seed: .*found '-1'"),
        ({"preset": "grppo"}, 'preset: there is no "grppo"; did you mean "grpo"'),
        ({"older": "mlx-grp"}, 'there is no system "mlx-grp"; did you mean "mlx-grpo"'),
    ]:
        with pytest.raises(InvalidConfigurationError, match=sentence):
            load_config(PPOConfig, **{"environ": {}, **keywords})  # type: ignore[arg-type]


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    (file,) = write(tmp_path, a_toml="seed = -1\ngamma = 2\n")
    with pytest.raises(InvalidConfigurationError, match=r"a\.toml:1: seed: .*; .*a\.toml:2: gamma: "):
        load_config(PPOConfig, files=file, environ={})


def test_one_file_serves_all_stages(tmp_path: Path) -> None:
    (file,) = write(tmp_path, a_toml="kl_coef = 0.1\nlearning_rate = 1e-4\n")
    loaded = load_config(SFTConfig, files=file, environ={"MLX_PPO_GAMMA": "1"})
    assert loaded.config.learning_rate == 1e-4
    assert loaded.notes == [f"{file}:1: kl_coef is of another stage; SFTConfig has no use for it"]
    with pytest.raises(InvalidConfigurationError, match="command line --kl-coef: SFTConfig has no kl_coef"):
        load_config(SFTConfig, environ={}, overrides=["kl_coef=1"])


def test_an_error_of_later_on_is_told_where_its_option_was_set(tmp_path: Path) -> None:
    (file,) = write(tmp_path, a_toml="algorithm = 'grpo'\ngroup_size = 1\n")
    loaded = load_config(PPOConfig, files=file, environ={})
    error = loaded.located(InvalidConfigurationError("group_size: at least 2 is needed, found 1"))
    assert str(error) == f"group_size: at least 2 is needed, found 1 (group_size: {file}:2)"


def test_the_environment_is_read_unless_another_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_PPO_SEED", "77")
    assert load_config(PPOConfig).config.seed == 77
    assert load_config(PPOConfig, environ={}).config.seed == 0


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, config.loader, config.explain, config.template\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('mlx', 'numpy', 'transformers', 'yaml', 'datasets')])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
