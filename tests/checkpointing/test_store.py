"""The protocol of checkpoints: whole or absent, the newest by sequence, never the last good one deleted."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from checkpointing import store as store_module
from checkpointing.durable import read_strict_json, write_strict_json
from checkpointing.store import MANIFEST, CheckpointStore, open_checkpoint
from config.errors import CheckpointError


def save(store: CheckpointStore, update: int, score: float | None = None, text: str = "weights") -> Path:
    return store.save("periodic", update, lambda folder: fill(folder, text), score=score).path


def fill(folder: Path, text: str = "weights") -> None:
    (folder / "value").mkdir()
    (folder / "a.bin").write_text(text)
    (folder / "value" / "b.bin").write_text("head")


def updates(store: CheckpointStore) -> list[int]:
    return [saved.update for saved in store.complete()]


def test_the_name_says_when_why_and_where(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path), 7)
    assert store_module._NAME.fullmatch(path.name)
    assert path.name.endswith("_periodic_update_7")
    assert os.readlink(tmp_path / "latest") == path.name
    saved = open_checkpoint(path)
    assert set(saved.files) == {"a.bin", "value/b.bin"}
    assert saved.files["a.bin"] == {
        "bytes": 7,
        # printf weights | sha256sum
        "sha256": subprocess.run(
            ["sha256sum", path / "a.bin"], capture_output=True, text=True, check=True
        ).stdout.split()[0],
    }


def test_the_newest_n_and_the_best_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2, keep_best=True)
    for update, score in [(1, 0.1), (2, 0.9), (3, 0.3), (4, 0.2), (5, 0.2)]:
        save(store, update, score)
    assert updates(store) == [2, 4, 5]
    assert not list(tmp_path.glob(".partial-*"))


def test_a_clock_that_is_set_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    save(store, 1)
    monkeypatch.setattr(time, "strftime", lambda form: "19990101_000000")
    for update in (2, 3):
        save(store, update)
    newest = store.newest()
    assert newest is not None
    assert newest.update == 3
    assert updates(store) == [2, 3]


def test_two_in_a_second_have_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "20260101_000000")
    store = CheckpointStore(tmp_path)
    assert save(store, 1) != save(store, 1)
    assert updates(store) == [1, 1]


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [remove, cut, flip, empty], ids=["missing", "cut", "flipped", "empty"])
@pytest.mark.parametrize("name", ["a.bin", "value/b.bin", MANIFEST])
def test_damage_is_named_and_the_one_before_is_offered(tmp_path: Path, harm, name: str) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    harm(save(store, 2) / name)
    with pytest.raises(CheckpointError, match=rf"{name.rpartition('/')[2]}.*update_1 .*--resume-fallback"):
        store.newest()
    said: list[str] = []
    taken = store.newest(fallback=True, say=said.append)
    assert taken is not None
    assert taken.update == 1
    assert name in said[0]


def test_with_none_left_it_says_so(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    cut(save(store, 1) / "a.bin")
    with pytest.raises(CheckpointError, match="no whole checkpoint is left"):
        store.newest(fallback=True)


def test_a_manifest_may_name_nothing_outside_its_folder(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path), 1)
    manifest = read_strict_json(path / MANIFEST)
    manifest["files"]["../../etc/passwd"] = manifest["files"].pop("a.bin")
    write_strict_json(path / MANIFEST, manifest)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(path)


def test_a_file_that_is_a_link_is_not_taken(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path), 1)
    (tmp_path / "elsewhere").write_text("weights")
    (path / "a.bin").unlink()
    (path / "a.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"a\.bin: a link \(to "):
        open_checkpoint(path)


def test_the_free_space_is_looked_at_first(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    with pytest.raises(CheckpointError, match=r"needs 1000000000\.0 GB"):
        store.save("periodic", 2, fill, size=10**18)
    assert updates(store) == [1]


def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path: Path) -> None:
    """The limit on a file's size stands in for a full disk: the same error at the same place, from the system."""
    store = CheckpointStore(tmp_path)
    save(store, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"update 2 .*could not be written \(File too large\)"):
            save(store, 2, text="w" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert updates(store) == [1]
    assert not list(tmp_path.glob(".partial-*"))
    assert os.readlink(tmp_path / "latest").endswith("update_1")


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any
from checkpointing import durable, store

at = int(sys.argv[2])
calls = 0

def counted(function):
    def call(*arguments, **named):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call

store.flush_to_disk = counted(store.flush_to_disk)
store.write_strict_json = counted(store.write_strict_json)
store.sha256_of = counted(store.sha256_of)
os.rename, os.replace = counted(os.rename), counted(os.replace)
folder = Path(sys.argv[1])

def fill(folder):
    for name in ("a", "b"):
        (folder / name).write_text(name * 100)

store.CheckpointStore(folder, keep_last_n=1).save("periodic", 2, fill)
print("through")
"""


def test_a_kill_between_any_two_steps_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    ends = []
    for at in range(1, 20):
        folder = tmp_path / str(at)
        save(CheckpointStore(folder), 1)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(folder), str(at)], cwd=root, capture_output=True, text=True
        )
        store = CheckpointStore(folder)
        newest = store.newest()  # checks every byte
        assert newest is not None
        ends.append(newest.update)
        store.clear_leftovers()
        assert not list(folder.glob(".partial-*"))
        if "through" in done.stdout:
            break
        assert done.returncode == -signal.SIGKILL
    else:
        pytest.fail("the save never came to its end")
    assert set(ends) == {1, 2}
    assert ends == sorted(ends)  # the old one until the rename, the new one from there


def test_numbers_that_json_has_not_survive(tmp_path: Path) -> None:
    content = {"a": [float("nan"), float("inf"), -float("inf"), 0.1], "b": {"c": None}}
    write_strict_json(tmp_path / "x.json", content)
    assert "NaN" not in (tmp_path / "x.json").read_text().replace('"NaN"', "")
    back = read_strict_json(tmp_path / "x.json")
    assert str(back) == str(content)


def test_a_score_that_is_not_finite_does_not_lose_the_checkpoint(tmp_path: Path) -> None:
    """keep_best goes by minus the validation loss, which may have overflowed."""
    store = CheckpointStore(tmp_path, keep_last_n=1)
    for update, score in [(1, -float("inf")), (2, -3.0), (3, -float("inf"))]:
        save(store, update, score)
    assert [(one.update, one.score) for one in store.complete()] == [(2, -3.0), (3, -float("inf"))]
    newest = store.newest()
    assert newest is not None
    assert newest.update == 3


@pytest.mark.parametrize(
    "change",
    [
        {"sequence": 1e400},
        {"files": {"a.bin": {}}},
        {"files": {"a.bin": {"bytes": "x", "sha256": ""}}},
        {"files": [1]},
        {"score": {"not_finite": "?"}},
        "[" * 100_000,
    ],
    ids=["infinite", "no sizes", "no number", "a list", "no score", "deep"],
)
def test_a_manifest_of_anything_is_named(tmp_path: Path, change: Any) -> None:
    store = CheckpointStore(tmp_path)
    path = save(store, 1) / MANIFEST
    content = {**json.loads(path.read_text()), **change} if isinstance(change, dict) else change
    path.write_text(json.dumps(content) if isinstance(content, dict) else content)
    assert store.complete() == []
    with pytest.raises(CheckpointError, match="missing, or not a manifest"):
        store.newest()
