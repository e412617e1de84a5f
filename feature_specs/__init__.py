"""Declarations of data sets, one YAML file each; ``get_spec`` finds them by name or by path."""

from __future__ import annotations

import pathlib

from clsd_tf.spec.feature_spec import FeatureSpec, load_spec

_DIRECTORY = pathlib.Path(__file__).parent


def spec_names() -> list[str]:
    """Names of the specs that come with the package."""
    return sorted(path.stem for path in _DIRECTORY.glob("*.yaml"))


def get_spec(name_or_path: str) -> FeatureSpec:
    """Loads a spec.

    Args:
      name_or_path: ``movielens_100k``, or ``./my_spec.yaml``.

    Returns:
      The spec.

    Raises:
      ValueError: neither a known name nor an existing file; the message lists the names.
    """
    if name_or_path in spec_names():
        return load_spec(_DIRECTORY / f"{name_or_path}.yaml")
    if pathlib.Path(name_or_path).is_file():
        return load_spec(name_or_path)
    raise ValueError(
        "a feature spec is a name or the path of a YAML file. "
        f"Received: {name_or_path!r}. Known names: {', '.join(spec_names())}"
    )
