"""Strict models and errors that help: for feature specs and for configs."""

from __future__ import annotations

import re
from typing import Any

import pydantic
import yaml


class SpecError(ValueError):
    """A feature spec that breaks a rule; the message names the key, what was received and what is allowed."""


class StrictModel(pydantic.BaseModel):
    """Frozen; refuses unknown keys and values of another type; reads a field by its name or its alias."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; this one reads it as the number that is meant, as YAML 1.2 does."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """Reads YAML; numbers such as 1e-3 are numbers.

    Args:
      text: YAML.
      source: named in errors.

    Returns:
      What it holds, as Python's types.

    Raises:
      SpecError: the text is not YAML.
    """
    try:
        return yaml.load(text, _YamlLoader)
    except yaml.YAMLError as error:
        raise SpecError(f"{source}: not valid YAML: {error}") from error


def parse_yaml_mapping(text: str, source: str) -> dict[str, Any]:
    """Reads a YAML mapping.

    Args:
      text: YAML; an empty text is an empty mapping.
      source: named in errors.

    Returns:
      Its keys and values.

    Raises:
      SpecError: the text is not YAML, or no mapping.
    """
    content = parse_yaml(text, source)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SpecError(f"{source}: must be a mapping of keys to values. Received: {type(content).__name__}")
    return content


def explain_validation_error(
    error: pydantic.ValidationError, model: type[pydantic.BaseModel], source: str, at: tuple[str, ...] = ()
) -> str:
    """Writes an error for whoever wrote the YAML.

    Args:
      error: of the validation.
      model: what was validated.
      source: the file or flag that it came from; named first.
      at: where ``model`` stands in the source: the beginning of each path.

    Returns:
      A line per problem: the key's path, the rule, ``Received`` and, for unknown keys, what is allowed.
    """
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in (*at, *problem["loc"])) or "(top level)"
        if problem["type"] == "extra_forbidden":
            allowed = ", ".join(_allowed_keys(model, problem["loc"][:-1]))
            lines.append(f"{path}: unknown key. Received: {problem['loc'][-1]!r}. Allowed: {allowed}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            received = (
                ""
                if "Received" in message or isinstance(problem["input"], dict)
                else f". Received: {problem['input']!r}"
            )
            lines.append(f"{path}: {message}{received}")
    return f"{source} is not valid:\n  " + "\n  ".join(lines)


def _allowed_keys(model: Any, location: tuple[Any, ...]) -> list[str]:
    """The keys allowed at ``location``, found by walking the JSON schema."""
    schema = model.model_json_schema(by_alias=True)
    definitions = schema.get("$defs", {})

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        while True:
            if "$ref" in node:
                node = definitions[node["$ref"].rsplit("/", 1)[-1]]
            elif "anyOf" in node:
                node = next(option for option in node["anyOf"] if option.get("type") != "null")
            elif "allOf" in node:
                node = node["allOf"][0]
            else:
                return node

    node = resolve(schema)
    for part in location:
        if isinstance(part, int):
            node = resolve(node["items"])
        elif part in node.get("properties", {}):
            node = resolve(node["properties"][part])
        else:  # The tag of a discriminated union stands in the path behind the list index.
            node = resolve({"$ref": node["discriminator"]["mapping"][part]})
    return sorted(node["properties"])
