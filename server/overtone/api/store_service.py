"""StoreService: what the store holds, and its upkeep, one of each kind at a time."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path

from overtone.adapters.packs import Problem as FileProblem
from overtone.adapters.records import check_id
from overtone.adapters.store import AdapterStore, Problem, Progress, StoreStats
from overtone.api.backend import BackendSlot
from overtone.api.change_log import ChangeLog
from overtone.api.long_work import Reported
from overtone.api.status import Context
from overtone.errors import ConfigError, InvalidRequest, Overloaded
from overtone.v1 import store_pb2 as pb
from overtone.v1 import store_pb2_grpc as pb_grpc

MAX_PROBLEMS = 10_000


class StoreService(pb_grpc.StoreServiceServicer):
    """Errors leave as exceptions of `overtone.errors`; the interceptor makes them a status."""

    def __init__(self, backend: BackendSlot, log: ChangeLog, backup_root: Path | None = None) -> None:
        """backup_root: below which clients may have the store copied; None: they may not."""
        self._backend, self._log, self._backup_root = backend, log, backup_root
        self._compacting, self._checking, self._copying = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()

    async def GetStoreStatistics(self, request: pb.GetStoreStatisticsRequest, context: Context) -> pb.StoreStatistics:
        backend = self._backend.get()
        return _statistics(await backend.in_store(backend.store.stats))

    async def CompactStore(
        self, request: pb.CompactStoreRequest, context: Context
    ) -> AsyncIterator[pb.CompactStoreResponse]:
        backend = self._backend.changing()
        _check_free(self._compacting, "the store is being compacted already")
        async with self._compacting:
            with self._log.change("CompactStore", context) as change:
                work = Reported(backend.store.compact, backend.in_upkeep)
                async with aclosing(work.progress()) as steps:
                    async for done, total in steps:
                        yield pb.CompactStoreResponse(progress=pb.Progress(done=done, total=total))
                ended = work.result
                change.fields |= {"packs": ended.packs, "moved_bytes": ended.moved_bytes, "bytes": ended.freed_bytes}
            compaction = pb.Compaction(
                pack_count=ended.packs,
                moved_bytes=ended.moved_bytes,
                freed_bytes=ended.freed_bytes,
                check=_check(ended.problems),
            )
            yield pb.CompactStoreResponse(compaction=compaction)

    async def CheckStore(self, request: pb.CheckStoreRequest, context: Context) -> AsyncIterator[pb.CheckStoreResponse]:
        backend = self._backend.changing()
        _check_free(self._checking, "the store is being checked already")
        async with self._checking:
            with self._log.change("CheckStore", context) as change:
                work = Reported(partial(backend.store.check, request.deep), backend.in_upkeep)
                async with aclosing(work.progress()) as steps:
                    async for done, total in steps:
                        yield pb.CheckStoreResponse(progress=pb.Progress(done=done, total=total))
                problems = work.result
                change.fields |= {"deep": request.deep, "problems": len(problems)}
            yield pb.CheckStoreResponse(check=_check(problems))

    async def BackupStore(
        self, request: pb.BackupStoreRequest, context: Context
    ) -> AsyncIterator[pb.BackupStoreResponse]:
        backend = self._backend.changing()
        _check_free(self._copying, "the store is being copied already")
        async with self._copying:
            with self._log.change("BackupStore", context) as change:
                folder, copied = _backup_folder(self._backup_root, request.folder), 0
                change.fields["folder"] = request.folder
                work = Reported(partial(_copy, backend.store, folder), backend.in_upkeep)
                async with aclosing(work.progress()) as steps:
                    async for copied, total in steps:
                        yield pb.BackupStoreResponse(progress=pb.Progress(done=copied, total=total))
                change.fields["bytes"] = copied
            yield pb.BackupStoreResponse(backup=pb.Backup(copied_bytes=copied))


def _backup_folder(root: Path | None, name: str) -> Path:
    if root is None:
        raise ConfigError("the server makes no backups: start it with --backup-root", field="backup_root")
    check_id(name, "folder")  # never a path
    if (root / name).exists():
        raise InvalidRequest(f"{name} exists already", field="folder")
    return root / name


def _copy(store: AdapterStore, folder: Path, progress: Progress) -> None:
    try:
        store.backup(folder, progress)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_free(lock: asyncio.Lock, message: str) -> None:
    if lock.locked():
        raise Overloaded(message, retry_after_s=10.0)


def _check(problems: Sequence[Problem | FileProblem]) -> pb.Check:
    found = [
        pb.Problem(kind=each.kind, digest=each.digest, pack=each.pack, message=each.what)
        for each in problems[:MAX_PROBLEMS]
    ]
    return pb.Check(problem_count=len(problems), problems=found)


def _statistics(stats: StoreStats) -> pb.StoreStatistics:
    return pb.StoreStatistics(
        store_id=stats.store_id,
        adapter_count=stats.registered_count,
        version_count=stats.version_count,
        quarantined_count=stats.quarantined_count,
        live_bytes=stats.live_bytes,
        disk_bytes=stats.disk_bytes,
        disk_budget_bytes=stats.disk_budget_bytes,
        pack_count=stats.pack_count,
        remote_bytes=stats.remote_bytes,
        resident_count=stats.resident_count,
        resident_bytes=stats.resident_bytes,
        memory_bytes=stats.memory_bytes,
        leased_count=stats.leased_count,
        hit_total=stats.hit_count,
        miss_total=stats.miss_count,
        disk_load_total=stats.disk_load_count,
        remote_load_total=stats.remote_load_count,
        memory_load_total=stats.memory_load_count,
        load_failure_total=stats.load_failure_count,
        eviction_total=stats.eviction_count,
        negative_count=stats.negative_count,
        negative_hit_total=stats.negative_hit_count,
        memo_bytes=stats.memo_bytes,
        pending_pack_count=stats.pending_pack_count,
        failed_pass_total=stats.failed_pass_count,
        fetch_failure_total=stats.fetch_failure_count,
        remote_error=stats.remote_error,
    )
