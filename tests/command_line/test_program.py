"""The program as a whole: commands, exit codes, sentences; and that help costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import main
from command_line import program
from command_line.commands import ALIASES, COMMANDS
from config.errors import DataLoadError, InvalidConfigurationError

ROOT = Path(__file__).resolve().parents[2]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    try:
        code = main.main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_no_help_imports_mlx() -> None:
    code = (
        "import sys, main\nfrom command_line.commands import COMMANDS\n"
        "texts = [main.build_parser().format_help()] + [c.parser().format_help() for c in COMMANDS.values()]\n"
        "print(len(texts), [m for m in sys.modules if m.split('.')[0] in "
        "('mlx', 'mlx_lm', 'transformers', 'datasets', 'torch', 'matplotlib', 'rich')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{len(COMMANDS) + 1} []"


def test_the_help_of_main_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--help", "-h"):
        code, out, _ = run(capsys, option)
        assert code == 0
        assert all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_two_examples(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, err = run(capsys, name, "--help")
    assert (code, err) == (0, "")
    examples = out.split("examples:\n")[1].splitlines()
    assert len(examples) == 2
    assert all(line.startswith(f"  python main.py {name} ") or name == "data" for line in examples)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("trian", 'there is no command "trian"; did you mean "train"?'),
        ("reward_modle", 'did you mean "reward-model"?'),
        ("xyz", "; there are generate-config, data,"),
    ],
)
def test_a_word_that_is_no_command(capsys: pytest.CaptureFixture[str], word: str, sentence: str) -> None:
    code, out, err = run(capsys, word)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (InvalidConfigurationError("x: wrong"), 2, "error: x: wrong\n"),
        (DataLoadError("f:1: wrong"), 1, "error: f:1: wrong\n"),
        (PermissionError(13, "Permission denied", "/there"), 1, "error: /there: Permission denied\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_happens_becomes_an_exit_code(
    capsys: pytest.CaptureFixture[str], raised: BaseException, code: int, said: str
) -> None:
    def work() -> int:
        raise raised

    assert program.guarded(work) == code
    assert capsys.readouterr().err == said


def test_a_bug_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        program.guarded(lambda: 1 // 0)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """``python main.py train --help | head -1``, with more text than a pipe holds."""
    code = (
        "import sys\nfrom command_line.program import guarded\n"
        "def work():\n    print('x' * 5000000)\n    return 0\nsys.exit(guarded(work))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (program.train, "mlx-train"),
        (program.evaluate, "mlx-evaluate"),
        (program.preprocess, "mlx-preprocess"),
        (program.generate_config, "mlx-generate-config"),
    ],
)
def test_installed_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, function: object, name: str
) -> None:
    import tomllib

    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        function()  # type: ignore[operator]
    assert stop.value.code == 0
    assert f"usage: {name} " in capsys.readouterr().out
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, attribute = scripts[name].partition(":")
    assert getattr(sys.modules[module], attribute) is function


def test_words_of_older_systems_find_their_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for word, name in ALIASES.items():
        code, out, _ = run(capsys, word.replace("-", "_"), "--help")
        assert code == 0
        assert f"usage: main.py {name} " in out


def test_the_demo_ignores_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--algorithm", "grpo"], ["--batch-size", "0"], ["--full"]):
        code, out, err = run(capsys, *words)
        assert (code, out) == (2, "")
        assert f"{words[0]}: the demo has no use for it; add --dry-run" in err


def test_a_written_config_is_text_and_its_next_command_can_be_pasted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "a b.yaml"
    words = ("generate-config", "--data-path", "x.jsonl", "--output", str(path), "--model-path")
    code, _, err = run(capsys, *words, "a\udcff")
    assert (code, path.exists()) == (2, False)
    assert "no UTF-8" in err
    code, out, _ = run(capsys, *words, "embedded")
    assert code == 0
    assert f"train --config '{path}' --dry-run" in out
