"""MovieLens-100k from the Python package index, checked and unpacked."""

from __future__ import annotations

import hashlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile

from clsd_tf.storage.files import staged_directory

_REQUIREMENT = "recbole==1.2.1"
_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
_FOLDER = "recbole/dataset_example/ml-100k"
_FILES = ("ml-100k.inter", "ml-100k.user", "ml-100k.item")


def fetch(raw_dir: pathlib.Path) -> None:
    """Downloads, checks and unpacks the three tables.

    Args:
      raw_dir: directory to write.

    Raises:
      FileExistsError: ``raw_dir`` is there already.
      RuntimeError: the package cannot be downloaded, or is not the expected one.
    """
    with staged_directory(raw_dir) as staging, tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--dest", scratch, _REQUIREMENT], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:]
            raise RuntimeError(
                f"MovieLens-100k could not be fetched. Received: {''.join(reason)} from `pip download {_REQUIREMENT}`. "
                "Check the network, or use the simulated feed: python -m pipelines.simulate_feed --help"
            )
        (wheel,) = pathlib.Path(scratch).glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != _SHA256:
            raise RuntimeError(f"{wheel.name} is not the expected file. Received: sha256 {digest}. Allowed: {_SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            for name in _FILES:
                (staging / name).write_bytes(archive.read(f"{_FOLDER}/{name}"))
