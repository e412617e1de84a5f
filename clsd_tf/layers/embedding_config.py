"""Settings of embedding tables; no TensorFlow."""

from __future__ import annotations

from typing import Literal

import pydantic

from clsd_tf.spec.validation import StrictModel

L2Rows = Literal["all", "touched"]
Initializer = Literal["normal", "uniform"]


class EmbeddingConfig(StrictModel):
    """Settings of the embeddings of ids and numbers.

    Attributes:
      dim: size of each field's embedding.
      l2: the loss gets l2 * the sum of squares of embedding tables, >= 0.
      l2_rows: ``all`` rows, which makes every step as slow as the tables are large; or those ``touched`` by the batch,
        each once: another objective, under which frequent rows decay more.
      initializer: of the tables: ``normal`` with standard deviation ``init_scale``, or ``uniform`` in
        [-init_scale, init_scale].
      init_scale: > 0.
      unified_buckets: all vocabularies share one hashed table of that many rows; null: a row for each value. Source:
        Coleman et al. (2023), "Unified Embedding: Battle-Tested Feature Representations for Web-Scale ML Systems",
        section 3.
    """

    dim: int = pydantic.Field(10, ge=1)
    l2: float = pydantic.Field(0.0, ge=0)
    l2_rows: L2Rows = "all"
    initializer: Initializer = "normal"
    init_scale: float = pydantic.Field(0.01, gt=0)
    unified_buckets: int | None = pydantic.Field(None, ge=1)
