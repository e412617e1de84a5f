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
      kind: what the objects are, for messages: "backbone", whose registry is the variable ``BACKBONES``.
      built_in: name -> where it is, ``package.module:attribute``.
    """

    def __init__(self, kind: str, built_in: Mapping[str, str]):
        self.kind = kind
        self._places = dict(built_in)
        self._objects: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Registers an object: ``@registry.register("mine")`` above its definition.

        Args:
          name: by which it is found.

        Returns:
          A decorator that gives back what it is put on.

        Raises:
          ValueError: the name is taken; from the decorator.
        """

        def add(value: T) -> T:
            if name in self:
                variable = f"{self.kind.upper().replace(' ', '_')}S"
                raise ValueError(
                    f"a {self.kind} of this name is registered already. Received: {name!r}. "
                    f"Choose another name, or remove the old one first: del {variable}[{name!r}]"
                )
            self._objects[name] = value
            return value

        return add

    def require(self, name: str) -> None:
        """Checks a ``name``.

        Raises:
          ValueError: it is not registered; the message lists those that are.
        """
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
