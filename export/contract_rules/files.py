"""Rules of the files themselves: kinds, permissions, and agreement with the manifest."""

from __future__ import annotations

import os
import stat

from export.contract_rules.findings import Finding, NotApplicable, failed, judged, listed, passed, warned
from export.contract_rules.rules import version_rule
from export.contract_rules.version import Version
from export.publishing.manifest import MANIFEST_FILE, ManifestError, check_files, read_manifest


@version_rule(
    title="The version holds files and directories, and no link leaves it",
    why="A copy or a mount into a container breaks the link, which may lead to what was never checked; reading a pipe "
    "or a device waits for ever.",
)
def file_kinds(version: Version) -> Finding:
    root = version.path.resolve()
    problems = [f"{name} is neither file nor directory" for name in version.special_files]
    paths = sorted(version.path.rglob("*"))
    for path in paths:
        name = path.relative_to(version.path).as_posix()
        if not path.exists():
            problems.append(f"{name} is a broken link")
        elif path.is_symlink() and not path.resolve().is_relative_to(root):
            problems.append(f"{name} is a link that leaves the version")
    return judged(problems, f"{len(paths)} files and directories")


@version_rule(
    title="The server may read every file",
    why="A server often runs as another user than the exporter, and a file that it may not read fails the load.",
)
def permissions(version: Version) -> Finding:
    paths = [version.path, *sorted(version.path.rglob("*"))]
    names = {path: path.relative_to(version.path).as_posix() for path in paths if path.exists()}
    modes = {path: path.stat().st_mode for path in names}
    unreadable = [
        name for path, name in names.items() if not modes[path] & stat.S_IRUSR or not os.access(path, os.R_OK)
    ]
    if unreadable:
        return failed(f"not readable: {listed(unreadable)}")
    own = [name for path, name in names.items() if not _for_others(modes[path])]
    if own:
        return warned(f"the server must run as the owner, or in the group, of {listed(own)}: nobody else may read")
    return passed(f"{len(names)} files and directories are readable for everybody")


def _for_others(mode: int) -> bool:
    needed = stat.S_IROTH | stat.S_IXOTH if stat.S_ISDIR(mode) else stat.S_IROTH
    return mode & needed == needed


@version_rule(
    title="Files are those that the manifest lists",
    why="Sizes and SHA-256 show a copy that was cut off or changed, which TensorFlow may load all the same.",
)
def manifest_files(version: Version) -> Finding:
    try:
        manifest = read_manifest(version.path)
    except ManifestError as error:
        return failed(str(error))
    if manifest is None:
        raise NotApplicable(f"there is no {MANIFEST_FILE}")
    return judged(check_files(version.path, manifest), f"{len(manifest.get('files', ()))} files have their SHA-256")
