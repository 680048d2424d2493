"""A guide that takes long to compile, as a client of the whole server sees it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from overtone.api import backend
from overtone.errors import InvalidRequest
from support.server import ThreadServer


def test_a_guide_that_takes_too_long_is_refused(tiny_server: ThreadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile requests without a guide are served, and so is another guide; the thread is free again once it is done."""
    grammars = tiny_server.server.backend._grammars
    compile_guide, begun, may_end = grammars.compile, threading.Semaphore(0), threading.Event()

    def slow(spec: Any) -> Any:
        if spec.text == "slow":
            begun.release()
            assert may_end.wait(300)
        return compile_guide(spec)

    monkeypatch.setattr(grammars, "compile", slow)
    with tiny_server.client() as client, ThreadPoolExecutor(1) as pool:
        assert client.generate("a", regex="[ab]{3}", max_new_tokens=5).text  # the tokenizer's tables are there
        monkeypatch.setattr(backend, "GUIDE_LIMIT_S", 1.5)
        refused = pool.submit(client.generate, "a", regex="slow", max_new_tokens=5)
        assert begun.acquire(timeout=300)
        assert client.generate("a", max_new_tokens=3, ignore_eos=True).usage.completion_tokens == 3
        with pytest.raises(InvalidRequest, match=r"was not compiled within 1\.5 s") as caught:
            refused.result()
        assert caught.value.field == "sampling.guided.regex"
        may_end.set()
        monkeypatch.setattr(backend, "GUIDE_LIMIT_S", 300.0)
        texts = {client.generate("a", regex=text, max_new_tokens=9).text for text in ("slow", "other", "third")}
        assert texts == {"slow", "other", "third"}
