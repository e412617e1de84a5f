"""Ways to learn from clicks: one folder each, behind the contract in ``method``; this registry names them.

Another method is a folder with its settings, its model and a ``Method``, and a line here; in a module of your own,
``METHODS.register("my_method")(MyMethod())`` and ``--plugin=my_module``. CONTRIBUTING.md has a template.
"""

from __future__ import annotations

from typing import Any

from clsd_tf.methods.method import Method, MethodConfig
from clsd_tf.plugins.registry import Registry

DEFAULT_METHOD = "clsd"
METHODS = Registry(
    "method",
    {
        "bce": "clsd_tf.methods.pointwise.method:BCE",
        "clsd": "clsd_tf.methods.clsd.method:CLSD",
    },
)


def method_of(config: MethodConfig) -> Method[Any]:
    """Finds the method that the settings ``config`` belong to.

    Returns:
      The registered instance.

    Raises:
      ValueError: no method of that name is registered.
    """
    return METHODS[config.name]
