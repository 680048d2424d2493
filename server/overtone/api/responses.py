"""The events of a call's generations as response messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from overtone.api import convert
from overtone.api.backend import Running
from overtone.api.convert import Draft
from overtone.engine.types import Event
from overtone.models.tokenizer import TextCodec
from overtone.v1 import generation_pb2 as pb


class Parts:
    """Streamed messages of a call. `open`: completions that have not ended."""

    def __init__(self, draft: Draft, running: Running, codec: TextCodec, echo: pb.Prompt | None) -> None:
        self._draft, self._running, self._codec, self._echo = draft, running, codec, echo
        self._index = {request.request_id: index for index, request in enumerate(running.requests)}
        self.open = len(running.requests)

    def of(self, events: Sequence[Event]) -> Iterator[pb.StreamGenerateResponse]:
        """All events so far in one message for each completion that has some."""
        by_index: dict[int, list[Event]] = {}
        for event in events:
            by_index.setdefault(self._index[event.request_id], []).append(event)
        for index, own in sorted(by_index.items()):
            yield self._part(index, own)

    def _part(self, index: int, events: list[Event]) -> pb.StreamGenerateResponse:
        ids = [token for event in events for token in event.token_ids]
        logprobs = [info for event in events for info in event.logprobs]
        part = pb.StreamGenerateResponse(
            text="".join(event.text for event in events),
            token_ids=ids,
            tokens=convert.token_infos(ids, logprobs, self._codec.token_text),
            index=index,
        )
        request = self._running.requests[index]
        if index == 0 and self._echo is not None:
            part.prompt.CopyFrom(self._echo)
            self._echo = None
        for event in events:
            if event.prompt_logprobs:
                infos = convert.token_infos(request.prompt_ids[1:], event.prompt_logprobs, self._codec.token_text)
                part.prompt.tokens.extend(infos)
        finish = events[-1].finish
        if finish is not None:
            self.open -= 1
            part.outcome.CopyFrom(convert.outcome(finish, self._draft, request, self._running.shares))
        return part


class WholeResponse:
    """A call's streamed messages put together."""

    def __init__(self) -> None:
        self._completions: dict[int, pb.Completion] = {}
        self._texts: dict[int, list[str]] = {}
        self._prompt: pb.Prompt | None = None

    def add(self, part: pb.StreamGenerateResponse) -> None:
        completion = self._completions.setdefault(part.index, pb.Completion(index=part.index))
        self._texts.setdefault(part.index, []).append(part.text)
        completion.token_ids.extend(part.token_ids)
        completion.tokens.extend(part.tokens)
        if part.HasField("prompt"):
            self._prompt = part.prompt
        if part.HasField("outcome"):
            completion.outcome.CopyFrom(part.outcome)

    def response(self) -> pb.GenerateResponse:
        for index, texts in self._texts.items():
            self._completions[index].text = "".join(texts)
        first, *others = (self._completions[index] for index in sorted(self._completions))
        return pb.GenerateResponse(
            text=first.text,
            token_ids=first.token_ids,
            tokens=first.tokens,
            prompt=self._prompt,
            outcome=first.outcome,
            others=others,
        )
