"""All kinds of features that a spec can declare.

To add one: a class that answers the questions of ``feature_base``, its line here, and its TensorFlow ops in
``clsd_tf.data.transform``. What is made of past events has its computation in ``pipelines.rows.histories``, and what is
learned from training rows has it in ``pipelines.rows``: ``vocabularies`` for ids, ``fitting`` for numbers.
"""

from __future__ import annotations

from typing import Annotated

import pydantic

from clsd_tf.spec.id_features import CategoricalFeature, MultiValuedFeature
from clsd_tf.spec.number_features import NumericFeature
from clsd_tf.spec.past_features import HistoryFeature, WindowFeature

Feature = Annotated[
    CategoricalFeature | MultiValuedFeature | NumericFeature | HistoryFeature | WindowFeature,
    pydantic.Field(discriminator="type"),
]
