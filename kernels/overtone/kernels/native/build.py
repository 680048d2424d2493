"""Compiles the CPU kernels for the machine that they run on: once, in about four seconds, then from a cache.

Only gcc will do: its OpenMP runtime is the one that torch brings, so both share one team of threads. Where there is none, or
the processor has no vectors worth it, torch's own operators do the same, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

# A product and a sum of vectors are one instruction in each form of a loop, so that a row's last bit is the same in all. By
# itself gcc leaves some apart, for the sake of certain processors' latencies.
_ROUNDING = ("-ffp-contract=fast", "--param=avoid-fma-max-bits=0")
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", *_ROUNDING, "-fopenmp", "-shared", "-fPIC", "-Wall", "-Wextra")
_TUNING = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}
_SECONDS = 120


class NotBuilt(Exception):
    """There are no native kernels here; says why."""


def load_library() -> ctypes.CDLL:
    """The compiled kernels. torch must have been imported: its OpenMP runtime has to be there first."""
    if sys.platform != "linux" or platform.machine() not in _TUNING:
        raise NotBuilt(f"there are none for {sys.platform} on {platform.machine()}")
    compiler = _compiler()
    sources = _sources()
    name = f"{_digest(compiler, sources)}.so"
    cache = _cache()
    if cache is not None:
        if not (cache / name).is_file():
            _compile(compiler, sources, cache / name)
        return _load(cache / name)
    with tempfile.TemporaryDirectory(prefix="overtone-native-") as folder:  # once loaded, the file is not needed
        _compile(compiler, sources, Path(folder) / name)
        return _load(Path(folder) / name)


def _load(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NotBuilt(f"the compiled library does not load: {error}") from error


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CC"), "gcc", "cc")):
        found = shutil.which(name)
        if found is None:
            continue
        try:
            macros = _run([found, "-dM", "-E", "-x", "c", os.devnull])
        except NotBuilt:
            continue
        if "__GNUC__" in macros and "__clang__" not in macros:
            return found
    raise NotBuilt("no gcc was found")


def _sources() -> dict[str, str]:
    folder = resources.files(__package__)
    return {
        entry.name: entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith((".c", ".h"))
    }


def _digest(compiler: str, sources: dict[str, str]) -> str:
    """Of all that the library depends on: sources, flags, compiler and processor."""
    digest = hashlib.sha256()
    for part in (*_FLAGS, _processor(), _run([compiler, "--version"]), *sources, *sources.values()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def _cache() -> Path | None:
    """The user's cache; None where it cannot be written, or others can write it too: what lies there is executed."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = Path(home) / "overtone" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    private = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if private and os.access(folder, os.W_OK) else None


def _compile(compiler: str, sources: dict[str, str], target: Path) -> None:
    """Atomically: several servers may start at once."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            for name, text in sources.items():
                (Path(folder) / name).write_text(text, encoding="utf-8")
            units = [Path(folder) / name for name in sources if name.endswith(".c")]
            command, built = [compiler, *_FLAGS, _TUNING[platform.machine()]], Path(folder) / target.name
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda unit: _run([*command, "-c", str(unit), "-o", f"{unit}.o"]), units))
            _run([*command, *(f"{unit}.o" for unit in units), "-o", str(built)])
            built.replace(target)
    except OSError as error:
        raise NotBuilt(f"the library cannot be written: {error}") from error


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{command[0]}: {error}") from error
    if done.returncode:
        raise NotBuilt(f"{command[0]} failed: {(done.stderr.splitlines() or ['no message'])[0]}")
    return done.stdout
