"""A conversation with a model: what it is shown of the past, where its reply ends, and what is kept of the cache.

Three templates. ``chat``: the tokenizer's own. ``plain``: "User: …" and "Assistant: …", for a tokenizer without one.
``lines``: "\\nUser: …\\nSystem:", which models trained on such lines continue; the reply ends where it begins to speak
for the user.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from base_setup.soft_prompt import soft_prompt_of
from base_setup.tokenizer_setup import encode, encode_prompt
from config.decoding_config import DecodingConfig
from config.errors import DataLoadError, InvalidConfigurationError
from models.sft_model import LanguageModel
from tools.generating import check_decoding, stream

TEMPLATES = ("auto", "chat", "plain", "lines")
STOPS = {"chat": (), "plain": ("\nUser:",), "lines": ("User:", "</s>")}


class Conversation:
    """What has been said, and the model that answers.

    Attributes:
        messages: role and content, the system's first where there is one.
        was_cut: whether a part of the conversation has been left out.
    """

    def __init__(
        self,
        base: LanguageModel,
        how: DecodingConfig,
        *,
        max_context: int = 1024,
        template: str = "auto",
        system: str | None = None,
        speaker: str = "System",
    ) -> None:
        """Args:
        max_context: most tokens of the conversation that the model is shown.
        template: one of ``TEMPLATES``; auto: the tokenizer's own, else plain. speaker: who answers in "lines".
        """
        has_own = getattr(base.tokenizer, "chat_template", None) is not None
        if template == "chat" and not has_own:
            raise InvalidConfigurationError(
                '--template: the tokenizer has no chat template; choose "plain" or "lines"'
            )
        if max_context < 1:
            raise InvalidConfigurationError(f"--max-context: at least 1 is expected, found {max_context}")
        check_decoding(base, how)
        self.base, self.how, self.max_context, self.speaker = base, how, max_context, speaker
        self.template = ("chat" if has_own else "plain") if template == "auto" else template
        self.system = system
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system's message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.was_cut = False
        self._turn = 0
        self._cached: list[int] = []
        self._cache: list[Any] = make_prompt_cache(self.base.model)

    def say(self, text: str) -> Iterator[str]:
        """The reply to ``text``, as it comes; both are part of the conversation when it has been read to its end.

        Raises:
            DataLoadError: the chat template does not take the messages, or this one alone is longer than max_context.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids, kept = self._fitting(asked)
        self.was_cut |= len(kept) < len(asked) or (self.template == "lines" and len(ids) == self.max_context)
        self._turn += 1
        reply = UntilStop(STOPS[self.template])
        told: tuple[int, ...] = ()
        unseen, self._cached = self._unseen(ids), []  # whoever interrupts leaves a cache of nobody knows what
        seen = ids[: len(ids) - len(unseen)]
        for piece in stream(self.base, unseen, self.how, prompt=self._turn, cache=self._cache, seen=seen):
            told = piece.ids
            yield reply.add(piece.text)
            if reply.stopped:
                break
        yield reply.rest()
        self._cached = [*ids, *told][: self._columns_of_tokens()]
        self.messages = [*kept, {"role": "assistant", "content": reply.text.strip()}]

    def _columns_of_tokens(self) -> int:
        """How many tokens the cache holds; the last one may have been drawn and not been read by the model."""
        rows = soft_prompt_of(self.base.model)
        lead = 0 if rows is None else rows.shape[0]  # its columns stand in the cache and are no tokens
        return max(getattr(self._cache[0], "offset", 0) - lead, 0)

    # -- The prompt -----------------------------------------------------------------------------------

    def _fitting(self, messages: list[dict[str, str]]) -> tuple[list[int], list[dict[str, str]]]:
        """Ids of the conversation and the messages that are in it: the oldest go first where it is too long."""
        ids = self._encoded(messages)
        if self.template == "lines":  # a text: cut at a token
            return ids[-self.max_context :], messages
        first = 1 if self.system is not None else 0
        while len(ids) > self.max_context:
            # A reply goes with what it answers, so that the conversation begins with the user.
            if len(messages) - first < 3:
                raise DataLoadError(
                    f"the message takes {len(ids)} tokens{' with the system message' if first else ''}, --max-context "
                    f"is {self.max_context}; shorten it or raise the limit"
                )
            messages = [*messages[:first], *messages[first + 2 :]]
            ids = self._encoded(messages)
        return ids, messages

    def _encoded(self, messages: list[dict[str, str]]) -> list[int]:
        tokenizer = self.base.tokenizer
        if self.template == "chat":
            return encode_prompt(tokenizer, messages)
        names = {"user": "User", "assistant": self.speaker if self.template == "lines" else "Assistant"}
        lines = [
            (
                f"{message['content']}\n"
                if message["role"] == "system"
                else f"\n{names[message['role']]}: {message['content']}"
            )
            for message in messages
        ]
        return encode(tokenizer, "".join(lines) + f"\n{names['assistant']}:", special=True)

    def _unseen(self, ids: list[int]) -> list[int]:
        """What the cache has not seen of ``ids``; a cache of something else is cut back or made anew."""
        common = 0
        for one, other in zip(
            ids[:-1], self._cached, strict=False
        ):  # the last has to be read for its prediction
            if one != other:
                break
            common += 1
        surplus = len(self._cached) - common
        if surplus and can_trim_prompt_cache(self._cache):
            trim_prompt_cache(self._cache, surplus)
        elif surplus or not self._cached:
            self._cache, common = make_prompt_cache(self.base.model), 0
        return ids[common:]


class UntilStop:
    """A reply up to the first of some words, handed on as it comes: what may be the beginning of one waits."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.text = ""
        self.stopped = False
        self._stops = stops
        self._shown = 0

    def add(self, piece: str) -> str:
        """What can be shown now."""
        self.text += piece
        found = [self.text.find(stop) for stop in self._stops if stop in self.text]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            return self._show(len(self.text))
        waiting = max(
            (n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])),
            default=0,
        )
        return self._show(len(self.text) - waiting)

    def rest(self) -> str:
        """What waited and was no such word after all."""
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        shown, self._shown = self.text[self._shown : end], max(end, self._shown)
        return shown
