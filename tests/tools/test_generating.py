"""Answers: one distribution whichever way they come; a conversation that fits; mlx-lm's server on what we save."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from base_setup.parameters import named_arrays
from config.decoding_config import DecodingConfig
from config.errors import DataLoadError, InvalidConfigurationError
from models.policy_model import PolicyModel
from models.sft_model import LanguageModel, save_language_model
from tools.chatting import Conversation, UntilStop
from tools.generating import answer_to, generate, stream

PROMPTS = [[40, 41, 42], [50, 51], [60]]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.0, "top_p": 1.0},
        {
            "temperature": 0.8,
            "top_p": 0.7,
            "top_k": 30,
            "min_p": 0.02,
            "repetition_penalty": 1.3,
            "logit_bias": {65: 4.0},
        },
    ],
)
def test_a_stream_is_the_row_of_the_batch(tiny: LanguageModel, options: dict) -> None:
    how = DecodingConfig(max_tokens=12, seed=5, **options)
    batch = generate(tiny, PROMPTS, how, members=2)
    for number, answer in enumerate(batch):
        one = answer_to(tiny, PROMPTS[number // 2], how, prompt=number // 2, member=number % 2)
        assert one == answer
    *_, last = stream(tiny, PROMPTS[0], how)
    assert last.finish == batch[0].finish


def test_greedy_is_mlx_lms(tiny: LanguageModel) -> None:
    [answer] = generate(tiny, [PROMPTS[0]], DecodingConfig(max_tokens=9, temperature=0))
    assert answer.text == mlx_lm.generate(tiny.model, tiny.tokenizer, PROMPTS[0], max_tokens=9)


def test_an_answer_ends_with_its_end_token_and_says_so(tiny: LanguageModel) -> None:
    end = tiny.tokenizer.eos_token_id
    how = DecodingConfig(max_tokens=5, temperature=1, logit_bias={end: 100.0})
    for answer in (generate(tiny, [PROMPTS[0]], how)[0], answer_to(tiny, PROMPTS[0], how)):
        assert answer == ("", (end,), "stop")


def test_mlx_lms_further_samplers_do_something(tiny: LanguageModel) -> None:
    plain = generate(tiny, [PROMPTS[0]], DecodingConfig(max_tokens=12, temperature=0))[0].ids
    free = generate(tiny, [PROMPTS[0]], DecodingConfig(max_tokens=12, temperature=0, presence_penalty=50.0))[
        0
    ].ids
    assert len(set(free)) == 12 > len(set(plain)) - 1
    with pytest.raises(InvalidConfigurationError, match=r"token ids from 0 to .* are expected, found 9999"):
        generate(tiny, [PROMPTS[0]], DecodingConfig(logit_bias={9999: 1.0}))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": 1e-40}, "temperature: 0 .* or at least 1e-05 is expected, found 1e-40"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias: a finite number or -inf is expected for token 3"),
        ({"logit_bias": {3: 1e39}}, "logit_bias: a finite number or -inf is expected for token 3"),
    ],
)
def test_what_float32_does_not_hold_is_refused(tiny: LanguageModel, options: dict, sentence: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=sentence):
        generate(tiny, [PROMPTS[0]], DecodingConfig(max_tokens=2, **options))


def test_what_may_begin_a_stop_waits() -> None:
    reply = UntilStop(("User:", "</s>"))
    assert [reply.add(one) for one in ("Hi U", "se", "s it. Us", "er", ": x")] == [
        "Hi ",
        "",
        "Uses it. ",
        "",
        "",
    ]
    assert (reply.text, reply.stopped) == ("Hi Uses it. ", True)
    other = UntilStop(("User:",))
    assert other.add("Us") + other.rest() == "Us"


def talk(tiny: LanguageModel, **options: object) -> Conversation:
    return Conversation(tiny, DecodingConfig(max_tokens=6, temperature=0), **options)  # type: ignore[arg-type]


def test_a_conversation_with_its_cache_says_what_one_without_does(tiny: LanguageModel) -> None:
    cached, plain = talk(tiny), talk(tiny)
    for text in ("one", "two", "three"):
        plain._cached = []
        assert list(cached.say(text)) == list(plain.say(text))
    assert [m["role"] for m in cached.messages] == ["user", "assistant"] * 3


def test_the_oldest_exchange_goes_first_and_the_system_stays(tiny: LanguageModel) -> None:
    chat = talk(tiny, system="Be kind.", max_context=70)
    for text in ("first", "second", "third"):
        list(chat.say(text))
    assert chat.was_cut
    said = [m["content"] for m in chat.messages]
    assert said[0] == "Be kind."
    assert "first" not in said
    assert said[-2] == "third"
    with pytest.raises(DataLoadError, match="--max-context is 70"):
        list(chat.say("x" * 200))
    chat.clear()
    assert [m["content"] for m in chat.messages] == ["Be kind."]


def test_lines_are_those_of_mlx_rlhf_and_cut_at_a_token(tiny: LanguageModel) -> None:
    chat = talk(tiny, template="lines", max_context=1000)
    chat.messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    asked = [*chat.messages, {"role": "user", "content": "c"}]
    assert tiny.tokenizer.decode(chat._fitting(asked)[0]) == "\nUser: a\nSystem: b\nUser: c\nSystem:"
    chat.max_context = 10
    assert tiny.tokenizer.decode(chat._fitting(asked)[0]) == " c\nSystem:"


@pytest.mark.parametrize("adapted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_mlx_lms_server_serves_what_we_save(
    tiny: LanguageModel, make_config: Callable[..., Any], tmp_path: Path, adapted: bool
) -> None:
    """By the two commands of docs/tools.md."""
    save_language_model(tiny, tmp_path / "model")
    policy = PolicyModel(tiny, make_config())
    if adapted:
        moved = {k: x + 0.1 for k, x in named_arrays(policy.model.trainable_parameters()).items()}
        policy.model.load_weights(list(moved.items()), strict=False)
        policy.save(tmp_path / "adapter")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        sys.executable,
        "-m",
        "mlx_lm",
        "server",
        "--model",
        str(tmp_path / "model"),
        "--port",
        str(port),
        *(["--adapter-path", str(tmp_path / "adapter")] if adapted else []),
    ]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        messages = [{"role": "user", "content": "hi"}]
        body = {"messages": messages, "max_tokens": 6, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(300):
            try:
                with opener.open(request, timeout=30) as reply:
                    said = json.loads(reply.read())["choices"][0]["message"]["content"]
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.1)
        ids = tiny.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        ids = ids["input_ids"] if hasattr(ids, "keys") else ids
        expected = [
            generate(model, [ids], DecodingConfig(max_tokens=6, temperature=0))[0].text
            for model in (replace(tiny, model=policy.model), tiny)
        ]
        assert said == expected[0]
        assert (expected[0] != expected[1]) == adapted
    finally:
        server.terminate()
        server.wait()
