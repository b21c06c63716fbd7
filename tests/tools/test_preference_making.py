"""Rejected answers beside demonstrated ones: what is written, what is not, and where an interrupted run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from config.decoding_config import DecodingConfig
from config.errors import DataLoadError, TrainingRuntimeError
from data_loading.loading import load_preferences
from models.sft_model import LanguageModel
from rewards.chat_endpoint import ChatEndpoint
from tools.preference_making import demonstrations, from_endpoint, from_model, make_preferences

ROWS = [{"prompt": f"{n}?", "completion": f"is {n}"} for n in range(5)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_that_differ_are_written_and_read_as_preferences(tmp_path: Path) -> None:
    given = [["is 0", "no", " NO "], ["a", "b", "c"]]
    made = make_preferences(ROWS[:2], lambda asked: given, tmp_path / "out.jsonl")
    assert made == (4, 0, 2)
    assert [(one["row"], one["rejected"]) for one in lines(tmp_path / "out.jsonl")] == [
        (0, "no"), (1, "a"), (1, "b"), (1, "c"),
    ]  # fmt: skip
    assert load_preferences(str(tmp_path / "out.jsonl"))[0] == {
        "prompt": "0?",
        "chosen": "is 0",
        "rejected": "no",
    }


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    make_preferences(ROWS[:2], lambda asked: [["x"]] * len(asked), path)
    path.write_text(path.read_text() + '{"prompt": "half a li')
    asked: list[int] = []

    def sample(some: Any) -> list[list[str]]:
        asked.extend(number for number, _ in some)
        return [["y"]] * len(some)

    assert make_preferences(ROWS, sample, path).known == 2
    assert asked == [2, 3, 4]
    assert [one["row"] for one in lines(path)] == [0, 1, 2, 3, 4]
    (tmp_path / "other.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(
        DataLoadError, match=r"other\.jsonl:1: this line is not of an earlier make-preferences"
    ):
        make_preferences(ROWS, sample, tmp_path / "other.jsonl")


def test_a_file_goes_on_with_its_own_data_alone(tmp_path: Path) -> None:
    """Lines end at line feeds: JSON may hold U+2028 and U+0085, which Python takes for ends of lines, too."""
    path = tmp_path / "out.jsonl"
    rows = [{"prompt": [{"role": "user", "content": "a\u2028b"}], "completion": "x\x85y"}]
    make_preferences(rows, lambda asked: [["no\u2029"]], path)
    assert make_preferences([*rows, ROWS[0]], lambda asked: [["x"]], path) == (1, 1, 0)
    before = path.read_bytes()
    with pytest.raises(DataLoadError, match=r"out\.jsonl:1: this line was made from other data, whose row 0"):
        make_preferences(ROWS, lambda asked: [["x"]] * len(asked), path)
    assert path.read_bytes() == before
    path.write_bytes(b"\xff\n")
    with pytest.raises(DataLoadError, match=r"out\.jsonl:1: this line is not of an earlier"):
        make_preferences(ROWS, lambda asked: [["x"]] * len(asked), path)


def test_a_model_here(tiny: LanguageModel, tmp_path: Path) -> None:
    how = DecodingConfig(max_tokens=5, temperature=1.0, seed=2)
    made = make_preferences(ROWS, from_model(tiny, how, 2, 100), tmp_path / "a.jsonl")
    assert made.written + made.equal == 10
    make_preferences(ROWS, from_model(tiny, how, 2, 100), tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    with pytest.raises(DataLoadError, match="row 0: 2 tokens"):
        make_preferences(ROWS, from_model(tiny, how, 1, 1), tmp_path / "c.jsonl")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An endpoint on loopback that answers what a function says; its address and the requests."""
    servers = []
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def start(answer: Callable[[dict[str, Any]], tuple[int, str]]) -> tuple[str, list[dict[str, Any]]]:
        requests: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append(body)
                status, text = answer(body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

            def log_message(self, *words: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_model_elsewhere(serve: Any, tmp_path: Path) -> None:
    url, requests = serve(lambda body: (200, f"no idea about {body['messages'][-1]['content']}"))
    how = DecodingConfig(max_tokens=7, temperature=0.5)
    make_preferences(ROWS, from_endpoint(ChatEndpoint(url), "m", how, 1), tmp_path / "a.jsonl")
    assert [one["rejected"] for one in lines(tmp_path / "a.jsonl")] == [
        f"no idea about {n}?" for n in range(5)
    ]
    assert {(one["model"], one["max_tokens"], one["temperature"]) for one in requests} == {("m", 7, 0.5)}
    assert requests[0]["messages"][0]["role"] == "system"


def test_an_endpoint_that_refuses_is_a_sentence_and_what_came_is_kept(serve: Any, tmp_path: Path) -> None:
    url, requests = serve(lambda body: (401, "no"))
    sample = from_endpoint(ChatEndpoint(url, retries=3, backoff=0), "m", DecodingConfig(), 1)
    with pytest.raises(
        TrainingRuntimeError, match="gave no answer to row 0 after 1 tries, the last one: status 401"
    ):
        make_preferences(ROWS[:1], sample, tmp_path / "a.jsonl")
    assert len(requests) == 1  # nothing changes by asking again


def test_a_whole_text_has_no_answer_to_reject(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a b"}\n')
    with pytest.raises(
        DataLoadError, match=r"t\.jsonl:1: prompt and completion are expected, found one text"
    ):
        demonstrations(str(tmp_path / "t.jsonl"), None)
