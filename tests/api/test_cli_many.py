"""The commands for many adapters against a control plane of our own: import, statistics, versions, export, the store."""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
from click.testing import CliRunner, Result

from overtone.adapters.operations import Compaction, Problem, Progress
from overtone.adapters.records import StoreStats
from overtone.api.cli import main
from overtone.api.cli.journal import Journal
from overtone.api.usage import Measured
from overtone.v1 import store_pb2, store_pb2_grpc
from support.archives import CONFIG, WEIGHTS, adapter, member, tar_of, web_server
from support.control_plane import ControlPlane


@pytest.fixture
def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ControlPlane]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.delenv("COLUMNS", raising=False)
    (tmp_path / "tmp").mkdir()
    with ControlPlane(tmp_path / "tmp") as plane:
        monkeypatch.setenv("OVERTONE_ADDRESS", plane.address)
        yield plane


def run(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(main, arguments, catch_exceptions=False, **options)


def write(root: Path, name: str, weights: bytes = b"w") -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / CONFIG).write_bytes(b"{}")
    (root / name / WEIGHTS).write_bytes(weights)


def summary(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    assert found.pop("seconds") >= 0
    return found


def counts(**given: int) -> dict[str, Any]:
    names = ("created", "updated", "unchanged", "refused", "skipped")
    return {**dict.fromkeys(names, 0), "reasons": {}, **given}


def journals(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "settings").rglob("*.journal"))


def test_a_folder_is_imported(plane: ControlPlane, tmp_path: Path) -> None:
    for name in ("one", "team/two", "team/deep/three"):
        write(tmp_path / "all", name)
    arguments = ("--id-prefix", "x-", "--tenant", "anna", "--label", "k=v")
    result = run("adapters", "import", str(tmp_path / "all"), *arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("3 created in ")
    assert plane.store.records.keys() == {"x-one", "x-team.two", "x-team.deep.three"}
    assert {(record.tenant, record.labels["k"]) for record in plane.store.records.values()} == {("anna", "v")}
    assert journals(tmp_path) == []
    again = run("adapters", "import", str(tmp_path / "all"), *arguments, "--json")
    assert summary(again) == counts(unchanged=3)
    write(tmp_path / "all", "one", b"new")
    assert summary(run("adapters", "import", str(tmp_path / "all"), *arguments, "--json")) == counts(
        updated=1, unchanged=2
    )


def test_archives_and_urls_are_imported(plane: ControlPlane, tmp_path: Path) -> None:
    data = tar_of(*adapter("one"), *adapter("two"))
    (tmp_path / "some.tar").write_bytes(data)
    assert summary(run("adapters", "import", str(tmp_path / "some.tar"), "--json")) == counts(created=2)
    with web_server({"/some.tar": data}) as url:
        assert summary(run("adapters", "import", f"{url}/some.tar", "--json")) == counts(unchanged=2)
    (tmp_path / "lone.tar").write_bytes(tar_of(*adapter("")))
    assert summary(run("adapters", "import", str(tmp_path / "lone.tar"), "--json")) == counts(created=1)
    assert plane.store.records.keys() == {"one", "two", "lone"}


def test_refusals_are_told_and_end_in_status_1(plane: ControlPlane, tmp_path: Path) -> None:
    members = [*adapter("good"), *adapter("bad", b"bad"), *adapter("no id"), member(f"half/{CONFIG}", b"{}")]
    (tmp_path / "a.tar").write_bytes(tar_of(*members, *adapter("last")))
    result = run("adapters", "import", str(tmp_path / "a.tar"))
    assert result.exit_code == 1
    assert result.stdout.startswith("2 created, 3 refused in ")
    lines = result.stderr.splitlines()
    assert any(line.startswith("refused bad: spectrum has 3 numbers, not 4 [ADAPTER_MALFORMED]") for line in lines)
    assert any(line.startswith("refused half: adapter_model.safetensors is missing") for line in lines)
    rows = {line.split()[0]: line.split()[1] for line in result.stdout.splitlines() if len(line.split()) > 1}
    assert (rows["ADAPTER_MALFORMED"], rows["INVALID_REQUEST"]) == ("2", "1")
    found = run("adapters", "import", str(tmp_path / "a.tar"), "--json")
    assert summary(found)["reasons"] == {"ADAPTER_MALFORMED": 2, "INVALID_REQUEST": 1}


def test_only_the_first_refusals_are_told_one_by_one(plane: ControlPlane, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(*(each for i in range(100) for each in adapter(f"a{i}", b"bad"))))
    result = run("adapters", "import", str(tmp_path / "a.tar"))
    assert len(result.stderr.splitlines()) == 20
    assert "100 refused" in result.stdout


@pytest.mark.parametrize("bad", [adapter("bad", b"bad"), [member(f"../bad/{CONFIG}", b"{}")]])
def test_stopping_at_the_first_refusal(plane: ControlPlane, tmp_path: Path, bad: Any) -> None:
    many = [each for i in range(3000) for each in adapter(f"a{i}")]
    (tmp_path / "a.tar").write_bytes(tar_of(*adapter("first"), *bad, *many))
    result = run("adapters", "import", str(tmp_path / "a.tar"), "--on-error", "stop", "--json")
    assert result.exit_code == 1
    assert summary(result)["refused"] == 1
    assert len(plane.store.records) < 2500


def test_an_interrupted_import_goes_on(plane: ControlPlane, tmp_path: Path) -> None:
    good = [each for i in range(1000) for each in adapter(f"a{i}")]
    (tmp_path / "a.tar").write_bytes(tar_of(*good, *adapter("z", b"broken")))
    first = run("adapters", "import", str(tmp_path / "a.tar"), "--json")
    assert first.exit_code == 1
    assert "the disk is full [STORE_FAILED]" in first.stderr
    created = summary(first)["created"]
    assert created >= 256
    assert len(journals(tmp_path)) == 1
    stored = len(plane.store.records)
    plane.store.records.clear()  # shows what is sent again
    (tmp_path / "a.tar").write_bytes(tar_of(*good))
    again = summary(run("adapters", "import", str(tmp_path / "a.tar"), "--json"))
    assert again == counts(created=1000 - created, skipped=created)
    assert journals(tmp_path) == []
    assert stored <= 1000
    assert summary(run("adapters", "import", str(tmp_path / "a.tar"), "--json"))["skipped"] == 0


def test_restart_sends_everything_again(plane: ControlPlane, tmp_path: Path) -> None:
    members = [*adapter("a"), *adapter("bad", b"bad")]
    (tmp_path / "a.tar").write_bytes(tar_of(*members))
    run("adapters", "import", str(tmp_path / "a.tar"), "--on-error", "stop")
    assert len(journals(tmp_path)) == 1
    (tmp_path / "a.tar").write_bytes(tar_of(*adapter("a")))
    assert summary(
        run("adapters", "import", str(tmp_path / "a.tar"), "--on-error", "stop", "--json", "--restart")
    ) == counts(unchanged=1)


def test_another_import_has_another_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    marks = [bytes([i]) * 8 for i in range(5)]
    with Journal({"source": "a"}, restart=False) as journal:
        for mark in marks[:3]:
            journal.add(mark)
    (path,) = tmp_path.rglob("*.journal")
    path.write_bytes(path.read_bytes() + b"torn")
    with Journal({"source": "a"}, restart=False) as journal:
        assert [mark in journal for mark in marks] == [True, True, True, False, False]
        journal.add(marks[4])
    with Journal({"source": "b"}, restart=False) as journal:
        assert marks[0] not in journal
    with Journal({"source": "a"}, restart=False) as journal:
        assert marks[4] in journal
        journal.finish()
    with Journal({"source": "a"}, restart=False) as journal:
        assert marks[0] not in journal


def test_a_folder_whose_name_is_no_text_is_refused_alone(plane: ControlPlane, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "all", name)
    Path(os.fsdecode(os.fsencode(tmp_path / "all") + b"/b")).rename(os.fsdecode(os.fsencode(tmp_path) + b"/all/\xff"))
    result = run("adapters", "import", str(tmp_path / "all"))
    assert result.exit_code == 1
    assert result.stdout.startswith("1 created, 1 refused in ")
    assert "INVALID_REQUEST" in result.stdout
    assert plane.store.records.keys() == {"a"}


def test_a_journal_that_cannot_be_kept_stops_nothing(
    plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way of the folder")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    write(tmp_path / "all", "a")
    result = run("adapters", "import", str(tmp_path / "all"))
    assert result.exit_code == 0
    assert result.stdout.startswith("1 created")
    assert "no journal of this import is kept" in result.stderr


def test_a_source_that_is_none(plane: ControlPlane, tmp_path: Path) -> None:
    result = run("adapters", "import", str(tmp_path / "nothing"))
    assert result.exit_code == 1
    assert "there is no such file or folder" in result.stderr
    assert run("adapters", "import", str(tmp_path), "--label", "nonsense").exit_code == 2


def use(plane: ControlPlane, adapter_id: str, seconds: float, times: int = 1) -> None:
    for _ in range(times):
        measured = Measured(0.0, 7)
        measured.tokens(3, seconds)
        measured.ended(seconds)
        plane.backend.statistics.end(plane.backend.statistics.begin(adapter_id), measured, "eos")


def test_top_and_stats(plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(plane, "often", 0.01, 3)
    use(plane, "slow", 5.0)

    def first(*arguments: str) -> str:
        return run("adapters", "top", *arguments).stdout.splitlines()[3].split()[0]

    assert [first(), first("--by", "p99"), first("--by", "ttft", "-n", "1")] == ["often", "slow", "slow"]
    assert "2 adapters used" in run("adapters", "top").stdout
    found = json.loads(run("adapters", "top", "--json", "-n", "1").stdout)
    assert (found["statistics"][0]["id"], found["tracked_count"]) == ("often", 2)
    assert "of 3" in run("adapters", "stats", "often").stdout
    assert json.loads(run("adapters", "stats", "often", "--json").stdout)["request_count"] == 3
    assert run("adapters", "stats", "gone").exit_code == 1
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("overtone.api.cli.usage.time.sleep", pause)
    watched = run("adapters", "top", "--watch", "--interval", "0.5")
    assert (watched.exit_code, watched.stdout.count("often"), pauses) == (130, 3, [0.5] * 3)


def test_versions_and_rollback(plane: ControlPlane, tmp_path: Path) -> None:
    for weights in (b"1", b"2"):
        write(tmp_path / "all", "a", weights)
        assert run("adapters", "import", str(tmp_path / "all")).exit_code == 0
    listed = json.loads(run("adapters", "versions", "a", "--json").stdout)
    assert [row["current"] for row in listed] == [True, False]
    old = listed[1]["digest"]
    assert old in run("adapters", "versions", "a").stdout
    assert run("adapters", "rollback", "a").stdout == f"a is now {old}\n"
    assert run("adapters", "rollback", "a", "--to", listed[0]["digest"][:12]).exit_code == 0
    assert plane.store.get("a").digest == listed[0]["digest"]
    assert run("adapters", "rollback", "a", "--to", "0" * 12).exit_code == 1


def test_watch_prints_until_the_server_ends(plane: ControlPlane, tmp_path: Path) -> None:
    write(tmp_path / "all", "a")
    run("adapters", "import", str(tmp_path / "all"))
    plane.loop.call_soon_threadsafe(plane.backend.changes.close)
    result = run("adapters", "watch", "--snapshot")
    assert result.stdout.startswith("existing  a  ")
    assert "[DRAINING]" in result.stderr
    lines = [json.loads(line) for line in run("adapters", "watch", "--snapshot", "--json").stdout.splitlines()]
    assert lines[-1]["caught_up"]


def test_export_into_an_archive(plane: ControlPlane, tmp_path: Path) -> None:
    write(tmp_path / "all", "a")
    run("adapters", "import", str(tmp_path / "all"))
    target = tmp_path / "a.tar"
    result = run("adapters", "export", "a", "-o", str(target))
    assert result.exit_code == 0, result.output
    content = plane.store.get("a").digest.encode() * 4096 * 3
    assert target.read_bytes() == content
    assert run("adapters", "export", "a", f"--output={target}").exit_code == 1
    assert run("adapters", "export", "gone", "-o", str(tmp_path / "b.tar")).exit_code == 1
    assert sorted(path.name for path in tmp_path.glob("*.tar*")) == ["a.tar"]
    assert run("adapters", "export", "a", "-o", "-").stdout_bytes == content
    assert "--to" in run("adapters", "export", "--help").stdout  # the other export


def test_the_store_of_a_server(plane: ControlPlane) -> None:
    assert json.loads(run("store", "stats", "--json").stdout)["store_id"] == "s-1"
    assert "hit_total" in run("store", "stats").stdout
    assert run("store", "compact").stdout == "2 packs removed, 1000 bytes freed, 300 moved\n"
    assert run("store", "fsck", "--deep").stdout == "nothing is wrong\n"
    plane.store.problems = [Problem("bad_digest", "d" * 64, 3, "it is damaged")]
    broken = run("store", "fsck", "--deep")
    assert broken.exit_code == 1
    assert "1 problems" in broken.stdout
    assert "it is damaged" in broken.stdout
    assert run("store", "fsck").exit_code == 0
    told = json.loads(run("store", "compact", "--json").stdout)
    assert told["problems"] == [{"kind": "bad_digest", "digest": "d" * 64, "pack": 3, "what": "it is damaged"}]


def test_a_running_store_is_copied(plane: ControlPlane, tmp_path: Path) -> None:
    refused = run("store", "backup", "monday")
    assert refused.exit_code == 1
    assert "--backup-root" in refused.stderr
    plane.upkeep._backup_root = tmp_path
    assert run("store", "backup", "monday").exit_code == 0
    assert (tmp_path / "monday" / "copy").read_text() == "of it"
    for name in ("monday", "../tuesday", "a/b", ""):
        assert "INVALID_REQUEST" in run("store", "backup", name).stderr


def test_half_a_copy_is_removed(plane: ControlPlane, tmp_path: Path) -> None:
    plane.upkeep._backup_root, plane.store.work = tmp_path, 1 << 30
    with plane.channel() as channel:
        stub = store_pb2_grpc.StoreServiceStub(channel)
        call = stub.BackupStore(store_pb2.BackupStoreRequest(folder="half"))
        assert next(call).progress.done
        assert (tmp_path / "half").is_dir()
        with pytest.raises(grpc.RpcError, match="being copied already"):
            list(stub.BackupStore(store_pb2.BackupStoreRequest(folder="other")))
        call.cancel()
        plane.call(plane.calls.wait_idle(60))
    assert not (tmp_path / "half").exists()


@dataclass
class FakeMaintenance:
    """What `overtone.adapters.maintenance.Maintenance` offers."""

    root: Path
    remote_url: str = ""
    problems: list[Problem] = field(default_factory=lambda: [Problem("stray_file", "", 0, "x lies about")])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def stats(self) -> StoreStats:
        return StoreStats(7, 0, 0, 0, 0, 0, 0, 0, 0)

    def compact(self, progress: Progress) -> Compaction:
        progress(1, 2)
        return Compaction(1, 2, 3, ())

    def check(self, deep: bool, progress: Progress) -> Sequence[Problem]:
        return self.problems if deep else []

    def backup(self, destination: Path, progress: Progress) -> None:
        shutil.copytree(self.root, destination)


def test_a_store_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("overtone.adapters.maintenance")
    module.Maintenance = FakeMaintenance
    monkeypatch.setitem(sys.modules, "overtone.adapters.maintenance", module)
    root = tmp_path / "store"
    root.mkdir()
    (root / "file").write_text("x")
    where = ("--store", str(root))
    assert json.loads(run("store", "stats", "--json", *where).stdout)["registered_count"] == 7
    assert run("store", "compact", *where).stdout == "1 packs removed, 3 bytes freed, 2 moved\n"
    assert run("store", "fsck", *where).exit_code == 0
    broken = run("store", "fsck", "--deep", "--json", *where)
    assert (broken.exit_code, json.loads(broken.stdout)["problem_count"]) == (1, 1)
    assert run("store", "backup", str(tmp_path / "copy"), *where).exit_code == 0
    assert (tmp_path / "copy" / "file").read_text() == "x"
    assert run("store", "backup", str(tmp_path / "copy"), *where).exit_code == 1
    opened: list[tuple[Path, str]] = []
    module.Maintenance = lambda *given: opened.append(given) or FakeMaintenance(*given)
    assert run("store", "fsck", *where, "--remote-store", "s3://b/p").exit_code == 0
    assert opened == [(root, "s3://b/p")]
    assert run("store", "fsck", "--store", str(tmp_path / "none")).exit_code == 1
