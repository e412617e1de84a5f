"""Click-confidence learning (CLSD, arXiv 2309.16322) for CTR models in TensorFlow/Keras.

The map of rooms, lowest first; a room imports only rooms above it in this list:

* ``model_inputs``, ``validation``, ``tables``, ``features``: what a data set contains (types only, no TensorFlow)
* ``artifacts``: the directories that couple the jobs
* ``columns``, ``hashing``: text -> declared types, and hashes that are the same everywhere
* ``console``, ``quiet_start``: how commands start, report and fail
* ``transform``, ``examples``, ``input_pipeline``: raw columns -> ids -> tf.Example -> tf.data
* ``embeddings``, ``losses``, ``metrics``, ``significance``: parts that know no model
* ``backbones``: feature dict -> logits
* ``clsd``: click confidence, AdGate, monitors and ``ClsdModel``
* ``callbacks``, ``training``, ``evaluation``, ``report``, ``study``: assembly

``pipelines`` and ``export`` hold the commands. Importing this package imports no TensorFlow: it only selects the
Keras that tensorflow-recommenders supports (tf-keras 2), which must happen before TensorFlow's Keras is first touched.
"""

import os
import sys

__version__ = "0.1.0"


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
