"""Which sandbox is chosen, when none is, and what the back ends are told."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from config.errors import InvalidConfigurationError
from rewards.sandbox import backends, choice, supervision
from rewards.sandbox.backends import Bubblewrap, Command, Unsafe, seatbelt_profile
from rewards.sandbox.choice import proven_backend, why_not
from rewards.sandbox.limits import Limits
from rewards.sandbox.runner import run_program, run_test
from rewards.sandbox.session import bundle

LINUX = sys.platform == "linux"


class Nowhere(backends.Backend):
    name = "nowhere"

    def missing(self) -> str:
        return "it is not there"


@pytest.fixture
def no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_ORDER", (Nowhere,))
    choice._warned.clear()


def test_without_a_sandbox_nothing_runs_and_two_lines_say_what_to_install(no_sandbox: None) -> None:
    with pytest.raises(InvalidConfigurationError) as caught:
        proven_backend()
    first, second = str(caught.value).split("\n")
    assert "nowhere: it is not there" in first
    assert "bubblewrap" in second or "sandbox-exec" in second
    assert "allow_unsafe_code" in second


def test_unsafe_is_chosen_when_asked_for_and_says_so_once(no_sandbox: None) -> None:
    with pytest.warns(RuntimeWarning, match="WITHOUT A SANDBOX"):
        assert proven_backend(allow_unsafe_code=True).name == "unsafe"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        proven_backend(allow_unsafe_code=True)


def test_unsafe_is_not_chosen_where_there_is_a_sandbox() -> None:
    try:
        proven_backend()
    except InvalidConfigurationError as error:
        pytest.skip(str(error))
    assert proven_backend(allow_unsafe_code=True).name != "unsafe"


def test_the_probe_sees_that_unsafe_is_unsafe() -> None:
    achieved = why_not(Unsafe())
    for attack in ("read a file", "write a file", "open a TCP connection", "connect to a Unix socket"):
        assert attack in achieved


def test_a_command_that_walls_nothing_in_is_refused() -> None:
    with pytest.raises(InvalidConfigurationError, match=r"could read a file|does not run programs here"):
        proven_backend("env PATH=/usr/bin:/bin")  # runs what follows it, as docker would, but here
    with pytest.raises(InvalidConfigurationError, match="there is no"):
        proven_backend(["no-such-container-tool", "run"])
    with pytest.raises(InvalidConfigurationError, match="does not run programs here"):
        proven_backend("true")


def test_a_command_that_holds_is_used() -> None:
    """Stands in for docker: bubblewrap, as a user would write it down."""
    if trouble := why_not(Bubblewrap()):
        pytest.skip(f"bubblewrap: {trouble}")
    if os.getuid() == 0 and not backends._reachable_by_nobody():
        pytest.skip("as root it needs a Python that every user may execute")
    words = Bubblewrap().words(None, Limits())
    backend = proven_backend(
        [*words, "env", "-i", "PATH=" + os.path.dirname(os.path.realpath(sys.executable)) + ":/usr/bin"]
    )
    assert backend.name == "command"
    assert run_program("print(6 * 7)", backend=backend).stdout == "42\n"
    assert run_test("def f(): return 1", "assert f() == 1", backend=backend).status == "ok"


def test_the_folder_of_a_command_is_put_in_its_place() -> None:
    command = Command(("run", "--volume={dir}:/work", "{dir}"))
    assert command.words(Path("/x"), Limits()) == ["run", "--volume=/x:/work", "/x"]


def test_the_bundle_is_the_same_code_as_text_and_compiled() -> None:
    modules = dict(eval(bundle(as_text=True)))
    assert list(modules) == [
        "rewards", "rewards.sandbox", "rewards.sandbox.values", "rewards.sandbox.kernel",
        "rewards.sandbox.judge", "rewards.sandbox.program", "rewards.sandbox.keeper",
    ]  # fmt: skip
    assert "def main" in modules["rewards.sandbox.keeper"]
    assert bundle(as_text=False)


def test_the_profile_for_macos_denies_by_default_and_names_what_is_allowed() -> None:
    profile = seatbelt_profile(Path("/private/tmp/program-1"), ['/opt/py thon"3'])
    lines = profile.splitlines()
    assert lines[:3] == ["(version 1)", "(deny default)", "(deny network*)"]
    assert '(allow file-write* (subpath "/private/tmp/program-1"))' in lines
    assert '(allow file-read* (subpath "/opt/py thon\\"3"))' in lines
    writable = [line for line in lines if "file-write" in line]
    assert len(writable) == 2  # the folder, and /dev/null
    assert not any("/Users" in line or "allow network" in line or "allow default" in line for line in lines)
    assert profile.count("(") == profile.count(")")


def test_no_folder_of_the_user_as_a_whole_is_shown_to_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    for prefix in ("/", str(Path.home()), str(Path.home().parent)):
        monkeypatch.setattr(sys, "base_prefix", prefix)
        assert os.path.realpath(prefix) not in backends.python_folders()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seconds", 0),
        ("seconds", float("inf")),
        ("memory_mb", 1.5),
        ("memory_mb", 32),
        ("processes", -1),
        ("file_mb", True),
    ],
)
def test_a_limit_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidConfigurationError, match=f"The limit {field} is {value!r}"):
        Limits(**{field: value})


def test_a_hostile_folder_is_removed_without_following_links(tmp_path: Path) -> None:
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "file").write_text("x")
    folder = tmp_path / "program"
    inner = folder
    inner.mkdir()
    for _ in range(1200):  # deeper than Python recurses
        inner = Path(os.path.join(inner, "d"))
    here = os.open(folder, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        following = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = following
    os.symlink(keep, "link", dir_fd=here)
    os.mkdir("locked", 0, dir_fd=here)
    os.close(here)
    supervision.remove(folder)
    assert not folder.exists()
    assert (keep / "file").read_text() == "x"


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_the_memory_of_a_tree_counts_its_children() -> None:
    import subprocess

    code = (
        "import os, sys\nif os.fork() == 0: x = bytearray(b'1' * 30_000_000)\n"
        "print(1, flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        used = supervision.memory_of_tree(process.pid)
        assert 30e6 < used < 120e6
        assert process.stdin is not None
        process.stdin.close()
