"""``generate``, ``chat``, ``fuse`` and ``convert`` as they are typed: no flag without effect, no traceback."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

MODEL = ["--model", "embedded", "--max-tokens", "4", "--temp", "0"]


def test_a_stream_is_written_down_too(tmp_path: Path, command: Callable[..., Any]) -> None:
    output = tmp_path / "answer.jsonl"
    done = command("generate", *MODEL, "-p", "a", "--stream", "--output", str(output))
    assert done.code == 0, done.err
    [row] = [json.loads(line) for line in output.read_text().splitlines()]
    assert done.out == row["completion"] + "\n"
    assert row == {"prompt": "a", "completion": row["completion"], "tokens": 4, "finish": "length"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["generate", "--chat", "-p", "x"], "--prompt: with --chat everything is typed"),
        (["generate", "--chat", "--output", "x"], "--output: with --chat everything is typed"),
        (["generate", "--chat", "-n", "2"], "--num: with --chat there is one answer at a time"),
        (
            ["chat", "--template", "plain", "--reply-as", "Jo"],
            "--reply-as: the template lines alone has a name",
        ),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(
    command: Callable[..., Any], words: list[str], sentence: str
) -> None:
    done = command(*words, *MODEL)
    assert done.code == 2
    assert sentence in done.err


def test_half_a_character_is_a_sentence(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    done = command("generate", *MODEL, "-p", "a\udcff")
    assert (done.code, done.err) == (
        1,
        "error: the text has half a character (a lone surrogate); repair it\n",
    )
    for template in ("chat", "plain"):
        monkeypatch.setattr("sys.stdin", io.StringIO("a\udcff\nb\n"))
        done = command("chat", *MODEL, "--template", template)
        assert (done.code, done.err.count("\n")) == (0, 1)
        assert "half a character" in done.err
        assert done.out  # the next message is answered
    for words in (["generate", "-p", "-"], ["chat"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
        done = command(*words, *MODEL)
        assert done.code == 1
        assert "standard input is not UTF-8 text" in done.err


@pytest.mark.parametrize("length", ["abc", -1, 1.5, [2]])
def test_a_soft_prompt_of_no_length_is_refused(
    tmp_path: Path, command: Callable[..., Any], length: Any
) -> None:
    described = {"fine_tune_type": "soft_prompt", "num_layers": 1, "soft_prompt_tokens": length}
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"a": mx.zeros(2)})
    adapter = ["--model", "embedded", "--adapter-path", str(tmp_path)]
    for words in (["fuse", "--save-path", str(tmp_path / "fused")], ["generate", "-p", "x"]):
        done = command(*words, *adapter)
        assert done.code in (1, 2)
        assert "soft_prompt_tokens: a whole number from 0 up is expected" in done.err
    assert not (tmp_path / "fused").exists()


def _damaged(path: Path) -> None:
    np.savez_compressed(path, **{"prompts.weight": np.random.default_rng(0).random((50, 64))})
    content = bytearray(path.read_bytes())
    content[60:400] = bytes(340)
    path.write_bytes(bytes(content))


def _array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (_damaged, "cannot be read"),
        (_array, "cannot be read (File is not a zip file)"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: np.savez(path, **{"prompts.weight": np.zeros((2, 9), np.longdouble)}), "16 to 64 bits"),
        (lambda path: np.savez(path, **{"prompts.weight": np.zeros((2, 3))}), "belongs to another model"),
        (
            lambda path: np.savez(path, **{"model.layers.0.self_attn.q_proj.lora_a": np.zeros((3, 2))}),
            "a.npz: this adapter does not fit the model",
        ),
    ],
)
def test_a_file_that_is_no_older_adapter_is_a_sentence(
    tmp_path: Path, command: Callable[..., Any], write: Callable[[Path], Any], sentence: str
) -> None:
    write(tmp_path / "a.npz")
    words = [
        "--hf-path",
        "embedded",
        "--adapter-file",
        str(tmp_path / "a.npz"),
        "--mlx-path",
        str(tmp_path / "to"),
    ]
    done = command("convert", *words)
    assert done.code in (1, 2)
    assert sentence in done.err
    assert done.err.count("\n") == 1
    assert [one.name for one in tmp_path.iterdir()] == ["a.npz"]


def test_a_base_named_from_another_working_folder_is_asked_for(
    tmp_path: Path, command: Callable[..., Any]
) -> None:
    described = {"fine_tune_type": "lora", "num_layers": 1, "model": "mine"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"a": mx.zeros(2)})
    done = command("generate", "-p", "x", "--adapter-path", str(tmp_path))
    assert done.code == 2
    assert f'{tmp_path} was trained on the folder "mine", which is not there' in done.err


def test_what_is_to_be_typed_next_can_be(tmp_path: Path, command: Callable[..., Any]) -> None:
    folder = tmp_path / "with space"
    done = command("convert", "--hf-path", "embedded", "--mlx-path", str(folder))
    assert shlex.split(done.out.splitlines()[-1])[-1] == str(folder)
