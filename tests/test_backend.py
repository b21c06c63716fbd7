"""base_setup.backend: decisions as tables, and what it does to a process in a process of its own."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from base_setup import backend

ROOT = Path(__file__).resolve().parents[1]
OURS = ("MLX_PPO_BLAS", "MLX_DISABLE_COMPILE", "KMP_BLOCKTIME", "OPENBLAS_THREAD_TIMEOUT", "LD_PRELOAD")

cpu_wheel = pytest.mark.skipif(backend.installed_build() != "cpu", reason="about MLX's CPU wheel on Linux")
blas_wheel = pytest.mark.skipif(
    backend.installed_build() != "cpu" or not backend._openblas_wheel(),
    reason="needs MLX's CPU wheel and the scipy-openblas32 wheel",
)


def child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh Python, whose environment has none of our variables but those given."""
    inherited = {name: value for name, value in os.environ.items() if name not in OURS}
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


# --- decisions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "wheels", "build"),
    [
        ("Darwin", [], "metal"),
        ("Linux", ["mlx-cpu"], "cpu"),
        ("Linux", ["mlx-cuda-12"], "cuda"),
        ("Linux", ["mlx-cuda-13"], "cuda"),
        ("Linux", ["mlx-cpu", "mlx-cuda-13"], "cuda"),
        ("Linux", [], "source"),
    ],
)
def test_the_build_is_known_from_system_and_wheels(system, wheels, build):
    assert backend.mlx_build(system, wheels) == build


@pytest.mark.parametrize("build", ["metal", "cuda", "source"])
@pytest.mark.parametrize("mlx_imported", [False, True])
def test_only_the_cpu_wheel_is_meddled_with(build, mlx_imported):
    assert backend.blas_action(build, None, False, mlx_imported) == "leave"


@pytest.mark.parametrize(
    ("requested", "present", "mlx_imported", "action"),
    [
        (None, False, False, "load"),
        ("/some/lib.so", False, False, "load"),
        (None, False, True, "late"),
        (None, True, False, "present"),
        (None, True, True, "present"),
        ("none", False, False, "leave"),
        ("none", False, True, "leave"),
        ("none", True, False, "present"),
    ],
)
def test_what_to_do_about_the_blas(requested, present, mlx_imported, action):
    assert backend.blas_action("cpu", requested, present, mlx_imported) == action


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(None, False), ("1", False), ("yes", False), ("0", True), ("", True), ("false", True), ("OFF", True)],
)
def test_disable_compile_set_to_no_means_compile(value, wanted):
    assert backend.wants_compiled_kernels(value) is wanted


def test_environment_defaults_differ_by_build():
    everywhere = {"TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_TELEMETRY"}
    threads = {"KMP_BLOCKTIME", "OPENBLAS_THREAD_TIMEOUT"}
    assert set(backend.environment_defaults("metal")) == everywhere
    assert set(backend.environment_defaults("cuda")) == everywhere
    assert set(backend.environment_defaults("cpu")) == everywhere | threads | {"MLX_DISABLE_COMPILE"}
    assert set(backend.environment_defaults("cpu", compiled_kernels=True)) == everywhere | threads


# --- the process ----------------------------------------------------------------------------------


def test_importing_it_imports_nothing_heavy():
    loaded = child("import base_setup.backend, sys; print(*sys.modules)").stdout.split()
    assert not {"mlx.core", "numpy", "mlx_lm", "transformers", "pydantic"} & set(loaded)
    assert [name for name in loaded if name.startswith("base_setup")] == ["base_setup", "base_setup.backend"]


@blas_wheel
@pytest.mark.skipif(sys.platform != "linux", reason="LD_DEBUG is glibc's")
def test_the_loader_binds_mlx_to_the_fast_blas(tmp_path):
    """What ``fast_blas`` claims, held against the loader's own log of where libmlx.so found the symbol."""
    code = "import base_setup.backend as b, mlx.core; print(b.fast_blas())"
    claimed = child(code, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(tmp_path / "log")).stdout.strip()
    log = "".join(file.read_text(errors="replace") for file in tmp_path.glob("log.*"))
    bound = re.findall(r"binding file \S.*libmlx\.so \[0\] to (.+) \[0\]: normal symbol `cblas_sgemm'", log)
    assert bound == [claimed]
    assert claimed.endswith("libopenblas_python.so")


@blas_wheel
def test_describe_names_the_blas_and_products_stay_right():
    code = """
import base_setup.backend as b, mlx.core as mx, numpy as np
x, y = mx.random.normal((37, 65)), mx.random.normal((65, 21))
assert np.allclose(np.array(x @ y), np.array(x) @ np.array(y), atol=1e-4)
print(b.describe())
"""
    ran = child(code)
    assert re.fullmatch(
        r"cpu: OpenBLAS 0\.3\.23 \(scipy-openblas32 wheel\), \d+ threads?, float32\n", ran.stdout
    )
    assert ran.stderr == ""


@cpu_wheel
def test_mlx_imported_first_is_told_once():
    code = """
import mlx.core
import base_setup.backend as b
import base_setup.backend
b.prepare()
print(b.fast_blas(), b.describe())
"""
    ran = child(code)
    assert ran.stdout.startswith("None cpu: reference BLAS (slow;")
    assert ran.stderr.count("RuntimeWarning: mlx.core was imported before base_setup.backend") == 1
    assert "<string>:3: RuntimeWarning" in ran.stderr  # the line to change


@blas_wheel
def test_a_preloaded_blas_is_recognised_even_if_mlx_came_first():
    code = "import mlx.core, base_setup.backend as b; print(b.describe())"
    library = Path(backend._openblas_wheel()[0])  # by name: LD_PRELOAD splits a path at its spaces
    ran = child(code, LD_PRELOAD=library.name, LD_LIBRARY_PATH=str(library.parent))
    assert ran.stdout.startswith("cpu: OpenBLAS")
    assert ran.stderr == ""


@cpu_wheel
def test_none_leaves_mlx_with_its_own():
    code = """
import base_setup.backend as b, mlx.core as mx
print((mx.ones((2, 3)) @ mx.ones((3, 2))).tolist(), b.describe())
"""
    ran = child(code, MLX_PPO_BLAS="none")
    assert ran.stdout.startswith(
        "[[3.0, 3.0], [3.0, 3.0]] cpu: reference BLAS (slow; pip install scipy-openblas32"
    )
    assert ran.stderr == ""


@blas_wheel
@pytest.mark.parametrize("library", ["/no/such/library.so", "libm.so.6"])
def test_an_unusable_choice_is_reported_and_the_next_best_taken(library):
    ran = child("import base_setup.backend as b; print(b.fast_blas())", MLX_PPO_BLAS=library)
    assert ran.stdout.strip().endswith("libopenblas_python.so")
    assert ran.stderr.count(f"RuntimeWarning: MLX_PPO_BLAS={library} cannot be used") == 1


@cpu_wheel
def test_nothing_found_falls_back_with_the_remedy(monkeypatch):
    monkeypatch.setattr(backend, "blas_candidates", lambda: ["/no/such/library.so"])
    path, complaint = backend.load_blas(None)
    assert path is None
    assert complaint.endswith(f"pip install {backend.BLAS_WHEEL}")


@cpu_wheel
def test_the_users_environment_wins():
    names = ["KMP_BLOCKTIME", "MLX_DISABLE_COMPILE"]
    code = f"import base_setup.backend, os; print(*(os.environ[name] for name in {names}))"
    assert child(code).stdout.split() == ["1", "1"]
    assert child(code, KMP_BLOCKTIME="7", MLX_DISABLE_COMPILE="2").stdout.split() == ["7", "2"]


@cpu_wheel
def test_compiled_kernels_get_a_private_folder_that_goes_away():
    code = """
import base_setup.backend, os, stat, tempfile
print(os.environ.get("MLX_DISABLE_COMPILE"), tempfile.gettempdir())
print(os.environ["TMPDIR"], oct(stat.S_IMODE(os.stat(os.environ["TMPDIR"]).st_mode)))
"""
    first, second = child(code, MLX_DISABLE_COMPILE="0").stdout.splitlines()
    assert first == f"None {tempfile.gettempdir()}"
    folder, mode = second.rsplit(" ", 1)
    assert mode == "0o700"
    assert not os.path.exists(folder)


def test_a_spawned_worker_computes_after_its_parent_has():
    code = """
import base_setup.backend as b, mlx.core as mx
mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
with b.spawn_context().Pool(1) as pool:
    print(pool.apply_async(eval, ("__import__('mlx.core').core.ones((5,)).sum().item()",)).get(timeout=60))
"""
    assert child(code).stdout == "5.0\n"


# --- what the rest of the project asks ------------------------------------------------------------


def test_compute_dtype_is_float32_on_cpu_and_the_checkpoints_own_elsewhere(monkeypatch):
    import mlx.core as mx

    for kind, expected in (("cpu", mx.float32), ("metal", mx.bfloat16), ("cuda", mx.bfloat16)):
        monkeypatch.setattr(backend, "device_kind", lambda kind=kind: kind)
        assert backend.compute_dtype(mx.bfloat16) == expected


def test_device_kind_agrees_with_the_build():
    assert backend.device_kind() in {"cpu", "metal", "cuda"}
    if backend.installed_build() == "cpu":
        assert backend.device_kind() == "cpu"
        assert backend.set_memory_limits() == 0


def test_one_seed_repeats_all_three_generators():
    import random

    import mlx.core as mx
    import numpy as np

    def draw(seed):
        backend.seed_everything(seed)
        return random.random(), float(np.random.random()), mx.random.uniform(shape=(3,)).tolist()

    assert draw(2**40 + 1) == draw(2**40 + 1)
    assert draw(1) != draw(2)
    with pytest.raises(ValueError, match="-1"):
        backend.seed_everything(-1)
