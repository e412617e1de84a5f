"""Rules of names and of the parts of a SavedModel that TF Serving looks for."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections import defaultdict

import tensorflow as tf
from tensorflow.core.protobuf import fingerprint_pb2

from clsd_tf.serving.versions import version_number
from clsd_tf.storage.files import locked
from export.contract_rules.findings import Finding, NotApplicable, failed, judged, listed, passed, reason_of, warned
from export.contract_rules.rules import base_rule, version_rule
from export.contract_rules.version import Base, Version, read_meta_graph, saved_model_file

_LEFTOVER = re.compile(
    r"incomplete|\.deleted-|^tmp|(^|[._-])te?mp([._-]|$|\d)|tempstate|\.part(ial)?$|\.sw[op]$|~$", re.IGNORECASE
)
# What checkpoints hold; a HashTableV2 is filled by an initializer instead.
_VARIABLE_OPS = frozenset(("VarHandleOp", "Variable", "VariableV2", "MutableHashTableV2"))


@base_rule(
    title="The base directory holds at least one version",
    why="A directory named by an integer is a version; without one nothing is served "
    "(file_system_storage_path_source.cc).",
)
def has_versions(base: Base) -> Finding:
    if not base.versions:
        return failed(f"no child is named by an integer: {listed(base.children) or 'the directory is empty'}")
    return passed(f"versions {listed(base.versions)}")


@base_rule(
    title="Every model lies in a directory named by an integer",
    why="Names that int64 cannot parse, such as v1 or 0.1, are skipped without an error, so that the model is never "
    "served; a file with such a name is taken for a version (file_system_storage_path_source.cc).",
)
def names_are_versions(base: Base) -> Finding:
    problems = [
        f"{name} holds a {file.name} but is no integer, so it is ignored"
        for name, child in base.children.items()
        if name not in base.versions and not _LEFTOVER.search(name) and (file := saved_model_file(child))
    ]
    problems += [f"{name} is no directory" for name, child in base.versions.items() if not child.is_dir()]
    return judged(problems, f"{len(base.versions)} of {len(base.children)} children are versions")


@base_rule(
    title="No two directories spell the same version",
    why="7 and 007 are one version: one of them is served and the other ignored, with no more than a warning in the "
    "server's log (file_system_storage_path_source.cc).",
)
def versions_are_distinct(base: Base) -> Finding:
    spellings = defaultdict(list)
    for name in base.versions:
        spellings[int(name)].append(name)
    return judged(
        [f"{' and '.join(names)} are one version" for names in spellings.values() if len(names) > 1],
        "every number has one directory",
    )


@base_rule(
    title="Nothing temporary lies beside the versions",
    why="It is the rest of a publication or a deletion that was killed; it fills the disk, and renamed by hand it "
    "would be served in part. Only one under way may be there.",
)
def no_leftovers_beside(base: Base) -> Finding:
    found = [child for name, child in base.children.items() if _LEFTOVER.search(name)]
    abandoned = [child.name for child in found if not _is_being_written(child)]
    if found and not abandoned:
        return warned(f"another process is writing {listed(child.name for child in found)}")
    return judged(abandoned, "none")


def _is_being_written(path: pathlib.Path) -> bool:
    """Tells whether a process holds its lock, as an export does of the directory that it writes."""
    with contextlib.suppress(OSError), locked(path, wait=False) as is_free:
        return not is_free
    return False


@version_rule(
    title="The version's directory is named by an integer",
    why="TF Serving skips names that int64 cannot parse without an error (file_system_storage_path_source.cc).",
)
def version_name(version: Version) -> Finding:
    number = version_number(version.path.name)
    if number is None:
        return failed(f"{version.path.name!r} is no integer. Rename the directory to one, such as 1")
    return passed(f"version {number}")


@version_rule(
    title="Nothing temporary lies inside the version",
    why="A checkpoint or a copy that was killed left it, so that other files may be missing or cut off.",
)
def no_leftovers_inside(version: Version) -> Finding:
    names = (path.relative_to(version.path) for path in sorted(version.path.rglob("*")))
    return judged([name.as_posix() for name in names if _LEFTOVER.search(name.name)], "none")


@version_rule(
    title="saved_model.pb, or without it saved_model.pbtxt, holds a graph tagged serve",
    why="TF Serving loads exactly this file and this tag (saved_model_bundle_factory.cc, saved_model/reader.cc).",
)
def saved_model(version: Version) -> Finding:
    try:
        graph = read_meta_graph(version.path)
    except ValueError as error:
        return failed(str(error))
    written_by = graph.meta_info_def.tensorflow_version or "an unknown release"
    return passed(f"{len(graph.signature_def)} signature definitions, written by TensorFlow {written_by}")


@version_rule(
    title="Every variable can be read",
    why="Loading restores all variables, and a missing or damaged shard fails it (saved_model/loader.cc). The reader "
    "used here verifies a checksum of each tensor.",
)
def variables(version: Version) -> Finding:
    has_variables = any(node.op in _VARIABLE_OPS for node in version.meta_graph.graph_def.node)
    prefix = version.path / "variables" / "variables"
    if not prefix.with_suffix(".index").is_file():
        if has_variables:
            return failed("variables/variables.index is missing")
        raise NotApplicable("the graph has no variables")
    if not list(prefix.parent.glob("variables.data-?????-of-?????")):
        return failed("there is variables.index, but no variables.data-*-of-* beside it")
    problems, num_tensors = [], 0
    try:
        reader = tf.train.load_checkpoint(str(prefix))
        names = sorted(reader.get_variable_to_shape_map())
    except Exception as error:  # The reader raises errors of many classes.
        return failed(f"variables.index: {reason_of(error)}")
    for name in names:
        try:
            reader.get_tensor(name)
            num_tensors += 1
        except Exception as error:
            problems.append(f"{name}: {reason_of(error)}")
    return judged(problems, f"{num_tensors} tensors read")


@version_rule(
    title="fingerprint.pb identifies the model",
    why="TensorFlow 2.12 and later write it, and servers report it; one that does not parse means a damaged copy "
    "(saved_model/fingerprinting.cc).",
)
def fingerprint(version: Version) -> Finding:
    path = version.path / "fingerprint.pb"
    if not path.is_file():
        return warned("there is none: a TensorFlow before 2.12 wrote the model, or a copy lost the file")
    try:
        found = fingerprint_pb2.FingerprintDef.FromString(path.read_bytes())
    except Exception as error:  # DecodeError, whose class depends on protobuf's implementation.
        return failed(f"no FingerprintDef: {error}")
    if not found.saved_model_checksum:
        return failed("it holds no checksum of the model")
    return passed(f"saved_model_checksum {found.saved_model_checksum}")


@version_rule(
    title="Every asset that the graph names is in assets/",
    why="Vocabularies are read from there while loading, and a missing one fails it (saved_model/loader.cc).",
)
def assets(version: Version) -> Finding:
    names = sorted({asset.filename for asset in version.meta_graph.asset_file_def})
    if not names:
        raise NotApplicable("the graph names no assets")
    outside = [f"{name} points out of the directory" for name in names if _leaves_directory(name)]
    missing = [
        f"{name} is missing"
        for name in names
        if not _leaves_directory(name) and not (version.path / "assets" / name).is_file()
    ]
    return judged(outside + missing, f"{len(names)} assets")


def _leaves_directory(name: str) -> bool:
    path = pathlib.PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts
