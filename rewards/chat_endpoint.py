"""A language model behind an OpenAI-compatible address: one question, one answer, as many tries as are allowed.

Nothing is sent to anybody unless the user names the address. The key is read from an environment variable when a
request is made; it stands in no config, message, cache or log.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from rewards.text_utils import shortened

T = TypeVar("T")

_WORTH_ANOTHER_TRY = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
LONGEST_WAIT = 60.0  # seconds between two tries


class NoAnswerError(Exception):
    """Every try failed; ``tries`` of them, the last one for ``problem``. Without a try, ``problem`` forbids it."""

    def __init__(self, tries: int, problem: str) -> None:
        super().__init__(f"after {tries} tries, the last one: {problem}" if tries else f"({problem})")
        self.tries, self.problem = tries, problem


@dataclass(frozen=True)
class ChatEndpoint:
    """Where to ask, and how patiently.

    Attributes:
        url: base address, as in http://localhost:8080/v1. api_key_env: the variable with the key; unset = no key.
        retries: further tries of a failed request. backoff: seconds before the first of them; then twice as long, or
        what the server asks for. timeout: seconds that one request may take.
    """

    url: str
    api_key_env: str = "OPENAI_API_KEY"
    retries: int = 4
    backoff: float = 1.0
    timeout: float = 60.0

    def ask(
        self, body: Mapping[str, Any], read: Callable[[str], T], over: threading.Event | None = None
    ) -> T:
        """What ``read`` makes of the reply's text; a ``ValueError`` of it is a failed try.

        Args:
            body: of the request to ``/chat/completions``.
            over: once it is set, no further try is made.
        Raises:
            NoAnswerError: no try worked, or the server refused for good.
        """
        headers, problem = self._headers(), ""
        over = over or threading.Event()
        for attempt in range(self.retries + 1):
            pause = self.backoff * 2**attempt
            try:
                return read(self._post(body, headers))
            except urllib.error.HTTPError as error:
                problem = f"status {error.code} ({error.reason})"
                if error.code not in _WORTH_ANOTHER_TRY:
                    break
                pause = max(pause, _seconds(error.headers.get("Retry-After")))
            # No connection, one that broke off, a time limit, a reply that cannot be read.
            except (OSError, ValueError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}".strip()
            if attempt < self.retries and over.wait(min(pause, LONGEST_WAIT)):
                break
        raise NoAnswerError(attempt + 1, problem)

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):  # the library would refuse it in words that quote it
            raise NoAnswerError(0, f"the key in {self.api_key_env} has characters that no header can have")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        return headers

    def _post(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> str:
        address = f"{self.url}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), dict(headers))
        with urllib.request.build_opener(_StayHere).open(request, timeout=self.timeout) as reply:
            said = json.loads(reply.read())
        try:
            return str(said["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"the reply has no message ({shortened(json.dumps(said))})") from None


class _StayHere(urllib.request.HTTPRedirectHandler):
    """No redirect is followed: it would take the key to an address that nobody has named."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _seconds(header: str | None) -> float:
    return float(header) if header and header.strip().isdecimal() else 0.0
