"""Installs what peers need and this project does not, below a work directory, by pip from its configured index."""

from __future__ import annotations

import pathlib
import subprocess
import sys

_TORCH = "torch==2.13.0"
# Peer -> what pip installs into an environment of its own.
REQUIREMENTS = {
    # FuxiCTR 2.3.10 asks polars.scan_csv for an argument that polars 1.30 dropped.
    "fuxictr": ("fuxictr==2.3.10", "polars<1.30"),
    # It imports requests, which it does not declare.
    "deepctr-torch": (_TORCH, "deepctr-torch==0.3.0", "requests"),
    "torch-rechub": (_TORCH, "torch-rechub==0.9.0"),
}
# Without it Beam's WriteToTFRecord refuses to write.
_BEAM_TFRECORD = ("google-crc32c",)


class InstallError(RuntimeError):
    """pip could not install a peer."""


def peer_python(work_dir: pathlib.Path, peer: str) -> pathlib.Path:
    """The interpreter of a virtual environment with ``peer``, made on first use.

    Raises:
      InstallError: pip failed.
    """
    directory = work_dir / f"{peer}-venv"
    python = directory / "bin" / "python"
    if not _is_installed(directory):
        _run([sys.executable, "-m", "venv", "--clear", str(directory)])
        _run([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS[peer]])
        _mark_installed(directory)
    return python


def beam_tfrecord_path(work_dir: pathlib.Path) -> pathlib.Path:
    """A directory for PYTHONPATH with what Beam's TFRecord sink needs, made on first use.

    Raises:
      InstallError: pip failed.
    """
    directory = work_dir / "beam-tfrecord"
    if not _is_installed(directory):
        target = ["--target", str(directory), "--upgrade"]
        _run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *target, *_BEAM_TFRECORD])
        _mark_installed(directory)
    return directory


def _is_installed(directory: pathlib.Path) -> bool:
    return (directory / ".installed").exists()


def _mark_installed(directory: pathlib.Path) -> None:
    """Last, so that a broken install is retried."""
    (directory / ".installed").touch()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InstallError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
