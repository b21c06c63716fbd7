"""Nothing leaves the machine without a repository's name and consent: against a hub of our own on loopback."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as an upload of small files needs."""

    server: Hub

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        self.server.asked.append(("POST", self.path))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refuses:
            self._answer({"error": "You have been refused"}, 403)
        elif self.path.endswith("/repos/create"):
            asked = json.loads(body)
            self.server.private = asked.get("private")
            self._answer({"url": f"{self.server.address}/{asked.get('organization')}/{asked['name']}"})
        elif "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.address}/me/model/commit/{'a' * 40}"
            self._answer({"commitUrl": url, "commitOid": "a" * 40, "hookOutput": ""})
        else:
            self._answer({}, 200)

    def do_GET(self) -> None:
        self.server.asked.append(("GET", self.path))
        self.server.tokens.add(self.headers.get("Authorization"))
        if "/api/models/" in self.path:
            self._answer({"id": "me/model", "sha": "a" * 40, "siblings": [], "private": False})
        else:
            self._answer({"error": "not found"}, 404)

    def _chunks(self) -> bytes:
        parts = []
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        return b"".join(parts)

    def _answer(self, content: dict[str, Any], code: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: Any) -> None:
        pass


class Hub(ThreadingHTTPServer):
    """What it was asked for and what it was given."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hub)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[tuple[str, str]] = []
        self.files: dict[str, bytes] = {}
        self.tokens = set[str | None]()
        self.private: object = "never asked"
        self.refuses = False


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def convert(hub: Hub, folder: Path, *more: str, home: Path) -> subprocess.CompletedProcess[str]:
    words = [
        "convert",
        "--hf-path",
        "embedded",
        "--mlx-path",
        str(folder),
        "--upload-repo",
        "me/model",
        *more,
    ]
    ours = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_x", "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment = {k: v for k, v in environment.items() if k != "HF_HUB_OFFLINE"}
    return subprocess.run(
        [sys.executable, "main.py", *words],
        capture_output=True, text=True, cwd=ROOT, env={**environment, **ours}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
def test_an_upload_needs_consent_arrives_whole_and_fails_in_a_sentence(hub: Hub, tmp_path: Path) -> None:
    # Nobody at the terminal, and no --yes: nothing is asked of the hub at all.
    kept = convert(hub, tmp_path / "kept", home=tmp_path)
    assert kept.returncode == 0, kept.stderr
    assert "to be uploaded: " in kept.stdout
    assert "for everybody to see" in kept.stdout
    assert f"not uploaded; the model is in {tmp_path / 'kept'} (--yes uploads without asking)" in kept.stdout
    assert hub.asked == []

    sent = convert(hub, tmp_path / "sent", "--yes", home=tmp_path)
    assert sent.returncode == 0, sent.stderr
    assert ("POST", "/api/repos/create") in hub.asked
    assert hub.private in (None, False)
    assert "mlx_lm.chat --model me/model" in hub.files["README.md"].decode()
    assert hub.tokens - {None} == {"Bearer hf_x"}
    here = {str(f.relative_to(tmp_path / "sent")): f.read_bytes() for f in (tmp_path / "sent").rglob("*")
            if f.is_file() and ".cache" not in f.parts}  # fmt: skip
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= here.keys()
    assert hub.files.keys() - {".gitattributes"} == here.keys() - {".gitattributes"}
    assert all(hub.files[name] == here[name] for name in hub.files)

    hub.refuses = True
    failed = convert(hub, tmp_path / "failed", "--yes", home=tmp_path)
    assert failed.returncode == 1
    [line] = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert "--upload-repo: me/model could not be uploaded" in line
    assert f"the model is in {tmp_path / 'failed'}, hf upload me/model" in line
    assert "Traceback" not in failed.stderr
    assert (tmp_path / "failed" / "model.safetensors").is_file()
