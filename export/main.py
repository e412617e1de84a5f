"""Exports a finished run as a TF Serving servable.

Example:
  clsd export --dataset_dir=demo/dataset --work_dir=demo/clsd --servable_dir=demo/servable --name=movielens

Writes <servable_dir>/<name>/<version>/ with the transform inside and five signatures, warm-up requests and a manifest;
checks it in a fresh process against the training model; publishes it by one rename; and adds the model to
<servable_dir>/models.config. A published version is never rewritten. With --keep, old versions are deleted, as `clsd
manage prune` does.
"""

import pathlib

from absl import flags

from clsd_tf.commands import console, quiet_start  # noqa: F401 - quiet_start acts by being imported first.
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.storage.work_dir import WorkDir
from export.publishing.retention import prune
from export.publishing.versions import ModelVersions
from export.servable.profile import load_profile
from export.servable.saved_model import export_servable

_DATASET_DIR = flags.DEFINE_string("dataset_dir", None, "Dataset directory the run was trained on.", required=True)
_WORK_DIR = flags.DEFINE_string("work_dir", None, "Work directory of a finished run.", required=True)
_SERVABLE_DIR = flags.DEFINE_string(
    "servable_dir", None, "Directory that holds one directory per model.", required=True
)
_NAME = flags.DEFINE_string("name", None, "Name of the model.", required=True)
_VERSION = flags.DEFINE_integer("version", None, "Version number; the time in seconds by default.")
_KEEP = flags.DEFINE_integer("keep", None, "How many of the newest versions stay; all by default.", lower_bound=1)
_PROFILE = flags.DEFINE_string(
    "profile", None, "What the servable holds: a YAML file, or compact or ranking; by default every signature."
)
_SERVING_BASE_PATH = flags.DEFINE_string(
    "serving_base_path",
    None,
    "Where the server will see --servable_dir; by default as models.config has it, /models for a new model.",
)


def main(argv) -> None:
    with console.step("export and verify in a fresh process"):
        servable = export_servable(
            DatasetDir(_DATASET_DIR.value),
            WorkDir(_WORK_DIR.value),
            pathlib.Path(_SERVABLE_DIR.value),
            _NAME.value,
            version=_VERSION.value,
            serving_base_path=_SERVING_BASE_PATH.value,
            profile=load_profile(_PROFILE.value),
        )
    found = servable.verification
    rows = [(key, f"{value:.1e}") for key, value in found["max_difference"].items()]
    title = f"Largest difference to the training model, {found['rows']:,} rows"
    console.print_table(title, ["signature/output", "difference"], rows)
    console.console.print(f"{found['warmup_records']} warm-up requests replayed; published {servable.path}")
    if _KEEP.value is not None:
        deleted = prune(ModelVersions(pathlib.Path(_SERVABLE_DIR.value), _NAME.value), _KEEP.value).deleted
        console.console.print(f"deleted old versions: {', '.join(map(str, deleted)) or 'none'}")


if __name__ == "__main__":
    console.run(main)
