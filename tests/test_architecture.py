"""Who may import whom: read off the source, and shown to be able to fail on planted violations."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "config",
    "experience_buffer",
    "token_attribution",
    "reward_kl",
    "advantage",
    "base_setup",
    "data_loading",
    "models",
    "rewards",
    "training",
    "ppo_trainer",
    "checkpointing",
    "diagnosis",
    "monitoring",
    "tools",
    "command_line",
    "examples",
    "benchmarks",
)
BACKEND = "base_setup.backend"

#: The order of docs/architecture.md, lowest first; the longest name that fits a module decides.
LAYERS = (
    ("config",),
    ("experience_buffer.data_structures",),
    (
        "token_attribution",
        "reward_kl",
        "advantage",
        "training.policy_loss",
        "training.value_loss",
        "training.preference_loss",
        "training.preference_algorithms",
        "training.importance_correction",
    ),
    ("base_setup", "checkpointing", "data_loading", "models", "rewards"),
    ("experience_buffer", "training", "ppo_trainer.generator", "checkpointing.run_session"),
    ("ppo_trainer",),
    ("diagnosis",),
    ("main", "tools", "command_line", "examples", "benchmarks"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LEVEL["monitoring"] = LEVEL["training"]  # what it may import in its turn is a rule of its own
WITHOUT_MLX = ("config", "checkpointing", "rewards", "monitoring")
PURE = (
    "token_attribution.masking",
    "reward_kl",
    "advantage",
    "training.policy_loss",
    "training.value_loss",
    "training.preference_loss",
    "training.preference_algorithms",
    "training.importance_correction",
)
#: All that a function of arrays and numbers can need from elsewhere.
PURE_MAY_IMPORT = (*PURE, "__future__", "collections", "functools", "itertools", "math", "mlx.core", "typing")

Sources = Mapping[str, str]


class Import(NamedTuple):
    """One imported module; ``line`` is where, in ``module``."""

    module: str
    line: int
    target: str
    at_once: bool = True  # at the top of the module, not inside a function

    def __str__(self) -> str:
        return f"{self.module}, line {self.line}: {self.target}"


def under(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def is_package(module: str, sources: Sources) -> bool:
    return any(other.startswith(module + ".") for other in sources)


@functools.cache
def statements(text: str) -> list[tuple[ast.AST, bool]]:
    """What may be an import, and whether it is outside of functions."""
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    later = {id(inner) for function in functions for inner in ast.walk(function)}
    kinds = (ast.Import, ast.ImportFrom, ast.Call)
    return [(node, id(node) not in later) for node in ast.walk(tree) if isinstance(node, kinds)]


def imports(module: str, sources: Sources) -> Iterator[Import]:
    """Every import in the order of the text, those inside functions and by a constant name too."""
    package = module if is_package(module, sources) else module.rpartition(".")[0]
    found: list[Import] = []
    for node, at_once in statements(sources[module]):
        if isinstance(node, ast.Import):
            found += [Import(module, node.lineno, alias.name, at_once) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                origin = ".".join([*parents, *([origin] if origin else [])])
            # `from package import name`: a module where there is one, else what is inside `package`.
            inside = [f"{origin}.{alias.name}" for alias in node.names]
            targets = [name if name in sources else origin for name in inside]
            found += [Import(module, node.lineno, target, at_once) for target in targets]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.append(Import(module, node.lineno, str(node.args[0].value), at_once))
    yield from sorted(set(found), key=lambda one: one.line)


def ours(target: str) -> bool:
    return under(target, *PACKAGES, "main")


def level(module: str) -> int:
    return LEVEL[max((name for name in LEVEL if under(module, name)), key=len)]


def uses_mlx(target: str) -> bool:
    return under(target, "mlx", "mlx_lm")


# The rules: each gives the violations that it sees ------------------------------------------------------


def upward_imports(sources: Sources) -> list[str]:
    return [
        str(one)
        for module in sources
        if not is_package(module, sources)
        for one in imports(module, sources)
        if ours(one.target)
        and one.target != BACKEND
        and not is_package(one.target, sources)
        and level(one.target) > level(module)
    ]


def imports_of_whole_packages(sources: Sources) -> list[str]:
    """``from models import something`` hides which module is meant: only a package itself may say it."""
    return [
        str(one)
        for module in sources
        for one in imports(module, sources)
        if ours(one.target) and is_package(one.target, sources) and not under(module, one.target)
    ]


def crowded_package_files(sources: Sources) -> list[str]:
    """An ``__init__`` that imports makes whoever needs one module of the package pay for all of them."""
    return [
        str(one)
        for module in sources
        if is_package(module, sources)
        for one in imports(module, sources)
        if one.target not in (BACKEND, "__future__")
    ]


def upward_from_monitoring(sources: Sources) -> list[str]:
    return [
        str(one)
        for module in sources
        if under(module, "monitoring")
        for one in imports(module, sources)
        if ours(one.target) and not under(one.target, "monitoring", "config")
    ]


def imports_of_the_backend(sources: Sources) -> list[str]:
    return [str(one) for one in imports(BACKEND, sources) if ours(one.target)]


def mlx_where_there_is_none(sources: Sources) -> list[str]:
    """Directly, or through one of our packages that has it."""
    without = (*WITHOUT_MLX, "__future__")
    return [
        str(one)
        for module in sources
        if under(module, *WITHOUT_MLX)
        for one in imports(module, sources)
        if uses_mlx(one.target) or (ours(one.target) and not under(one.target, *without))
    ]


def mlx_before_the_backend(sources: Sources) -> list[str]:
    """MLX imported before anything that arranges its BLAS, in the order in which Python gets there.

    What stands inside functions is left to whoever calls them.
    """

    def arranges(target: str) -> bool:
        package = target.partition(".")[0]
        first = next((one.target for one in imports(package, sources)), "") if package in sources else ""
        return target == BACKEND or first == BACKEND

    violations = []
    for module in sources:
        package = module.partition(".")[0]
        if module == BACKEND or (package in sources and arranges(package)):
            continue
        for one in (one for one in imports(module, sources) if one.at_once):
            if arranges(one.target):
                break
            if uses_mlx(one.target):
                violations.append(str(one))
                break
    return violations


def impure(sources: Sources) -> list[str]:
    """Config, model, tokenizer, printing or randomness in what should be functions of arrays."""
    violations = []
    for module in sources:
        if not under(module, *PURE) or is_package(module, sources):
            continue
        violations += [
            str(one) for one in imports(module, sources) if not under(one.target, *PURE_MAY_IMPORT)
        ]
        for node in ast.walk(ast.parse(sources[module])):
            if isinstance(node, ast.Name) and node.id in ("print", "open"):
                violations.append(f"{module}, line {node.lineno}: {node.id}")
            elif isinstance(node, ast.Attribute) and node.attr == "random":
                violations.append(f"{module}, line {node.lineno}: random")
    return violations


def cycles(sources: Sources) -> list[str]:
    """Modules that import each other, at their top or inside functions."""
    after = {
        module: {one.target for one in imports(module, sources) if one.target in sources}
        for module in sources
        if not is_package(module, sources)
    }
    done: set[str] = set()
    found: list[str] = []

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.append(" → ".join((*path[path.index(module) :], module)))
        elif module not in done:
            for target in sorted(after.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in after:
        visit(module, ())
    return found


# The code ------------------------------------------------------------------------------------------------


def read_sources() -> dict[str, str]:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    files += [file for file in [ROOT / "main.py"] if file.exists()]
    sources = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file.read_text(encoding="utf-8")
    return sources


SOURCES = read_sources()
RULES = (
    upward_imports,
    imports_of_whole_packages,
    crowded_package_files,
    upward_from_monitoring,
    imports_of_the_backend,
    mlx_where_there_is_none,
    mlx_before_the_backend,
    impure,
    cycles,
)


def test_every_package_is_read_and_has_its_place_in_the_order() -> None:
    assert {name.partition(".")[0] for name in SOURCES} - {"main"} == set(PACKAGES)
    assert len(SOURCES) > 50
    for module in SOURCES:
        if not is_package(module, SOURCES):
            assert 0 <= level(module) < len(LAYERS)
    tracked = {folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").is_file()}
    assert tracked - {"scratch", "tests"} <= set(PACKAGES), "a new package needs its place in LAYERS"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule(rule) -> None:
    assert rule(SOURCES) == []


#: rule → (module, what is planted in it, what must be reported)
PLANTED = [
    (
        upward_imports,
        "config.ppo_config",
        "from experience_buffer.data_structures import Prompt",
        "data_structures",
    ),
    (upward_imports, "token_attribution.masking", "from rewards.registry import resolve", "registry"),
    (
        upward_imports,
        "training.policy_loss",
        "from training.model_trainer import ModelTrainer",
        "model_trainer",
    ),
    (upward_imports, "models.sft_model", "import training.model_trainer", "model_trainer"),
    (upward_imports, "rewards.registry", "import experience_buffer.buffer_manager as b", "buffer_manager"),
    (upward_imports, "ppo_trainer.generator", "from ppo_trainer.updater import Updater", "updater"),
    (upward_imports, "ppo_trainer.generator", "from .updater import Updater", "updater"),
    (upward_imports, "ppo_trainer.updater", "import main", "main"),
    (
        upward_imports,
        "ppo_trainer.updater",
        "def f():\n    from examples.digits_data import g",
        "digits_data",
    ),
    (upward_imports, "models.sft_model", "def f():\n    import ppo_trainer.callbacks", "callbacks"),
    (upward_imports, "models.sft_model", "from monitoring.plots import plot", "monitoring.plots"),
    (
        upward_imports,
        "base_setup.lora_setup",
        "importlib.import_module('ppo_trainer.callbacks')",
        "callbacks",
    ),
    (imports_of_whole_packages, "ppo_trainer.updater", "import models", "models"),
    (imports_of_whole_packages, "ppo_trainer.updater", "from models import NAME", "models"),
    (crowded_package_files, "models", "from models.sft_model import LanguageModel", "sft_model"),
    (upward_from_monitoring, "monitoring.plots", "from rewards.registry import resolve", "registry"),
    (imports_of_the_backend, BACKEND, "from config.errors import ToolkitError", "config.errors"),
    (mlx_where_there_is_none, "config.ppo_config", "import mlx.core as mx", "mlx.core"),
    (mlx_where_there_is_none, "rewards.registry", "def f():\n    from mlx_lm import load", "mlx_lm"),
    (mlx_where_there_is_none, "rewards.registry", "import base_setup.backend", BACKEND),
    (mlx_where_there_is_none, "monitoring.plots", "from models.sft_model import EMBEDDED", "sft_model"),
    (
        mlx_before_the_backend,
        "examples.digits_data",
        "import mlx.core\nimport base_setup.backend",
        "mlx.core",
    ),
    (mlx_before_the_backend, "rewards.registry", "import mlx_lm", "mlx_lm"),
    (impure, "advantage.td_error", "from config.ppo_config import PPOConfig", "config.ppo_config"),
    (impure, "reward_kl.kl_divergence", "import mlx.nn as nn", "mlx.nn"),
    (impure, "training.value_loss", "from token_attribution.trunk import Trunk", "token_attribution.trunk"),
    (impure, "token_attribution.masking", "print(1)", "print"),
    (impure, "advantage.group_relative", "noise = mx.random.normal((2,))", "random"),
    (cycles, "models.sft_model", "def f():\n    from models.policy_model import PolicyModel", "→"),
]


@pytest.mark.parametrize(
    ("rule", "module", "planted", "reported"), PLANTED, ids=[f"{r.__name__}-{m}" for r, m, *_ in PLANTED]
)
def test_a_planted_violation_is_reported(rule, module: str, planted: str, reported: str) -> None:
    """The rule is shown the code with one module's text replaced by the violation."""
    assert module in SOURCES
    violations = [one for one in rule({**SOURCES, module: planted}) if one not in rule(SOURCES)]
    assert len(violations) == 1
    assert module in violations[0]
    assert reported in violations[0]


def test_what_is_allowed_is_not_reported() -> None:
    """The checker can say yes: downward, sideways and the backend from anywhere."""
    sources = {
        **SOURCES,
        "training.value_loss": "import base_setup.backend\nfrom token_attribution.masking import masked_mean",
        "main": "from config.errors import ToolkitError\ndef f():\n    from examples import digits_data",
        "ppo_trainer.updater": "from ppo_trainer.generator import Generator\nfrom monitoring import recorder",
    }
    assert upward_imports(sources) == []
    assert imports_of_whole_packages(sources) == []


# The same, seen by Python itself -------------------------------------------------------------------------


def in_a_child(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_config_rewards_and_monitoring_are_imported_without_mlx() -> None:
    names = [name for name in SOURCES if under(name, *WITHOUT_MLX)]
    loaded = in_a_child(
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm', 'torch', 'transformers')])"
    )
    assert loaded == "[]"


def test_the_help_is_printed_without_mlx() -> None:
    loaded = in_a_child(
        "import sys, main\n"
        "parser = main.build_parser()\nassert 'usage' in parser.format_help()\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm')])"
    )
    assert loaded == "[]"


@pytest.mark.parametrize("first", ["base_setup.lora_setup", "models.prefix_cache", "advantage.gae_advantage"])
def test_whichever_module_comes_first_the_backend_comes_before_mlx(first: str) -> None:
    order = in_a_child(
        f"import sys, {first}\nprint([m for m in sys.modules if m in ('mlx.core', '{BACKEND}')])"
    )
    assert order == str([BACKEND, "mlx.core"])
