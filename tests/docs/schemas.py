"""The JSON Schema files of vmm/docs/reference, and what they say of a document."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, cast

from jsonschema import Draft202012Validator

from tests.docs.markdown import DOCS

REFERENCE = DOCS / "reference"


@cache
def schema(name: str) -> dict[str, Any]:
    """As the file has it. Raises jsonschema.SchemaError for what is no schema."""
    found = json.loads((REFERENCE / f"{name}.schema.json").read_text())
    Draft202012Validator.check_schema(found)
    return cast(dict[str, Any], found)


def faults(name: str, document: object, *, part: str | None = None) -> list[str]:
    """Where a document is not as the schema (or its part of $defs or properties) says, and what it
    has that the schema doesn't: a schema allows keys to come, its test does not.
    """
    whole = schema(name)
    if part is not None:
        parts = whole["$defs"] | whole.get("properties", {})
        whole = parts[part] | {"$defs": whole["$defs"]}
    validator = Draft202012Validator(_closed(whole))
    return [f"{each.json_path}: {each.message}" for each in validator.iter_errors(document)]


def _closed(node: Any) -> Any:
    """The same schema, with no properties but those that it names."""
    if isinstance(node, list):
        return [_closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    closed = {key: _closed(value) for key, value in node.items()}
    if isinstance(node.get("properties"), dict) and "additionalProperties" not in node:
        closed["additionalProperties"] = False
    return closed
