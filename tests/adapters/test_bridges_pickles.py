"""Files of torch.save: tensors come through as they are, and nothing in a file ever runs."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from overtone.adapters.bridges.pickles import read_pickle
from overtone.errors import InvalidAdapter, TooLarge

NAME = "adapter_model.bin"


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def tensors() -> dict[str, torch.Tensor]:
    whole = torch.arange(12.0).reshape(3, 4)
    return {
        "whole": whole,
        "a view": whole[1:],
        "turned": whole.T,
        "again": whole,
        "wide": torch.tensor([1 / 3], dtype=torch.float64),
        "narrow": torch.tensor([1 / 3], dtype=torch.bfloat16),
        "half": torch.tensor([1 / 3], dtype=torch.float16),
        "counts": torch.tensor([[1, 2], [3, 2**40]]),
        "bytes": torch.tensor([1, 255], dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
        "a number": torch.tensor(2.5),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_tensors_come_through(kind: type, zipped: bool) -> None:
    wanted = tensors()
    found = read_pickle(saved(kind(wanted), _use_new_zipfile_serialization=zipped), NAME)
    assert list(found) == list(wanted)
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name])
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert len({tensor.data_ptr() for tensor in found.values() if tensor.numel()}) == len(wanted) - 1


def test_parameters_are_tensors() -> None:
    found = read_pickle(saved({"a": torch.nn.Parameter(torch.ones(2))}), NAME)["a"]
    assert type(found) is torch.Tensor
    assert not found.requires_grad


class Attack:
    """Unpickling it calls `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def attacks(mark: Path) -> dict[str, Attack]:
    """Ways to create the file `mark`."""
    code = f"open({str(mark)!r}, 'w').close()"
    return {
        "exec": Attack(exec, code),
        "eval": Attack(eval, f"open({str(mark)!r}, 'w').close()"),
        "system": Attack(os.system, f"touch {mark}"),
        "touch": Attack(Path.touch, mark),
        "import": Attack(__import__("subprocess").getoutput, f"touch {mark}"),
        "torch": Attack(torch.save, 1, str(mark)),
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "plain", "nested", "as a key", "text"])
@pytest.mark.parametrize("name", attacks(Path("x")))
def test_nothing_runs(tmp_path: Path, name: str, form: str) -> None:
    mark = tmp_path / "mark"
    attack = attacks(mark)[name]
    value: Any = {"a": torch.ones(2), "b": attack}
    if form == "as a key":
        value = {(attack, 1): torch.ones(2)}
    if form == "nested":
        value = OrderedDict(a=[({"b": attack},)])
    if form in ("plain", "text"):
        data = pickle.dumps({"b": attack}, protocol=0 if form == "text" else 2)
    else:
        data = saved(value, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(InvalidAdapter) as caught:
        read_pickle(data, NAME)
    assert not mark.exists()
    assert caught.value.field == NAME
    if form not in ("plain", "text"):  # these are not even files of torch.save
        assert "holds more than tensors" in caught.value.message
    # The attack is a real one.
    if form in ("plain", "text"):
        pickle.loads(data)
    else:
        torch.load(io.BytesIO(data), weights_only=False)
    assert mark.exists()


def test_what_a_refusal_names() -> None:
    with pytest.raises(
        InvalidAdapter, match=r"holds more than tensors \(posix\.system\)|\(os\.system\)|\(nt\.system\)"
    ):
        read_pickle(saved({"a": Attack(os.system, "true")}), NAME)


@pytest.mark.parametrize(
    ("value", "field", "message"),
    [
        ({"state_dict": {"a": torch.ones(2)}}, "state_dict", "is dict, not a tensor; convert what is inside"),
        ({"a": torch.ones(2), "step": 7}, "step", "is int, not a tensor"),
        ({"a": [torch.ones(2)]}, "a", "is list"),
        ({"a": None}, "a", "NoneType"),
        ({3: torch.ones(2)}, "3", "no text"),
        ([torch.ones(2)], NAME, "holds list"),
        (torch.ones(2), NAME, "holds Tensor"),
        ({"a": torch.ones(2).to_sparse()}, "a", "sparse"),
        ({"a": torch.ones(2, device="meta")}, "a", "meta"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "a", "complex64"),
        ({"a": torch.ones(2, dtype=torch.bool)}, "a", "bool"),
        ({"a": torch.zeros(1).expand(1 << 40)}, NAME, "its tensors take more"),
    ],
)
def test_what_is_no_plain_tensor(value: Any, field: str, message: str) -> None:
    with pytest.raises((InvalidAdapter, TooLarge)) as caught:
        read_pickle(saved(value), NAME)
    assert caught.value.field == field
    assert message in caught.value.message


def test_many_names_of_one_tensor_are_few_or_refused() -> None:
    large = torch.zeros(1 << 16)
    assert len(read_pickle(saved({str(i): large for i in range(8)}), NAME)) == 8
    with pytest.raises(TooLarge):
        read_pickle(saved({str(i): large for i in range(64)}), NAME)


def test_any_bytes_are_refused_or_read() -> None:
    """Truncated and changed files of both formats, and bytes that are no pickle."""
    generator = random.Random(0)
    for data in (saved(tensors()), saved(tensors(), _use_new_zipfile_serialization=False)):
        for _ in range(150):
            broken = bytearray(data)
            for _ in range(generator.randint(1, 4)):
                broken[generator.randrange(len(broken))] = generator.randrange(256)
            _refused_or_read(bytes(broken[: generator.choice([len(broken), generator.randrange(len(broken))])]))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", b"garbage")
    for nothing in (b"", b"PK\x03\x04", b"\x80\x02.", b"{}", b"\x00" * 64, archive.getvalue(), b"\x80\x04N."):
        with pytest.raises(InvalidAdapter) as caught:
            read_pickle(nothing, NAME)
        assert caught.value.field == NAME


def _refused_or_read(data: bytes) -> None:
    try:
        found = read_pickle(data, NAME)
    except (InvalidAdapter, TooLarge):
        return
    assert all(type(tensor) is torch.Tensor for tensor in found.values())
