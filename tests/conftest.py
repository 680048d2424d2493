"""Fixtures that several folders share. Models are loaded once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from overtone.models.base import load_base_model, model_source
from support.demo import demo_cache
from support.reference import MergedReference
from support.server import ThreadServer
from support.tiny import tiny_base, tiny_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models are tiny, and a server, its clients and the reference compute in threads of their own: with a team of
    OpenMP threads for each they wait for one another most of the time."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_server(tmp_path: Path) -> Iterator[ThreadServer]:
    with ThreadServer(tmp_path / "store", tiny_base(), adapter_root=(tmp_path,), max_queue=32) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_reference() -> MergedReference:
    return MergedReference(tiny_model())


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    base = load_base_model("demo", dtype="float32", cache=demo_cache())
    with ThreadServer(tmp_path_factory.mktemp("demo") / "store", base, kv_cache_mib=1024) as server:
        yield server


@pytest.fixture(scope="session")
def demo_reference() -> MergedReference:
    from transformers import AutoModelForCausalLM

    source = model_source("demo", demo_cache())
    return MergedReference(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
