"""CTR models in TensorFlow/Keras, with click-confidence learning (CLSD, arXiv 2309.16322) as the first of its methods.

The packages, lowest first; a package imports only packages above it in this list:

* ``plugins``, ``commands``: names that a user's own modules may add to; how commands start, report and fail
* ``metrics``, ``pages``: numbers of scored rows; plots and the layout of HTML reports
* ``spec``: what a data set contains: types and rules, no TensorFlow
* ``storage``: the directories that couple the jobs
* ``layers``, ``optimizers``, ``backbones``: embeddings, losses and calibration; optimizers; feature dict -> logits
* ``data``: raw columns -> ids -> tf.Example -> tf.data
* ``distributed``, ``statistics``, ``serving``: replicas and strategies; summaries of columns; the loaded servable
* ``methods``: ways to learn from clicks, a folder each behind one contract
* ``training``, ``evaluation``, ``continual``, ``study``: runs, and what is measured of them

``pipelines`` and ``export`` hold the commands; ``clsd --help`` lists them.

The names in ``__all__`` can be imported from here. What they need, TensorFlow for most, is imported when one is asked
for. Importing this package only selects the Keras that tensorflow-recommenders supports (tf-keras 2), which must happen
before TensorFlow's Keras is first touched.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # For editors and type checkers, the same names as below.
    from clsd_tf.backbones import build_backbone as build_backbone
    from clsd_tf.backbones import register_backbone as register_backbone
    from clsd_tf.backbones.base import Backbone as Backbone
    from clsd_tf.backbones.base import feature_inputs as feature_inputs
    from clsd_tf.data.input_pipeline import batches as batches
    from clsd_tf.evaluation.evaluate import evaluate as evaluate
    from clsd_tf.layers.embeddings import FieldEmbeddings as FieldEmbeddings
    from clsd_tf.methods.clsd.ad_gate import AdGate as AdGate
    from clsd_tf.methods.clsd.config import AdGateConfig as AdGateConfig
    from clsd_tf.methods.clsd.config import ClsdConfig as ClsdConfig
    from clsd_tf.methods.clsd.model import ClsdModel as ClsdModel
    from clsd_tf.plugins.loading import load_plugins as load_plugins
    from clsd_tf.spec.feature_spec import FeatureSpec as FeatureSpec
    from clsd_tf.storage.dataset_dir import DatasetDir as DatasetDir
    from clsd_tf.storage.work_dir import WorkDir as WorkDir
    from clsd_tf.training.assembly import build_model as build_model
    from clsd_tf.training.assembly import load_model as load_model
    from clsd_tf.training.config import TrainConfig as TrainConfig
    from clsd_tf.training.config import load_config as load_config
    from clsd_tf.training.run import train as train

__version__ = "0.2.0"

_NAMES = {
    "backbones": ("build_backbone", "register_backbone"),
    "backbones.base": ("Backbone", "feature_inputs"),
    "data.input_pipeline": ("batches",),
    "evaluation.evaluate": ("evaluate",),
    "layers.embeddings": ("FieldEmbeddings",),
    "methods.clsd.ad_gate": ("AdGate",),
    "methods.clsd.config": ("AdGateConfig", "ClsdConfig"),
    "methods.clsd.model": ("ClsdModel",),
    "plugins.loading": ("load_plugins",),
    "spec.feature_spec": ("FeatureSpec",),
    "storage.dataset_dir": ("DatasetDir",),
    "storage.work_dir": ("WorkDir",),
    "training.assembly": ("build_model", "load_model"),
    "training.config": ("TrainConfig", "load_config"),
    "training.run": ("train",),
}
_MODULES = {name: f"clsd_tf.{module}" for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'clsd_tf' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _select_legacy_keras() -> None:
    """Sets TF_USE_LEGACY_KERAS=1, or raises ImportError where ``tf.keras`` is already Keras 3."""
    requested = os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    remedy = "Set the environment variable TF_USE_LEGACY_KERAS=1, or import clsd_tf before tensorflow's Keras is used."
    if requested.lower() not in ("1", "true"):
        raise ImportError(
            "clsd_tf needs tf-keras (Keras 2), since tensorflow-recommenders refuses Keras 3. "
            f"Received: TF_USE_LEGACY_KERAS={requested}. {remedy}"
        )
    tensorflow = sys.modules.get("tensorflow")
    loader = vars(tensorflow).get("keras") if tensorflow else None
    # tf.keras is a lazy loader: asking it for its version resolves it, now that the variable is set, unless it was
    # resolved before to Keras 3, which is the case that must be refused.
    version = getattr(loader, "__version__", "2") if loader else "2"
    if not str(version).startswith("2"):
        raise ImportError(f"clsd_tf was imported too late. Received: tf.keras version {version}. {remedy}")


_select_legacy_keras()
