"""./run on machines we do not have: the programs it asks are stubs, and so is the Python it builds on."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from command_line.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
SHELL = shutil.which("dash") or "/bin/sh"
TOOLS = ["cat", "cksum", "cp", "cut", "dirname", "head", "mkdir", "mv", "rm", "sed", "sleep", "tail"]

# Answers as a Python does whose version is fine, and writes down what it was asked.
PYTHON = """#!/bin/sh
printf '%s\\n' "$*" >>"$STUB_LOG"
case $* in
    *sys.version_info*) echo 'ok 3.12.1' ;;
    *platform.python_version*) echo '3.12.1, mlx 0.1' ;;
    '-m venv --clear '*) rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    '-m uv '* | *' -q uv') exit 1 ;;
    '-m pip install '*) echo 'no such package' && exit "${STUB_PIP:-0}" ;;
    '-m base_setup.backend') echo 'cpu: stub' ;;
    *) printf '<%s>' "$@" && echo " in $PWD" ;;
esac
"""
NVIDIA = "| NVIDIA-SMI 580.65.06    Driver Version: 580.65.06    CUDA Version: {}     |"
LINUX = {"uname": "case $1 in -s) echo Linux ;; -m) echo x86_64 ;; esac", "getconf": "echo 'glibc 2.36'"}
MAC = {
    "uname": "case $1 in -s) echo Darwin ;; -m) echo arm64 ;; esac",
    "sysctl": "echo 1",
    "sw_vers": "echo 14.5",
}


class Machine:
    """A checkout in a folder with a space, and a PATH with nothing but stubs and harmless tools."""

    def __init__(self, folder: Path, programs: dict[str, str]) -> None:
        self.root = folder / "a checkout"
        self.root.mkdir()
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.log = folder / "log"
        for name in ("run", "requirements.txt", "requirements-dev.txt"):
            shutil.copy(ROOT / name, self.root)
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name) or "")
        for name, script in programs.items():
            self.add(name, script)

    def add(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script if script.startswith("#!") else f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def run(
        self, *arguments: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SHELL, str(self.root / "run"), *arguments],
            cwd=cwd or self.root,
            env={"PATH": str(self.bin), "STUB_LOG": str(self.log), "HOME": os.environ.get("HOME", "/")}
            | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def asked(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def test_it_is_valid_posix_shell():
    assert subprocess.run([SHELL, "-n", str(ROOT / "run")], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("changes", "environment", "backend"),
    [
        ({}, {}, "cpu"),
        ({"nvidia-smi": "exit 9"}, {}, "cpu"),
        ({"nvidia-smi": f"echo '{NVIDIA.format('11.8')}'"}, {}, "cpu"),
        ({"nvidia-smi": f"echo '{NVIDIA.format('12.4')}'"}, {}, "cuda12"),
        ({"nvidia-smi": f"echo '{NVIDIA.format('13.0')}'"}, {}, "cuda13"),
        ({"nvidia-smi": f"echo '{NVIDIA.format('13.0')}'"}, {"MLX_BACKEND": "cpu"}, "cpu"),
        ({}, {"MLX_BACKEND": "cuda12"}, "cuda12"),
        (MAC, {}, "metal"),
        (MAC, {"MLX_BACKEND": "metal"}, "metal"),
    ],
)
def test_the_backend_follows_the_machine_and_the_override(tmp_path, changes, environment, backend):
    ran = Machine(tmp_path, LINUX | changes).run("backend", **environment)
    assert (ran.stdout, ran.stderr, ran.returncode) == (f"{backend}\n", "", 0)


@pytest.mark.parametrize(
    ("programs", "environment", "sentence"),
    [
        ({"uname": "echo MINGW64_NT-10.0"}, {}, "mlx-lm does not start on Windows: use this from WSL 2"),
        ({"uname": "echo FreeBSD"}, {}, "MLX runs on macOS and Linux, and this is FreeBSD."),
        (
            LINUX | {"uname": "case $1 in -s) echo Linux ;; -m) echo riscv64 ;; esac"},
            {},
            "no wheel for Linux on riscv64",
        ),
        (LINUX | {"getconf": "exit 1"}, {}, "another C library (musl, as in Alpine)"),
        (
            LINUX | {"getconf": "echo 'glibc 2.34'"},
            {},
            "MLX needs glibc 2.35 or newer (Debian 12, Ubuntu 22.04), and this is 2.34.",
        ),
        (MAC | {"sysctl": "exit 1"}, {}, "this one has an Intel processor"),
        (MAC | {"sw_vers": "echo 13.6.1"}, {}, "MLX needs macOS 14 or newer, and this is 13.6.1."),
        (LINUX, {"MLX_BACKEND": "metal"}, "MLX_BACKEND=metal does not exist on Linux"),
        (LINUX, {"MLX_BACKEND": "tpu"}, "MLX_BACKEND=tpu does not exist on Linux"),
        (MAC, {"MLX_BACKEND": "cuda13"}, "MLX_BACKEND=cuda13 does not exist on Darwin"),
        (LINUX, {}, "no Python was found"),
        (LINUX | {"python3.13": "exit 127"}, {}, "no Python was found"),  # a pyenv shim with nothing behind
        (LINUX | {"python3": "echo 'version 3.9.18'"}, {}, "Python 3.9.18 ("),
        (LINUX | {"python3": "echo 'version 3.14.0'"}, {}, "is not supported: install 3.11, 3.12 or 3.13"),
        (LINUX, {"PYTHON": "/no/such/python"}, "PYTHON=/no/such/python does not run"),
        (MAC | {"python3.12": "echo 'rosetta 3.12.1'"}, {}, "is built for Intel and runs under Rosetta"),
        (
            LINUX | {"python3.11": "echo 'venv 3.11.2'", "python": "echo 'version 2.7.18'"},
            {},
            "cannot make virtual environments: on Debian and Ubuntu, apt install python3-venv.",
        ),
    ],
)
def test_each_refusal_is_one_sentence(tmp_path, programs, environment, sentence):
    machine = Machine(tmp_path, programs)
    ran = machine.run("setup", **environment)
    assert ran.returncode == 1
    assert sentence in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert sorted(path.name for path in machine.root.iterdir()) == [
        "requirements-dev.txt",
        "requirements.txt",
        "run",
    ]


def test_it_passes_over_pythons_that_will_not_do(tmp_path):
    machine = Machine(
        tmp_path, LINUX | {"python3.13": "exit 1", "python3.12": "echo 'venv 3.12.0'", "python3": PYTHON}
    )
    assert machine.run("setup").returncode == 0
    assert f"-m venv --clear {machine.root}/.venv" in machine.asked()


def test_a_second_run_sets_nothing_up(tmp_path):
    machine = Machine(tmp_path, LINUX | {"python3.12": PYTHON})
    assert machine.run("setup").stdout == "ready: Python 3.12.1, mlx 0.1 on cpu: stub\n"
    machine.log.unlink()
    ran = machine.run("demo", "--name", "a b", cwd=tmp_path)
    assert ran.stdout == f"<{machine.root}/main.py><--name><a b> in {tmp_path}\n"
    assert machine.asked() == f"{machine.root}/main.py --name a b\n"


def test_every_command_of_the_program_is_one_of_the_script(tmp_path):
    machine = Machine(tmp_path, LINUX | {"python3.12": PYTHON})
    for command in COMMANDS:
        ran = machine.run(command, "--config", "a b.yaml", cwd=tmp_path)
        assert ran.stdout == f"<{machine.root}/main.py><{command}><--config><a b.yaml> in {tmp_path}\n"


def test_comparisons_with_pytorch_have_an_environment_of_their_own(tmp_path):
    stub = PYTHON.replace('"$*" >>', '"${UV_TORCH_BACKEND:-any} $*" >>')
    machine = Machine(tmp_path, LINUX | {"python3.12": stub})
    shutil.copy(ROOT / "requirements-torch.txt", machine.root)
    ran = machine.run("test-torch", "-x", cwd=tmp_path)
    assert ran.stdout == f"<-m><pytest><-m><torch><-x> in {machine.root}\n"
    torch = machine.root / ".venv-torch"
    assert f"-m venv --clear {torch}\n" in machine.asked()
    assert (
        f"cpu -m pip install --disable-pip-version-check -q -r {torch}/requirements-torch.txt"
        in machine.asked()
    )
    listed = (torch / "requirements-torch.txt").read_text()
    assert "-r requirements-dev.txt" in listed.splitlines()
    assert {"requirements.txt", "requirements-dev.txt"} <= {path.name for path in torch.iterdir()}
    assert not (machine.root / ".venv").exists()

    machine.log.unlink()
    machine.run("test-torch")
    assert machine.asked() == "cpu -m pytest -m torch\n"  # there already
    with open(machine.root / "requirements-torch.txt", "a") as file:
        file.write("another-package\n")
    machine.run("test-torch")
    assert "-m pip install" in machine.asked()
    machine.run("test")
    assert f"any -m pip install --disable-pip-version-check -q -r {machine.root}/.venv/" in machine.asked()


def test_changed_requirements_are_installed_without_a_new_environment(tmp_path):
    machine = Machine(tmp_path, LINUX | {"python3.12": PYTHON})
    machine.run("setup")
    machine.log.unlink()
    with open(machine.root / "requirements.txt", "a") as file:
        file.write("another-package\n")
    machine.run("python", "x.py")
    assert "-m pip install" in machine.asked()
    assert "-m venv" not in machine.asked()


def test_another_backend_gets_a_new_environment_and_its_own_list(tmp_path):
    machine = Machine(tmp_path, LINUX | {"python3.12": PYTHON})
    machine.run("setup")
    listed = machine.root / ".venv" / "requirements.txt"
    assert "\nmlx[cpu]>=" in listed.read_text()
    machine.log.unlink()
    machine.run("setup", MLX_BACKEND="cuda13")
    assert "-m venv --clear" in machine.asked()
    assert "\nmlx[cuda13]>=" in listed.read_text()
    assert "\nmlx[cpu]" not in listed.read_text()


def test_a_failed_installation_shows_why_and_leaves_no_stamp(tmp_path):
    machine = Machine(tmp_path, LINUX | {"python3.12": PYTHON})
    ran = machine.run("test", STUB_PIP="3")
    assert ran.returncode == 1
    assert "no such package\nrun: the installation failed" in ran.stderr
    assert not (machine.root / ".venv.lock").exists()
    assert machine.run("setup").returncode == 0  # and the next one starts over


def test_a_lock_whose_owner_is_gone_is_taken_over(tmp_path):
    machine = Machine(tmp_path, LINUX | {"python3.12": PYTHON})
    (machine.root / ".venv.lock").mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    (machine.root / ".venv.lock" / "pid").write_text(str(gone.pid))
    assert machine.run("setup").returncode == 0
    assert not (machine.root / ".venv.lock").exists()


def test_an_unknown_command_shows_the_usage(tmp_path):
    ran = Machine(tmp_path, LINUX).run("fly")
    assert ran.returncode == 1
    assert ran.stderr.startswith("run: usage: ./run setup | demo")
