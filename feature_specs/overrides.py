"""Changes of a spec by flags, checked like the spec itself."""

from __future__ import annotations

from typing import Any

from clsd_tf.spec.feature_spec import FeatureSpec, parse_spec

_TFDS = "tfds:"


def override_source(spec: FeatureSpec, source: str | None) -> FeatureSpec:
    """Reads the log from another source.

    Args:
      spec: declares the log.
      source: a path in the spec's format, or ``tfds:<name>``; None for the spec's own.

    Returns:
      A spec that names the source.
    """
    if source is None:
        return spec
    if source.startswith(_TFDS):
        return _replaced(spec, ("tables", "log"), {"path": source.removeprefix(_TFDS), "format": "tfds"})
    return _replaced(spec, ("tables", "log"), {"path": source})


def override_split_rule(spec: FeatureSpec, rule: str | None) -> FeatureSpec:
    """Splits by another rule; the spec's dates and gap are those of the time rule alone.

    Args:
      spec: declares a split.
      rule: its name; None for the spec's own.

    Returns:
      A spec with that rule.
    """
    if rule is None:
        return spec
    of_time = {"validation_from": None, "test_from": None, "until": None, "gap_days": 0}
    return _replaced(spec, ("split",), {"rule": rule, **(of_time if rule != "time" else {})})


def _replaced(spec: FeatureSpec, path: tuple[str, ...], changes: dict[str, Any]) -> FeatureSpec:
    content = spec.model_dump(mode="json")
    node = content
    for key in path:
        node = node[key]
    node.update(changes)
    return parse_spec(content, f"{spec.name} with {', '.join(f'{key}={value}' for key, value in changes.items())}")
