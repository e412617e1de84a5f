"""Export profile: the content of a servable beside the model, as YAML."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic

from clsd_tf.spec.validation import SpecError, StrictModel, explain_validation_error, parse_yaml_mapping

SignatureName = Literal["serving_default", "predict_raw", "classify", "regress", "rank", "debug"]
PROFILES = pathlib.Path(__file__).with_name("profiles")
_Count = Annotated[int, pydantic.Field(ge=1)]
_MAX_WARMUP_BATCH_SIZES = 100  # TF Serving takes 1000 warm-up records; each batch size makes one per signature.


class BatchingProfile(StrictModel):
    """TF Serving's batching parameters; null leaves a number to the server.

    Attributes:
      max_batch_size: rows of the largest batch.
      batch_timeout_micros: how long a request may wait for company while threads are free, in microseconds.
      max_enqueued_batches: batches that may wait; beyond them requests are refused.
      num_batch_threads: threads that run batches; the server's cores by default.
      allowed_batch_sizes: sizes that batches are padded to, rising, ending with max_batch_size; empty for any.
    """

    max_batch_size: _Count = 512
    batch_timeout_micros: int = pydantic.Field(0, ge=0)
    max_enqueued_batches: _Count | None = None
    num_batch_threads: _Count | None = None
    allowed_batch_sizes: tuple[_Count, ...] = ()

    @pydantic.model_validator(mode="after")
    def _check(self) -> BatchingProfile:
        sizes = self.allowed_batch_sizes
        if sizes and (list(sizes) != sorted(set(sizes)) or sizes[-1] != self.max_batch_size):
            raise ValueError(
                f"allowed_batch_sizes must rise and end with max_batch_size. Received: {list(sizes)} and "
                f"{self.max_batch_size}"
            )
        return self


class RankProfile(StrictModel):
    """Settings of the signature ``rank``.

    Attributes:
      top_k: how many items an answer holds; all by default.
    """

    top_k: _Count | None = None


class QuantizationProfile(StrictModel):
    """Quantization of the embedding tables.

    Attributes:
      tables: ``none``, ``float16``, or ``int8`` with a scale per row.
      max_auc_loss: the export fails if AUC on the test split falls by more.
    """

    tables: Literal["none", "float16", "int8"] = "none"
    max_auc_loss: float = pydantic.Field(0.0005, ge=0)


class ExportProfile(StrictModel):
    """Content of a servable; written to its manifest.

    Attributes:
      signatures: which to export; serving_default is always among them. null for all that the method has.
      warmup_batch_sizes: rows of the warm-up requests, one per size and signature.
      batching: what batching_params.pbtxt says; null writes none.
      quantisation: of the embedding tables.
      rank: of the signature that scores many items for one user.
      calibration: whether ``ctr`` is calibrated, where the run has a calibration.
      debug_user_groups: whether ``debug`` also gives the label of each user group.
    """

    signatures: tuple[SignatureName, ...] | None = None
    warmup_batch_sizes: tuple[_Count, ...] = pydantic.Field(
        (1, 16, 64), min_length=1, max_length=_MAX_WARMUP_BATCH_SIZES
    )
    batching: BatchingProfile | None = BatchingProfile()
    quantisation: QuantizationProfile = QuantizationProfile()
    rank: RankProfile = RankProfile()
    calibration: bool = True
    debug_user_groups: bool = False

    @pydantic.model_validator(mode="after")
    def _check(self) -> ExportProfile:
        if self.signatures is None:
            return self
        if "serving_default" not in self.signatures or len(set(self.signatures)) < len(self.signatures):
            raise ValueError(
                "signatures must name serving_default, which clients call that name none, and each other one once. "
                f"Received: {', '.join(self.signatures)}"
            )
        return self

    def resolved(self, available: Sequence[str]) -> ExportProfile:
        """The profile with its signatures by name.

        Args:
          available: what models of the method can have.

        Returns:
          A profile whose ``signatures`` are not None.

        Raises:
          ValueError: it names another one.
        """
        wanted = tuple(available) if self.signatures is None else self.signatures
        wrong = [name for name in wanted if name not in available]
        if wrong:
            raise ValueError(
                f"a profile's signatures must be some that the method has. Received: {', '.join(wrong)}. "
                f"Allowed: {', '.join(available)}"
            )
        return self.model_copy(update={"signatures": wanted})

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def load_profile(path: str | None) -> ExportProfile:
    """Reads a profile.

    Args:
      path: a name in ``export/servable/profiles``, a YAML file, or None for the defaults.

    Returns:
      The profile, checked.

    Raises:
      SpecError: unknown key or value out of range; says what is allowed.
      FileNotFoundError: no such profile.
    """
    if path is None:
        return ExportProfile()
    named = PROFILES / f"{path}.yaml"
    file = named if "/" not in path and named.is_file() else pathlib.Path(path)
    if not file.is_file():
        known = ", ".join(sorted(entry.stem for entry in PROFILES.glob("*.yaml")))
        raise FileNotFoundError(f"a profile is a YAML file or one of {known}. Received: {path}")
    return parse_profile(parse_yaml_mapping(file.read_text(encoding="utf-8"), str(file)), str(file))


def parse_profile(content: dict[str, Any], source: str) -> ExportProfile:
    """Checks a profile.

    Args:
      content: keys and values of ``ExportProfile``.
      source: where they come from, for errors.

    Returns:
      The profile.

    Raises:
      SpecError: as ``load_profile``.
    """
    try:
        return ExportProfile.model_validate_json(json.dumps(content))
    except pydantic.ValidationError as error:
        raise SpecError(explain_validation_error(error, ExportProfile, source)) from error
