"""Settings of calibration; no TensorFlow."""

from __future__ import annotations

from typing import Literal

import pydantic

from clsd_tf.spec.validation import StrictModel


class CalibrationConfig(StrictModel):
    """Settings of the calibration of ctr.

    Attributes:
      method: ``none``: ctr = sigmoid(logits). ``platt``: two numbers, enough for a shift and a stretch. ``isotonic``:
        any non-decreasing curve; it needs thousands of clicks and ties predictions that it cannot order.
      user_group: name of a user group to calibrate each group by its own curve; None: one curve for all rows.
      shrinkage_rows: effective rows at which a group's own curve counts half, >= 0; 0 trusts every group fully.
    """

    method: Literal["none", "platt", "isotonic"] = "platt"
    user_group: str | None = None
    shrinkage_rows: float = pydantic.Field(1000.0, ge=0)
