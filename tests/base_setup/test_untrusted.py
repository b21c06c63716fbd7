"""Folders from elsewhere: no code of theirs runs, and nothing in them leads out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import main
from base_setup.lora_setup import DESCRIPTION, WEIGHTS, read_description
from base_setup.untrusted import check_model_folder
from command_line.checkpoints import Checkpoint, check_written_rewards, find_checkpoint
from command_line.checks import load_tokenizer
from config.errors import CheckpointError, ModelLoadError
from config.ppo_config import PPOConfig
from config.training_config import TrainingConfig
from models.reward_model import SETTINGS, RewardModel
from models.sequence_classifier import SequenceClassifier
from models.sft_model import LanguageModel, load_language_model, save_language_model

ROOT = Path(__file__).resolve().parents[2]
#: Python that leaves a mark where it is run.
CODE = "import pathlib\npathlib.Path(__file__).with_name('RAN').touch()\n"
MODEL_CODE = CODE + "from mlx_lm.models.qwen3 import Model, ModelArgs\n"
TOKENIZER_CODE = CODE + (
    "from transformers import PreTrainedTokenizerFast\nclass Mine(PreTrainedTokenizerFast):\n    pass\n"
)


@pytest.fixture
def folder(tiny: LanguageModel, tmp_path: Path) -> Path:
    """A model folder in which nothing is wrong, and the files that a hostile one would bring."""
    save_language_model(tiny, tmp_path / "model")
    (tmp_path / "model" / "arch.py").write_text(MODEL_CODE)
    (tmp_path / "model" / "mine.py").write_text(TOKENIZER_CODE)
    return tmp_path / "model"


def put(file: Path, **settings: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **settings}))


def ask_for_model_code(folder: Path) -> str:
    put(folder / "config.json", model_file="arch.py")
    return r"config\.json asks for Python code to be run \(model_file: arch\.py\)"


def ask_for_tokenizer_code(folder: Path) -> str:
    put(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "mine.Mine"]},
        tokenizer_class="Mine",
    )
    return r"tokenizer_config\.json asks for Python code to be run \(auto_map: mine\.Mine\)"


def ask_in_the_models_config(folder: Path) -> str:
    put(folder / "config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    return r"config\.json asks for Python code to be run \(auto_map: mine\.Mine\)"


def ask_for_a_repository(folder: Path) -> str:
    put(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["someone/else--mine.Mine", None]})
    return r"from the repository someone/else\)"


ASKING = [ask_for_model_code, ask_for_tokenizer_code, ask_in_the_models_config, ask_for_a_repository]


@pytest.mark.parametrize("ask", ASKING)
def test_code_is_refused_by_every_loader_before_it_runs(folder: Path, ask: Callable[[Path], str]) -> None:
    sentence = ask(folder)
    config = TrainingConfig(model_name=str(folder))
    loaders = (load_language_model, load_tokenizer, lambda config: SequenceClassifier.load(config.model_name))
    for load in loaders:
        with pytest.raises(ModelLoadError, match=sentence) as caught:
            load(config)
        assert "set trust_remote_code = true" in str(caught.value)
    assert not (folder / "RAN").exists()
    assert not any(name.endswith("mine") and "transformers_modules" in name for name in sys.modules)


def test_with_consent_it_runs_and_a_line_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which also shows that the mark would have been seen."""
    ask_for_model_code(folder)
    loaded = load_language_model(TrainingConfig(model_name=str(folder), trust_remote_code=True))
    assert (folder / "RAN").exists()
    assert type(loaded.model).__name__ == "Model"
    assert "model_name: running arch.py, as " in capsys.readouterr().out


def test_a_sound_folder_and_a_models_own_auto_map_are_not_refused(folder: Path) -> None:
    """mlx-lm has the architecture; the code that comes with it is not run."""
    put(folder / "config.json", auto_map={"AutoConfig": "arch.Config", "AutoModelForCausalLM": "arch.Model"})
    assert check_model_folder(folder, trust_remote_code=False) == []
    load_language_model(TrainingConfig(model_name=str(folder)))
    assert not (folder / "RAN").exists()


def test_a_pickled_tokenizer_is_not_opened(folder: Path) -> None:
    ran = folder / "RAN"
    attack = f"cos\nsystem\n(S'touch {ran}'\ntR.".encode()
    (folder / "tokenizer.pickle").write_bytes(attack)
    assert check_model_folder(folder, trust_remote_code=False) == []  # beside tokenizer.json it is not read
    (folder / "tokenizer.json").unlink()
    for trusted in (False, True):
        with pytest.raises(ModelLoadError, match=r"tokenizer\.pickle is a pickle, which may run any code"):
            load_language_model(TrainingConfig(model_name=str(folder), trust_remote_code=trusted))
    (folder / "tokenizer.pickle").rename(folder / "tokenizer.pkl")
    for trusted in (False, True):
        with pytest.raises(
            ModelLoadError, match=r"a pickled tiktoken encoding is expected, and nothing else is read"
        ):
            load_language_model(TrainingConfig(model_name=str(folder), trust_remote_code=trusted))
    assert not ran.exists()


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "sub/../../x", "..\\x", "C:\\x"])
def test_an_index_may_name_nothing_outside(folder: Path, name: str) -> None:
    put(folder / "model.safetensors.index.json", weight_map={"a": "model.safetensors", "b": name})
    with pytest.raises(ModelLoadError, match="which is outside its folder"):
        load_language_model(TrainingConfig(model_name=str(folder)))
    put(folder / "model.safetensors.index.json", weight_map={"a": "model.safetensors"})
    check_model_folder(folder, trust_remote_code=False)


def test_code_outside_the_folder_is_refused_with_consent_too(folder: Path) -> None:
    put(folder / "config.json", model_file="../arch.py")
    with pytest.raises(ModelLoadError, match="outside its folder"):
        load_language_model(TrainingConfig(model_name=str(folder), trust_remote_code=True))


def test_links_out_of_a_model_folder(folder: Path, tmp_path: Path) -> None:
    """Weights may be anywhere; what names code or templates may not."""
    (folder / "model.safetensors").rename(tmp_path / "weights.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    (folder / "readme.md").symlink_to(folder / "config.json")
    (tmp_path / "link").symlink_to(folder)
    check_model_folder(tmp_path / "link", trust_remote_code=False)
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ModelLoadError, match=r"config\.json is a link out of its folder, to .*; put a copy"):
        check_model_folder(folder, trust_remote_code=False)


def test_the_hub_caches_own_links_are_followed(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    folder.rename(cache / "snapshots" / "abc")
    file = cache / "snapshots" / "abc" / "config.json"
    file.rename(cache / "blobs" / "0123")
    file.symlink_to("../../blobs/0123")
    check_model_folder(file.parent, trust_remote_code=False)
    (cache / "other").write_text("{}")
    for elsewhere in ("../../../elsewhere", "../../other", "../../blobs-2/0123", "../def/config.json"):
        file.unlink()
        file.symlink_to(elsewhere)
        with pytest.raises(ModelLoadError, match="is a link out of its folder"):
            check_model_folder(file.parent, trust_remote_code=False)


def test_links_out_of_an_adapter_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / WEIGHTS).write_bytes(b"")
    (adapter / DESCRIPTION).write_text("{}")
    assert read_description(adapter) == {}
    for name in (WEIGHTS, DESCRIPTION):
        content = (adapter / name).read_bytes()
        (adapter / name).unlink()
        (adapter / name).symlink_to(tmp_path / "secret")
        with pytest.raises(CheckpointError, match=f"{name} is a link out of its folder"):
            read_description(adapter)
        (adapter / name).unlink()
        (adapter / name).write_bytes(content)


# What a checkpoint says ----------------------------------------------------------------------------------


def test_a_checkpoint_cannot_give_consent(folder: Path, tmp_path: Path) -> None:
    put(folder / "config.json", config={"model_name": "embedded", "trust_remote_code": True, "seed": 3})
    assert find_checkpoint(str(folder)).config == {"model_name": "embedded", "seed": 3}
    ask_for_model_code(folder)
    reward = tmp_path / "reward"
    reward.mkdir()
    config = PPOConfig(model_name=str(folder), trust_remote_code=True).as_dict()
    put(
        reward / SETTINGS,
        gain=1.0,
        bias=0.0,
        config={k: config[k] for k in ("model_name", "trust_remote_code")},
    )
    with pytest.raises(ModelLoadError, match="asks for Python code"):
        RewardModel.load(reward)
    assert not (folder / "RAN").exists()


def written(folder: Path) -> Checkpoint:
    return Checkpoint(folder / "run" / "final", True, {}, {})


@pytest.mark.parametrize(
    "reward",
    [
        "run/evil.py:f",
        "run/final/../evil.py:f",
        "run.final.evil:f",
        {"name": "./run/evil.py:f", "weight": 2.0},
        {"name": "judge", "config": {"url": "http://example.com", "model": "m"}},
        {"name": "code_execution", "config": {"sandbox_command": ["sh", "-c", "id"]}},
    ],
)
def test_a_checkpoints_own_code_and_what_reaches_out_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"asks for the reward .*; if you trust it, give it yourself"):
        check_written_rewards(written(tmp_path), ["well_formed", reward])


@pytest.mark.parametrize(
    "reward", ["well_formed", "mine.py:f", "package.mine:f", {"name": "sequential_digits"}]
)
def test_other_rewards_of_a_checkpoint_are_let_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    check_written_rewards(written(tmp_path), [reward])
    check_written_rewards(written(tmp_path), {"well_formed": 1.0})
    check_written_rewards(written(tmp_path), None)


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        ("{run}/evil.py:f", "which is code that came with it"),
        ({"name": "judge", "config": {"url": "http://example.com", "model": "m"}}, "with url"),
    ],
)
def test_a_run_folder_that_is_resumed_cannot_give_consent_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reward: Any, reason: str
) -> None:
    """``--resume RUN`` takes the config that lies in the folder, which may be anybody's."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "evil.py").write_text(
        CODE + "def f(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    reward = reward.format(run=run) if isinstance(reward, str) else reward
    settings = {"model_name": "embedded", "rewards": [reward], "trust_remote_code": True}
    put(run / "config.json", config=settings)
    assert main.main(["train", "--resume", str(run)]) == 1
    said = capsys.readouterr().err
    assert "error: --resume: " in said
    assert reason in said
    assert "give it yourself with --reward, or --config" in said
    assert not (run / "RAN").exists()


@pytest.mark.parametrize("kind", ["circle", "deep", "index"])
def test_a_folder_that_is_odd_is_a_sentence_or_nothing(tmp_path: Path, kind: str) -> None:
    if kind == "circle":
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
    elif kind == "deep":
        (tmp_path / "config.json").write_text("[" * 100_000)
    else:
        put(tmp_path / "model.safetensors.index.json", weight_map={"a": {"b": 1}, "c": "../out"})
    if kind == "index":
        with pytest.raises(ModelLoadError, match="outside its folder"):
            check_model_folder(tmp_path, trust_remote_code=False)
    else:
        assert check_model_folder(tmp_path, trust_remote_code=False) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "cannot be read"),
        ('{"config": {"model_na', "cannot be read"),  # as a full disk leaves it
        ("[1]", "holds no JSON object"),
        ('{"config": {"model_name": "embedded", "rewards": 7}}', "rewards"),
        ('{"config": {"model_name": "embedded", "rewards": "RUN/evil.py:f"}}', "code that came with it"),
        ('{"config": {"model_name": "embedded", "rewards": [":f"]}}', "nothing can be called"),
        ('{"config": {"model_name": "embedded", "rewards": ["a\\u0000.py:f"]}}', "nothing can be called"),
    ],
    ids=["deep", "torn", "list", "number", "text", "no file", "NUL"],
)
@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_what_a_run_wrote_down_may_be_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, content: str, words: str
) -> None:
    """Never the defaults in its place: they are of another model, which would be downloaded."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(content.replace("RUN", str(run)))
    (run / WEIGHTS).write_bytes(b"")
    (run / DESCRIPTION).write_text("{}")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    options = ["--resume", str(run)] if command == "train" else ["--checkpoint", str(run)]
    option = "--val-path" if command == "evaluate" else "--train-path"
    assert main.main([command, *options, option, str(tmp_path / "p.jsonl")]) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said


# What is sent --------------------------------------------------------------------------------------------

WATCHED = """
import socket, sys
def refuse(what):
    def called(*arguments, **named):
        print("CONNECTION", what, arguments[:2], flush=True)
        raise OSError("no connection here")
    return called
connect = socket.socket.connect
def watched(self, address):
    return connect(self, address) if self.family == socket.AF_UNIX else refuse("connect")(address)
socket.socket.connect = socket.socket.connect_ex = watched
socket.getaddrinfo, socket.create_connection = refuse("getaddrinfo"), refuse("create_connection")
import main
sys.exit(main.main(sys.argv[1:]))
"""


def watched(folder: Path, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, capture_output=True, text=True, timeout=400,
        env={**environment, "HF_HOME": str(folder / "hub"), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


EVERYTHING = """
import importlib, pkgutil
from pathlib import Path
root = Path(main.__file__).parent
packages = [path.parent.name for path in root.glob("*/__init__.py") if path.parent.name != "tests"]
assert len(packages) > 10, packages
names = [one.name for name in packages for one in pkgutil.walk_packages([str(root / name)], name + ".")]
for name in names:
    if not name.endswith("__main__"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            print("left out:", name, error)
print("imported", len(names))
"""


@pytest.mark.slow
def test_neither_an_import_nor_the_demo_makes_a_connection(tmp_path: Path) -> None:
    imported = watched(tmp_path, WATCHED.replace("sys.exit(", "if 0: (") + EVERYTHING)
    assert imported.returncode == 0, imported.stderr
    assert "imported" in imported.stdout
    done = watched(tmp_path, WATCHED, "--fast", "--output", "out")
    assert done.returncode == 0, done.stderr
    for one in (imported, done):
        assert "CONNECTION" not in one.stdout + one.stderr


def test_a_run_on_a_local_model_makes_no_connection(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "abc"}\n')

    done = watched(
        tmp_path, WATCHED, "train", "--model-name", str(folder), "--train-path", "prompts.jsonl",
        "--max-new-tokens", "3", "--num-steps", "1", "--output-dir", "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONNECTION" not in done.stdout + done.stderr
    assert (tmp_path / "out" / "final" / "adapters.safetensors").is_file()


@pytest.mark.slow
def test_a_model_that_is_named_on_the_hub_is_asked_for_there(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "abc"}\n')
    asked = watched(
        tmp_path, WATCHED, "train", "--model-name", "nobody-here/no-such-model", "--train-path", "prompts.jsonl",
        "--dry-run",
    )  # fmt: skip
    assert "CONNECTION" in asked.stdout + asked.stderr  # the watch sees one where there is one
    assert asked.returncode == 1
    assert "Traceback" not in asked.stderr
