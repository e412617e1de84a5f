"""Lists, promotes, rolls back and deletes the versions of a servable.

Example:
  clsd manage list --servable_dir=demo/servable --name=movielens --check
  clsd manage promote --servable_dir=demo/servable --name=movielens --label=canary
  clsd manage promote --servable_dir=demo/servable --name=movielens --label=stable --version=1764115200
  clsd manage rollback --servable_dir=demo/servable --name=movielens --label=stable
  clsd manage prune --servable_dir=demo/servable --name=movielens --keep=3

`promote` gives a label to a version (the newest by default) whose files are as its manifest says; `rollback` gives it
back to the version that it named before. From the first label on, models.config lists the versions that the server
loads, and new exports wait for their promotion. A label moves to loaded versions only: with --server the command waits
for it, without it says when to ask again. `prune` deletes old versions, but none that is loaded, labeled, the
target of a rollback, or younger than ten minutes.

Start TF Serving with --model_config_file_poll_wait_seconds=60 --allow_version_labels_for_unavailable_models. Requests
without a label go to the largest loaded version, a canary too; clients that want stable must say so. To end a canary,
promote the stable version to the label canary.
"""

import pathlib
from collections.abc import Callable

from absl import flags

from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from export.publishing.listing import list_versions
from export.publishing.promotion import Promotion, PromotionError, promote, rollback
from export.publishing.retention import prune
from export.publishing.server_status import wait_until_available
from export.publishing.versions import ModelVersions

_SERVABLE_DIR = flags.DEFINE_string(
    "servable_dir", None, "Directory that holds one directory per model.", required=True
)
_NAME = flags.DEFINE_string("name", None, "Name of the model.", required=True)
_LABEL = flags.DEFINE_string("label", None, "promote, rollback: the label, say stable or canary.")
_VERSION = flags.DEFINE_integer("version", None, "promote: the version; the newest by default.")
_SERVER = flags.DEFINE_string(
    "server", None, "promote, rollback: REST address of a server, say http://localhost:8501, to wait for where needed."
)
_KEEP = flags.DEFINE_integer("keep", None, "prune: how many of the newest versions stay in any case.")
_CHECK = flags.DEFINE_bool("check", False, "list: read all files and compare them with the manifests.")


def _list(versions: ModelVersions) -> None:
    states = list_versions(versions, check=_CHECK.value)
    rows = [
        [
            str(state.version),
            state.created or "-",
            f"{state.num_bytes / 1e6:.1f}",
            " ".join(state.labels) or "-",
            "yes" if state.is_loaded else "-",
            "-" if state.max_difference is None else f"{state.max_difference:.1e}",
            "-" if state.auc is None else f"{state.auc:.4f}",
            "not checked" if state.problems is None else "; ".join(state.problems) or "as in the manifest",
        ]
        for state in states
    ]
    headings = ["version", "created", "MB", "labels", "loaded", "verified within", "test AUC", "files"]
    console.print_table(f"Versions of {versions.name}", headings, rows)
    damaged = [str(state.version) for state in states if state.problems]
    if damaged:
        raise PromotionError(f"files must be as their manifests say. Received: others in {', '.join(damaged)}")


def _promote(versions: ModelVersions) -> None:
    label = _required("label", _LABEL.value)
    _move(versions, lambda version: promote(versions, label, version), _VERSION.value)


def _rollback(versions: ModelVersions) -> None:
    label = _required("label", _LABEL.value)
    _move(versions, lambda version: rollback(versions, label, version), None)


def _move(versions: ModelVersions, move: Callable[[int | None], Promotion], version: int | None) -> None:
    done = move(version)
    if done.is_waiting and _SERVER.value is not None:
        with console.step(f"wait until {_SERVER.value} has loaded {done.version}"):
            wait_until_available(_SERVER.value, versions.name, done.version)
        done = move(done.version)
    _report(versions, done)


def _prune(versions: ModelVersions) -> None:
    pruned = prune(versions, _required("keep", _KEEP.value))
    console.console.print(f"deleted: {', '.join(map(str, pruned.deleted)) or 'nothing'}", soft_wrap=True)
    for version, reason in pruned.kept.items():
        console.console.print(f"kept: {version}, {reason}", soft_wrap=True)


def _report(versions: ModelVersions, done: Promotion) -> None:
    if done.is_waiting:
        console.warn(
            f"{done.label} still names {done.previous}: a server refuses to move a label to a version that it has not "
            f"loaded. It now loads {done.version}; once /v1/models/{versions.name} calls it AVAILABLE, say this again; "
            "not before, or the server refuses the file. With --server this command waits by itself"
        )
    elif done.previous == done.version:
        console.console.print(f"{done.label} named {done.version} already")
    else:
        was = "new label" if done.previous is None else f"before: {done.previous}"
        console.console.print(f"{done.label} names {done.version} ({was})")
    loaded = ", ".join(map(str, done.loaded))
    console.console.print(f"loaded: {loaded}; requests without a label go to {done.loaded[-1]}", soft_wrap=True)


def _required(name: str, value):
    if value is None:
        raise ValueError(f"--{name} is required here. Received: none")
    return value


_ACTIONS = {"list": _list, "promote": _promote, "rollback": _rollback, "prune": _prune}


def main(argv) -> None:
    action = argv[1] if len(argv) == 2 else None
    if action not in _ACTIONS:
        raise ValueError(
            f"say one thing to do. Received: {' '.join(argv[1:]) or 'nothing'}. Allowed: {', '.join(_ACTIONS)}"
        )
    _ACTIONS[action](ModelVersions(pathlib.Path(_SERVABLE_DIR.value), _NAME.value))


if __name__ == "__main__":
    console.run(main)
