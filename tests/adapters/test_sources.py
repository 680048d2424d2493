"""Folders, archives and URLs as sources of adapters: what is found, lazily, and what hostile ones come to."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.adapters.sources import Entry, Source, open_source, urls
from overtone.adapters.sources.archive import open_archive
from overtone.adapters.sources.tar import Tar
from overtone.errors import InvalidAdapter, InvalidRequest, OvertoneError, PathRefused, StoreFailed, TooLarge
from support.archives import COMPRESS, CONFIG, WEIGHTS, adapter, member, tar_of, web_server

MAX = 1 << 20


def read(entry: Entry) -> bytes | OvertoneError:
    """The weights, or why there are none."""
    try:
        files = entry.read()
    except OvertoneError as error:
        return error
    assert files.config == b"{}"
    return files.weights


def contents(source: Source) -> dict[str, bytes | OvertoneError]:
    found = [(entry.name, read(entry)) for entry in source.entries]
    assert len(dict(found)) == len(found)
    return dict(found)


def good(source: Source) -> dict[str, bytes]:
    return {name: each for name, each in contents(source).items() if isinstance(each, bytes)}


def write(root: Path, name: str, weights: bytes = b"w", **more: bytes) -> None:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_bytes(b"{}")
    (folder / WEIGHTS).write_bytes(weights)
    for file, data in more.items():
        (folder / file.replace("__", ".")).write_bytes(data)


def archive(tmp_path: Path, data: bytes, name: str = "a.tar") -> str:
    (tmp_path / name).write_bytes(data)
    return str(tmp_path / name)


# Folders


def test_a_folder_of_folders(tmp_path: Path) -> None:
    write(tmp_path, "one", b"1", README__md=b"x", training_args__bin=b"x")
    write(tmp_path, "deep/er/two", b"2")
    write(tmp_path, "deep", b"3")
    write(tmp_path, ".hidden/no", b"4")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.txt").write_text("x")
    assert contents(open_source(str(tmp_path), MAX)) == {"one": b"1", "deep/er/two": b"2", "deep": b"3"}


def test_a_folder_that_is_an_adapter_itself(tmp_path: Path) -> None:
    write(tmp_path, "", b"1")
    assert contents(open_source(str(tmp_path), MAX)) == {"": b"1"}


def test_what_is_wrong_with_a_folder_is_said_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, "good")
    for name, missing in (("no-weights", WEIGHTS), ("no-config", CONFIG)):
        write(tmp_path, name)
        (tmp_path / name / missing).unlink()
    write(tmp_path, "pickled", adapter_model__bin=b"x")
    (tmp_path / "pickled" / WEIGHTS).unlink()
    write(tmp_path, "large", b"x" * (MAX + 1))
    write(tmp_path, "long-config")
    (tmp_path / "long-config" / CONFIG).write_bytes(b" " * (64 << 10) + b"{}")
    write(tmp_path, "mixed", pica_config__json=b"{}")
    found = contents(open_source(str(tmp_path), MAX))
    kinds = {name: (type(error), error.field) for name, error in found.items() if isinstance(error, OvertoneError)}
    assert found.keys() - kinds.keys() == {"good"}
    assert kinds == {
        "no-weights": (InvalidAdapter, WEIGHTS),
        "no-config": (InvalidAdapter, CONFIG),
        "pickled": (InvalidAdapter, "adapter_model.bin"),
        "large": (TooLarge, WEIGHTS),
        "long-config": (TooLarge, CONFIG),
        "mixed": (InvalidAdapter, "pica_config.json"),
    }


def test_links_in_folders_are_not_followed(tmp_path: Path) -> None:
    secret, root = tmp_path / "secret", tmp_path / "root"
    write(secret, "", b"secret")
    write(root, "file-link")
    (root / "file-link" / WEIGHTS).unlink()
    (root / "file-link" / WEIGHTS).symlink_to(secret / WEIGHTS)
    (root / "folder-link").symlink_to(secret)
    os.mkfifo(root / "file-link" / "adapter_model.bin")
    found = contents(open_source(str(root), MAX))
    assert found.keys() == {"file-link"}
    assert isinstance(found["file-link"], PathRefused)


def test_a_folder_is_walked_only_as_far_as_it_is_read(tmp_path: Path) -> None:
    for i in range(300):
        write(tmp_path, f"a{i}")
    entries = open_source(str(tmp_path), MAX).entries
    first = [next(entries) for _ in range(3)]
    for entry in first:
        assert read(entry) == b"w"
    write(tmp_path, first[0].name, b"other")
    assert read(first[0]) == b"other"  # read when it is asked for


def test_too_deep(tmp_path: Path) -> None:
    write(tmp_path, "/".join(["d"] * 40))
    ((name, error),) = contents(open_source(str(tmp_path), MAX)).items()
    assert name == "/".join(["d"] * 33)
    assert isinstance(error, PathRefused)


def test_marks_change_with_what_they_mark(tmp_path: Path) -> None:
    def marks() -> dict[str, bytes]:
        return {entry.name: entry.mark for entry in open_source(str(tmp_path), MAX).entries}

    write(tmp_path, "a")
    write(tmp_path, "b")
    before = marks()
    assert len({len(mark) for mark in before.values()} | {8}) == 1
    assert len(set(before.values())) == 2
    assert marks() == before
    os.utime(tmp_path / "a" / WEIGHTS, ns=(1, 1))
    (tmp_path / "b" / CONFIG).write_bytes(b"{ }")
    assert not set(marks().values()) & set(before.values())


def test_no_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in ("nothing", "pipe"):
        with pytest.raises(InvalidRequest) as caught:
            open_source(str(tmp_path / place), MAX)
        assert caught.value.field == "source"


# Archives


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives(tmp_path: Path, suffix: str, format: int) -> None:
    long = "x" * 90 + "/" + "y" * 60
    members = [member("./dir", type=tarfile.DIRTYPE), *adapter("./dir/one", b"1"), *adapter(long, b"2" * 1000)]
    members += [member("dir/README.md", b"x" * 700), *adapter("three")]
    source = open_source(archive(tmp_path, COMPRESS[suffix](tar_of(*members, format=format))), MAX)
    assert contents(source) == {"dir/one": b"1", long: b"2" * 1000, "three": b"w"}
    assert source.position is not None
    assert source.total == (tmp_path / "a.tar").stat().st_size
    assert 0 < source.position() <= source.total


def test_zstd(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    data = zstandard.ZstdCompressor().compress(tar_of(*adapter("one", b"1" * 5000)))
    assert contents(open_source(archive(tmp_path, data), MAX)) == {"one": b"1" * 5000}


def test_an_archive_of_one_adapter(tmp_path: Path) -> None:
    assert contents(open_source(archive(tmp_path, tar_of(*adapter(""))), MAX)) == {"": b"w"}


def test_files_of_folders_may_be_mixed(tmp_path: Path) -> None:
    configs, weights = zip(*(adapter(f"a{i}", b"%d" % i) for i in range(60)), strict=True)
    found = contents(open_source(archive(tmp_path, tar_of(*configs, *reversed(weights))), MAX))
    assert found == {f"a{i}": b"%d" % i for i in range(60)}


def test_files_too_far_apart_are_given_up(tmp_path: Path) -> None:
    configs, weights = zip(*(adapter(f"a{i}") for i in range(70)), strict=True)
    found = [
        (entry.name, read(entry)) for entry in open_source(archive(tmp_path, tar_of(*configs, *weights)), MAX).entries
    ]
    assert len([each for _, each in found if each == b"w"]) == 64
    missing = {each.field for _, each in found if isinstance(each, InvalidAdapter)}
    assert missing == {WEIGHTS}
    assert len(found) == 70


def test_what_is_no_adapters_file_is_left_alone(tmp_path: Path) -> None:
    members = [
        member("one/adapter_model.bin", b"x"),
        *adapter("one"),
        member("one/adapter_model.bin", b"x"),
        member("/etc/passwd", b"x"),
        member("one/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("dev", type=tarfile.CHRTYPE),
        member("one/big.bin", b"x" * 100_000),
    ]
    assert contents(open_source(archive(tmp_path, tar_of(*members)), MAX)) == {"one": b"w"}


LINK = member(f"a/{WEIGHTS}", type=tarfile.SYMTYPE, linkname="/etc/shadow")


@pytest.mark.parametrize(
    ("members", "error", "field"),
    [
        ([member(f"../out/{CONFIG}", b"{}")], PathRefused, "path"),
        ([member(f"/etc/{WEIGHTS}", b"x")], PathRefused, "path"),
        ([member(f"a/../../b/{WEIGHTS}", b"x")], PathRefused, "path"),
        ([member(f"a\\b/{WEIGHTS}", b"x")], PathRefused, "path"),
        ([member(f"a\x1b[31m/{WEIGHTS}", b"x")], PathRefused, "path"),
        ([LINK, member(f"a/{CONFIG}", b"{}")], PathRefused, "path"),
        ([member(f"a/{WEIGHTS}", type=tarfile.LNKTYPE, linkname="b"), member(f"a/{CONFIG}")], PathRefused, "path"),
        ([member(f"a/{WEIGHTS}", type=tarfile.FIFOTYPE), member(f"a/{CONFIG}")], PathRefused, "path"),
        ([member(f"a/{CONFIG}", b"{}"), member(f"a/{WEIGHTS}", b"x" * (MAX + 1))], TooLarge, WEIGHTS),
        ([member(f"a/{CONFIG}", b" " * (65 << 10)), member(f"a/{WEIGHTS}", b"x")], TooLarge, CONFIG),
        ([member(f"a/{CONFIG}", b"{}")], InvalidAdapter, WEIGHTS),
        ([member("a/adapter_model.bin", b"x"), member(f"a/{CONFIG}", b"{}")], InvalidAdapter, "adapter_model.bin"),
    ],
)  # fmt: skip
def test_a_hostile_member_is_refused_and_the_others_are_read(
    tmp_path: Path, members: list[Any], error: type[OvertoneError], field: str
) -> None:
    found = contents(open_source(archive(tmp_path, tar_of(*adapter("before"), *members, *adapter("after"))), MAX))
    assert found.pop("before") == found.pop("after") == b"w"
    ((name, refused),) = found.items()
    assert name.isprintable()
    assert type(refused) is error
    assert isinstance(refused, OvertoneError)
    assert refused.field == field


def header(name: bytes = b"x", size: bytes = b"0", kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    block = bytearray(512)
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[257 : 257 + len(magic)] = magic
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


HUGE = b"\x80" + (1 << 80).to_bytes(11, "big")
WHOLE = tar_of(*adapter("one"))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "no tar archive"),
        (b"short", "no tar archive"),
        (b"x" * 2048, "no tar archive"),
        (header(kind=b"x", size=b"77777777") + bytes(512), "an extension header has"),
        (header(kind=b"L", size=HUGE) + bytes(512), "an extension header has"),
        (header(kind=b"g", size=b"377777") + bytes(512), "an extension header has"),
        (header(size=HUGE) + bytes(1024), "ends too early"),
        (header(size=b"-1"), "no number"),
        (header(size=b"1_0"), "no number"),
        (header(size=b"9"), "no number"),
        (header(kind=b"S", size=b"0"), "sparse"),
        (header(kind=b"x", size=b"10") + b"9999 a=b".ljust(512, b"\0"), "extension header"),
        (header(kind=b"x", size=b"10") + b"-1 size=1".ljust(512, b"\0"), "no number"),
        (header(kind=b"x", size=b"20") + b"16 size=999999z\n".ljust(512, b"\0"), "no number"),
        (WHOLE[:700], "ends too early"),
        (WHOLE[:512] + b"{" + WHOLE[513:1024] + b"\1" + WHOLE[1025:], "wrong checksum"),
        (gzip.compress(tar_of(*adapter("one", os.urandom(9000))))[:5000], "damaged"),
        (b"\x1f\x8b" + b"x" * 100, "damaged"),
        (b"BZh9" + b"x" * 100, "damaged"),
        (b"\xfd7zXZ\0" + b"x" * 100, "damaged"),
    ],
)
def test_a_damaged_archive_says_so(tmp_path: Path, data: bytes, match: str) -> None:
    with pytest.raises((InvalidRequest, StoreFailed), match=match):
        contents(open_source(archive(tmp_path, data), MAX))


def test_a_decompression_bomb_is_left_early(tmp_path: Path) -> None:
    """100 MB of zeros in 100 KB, as an ordinary file of no interest."""
    bomb = gzip.compress(header(b"zeros", b"%o" % (100 << 20)) + bytes(100 << 20), 6)
    tracemalloc.start()
    with pytest.raises(TooLarge, match="expands more than"):
        contents(open_source(archive(tmp_path, bomb), MAX))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


def test_an_archive_of_many_takes_little_memory(tmp_path: Path) -> None:
    block = tar_of(*adapter("a", b"w" * 400))[: 4 * 512]

    class Endless(io.RawIOBase):
        """Thousands of times the same adapter."""

        def __init__(self) -> None:
            self.data, self.left = io.BytesIO(block * 100), 30

        def read(self, size: int = -1) -> bytes:
            data = self.data.read(size)
            if not data and self.left:
                self.left -= 1
                self.data = io.BytesIO(block * 100 if self.left else bytes(1024))
                data = self.data.read(size)
            return data

    tracemalloc.start()
    count = sum(read(entry) == b"w" * 400 for entry in open_archive(Endless(), MAX, None).entries)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000
    assert peak < 4 << 20


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0\n"), min_size=1, max_size=180).filter(
    lambda name: not name.endswith("/")
)


@settings(deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=2000)), max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_that_tarfile_wrote(members: list[tuple[str, bytes]], format: int) -> None:
    data = tar_of(*(member(name, content) for name, content in members), format=format)
    tar = Tar(io.BytesIO(data))
    found = [(each.path, tar.content(each) if i % 2 else len(data)) for i, each in enumerate(tar)]
    assert found == [(name, content if i % 2 else len(data)) for i, (name, content) in enumerate(members)]


@settings(deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 2000), st.binary(min_size=1, max_size=20))
def test_any_bytes_end_in_entries_or_in_one_of_our_errors(tail: bytes, at: int, junk: bytes) -> None:
    for data in (tail, WHOLE[:at] + junk + WHOLE[at + len(junk) :], gzip.compress(WHOLE)[:at] + junk):
        entries: Iterator[Any] = _raw(data)
        try:
            for entry in entries:
                read(entry)
        except OvertoneError:
            continue


def _raw(data: bytes) -> Iterator[Entry]:
    return open_archive(io.BytesIO(data), MAX, len(data)).entries


# URLs


def test_an_archive_behind_a_url() -> None:
    data = gzip.compress(tar_of(*adapter("one", b"1"), *adapter("two", b"2")))
    with web_server({"/a.tar.gz": data, "/moved": "/a.tar.gz", "/out": "file:///etc/passwd"}) as url:
        source = open_source(f"{url}/a.tar.gz", MAX)
        assert source.total == len(data)
        assert contents(source) == {"one": b"1", "two": b"2"}
        assert good(open_source(f"{url}/moved", MAX)).keys() == {"one", "two"}
        for path in ("none", "out"):
            with pytest.raises(StoreFailed, match="cannot read"):
                open_source(f"{url}/{path}", MAX)


def test_a_download_that_breaks_off() -> None:
    data = tar_of(*adapter("one", os.urandom(5000)), *adapter("two", os.urandom(5000)))
    with web_server({"/a.tar": data}, cut=9000) as url, pytest.raises((InvalidRequest, StoreFailed)):
        contents(open_source(f"{url}/a.tar", MAX))


def test_other_urls_need_obstore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(InvalidRequest, match="needs the package obstore"):
        open_source("s3://bucket/a.tar", MAX)


def test_object_storage(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    write(tmp_path, "some/one", b"1")
    write(tmp_path, "some/two", b"2" * (MAX + 1))
    (tmp_path / "a.tar").write_bytes(tar_of(*adapter("three", b"3" * 5000)))
    found = contents(open_source(f"file://{tmp_path}/some/", MAX))
    assert found["one"] == b"1"
    assert isinstance(found["two"], TooLarge)
    assert contents(open_source(f"file://{tmp_path}/a.tar", MAX)) == {"three": b"3" * 5000}
    with pytest.raises(StoreFailed, match="cannot read"):
        open_source(f"file://{tmp_path}/none.tar", MAX)


def test_numbers_of_either_form(tmp_path: Path) -> None:
    """GNU tar writes sizes above 8 GiB in binary."""
    content = b"abc"
    block = header(b"x", b"\x80" + struct.pack(">3xQ", len(content))) + content.ljust(512, b"\0") + bytes(1024)
    tar = Tar(io.BytesIO(block))
    assert [(each.path, tar.content(each)) for each in tar] == [("x", b"abc")]


@pytest.mark.parametrize("ending", [0, 1, 511])
def test_an_archive_that_ends_between_members_is_not_complete(ending: int) -> None:
    """As a download that broke off there: without the block of zeros nobody knows whether more was to come."""
    whole = tar_of(*adapter("one"), *adapter("two"))
    end = len(whole.rstrip(b"\0"))
    members = whole[: -(-end // 512) * 512]
    with pytest.raises(InvalidRequest, match="too early"):
        list(Tar(io.BytesIO(members + bytes(ending))))
    assert len(list(Tar(io.BytesIO(members + bytes(512))))) == 4


def test_a_body_that_ends_too_early_is_no_end() -> None:
    whole = tar_of(*adapter("one"), *adapter("two"))
    for cut in (1, 1024, len(whole) - 512):
        with web_server({"/a.tar": whole}, cut=cut) as url:
            file = urls._Body(urls._opener().open(f"{url}/a.tar", timeout=10))
            with pytest.raises(OSError, match=f"{cut} bytes too early"):
                file.readall()
            file.close()


def test_only_the_files_of_the_layout_may_make_a_folder_too_large(tmp_path: Path) -> None:
    """In an archive as in a folder."""
    large = b"x" * 5000
    data = tar_of(member("a/adapter_model.bin", large), *adapter("a"), *adapter("b", large))
    write(tmp_path / "all", "a", adapter_model__bin=large)
    write(tmp_path / "all", "b", large)
    for place in (archive(tmp_path, data), str(tmp_path / "all")):
        found = contents(open_source(place, 1000))
        assert found["a"] == b"w"
        assert isinstance(found["b"], TooLarge)
