"""Token ids to text while they come: multi-byte characters whole, stop strings found across token borders."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_CONTEXT_TOKENS = 5
"""Prompt tokens decoded along, because some tokenizers decode a token differently at the beginning of a text."""

_INCOMPLETE = "\ufffd"

_MAX_UNREAD = 32
"""A character has at most four bytes. So many tokens without one are special or broken and are let go as they are: the
window must not grow with the text."""


class Detokenizer:
    """The text of one generation.

    `push` takes a token; `take` returns text that is final: it ends neither within a character nor within what may become
    a stop string. `finish` releases what was held back. decode: token ids -> text.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
    ) -> None:
        self._decode = decode
        self._window = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._window_text = decode(self._window)
        self._unread = 0
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._text = ""
        self._taken = 0
        self._searched = 0

    def push(self, token_id: int) -> str | None:
        """Adds a token. Returns the stop string if the text now contains one; the text is then cut there."""
        self._window.append(token_id)
        self._unread += 1
        text = self._decode(self._window)
        new = self._new_text(text)
        if self._unread < _MAX_UNREAD and (not new or text.endswith(_INCOMPLETE)):
            return None
        self._text += new
        # The tokens just read are the context of the next ones.
        self._window = self._window[-self._unread :]
        self._window_text = self._decode(self._window)
        self._unread = 0
        return self._cut_at_stop()

    def take(self) -> str:
        """New final text."""
        end = len(self._text) - self._held_back()
        text, self._taken = self._text[self._taken : end], max(self._taken, end)
        return text

    def finish(self) -> tuple[str, str | None]:
        """All text not taken yet, incomplete characters as U+FFFD, and the stop string if that completes one."""
        stop = None
        if self._unread:
            self._text += self._new_text(self._decode(self._window))
            self._unread = 0
            stop = self._cut_at_stop()
        text, self._taken = self._text[self._taken :], len(self._text)
        return text, stop

    def _new_text(self, text: str) -> str:
        """What `text`, the window decoded, has more than before."""
        if text.startswith(self._window_text):
            return text[len(self._window_text) :]
        # The prompt ended within a character, which is complete by now: it belongs to the completion.
        return text[len(self._window_text.rstrip(_INCOMPLETE)) :]

    def _cut_at_stop(self) -> str | None:
        found = [(self._text.find(stop, max(0, self._searched - len(stop) + 1)), stop) for stop in self._stop]
        found = [(position, stop) for position, stop in found if position >= 0]
        self._searched = len(self._text)
        if not found:
            return None
        position, stop = min(found, key=lambda hit: hit[0])
        self._text = self._text[: position + (len(stop) if self._include_stop else 0)]
        self._unread = 0
        return stop

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._text) - self._taken), longest, -1):
                if self._text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
