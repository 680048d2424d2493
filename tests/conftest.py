"""Fixtures that several folders share. Models are loaded once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from overtone.models.base import load_base_model, model_source
from support.background import GPU_WORK
from support.demo import demo_cache
from support.reference import MergedReference
from support.server import ThreadServer
from support.tiny import tiny_base, tiny_model

_OF_BACKGROUND = {"test_in_the_interpreter": "interpreted", "test_compiled_without_spills": "compiled {}"}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begins what takes minutes beside the tests, and leaves the tests that ask for it to the end."""
    if session.config.option.collectonly:
        return
    names = {}
    for item in session.items:
        if item.path.name == "test_gpu_kernels.py" and (work := _OF_BACKGROUND.get(item.originalname)):  # type: ignore[attr-defined]
            names[item.nodeid] = work.format(item.callspec.params["capability"] if "{}" in work else "")  # type: ignore[attr-defined]
    session.items.sort(key=lambda item: item.nodeid in names)
    if names:
        GPU_WORK.start(list(names.values()))


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
