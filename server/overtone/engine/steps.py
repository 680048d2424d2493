"""What a new token means for its request: the text it brings and whether it is the last."""

from __future__ import annotations

import math

from overtone.engine.sampler import Sampled
from overtone.engine.sequence import Sequence
from overtone.engine.types import Event, Finish, FinishReason
from overtone.errors import EngineError


class EventBuilder:
    """Advances sequences token by token."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos = eos_token_ids

    def advance(self, sequence: Sequence, choice: Sampled, now: float) -> Event:
        """Appends the chosen token to `sequence` and says what its client should hear."""
        request_id = sequence.request.request_id
        if choice.token_id is None:
            return Event(request_id, error=choice.error)
        prompt_logprobs, sequence.prompt_logprobs = tuple(sequence.prompt_logprobs), []
        if any(math.isnan(info.logprob) for info in prompt_logprobs):
            return Event(request_id, error=EngineError("the model's logits for this request's prompt are not finite"))
        sequence.output_ids.append(choice.token_id)
        if sequence.first_token_time is None:
            sequence.first_token_time = now
        reason, stop = self._ending(sequence, choice.token_id)
        text = sequence.detokenizer.take()
        if reason is not None:
            tail, late_stop = sequence.detokenizer.finish()
            text += tail
            if late_stop is not None and reason is FinishReason.LENGTH:
                reason, stop = FinishReason.STOP, late_stop
        return Event(
            request_id,
            text=text,
            token_ids=(choice.token_id,),
            logprobs=(choice.logprob,) if choice.logprob else (),
            finish=None if reason is None else _finish(sequence, reason, stop, now),
            prompt_logprobs=prompt_logprobs,
        )

    def _ending(self, sequence: Sequence, token_id: int) -> tuple[FinishReason | None, str]:
        stopping = sequence.request.stopping
        if token_id in self._eos and not stopping.ignore_eos:
            return FinishReason.EOS, ""
        if token_id in stopping.stop_token_ids:
            if stopping.include_stop:
                sequence.detokenizer.push(token_id)
            return FinishReason.STOP, ""
        stop = sequence.detokenizer.push(token_id)
        if stop is not None:
            return FinishReason.STOP, stop
        if len(sequence.output_ids) >= stopping.max_new_tokens:
            return FinishReason.LENGTH, ""
        return None, ""


def _stop_token(sequence: Sequence, reason: FinishReason, stop: str) -> int | None:
    """The stop token that ended the generation, if one did."""
    return sequence.output_ids[-1] if reason is FinishReason.STOP and not stop else None


def _finish(sequence: Sequence, reason: FinishReason, stop: str, now: float) -> Finish:
    arrival = sequence.request.arrival_time
    assert sequence.admitted_time is not None
    assert sequence.first_token_time is not None
    return Finish(
        reason=reason,
        stop=stop,
        completion_tokens=len(sequence.output_ids),
        queue_s=sequence.admitted_time - arrival,
        first_token_s=sequence.first_token_time - arrival,
        total_s=now - arrival,
        stop_token_id=_stop_token(sequence, reason, stop),
        cached_prompt_tokens=sequence.cached_tokens,
    )
