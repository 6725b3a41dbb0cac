"""One place names the report's keys: what checks a real report against it finds what is wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NotRequired, get_args, get_origin

import pytest

from vmm.machine.report_keys import DeviceCounts, Report, keys_of, objection

SCHEMA = Path(__file__).parents[3] / "vmm" / "docs" / "reference" / "report.schema.json"
TALLY = {"calls": 1, "bytes": 4096, "denied": 0, "failed": 0}
REPORT: dict[str, Any] = {
    "scheme": "cbit",
    "schemes_not_taken": {"attributes": "the guest picks the side by an address bit"},
    "doorbell": "port",
    "backings": {"private": "memfd", "shared": "memfd"},
    "host_access": {"private": "policy-refused", "launch": "pread/pwrite", "shared": "x"},
    "isolation": "policy-enforced rehearsal",
    "states": "told",
    "guest": {"exit": "poweroff", "reason": ""},
    "conversions": {"share": TALLY, "unshare": TALLY},
    "pages": {
        "ram_bytes": 1, "private_bytes": 1, "shared_bytes": 0, "deferred_bytes": 0,
        "common_bytes": 0,
    },
    "refinements": None,
    "residency": {"private_bytes": 1, "shared_bytes": None},
    "io": {
        "blk0": {
            "requests": 1, "bytes_read": 0, "bytes_written": 0, "flushes": 0, "errors": 0,
            "refused": 0, "engine": {"name": "auto", "bytes": {"hva": 1}, "fallbacks": 0},
        }
    },
    "exits": {"io": 210},
    "io_ports": {"0x3f8": 200},
    "wall_s": 1,
}  # fmt: skip


def changed(path: list[str], value: object) -> dict[str, Any]:
    report = copy.deepcopy(REPORT)
    inner = report
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return report


def test_report_as_it_should_be_is_not_objected_to() -> None:
    assert objection(REPORT) is None


def test_keys_that_are_new_are_not_objected_to() -> None:
    assert objection(changed(["io", "blk0", "codes"], {"0x0": 1})) is None


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["scheme"], None, "report has no scheme"),
        (["scheme"], 3, "report.scheme is 3, not str"),
        (["wall_s"], "1", "report.wall_s is '1', not float"),
        (["exits", "io"], True, "report.exits['io'] is True, not int"),
        (["conversions", "share", "denied"], None, "report.conversions.share has no denied"),
        (["pages", "lent_bytes"], "1", "report.pages.lent_bytes is '1', not int"),
        (["io", "blk0", "engine", "bytes"], 3, "report.io['blk0'].engine.bytes is 3, not an obj"),
        (["backings"], [], "report.backings is [], not an object"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(path: list[str], value: object, words: str) -> None:
    found = objection(changed(path, value))

    assert found is not None and found.startswith(words)


def shape(kind: Any) -> object:
    """A type's keys, with a star where one may lack, all the way down."""
    if get_origin(kind) is NotRequired:
        return shape(get_args(kind)[0])
    inner = [each for each in get_args(kind) if each is not type(None)]
    if get_origin(kind) is dict:
        return "map"
    if inner:
        return shape(inner[0])
    if not hasattr(kind, "__required_keys__"):
        return ""
    return {
        key + "*" * (get_origin(one) is NotRequired): shape(one)
        for key, one in keys_of(kind).items()
    }


def schema_shape(schema: dict[str, Any], definitions: dict[str, Any]) -> object:
    schema = definitions.get(schema.get("$ref", "").rpartition("/")[2], schema)
    if "properties" not in schema:
        return "map" if "additionalProperties" in schema else ""
    required = schema.get("required", [])
    return {
        key + "*" * (key not in required): schema_shape(one, definitions)
        for key, one in schema["properties"].items()
    }


@pytest.mark.skipif(not SCHEMA.exists(), reason="the documentation has no schema yet")
def test_schema_in_the_documentation_has_these_keys_and_no_others() -> None:
    schema = json.loads(SCHEMA.read_text())
    documented = schema_shape(schema, schema["$defs"])
    device = schema_shape({"$ref": "#/$defs/device"}, schema["$defs"])

    assert isinstance(documented, dict)
    whole = {key: value for key, value in documented.items() if key not in ("launch*", "iommu*")}
    ours = shape(Report)
    assert isinstance(ours, dict)
    assert {key: value for key, value in ours.items() if key not in ("launch*", "iommu*")} == whole
    assert shape(DeviceCounts) == device
