"""Configs as version 0.1 wrote them -> today's layout.

  0.1                                                today
  method: clsd                                       method: {name: clsd}
  clsd: {mu: .5, ...}                                method: {name: clsd, mu: .5, ...}
  clsd: {...} beside method: bce                     left out: it had no effect
  clsd.global_form, clsd.local_form                  method.global_weighting, method.local_weighting
  clsd.normaliser_momentum                           method.normalizer_momentum
  standardised (a form)                              standardized
  clsd.guards.min_pctr_ratio                         method.guards.min_ctr_ratio
  loss, label_smoothing, focal_gamma, clicks         method.loss, method.label_smoothing, ...
  embedding_dim, embedding_l2, embedding_l2_rows     embeddings.dim, embeddings.l2, embeddings.l2_rows
  embedding_initializer, embedding_init_scale        embeddings.initializer, embeddings.init_scale
  unified_buckets                                    embeddings.unified_buckets

The same config gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OF_ROWS = ("loss", "label_smoothing", "focal_gamma", "clicks")
_EMBEDDINGS = {
    "embedding_dim": "dim",
    "embedding_l2": "l2",
    "embedding_l2_rows": "l2_rows",
    "embedding_initializer": "initializer",
    "embedding_init_scale": "init_scale",
    "unified_buckets": "unified_buckets",
}
_CLSD = {
    "global_form": "global_weighting",
    "local_form": "local_weighting",
    "normaliser_momentum": "normalizer_momentum",
}
_GUARDS = {"min_pctr_ratio": "min_ctr_ratio"}
_VALUES = {"standardised": "standardized"}


def converted(content: Mapping[str, Any]) -> dict[str, Any]:
    """Moves the keys of a config of version 0.1 to where they stand today; others stay as they are.

    Args:
      content: a config of either version, or of both mixed, as --set can give it; today's keys win.

    Returns:
      Another mapping; ``content`` is left as it is.
    """
    rest = dict(content)
    of_rows = {key: rest.pop(key) for key in _OF_ROWS if key in rest}
    # What is no mapping stays, and is refused where configs are checked.
    clsd = rest.pop("clsd") if isinstance(rest.get("clsd"), Mapping) else {}
    clsd = {_CLSD.get(key, key): _value(value) for key, value in clsd.items()}
    if isinstance(clsd.get("guards"), Mapping):
        clsd["guards"] = {_GUARDS.get(key, key): value for key, value in clsd["guards"].items()}
    method = {"name": rest["method"]} if isinstance(rest.get("method"), str) else rest.get("method", {})
    if isinstance(method, Mapping):
        is_clsd = method.get("name", "clsd") == "clsd"
        method = {**(clsd if is_clsd else {}), **of_rows, **method}
        rest |= {"method": method} if method else {}
    embeddings = rest.get("embeddings", {})
    if isinstance(embeddings, Mapping):
        embeddings = {**{new: rest.pop(old) for old, new in _EMBEDDINGS.items() if old in rest}, **embeddings}
        rest |= {"embeddings": embeddings} if embeddings else {}
    return rest


def _value(value: Any) -> Any:
    return _VALUES.get(value, value) if isinstance(value, str) else value
