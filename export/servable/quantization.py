"""Smaller embedding tables for serving, and what they cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from clsd_tf.data.input_pipeline import read_columns
from clsd_tf.layers.embeddings import FieldEmbeddings
from clsd_tf.metrics.pointwise import auc, log_loss
from clsd_tf.storage.dataset_dir import DatasetDir
from clsd_tf.training.assembly import predict
from export.servable.profile import QuantizationProfile


class QuantizationError(RuntimeError):
    """Quantization that costs more than the profile allows; nothing was published."""


def quantize_tables(model: tf.keras.Model, dataset: DatasetDir, profile: QuantizationProfile) -> dict[str, Any]:
    """Quantizes the embedding tables of a model in place and measures what that costs on the test split.

    Args:
      model: with a ``backbone`` of ``FieldEmbeddings``; afterwards it can be served, not trained.
      dataset: of its run.
      profile: the kind of tables, not ``none``, and the loss that is allowed.

    Returns:
      ``tables``; ``bytes_before`` and ``bytes_after`` of the tables; ``auc_before``, ``auc_after``,
      ``log_loss_before``, ``log_loss_after``; ``max_ctr_difference``.

    Raises:
      ValueError: the backbone has no tables of ours.
      QuantizationError: AUC falls by more than ``profile.max_auc_loss``.
    """
    layers = [part for part in model.backbone.submodules if isinstance(part, FieldEmbeddings) and part.has_tables]
    if not layers:
        raise ValueError(
            "quantization needs a backbone with FieldEmbeddings of categorical inputs. "
            f"Received: {type(model.backbone).__name__}. Set quantisation.tables: none"
        )
    assert profile.tables != "none", "nothing to quantize"
    rows = read_columns(dataset, "test", ["label", "sample_weight"])
    before, bytes_before = predict(model, dataset, "test"), sum(layer.table_bytes for layer in layers)
    for layer in layers:
        layer.quantize(profile.tables)
    model.predict_function = None  # Keras would go on with the function that it traced before.
    after = predict(model, dataset, "test")
    found: dict[str, Any] = {
        "tables": profile.tables,
        "bytes_before": bytes_before,
        "bytes_after": sum(layer.table_bytes for layer in layers),
        "max_ctr_difference": float(np.abs(after - before).max()),
    }
    for name, metric in (("auc", auc), ("log_loss", log_loss)):
        for when, ctr in (("before", before), ("after", after)):
            found[f"{name}_{when}"] = metric(rows["label"], ctr, rows["sample_weight"])
    # Without clicks or without non-clicks there is no AUC that could fall.
    if (found["auc_before"] or 0.0) - (found["auc_after"] or 0.0) > profile.max_auc_loss:
        raise QuantizationError(
            f"quantization may cost at most {profile.max_auc_loss:g} of AUC on the test split. Received: "
            f"{found['auc_before']:.5f} before and {found['auc_after']:.5f} after. Allowed: a larger "
            "quantisation.max_auc_loss, or tables: float16 or none"
        )
    return found
