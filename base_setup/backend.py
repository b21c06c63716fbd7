"""The machine under MLX: a fast BLAS on Linux CPUs, quiet libraries, dtype, seeds and memory limits.

Import this module before ``mlx.core``. The CPU wheel of MLX links the netlib reference BLAS, and a real BLAS
that is already in the process takes its place; one that comes later is ignored, without a word. Importing
the module is all there is to do (it calls ``prepare()`` once). It imports nothing heavy and nothing of ours.

    MLX_PPO_BLAS=/path/to/libblas.so   use this BLAS;  MLX_PPO_BLAS=none   leave MLX with its own
    MLX_DISABLE_COMPILE=0              compile kernels on CPU too (off there by default)
    python -m base_setup.backend       print in one line what MLX runs on

float32 GFLOP/s on two cores of an AMD EPYC with AVX-512, ``benchmarks/blas.py``, best of two runs:

                                       2048³   256³   x[32,1024]·Wᵀ[4096,1024]   wheel
    the reference BLAS in the wheel        4      5      4                       –
    OpenBLAS 0.3.23, scipy-openblas32    459    374    200                       11 MB; x86-64 and arm64
    … held to its AVX2 kernels           245    220    152
    MKL 2026.2, mkl                      190    204    143                       about 200 MB, x86-64 only
    BLIS 0.9 from Debian (one thread)     41     38     34

So OpenBLAS from its small wheel is what we ship and try first. MKL was a few per cent ahead of it on an
Intel CPU, not enough to prefer one that happens to be installed; ``MLX_PPO_BLAS`` does prefer it. The wheel
is pinned because later versions prefix every symbol (``scipy_cblas_sgemm``), and MLX would not find them.

Left out: Metal, CUDA and MLX built from source multiply matrices their own way, and nothing is done for them.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import random
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Collection
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

BLAS_WHEEL = "scipy-openblas32==0.3.23.293.2"

_prepared = False
_blas_path: str | None = None  # the file MLX takes cblas_sgemm from; None where that is its own affair


# --- decisions: pure functions, so that a test can ask about machines it does not run on ----------


def mlx_build(system: str, wheels: Collection[str]) -> str:
    """Which MLX is installed: "metal", "cuda", "cpu", or "source" for one built on the spot."""
    if system == "Darwin":
        return "metal"
    if any(name.startswith("mlx-cuda") for name in wheels):
        return "cuda"
    return "cpu" if "mlx-cpu" in wheels else "source"


def blas_action(build: str, requested: str | None, present: bool, mlx_imported: bool) -> str:
    """What to do about the BLAS: "leave" it, it is "present" already, it is too "late", or "load" one."""
    if build != "cpu":
        return "leave"
    if present:  # LD_PRELOAD, or somebody loaded one before us: theirs wins, even over requested="none"
        return "present"
    if requested == "none":
        return "leave"
    return "late" if mlx_imported else "load"


def wants_compiled_kernels(value: str | None) -> bool:
    """Whether MLX_DISABLE_COMPILE says "do compile". MLX itself takes any value, "0" too, as "do not"."""
    return value is not None and value.strip().lower() in {"", "0", "false", "no", "off"}


def environment_defaults(build: str, compiled_kernels: bool = False) -> dict[str, str]:
    """Variables that libraries read once, when they start. The user's own settings always win."""
    defaults = {
        "TRANSFORMERS_VERBOSITY": "error",  # "PyTorch was not found …": we use its tokenizers only
        "HF_HUB_DISABLE_TELEMETRY": "1",  # nothing phones home unless asked
    }
    if build == "cpu":
        # Between two products an idle BLAS thread spins, waiting for more: by default for 200 ms in Intel's
        # OpenMP and 2^26 cycles in OpenBLAS. MLX's elementwise kernels run on one thread, so the others spin
        # half of the time and take cycles from anything else that runs. 1 ms and 2^20 cycles cost no speed
        # in a layer's worth of products (5.4 ms either way) and free 0.15 to 0.3 of two cores.
        defaults |= {"KMP_BLOCKTIME": "1", "OPENBLAS_THREAD_TIMEOUT": "20"}
        if (
            not compiled_kernels
        ):  # mx.compile calls g++ at run time, half a second a kernel, and gains little here
            defaults |= {"MLX_DISABLE_COMPILE": "1"}
    return defaults


# --- preparing the process ------------------------------------------------------------------------


def prepare() -> None:
    """Set the process up for MLX. Runs when this module is imported; a second call does nothing."""
    global _prepared
    if _prepared:
        return
    _prepared = True
    build = installed_build()
    set_environment(build)
    set_blas(build)


def installed_build() -> str:
    """``mlx_build`` of this machine, found without importing MLX."""
    wheels = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
    return mlx_build(platform.system(), [name for name in wheels if _is_installed(name)])


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def set_environment(build: str) -> None:
    """Put ``environment_defaults`` in place, and make MLX_DISABLE_COMPILE=0 mean what it says."""
    compiled_kernels = wants_compiled_kernels(os.environ.get("MLX_DISABLE_COMPILE"))
    if compiled_kernels:
        del os.environ["MLX_DISABLE_COMPILE"]
        if build == "cpu":
            use_private_kernel_cache()
    for name, value in environment_defaults(build, compiled_kernels).items():
        os.environ.setdefault(name, value)


def use_private_kernel_cache() -> None:
    """Give the kernels MLX compiles on CPU a folder of this process alone, removed at its end.

    MLX keeps them in $TMPDIR/mlx/<version>/cpu, a name anybody on the machine can guess, writes them in place
    and loads whatever it finds: a half-written one kills every later run with SIGBUS. There is no setting for
    the folder, so TMPDIR is moved; ``tempfile`` has made up its mind by then and keeps its own.
    """
    folder = tempfile.mkdtemp(prefix="mlx-ppo-kernels-")  # decides tempfile.tempdir, before TMPDIR changes
    os.environ["TMPDIR"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def set_blas(build: str) -> None:
    """Have a fast BLAS in the process before MLX looks for one, or say once why it does not."""
    global _blas_path
    requested = os.environ.get("MLX_PPO_BLAS")
    present = global_blas() if build == "cpu" else None
    action = blas_action(build, requested, present is not None, "mlx.core" in sys.modules)
    if action == "present":
        _blas_path = present
    elif action == "load":
        _blas_path, complaint = load_blas(requested)
        if complaint:
            warnings.warn(complaint, RuntimeWarning, stacklevel=4)
    elif action == "late":
        warnings.warn(
            "mlx.core was imported before base_setup.backend, so matrix products stay with MLX's reference "
            "BLAS, 20 to 100 times slower: import base_setup.backend first.",
            RuntimeWarning,
            stacklevel=4,  # the line that imported this module: set_blas, prepare, <module>, importer
        )


def load_blas(requested: str | None) -> tuple[str | None, str]:
    """Load the BLAS asked for, or else the best there is; return its file and what to complain about."""
    if requested and (path := load_first_usable([requested])):
        return path, ""
    path = load_first_usable(blas_candidates())
    if requested:
        return path, (
            f"MLX_PPO_BLAS={requested} cannot be used (it must be a shared library with 32-bit cblas_sgemm): "
            f"going on with {path or 'the slow reference BLAS'}."
        )
    if path is None:
        return None, (
            "no fast BLAS was found, so matrix products run 20 to 100 times slower than they could: "
            f"pip install {BLAS_WHEEL}"
        )
    return path, ""


def blas_candidates() -> list[str]:
    """Libraries to try, best first: our wheel, then what the environment or the system happens to have."""
    lib = Path(sys.prefix) / "lib"
    return [
        *_openblas_wheel(),
        *map(str, sorted(lib.glob("libmkl_rt.so*"), reverse=True)),  # pip's mkl and conda's
        *map(str, sorted(lib.glob("libopenblas.so*"), reverse=True)),  # conda's
        "libopenblas.so.0",  # by name alone the loader searches the system: Debian's libopenblas0, Fedora's
        "libopenblas.so",
    ]


def _openblas_wheel() -> list[str]:
    # Found but not imported: its __init__ reads metadata and loads whichever file comes first.
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or spec.origin is None:
        return []
    return [str(Path(spec.origin).parent / "lib" / "libopenblas_python.so")]


def load_first_usable(candidates: list[str]) -> str | None:
    """Load the first candidate that has 32-bit ``cblas_sgemm``, and return the file it came from."""
    for candidate in candidates:
        try:
            library = ctypes.CDLL(
                candidate
            )  # RTLD_LOCAL: a look at it, without putting its symbols before others
            if _has_sgemm(library):
                ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
                return global_blas()
        except OSError:  # not there, not a library, another architecture, a missing dependency
            continue
    return None


def _has_sgemm(library: ctypes.CDLL) -> bool:
    # Sizes are 64-bit in some builds of OpenBLAS under the same names: MLX would hand it rubbish.
    return hasattr(library, "cblas_sgemm") and "USE64BITINT" not in _openblas_config(library)


def _openblas_config(library: ctypes.CDLL) -> str:
    if not hasattr(library, "openblas_get_config"):
        return ""
    library.openblas_get_config.restype = ctypes.c_char_p
    return str(library.openblas_get_config().decode())


class _SymbolInfo(ctypes.Structure):  # Dl_info of <dlfcn.h>
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def global_blas() -> str | None:
    """The file that provides ``cblas_sgemm`` to whatever is loaded next, as the dynamic loader sees it.

    A library asks the process's global symbols before its own dependencies, and binds when it is loaded. So
    what this says just before MLX is imported is what MLX will use (a test holds it against the loader's own
    log). If MLX came first, a library that became global after it would be reported wrongly.
    """
    process = ctypes.CDLL(None)
    if not hasattr(process, "cblas_sgemm"):
        return None
    info = _SymbolInfo()
    process.dladdr(ctypes.cast(process.cblas_sgemm, ctypes.c_void_p), ctypes.byref(info))
    path = os.fsdecode(info.file or b"")
    return None if "mlx_cpu.libs" in path else path  # MLX's own, made global by unusual dlopen flags


# --- what the rest of the project asks ------------------------------------------------------------


def device_kind() -> str:
    """Where MLX computes by default: "cpu", "metal" or "cuda"."""
    import mlx.core as mx

    if mx.default_device().type == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def compute_dtype(checkpoint_dtype: mx.Dtype) -> mx.Dtype:
    """The dtype to hold weights in: float32 on CPU whatever the checkpoint says, its own on a GPU.

    16-bit products never reach the BLAS on CPU: 3 to 7 GFLOP/s instead of hundreds.
    """
    import mlx.core as mx

    return mx.float32 if device_kind() == "cpu" else checkpoint_dtype


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and MLX's global generators (MLX keeps one per thread: this thread's)."""
    import mlx.core as mx
    import numpy as np

    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy's old generator takes 32 bits, MLX's 64
    mx.random.seed(seed)


def set_memory_limits(cache_bytes: int | None = None) -> int:
    """Keep the model resident where the backend can; return the wired limit in bytes, 0 where there is none.

    On Metal the weights may otherwise be paged out between steps. ``cache_bytes`` bounds the freed buffers
    that MLX keeps for reuse, which grow with every new length; leave it None for MLX's own bound. No limit
    here makes running out of memory an error one could catch: MLX has none that does.
    """
    import mlx.core as mx

    if cache_bytes is not None:
        mx.set_cache_limit(cache_bytes)
    if device_kind() != "metal":
        return 0
    limit = int(mx.device_info()["max_recommended_working_set_size"])
    mx.set_wired_limit(limit)
    return limit


def spawn_context() -> SpawnContext:
    """How to start workers: a child forked after MLX has computed once hangs in its first evaluation."""
    return multiprocessing.get_context("spawn")


def fast_blas() -> str | None:
    """The file of the BLAS that took over from the reference one in MLX's CPU wheel, or None."""
    return _blas_path


def describe() -> str:
    """One line for logs: ``cpu: OpenBLAS 0.3.23 (scipy-openblas32 wheel), 2 threads, float32``."""
    import mlx.core as mx

    kind = device_kind()
    if kind == "cpu":
        return f"cpu: {_describe_blas(installed_build())}, float32"
    info = mx.device_info()
    name = info.get("device_name", "unknown GPU")
    memory = int(info.get("memory_size", info.get("total_memory", 0))) / 2**30
    return f"{kind}: {name}, {memory:.0f} GB, the checkpoint's own dtype"


def _describe_blas(build: str) -> str:
    if build == "metal":
        return "Accelerate"
    if build == "source":
        return "the BLAS this MLX was built with"
    if build == "cuda":
        return "no GPU found, reference BLAS (slow; on a machine without a GPU: MLX_BACKEND=cpu ./run setup)"
    if _blas_path is not None:
        return describe_library(_blas_path)
    return f"reference BLAS (slow; pip install {BLAS_WHEEL}, and import base_setup.backend before mlx.core)"


def describe_library(path: str) -> str:
    """Name, version, origin and thread count of a BLAS that is loaded already."""
    library = ctypes.CDLL(path)
    origin = "scipy-openblas32 wheel" if "scipy_openblas32" in path else path
    if words := _openblas_config(library).split():
        version = words[1].removesuffix(".dev")
        return f"OpenBLAS {version} ({origin}), {_threads(library.openblas_get_num_threads())}"
    if hasattr(library, "mkl_get_version_string"):
        text = ctypes.create_string_buffer(200)
        library.mkl_get_version_string(text, len(text))
        found = re.search(r"Version ([\d.]+)", text.value.decode())
        return f"MKL {found[1] if found else ''} ({origin}), {_threads(library.MKL_Get_Max_Threads())}"
    return path


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


prepare()

if __name__ == "__main__":
    import mlx.core as mx

    mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))  # importing MLX does not show that its device computes
    print(describe())
