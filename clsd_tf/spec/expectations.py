"""Expectations that a feature spec has of data: allowed values of a column, and limits of drift."""

from __future__ import annotations

import pydantic

from clsd_tf.spec.validation import StrictModel


class DriftLimits(StrictModel):
    """Limits of how data may differ from a baseline, beyond what the size of the samples explains; None: no limit.

    Attributes:
      max_l_infinity: largest change of one value's share.
      max_jensen_shannon: Jensen-Shannon divergence of the values' distributions, in bits.
      max_mean_change: change of a number's mean, in standard deviations of the baseline.
      max_missing_change: change of the share of missing values.
      max_click_rate_change: change of the click rate, as a share of the baseline's.
      max_unseen: share of values that the baseline never had, where both have 1,000 values or fewer.
    """

    max_l_infinity: float | None = pydantic.Field(default=0.1, ge=0, le=1)
    max_jensen_shannon: float | None = pydantic.Field(default=0.05, ge=0, le=1)
    max_mean_change: float | None = pydantic.Field(default=0.25, ge=0)
    max_missing_change: float | None = pydantic.Field(default=0.05, ge=0, le=1)
    max_click_rate_change: float | None = pydantic.Field(default=0.25, ge=0)
    max_unseen: float | None = pydantic.Field(default=None, ge=0, le=1)


class Expectation(StrictModel):
    """Limits of the values of a column; missing values have one of their own.

    Attributes:
      min: least number.
      max: greatest number.
      values: all values there may be, as text (of separated values, each).
      max_missing: greatest share of rows without a value.
      drift: limits of this column instead of the spec's.
    """

    min: float | None = None
    max: float | None = None
    values: tuple[str, ...] | None = pydantic.Field(default=None, min_length=1)
    max_missing: float | None = pydantic.Field(default=None, ge=0, le=1)
    drift: DriftLimits | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> Expectation:
        if self.has_range and self.values is not None:
            raise ValueError("expect takes a range of numbers or a list of values. Received: both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min must be at most max. Received: {self.min:g} and {self.max:g}")
        return self

    @property
    def has_range(self) -> bool:
        """Tells if numbers have a limit."""
        return self.min is not None or self.max is not None
