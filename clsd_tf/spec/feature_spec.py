"""The feature spec: what a data set contains, declared once in YAML and read by every stage.

Strict, frozen pydantic models; no TensorFlow. Labels, weights, event time and keys are other types than features, so
they cannot become a model input. ``FeatureSpec.model_inputs`` is what a backbone may see.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import pydantic

from clsd_tf.spec.declared_spec import DeclaredSpec
from clsd_tf.spec.model_inputs import CategoricalInput, GroupInput, ModelInputs
from clsd_tf.spec.spec_rules import RULES
from clsd_tf.spec.validation import SpecError, explain_validation_error, parse_yaml_mapping


class FeatureSpec(DeclaredSpec):
    """A data set: its tables, its label, its split, its features and its user groups.

    Attributes:
      label: what a click is, for example ``rating >= 4``.
      intensity_label: optional stronger signal, held out from training, to judge click confidence with.
      intensity_value: optional numeric column of the log that grows with interest (seconds read), held out likewise.
      sample_weight: optional column of weights in [0, 1,000,000].
      duplicates: what becomes of events of one user, item and time: the one of the lowest row id stays, all stay, or
        the build fails. They are counted in any case.
      record_layout: of the TFRecords: all integers of a row in one entry (fast), or an entry for each name.
      user_id_salt_env: optional name of the environment variable that holds a secret salt. The user key of log and user
        table is then replaced by a salted hash as soon as it is read, so that no id stands in any file that is written.
        A serving request then carries the hashed id too: ``clsd_tf.data.hashing.hash_user_ids`` with the same salt.
    """

    @pydantic.model_validator(mode="after")
    def _check(self) -> FeatureSpec:
        for rule in RULES:
            rule(self)
        return self

    def model_inputs(self, vocabulary_lengths: Mapping[str, int]) -> ModelInputs:
        """Describes what models see.

        Args:
          vocabulary_lengths: number of values of each of ``vocabularies``.

        Returns:
          Sizes and names: ids and numbers in the order of the features.
        """
        found = {feature.name: feature.categorical_input(self.feature, vocabulary_lengths) for feature in self.features}
        categorical = {name: entry for name, entry in found.items() if entry}
        return ModelInputs(
            categorical=tuple(categorical.values()),
            numeric=tuple(name for name in found if name not in categorical),
            groups=tuple(GroupInput(group.name, group.labels) for group in self.user_groups),
            user_features=self._user_features(categorical),
        )

    def _user_features(self, categorical: Mapping[str, CategoricalInput]) -> tuple[str, ...]:
        """Features of one id or number that tell of the user's profile, never of the user's id."""
        sides = self.sides
        return tuple(
            feature.name
            for feature in self.features
            if feature.reads_column and sides[feature.raw_name] == "user" and feature.raw_name != self.user_key
            if feature.name not in categorical or categorical[feature.name].num_ids is None
        )

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, defaults written out."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the spec's content."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def parse_spec(content: Mapping[str, Any], source: str) -> FeatureSpec:
    """Builds a spec from YAML content.

    Args:
      content: keys and values as YAML gives them.
      source: named in errors.

    Returns:
      A spec that keeps all rules.

    Raises:
      SpecError: names each offending key's path, what was received and, for an unknown key, the allowed keys.
    """
    try:
        # JSON mode keeps strictness and still reads YAML lists as tuples and text as dates.
        return FeatureSpec.model_validate_json(json.dumps(content, default=str))
    except pydantic.ValidationError as error:
        raise SpecError(explain_validation_error(error, FeatureSpec, source)) from error


def load_spec(path: str | pathlib.Path) -> FeatureSpec:
    """Reads a spec from a YAML file.

    Args:
      path: of the file.

    Returns:
      A spec that keeps all rules.

    Raises:
      FileNotFoundError: no such file.
      SpecError: the file is not YAML, or breaks a rule of the spec.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"a feature spec is a YAML file. Received: {path}, which does not exist")
    content = parse_yaml_mapping(path.read_text(encoding="utf-8"), str(path))
    return parse_spec(content, str(path))


def meaning_differences(spec: FeatureSpec, previous: FeatureSpec) -> list[str]:
    """Compares what ids and numbers mean in two specs, for the features and user groups that both have.

    Values of vocabularies aside, and what decides which values a vocabulary gets.

    Args:
      spec: the newer one.
      previous: the one that gave ids and numbers their meaning.

    Returns:
      A text for each setting that differs: its name, what was received and what is allowed.
    """
    old = {entry.name: entry.meaning() for entry in previous.entries}
    new = {entry.name: entry.meaning() for entry in spec.entries}
    return [
        f"{name}.{key}. Received: {new[name].get(key)!r}. Allowed: {old[name].get(key)!r}"
        for name in new
        if name in old
        for key in sorted(new[name].keys() | old[name].keys())
        if new[name].get(key) != old[name].get(key)
    ]
