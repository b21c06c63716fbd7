"""Files of settings: what each format says, the line of everything, and a sentence for whatever is wrong with one."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from config.errors import InvalidConfigurationError
from config.files import LARGEST, read_settings
from config.loader import load_config
from config.ppo_config import PPOConfig


def read(folder: Path, name: str, content: str | bytes) -> dict[str, tuple[object, int | None]]:
    """Name → (value, line)."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return {one.name: (one.value, one.line) for one in read_settings(path, lambda key: key == "logit_bias")}


YAML = """\
# a comment
trainer:
  learning_rate: 1e-5   # a number, whatever YAML 1.1 says
  system_prompt: no
  model_name: 12:30
  dataset_name: 2026-01-01
  seed: 0x10
  verbose: true
deep:
  deeper:
    top_p: .5
    adapter_path: ~
    output_dir: "1e-5"
    entropy_coef: -1.
logit_bias: {5: -.inf, 7: 2}
"""


def test_yaml_has_the_types_of_its_version_1_2(tmp_path: Path) -> None:
    found = read(tmp_path, "a.yaml", YAML)
    assert found == {
        "learning_rate": (1e-5, 3),
        "system_prompt": ("no", 4),
        "model_name": ("12:30", 5),
        "dataset_name": ("2026-01-01", 6),
        "seed": (16, 7),
        "verbose": (True, 8),
        "top_p": (0.5, 11),
        "adapter_path": (None, 12),
        "output_dir": ("1e-5", 13),
        "entropy_coef": (-1.0, 14),
        "logit_bias": ({"5": float("-inf"), "7": 2}, 15),
    }
    assert isinstance(found["learning_rate"][0], float)


def test_yaml_does_not_depend_on_what_others_have_done_to_the_library(tmp_path: Path) -> None:
    """mlx_lm.lora adds a rule to yaml.SafeLoader for the whole process; any rule there must be without effect."""
    import yaml

    class Changed(yaml.SafeLoader):
        pass

    before = read(tmp_path, "a.yaml", YAML)
    resolvers = yaml.SafeLoader.yaml_implicit_resolvers
    try:
        yaml.SafeLoader.yaml_implicit_resolvers = {}
        yaml.resolver.BaseResolver.yaml_implicit_resolvers, kept = (
            {},
            yaml.resolver.BaseResolver.yaml_implicit_resolvers,
        )
        assert read(tmp_path, "a.yaml", YAML) == before
    finally:
        yaml.SafeLoader.yaml_implicit_resolvers = resolvers
        yaml.resolver.BaseResolver.yaml_implicit_resolvers = kept


def test_toml_and_json_give_the_line_of_each_key(tmp_path: Path) -> None:
    toml = 'seed = 1\n[a.b]\nsystem_prompt = """\nseed = 5\n"""\n"learning_rate" = 1e-5\n[[rewards]]\nname = "x"\n'
    assert read(tmp_path, "a.toml", toml) == {
        "seed": (1, 1),
        "system_prompt": ("seed = 5\n", 3),
        "learning_rate": (1e-5, 6),
        "rewards": ([{"name": "x"}], 7),
    }
    json = '{"a": {"seed": 1,\n "rewards": [{"name": "x"},\n {"name": "y"}]},\n\n "model_name": "e:\\"seed\\": {"}'
    assert read(tmp_path, "a.json", json) == {
        "seed": (1, 1),
        "rewards": ([{"name": "x"}, {"name": "y"}], 2),
        "model_name": ('e:"seed": {', 5),
    }


@pytest.mark.parametrize("name", ["a.yaml", "a.toml", "a.json"])
@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_byte_order_marks_and_line_ends_change_nothing(
    tmp_path: Path, name: str, prefix: bytes, end: bytes
) -> None:
    lines = {
        "a.yaml": [b"x:", b"  seed: 3"],
        "a.toml": [b"[x]", b"seed = 3"],
        "a.json": [b"{", b'"seed": 3}'],
    }
    assert read(tmp_path, name, prefix + end.join(lines[name]) + end) == {"seed": (3, 2)}


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    for name in ("a.yaml", "a.toml", "a.json"):
        assert read(tmp_path, name, "") == {}
    assert read(tmp_path, "a.yaml", "# only a comment\n") == {}


WRONG = [
    ("a.toml", "seed = 1\nlearning_rate = \n", r"a\.toml:2: this is not TOML: invalid value"),
    ("a.toml", "seed = 1\nseed = 2\n", r"a\.toml:2: this is not TOML: cannot overwrite a value"),
    ("a.toml", "seed = no\n", r"a\.toml:1: this is not TOML"),
    ("a.yaml", "seed: 1\nx: [1\n", r"a\.yaml:\d: this is not YAML"),
    (
        "a.yaml",
        "seed: 1\nx:\n  seed: 1\n  seed: 2\n",
        r'a\.yaml:4: "seed" is given twice \(first in line 3\)',
    ),
    ("a.yaml", "a: &x {seed: 1}\nb:\n  <<: *x\n", r"a\.yaml:3: merge keys"),
    ("a.yaml", "seed: !!python/object:os.system x\n", r"a\.yaml:1: the tag .* is not understood"),
    ("a.yaml", "a: 1\n---\nb: 2\n", r"a\.yaml:2: this is not YAML: but found another document"),
    ("a.yaml", "[1, 2]: 3\n", r"a\.yaml:1: a name is expected before the colon"),
    ("a.yaml", "- 1\n- 2\n", r"a\.yaml: settings \(name and value\) are expected, found \[1, 2\]"),
    ("a.yaml", "a: &a [*a]\n", r"a\.yaml:\d: |nested too deeply"),
    ("a.json", '{"seed": 1,}', r"a\.json:1: this is not JSON"),
    ("a.json", '{"x": {"seed": 1,\n"seed": 2}}', r'a\.json:2: "seed" is given twice \(first in line 1\)'),
    ("a.json", "[" * 100_000, r"a\.json: it is nested too deeply"),
    ("a.yaml", "[" * 10_000, r"a\.yaml.*: (it is nested too deeply|this is not YAML)"),
    ("a.toml", "x = " + "[" * 100_000, r"a\.toml: it is nested too deeply"),
    ("a.toml", "seed = " + "9" * 10_000, r"a\.toml: this is not TOML that can be read"),
    ("a.json", '{"seed": ' + "9" * 10_000 + "}", r"a\.json: this is not JSON that can be read"),
    ("a.yaml", "seed: " + "9" * 10_000, r"a\.yaml:1: a whole number that is too long"),
    ("a.toml", "seed = 1\nx = '\0'\n", r"a\.toml:2: there is a nul byte"),
    ("a.toml", b"seed = 1\n# caf\xe9\n", r"a\.toml:2: byte 0xe9 is not UTF-8"),
    ("a.ini", "seed = 1", r"a\.ini: the name ends in '\.ini'; \.toml, \.yaml, \.yml or \.json is expected"),
    ("a.toml", "#" * (LARGEST + 1), r"a\.toml: it has 1\.0 MB"),
]


@pytest.mark.parametrize(
    ("name", "content", "sentence"), WRONG, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(WRONG)]
)
def test_a_bad_file_is_refused_in_a_sentence(
    tmp_path: Path, name: str, content: str | bytes, sentence: str
) -> None:
    with pytest.raises(InvalidConfigurationError, match=sentence) as caught:
        read(tmp_path, name, content)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    for path, reason in [("none.toml", "there is no such file"), ("folder.toml", "this is a folder")]:
        with pytest.raises(InvalidConfigurationError, match=reason):
            read_settings(tmp_path / path, lambda _: False)
    with pytest.raises(InvalidConfigurationError, match="cannot be read"):
        read_settings("a\0.toml", lambda _: False)


def test_aliases_cannot_grow_without_bound(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    with pytest.raises(InvalidConfigurationError, match="more than 20000 values"):
        read(tmp_path, "a.yaml", "\n".join(lines))


# Anything at all ------------------------------------------------------------------------------------------

NAMES = st.sampled_from(
    ["seed", "learning_rate", "rewards", "lr_schedule_config", "trainer", "beta", "x", "logit_bias"]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.just(10**400),
    st.just("1e-5"),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
TEXTS = st.text(alphabet=st.sampled_from(list("seed=:-[]{}'\"#&*!|>,.%@`\n\t \\0123e\0é")), max_size=60)


@pytest.mark.parametrize("suffix", [".toml", ".yaml", ".json"])
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(content=st.one_of(st.binary(max_size=40), TEXTS.map(str.encode)))
@example(content=b"seed = nan")
@example(content=b"a: *b")
def test_any_bytes_give_a_config_or_a_sentence(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    _config_or_sentence(path)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(content=st.dictionaries(NAMES | st.text(max_size=5), VALUES, max_size=5))
@example(content={"learning_rate": float("nan")})
@example(content={"learning_rate": 10**400})
@example(content={"batch_size": True})
@example(content={"entropy_coef": float("nan")})
@example(content={"rewards": [{"name": "x", "weight": 10**400}]})
@example(content={"logit_bias": {"x": []}})
@example(content={"mlx_grpo": {"batch_size": [1], "num_generations": "x"}})
@example(content={"trainer": {"lr_schedule_config": {"name": [], "arguments": {}}, "grpo_beta": None}})
@example(content={"lr_schedule_config": {"name": "cosine_decay", "arguments": [1e-5, "x", None]}})
def test_any_values_give_a_config_or_a_sentence(tmp_path: Path, content: dict[str, object]) -> None:
    import json
    import sys

    path = tmp_path / "a.json"
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
    finally:
        sys.set_int_max_str_digits(limit)
    _config_or_sentence(path)


def _config_or_sentence(path: Path) -> None:
    """Any other exception than ours fails the test."""
    with contextlib.suppress(InvalidConfigurationError):
        load_config(PPOConfig, files=path, environ={})


def test_a_folder_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigurationError) as caught:
        read_settings(tmp_path, lambda name: False)
    assert str(caught.value) == f"{tmp_path}: this is a folder; a configuration file is expected"
