"""Names -> what they stand for: the built-in ones, and those of a user's own modules."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, Any]):
    """Named objects of one kind.

    Built-in ones are imported when they are asked for: a config can name what TensorFlow is needed for, and be read
    without it.

    Args:
      kind: what the objects are, for messages: "backbone".
      built_in: name -> where it is, ``package.module:attribute``.
    """

    def __init__(self, kind: str, built_in: Mapping[str, str]):
        self.kind = kind
        self._places = dict(built_in)
        self._objects: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that adds an object under ``name``.

        Raises:
          ValueError: the name is taken.
        """

        def add(value: T) -> T:
            if name in self:
                raise ValueError(
                    f"a {self.kind} of this name is registered already. Received: {name!r}. Choose another name, or "
                    f"remove the old one first: del the registry's [{name!r}]"
                )
            self._objects[name] = value
            return value

        return add

    def require(self, name: str) -> None:
        """Raises ValueError for a name that is not registered; the message lists the known ones."""
        if name not in self:
            raise ValueError(
                f"unknown {self.kind}. Received: {name!r}. Allowed: {', '.join(sorted(self))}; those of your own "
                "module with --plugin=<module>"
            )

    def __getitem__(self, name: str) -> Any:
        self.require(name)
        if name not in self._objects:
            module, _, attribute = self._places[name].partition(":")
            self._objects[name] = getattr(importlib.import_module(module), attribute)
        return self._objects[name]

    def __delitem__(self, name: str) -> None:
        self.require(name)
        self._objects.pop(name, None)
        self._places.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._objects or name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._places, *self._objects)))

    def __len__(self) -> int:
        return len(set(self))
