"""Cuts a schema of Kubernetes or SkyPilot down to what a manifest of `deploy/` uses.

    python scripts/deploy_schemas.py deploy/rayjob.yaml ray.io_rayjobs.yaml \\
        --source "github.com/ray-project/kuberay COMMIT" > tests/data/schemas/rayjob.json

Reads a CustomResourceDefinition, or a JSON schema: for SkyPilot, that of `get_task_schema()` in
`sky/utils/schemas.py`, with `get_resources_schema()` for its `resources`. Of each object that the
manifest has, all names of properties stay, so that a misspelt one fails; what is under those that
it has not stays out.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

UNCHECKED = True
"""The schema of a property that the manifest has not."""

KEPT = "type enum const pattern required minimum maximum minItems maxItems minLength maxLength "
KEPT += "minProperties maxProperties uniqueItems"
BRANCHES = ("anyOf", "oneOf", "allOf")


def read_schema(path: pathlib.Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a manifest's kind and version, of a definition; or a JSON schema as it is."""
    read = yaml.load(path.read_text(), yaml.CSafeLoader)
    if read.get("kind") != "CustomResourceDefinition":
        return read
    group, version = manifest["apiVersion"].split("/")
    if read["spec"]["group"] != group or read["spec"]["names"]["kind"] != manifest["kind"]:
        raise SystemExit(f"{path} defines no {manifest['kind']} of {group}")
    versions = {one["name"]: one for one in read["spec"]["versions"] if one["served"]}
    schema = versions[version]["schema"]["openAPIV3Schema"]
    schema["properties"]["apiVersion"] = {"const": manifest["apiVersion"]}
    schema["properties"]["kind"] = {"const": manifest["kind"]}
    return schema


def cut(schema: Any, values: Sequence[Any], path: str = "") -> Any:
    """What is left of a schema for the values that are found at a place of a manifest.

    Raises:
      ValueError: the schema was cut for another manifest, which had nothing there.
    """
    if schema is UNCHECKED:
        raise ValueError(f"{path or 'the manifest'} is unchecked: cut its schema again")
    left = {key: schema[key] for key in KEPT.split() if key in schema}
    objects = [value for value in values if isinstance(value, Mapping)]
    lists = [value for value in values if isinstance(value, Sequence) and type(value) is not str]
    if "properties" in schema:
        left["properties"] = {
            name: cut(below, found, f"{path}.{name}") if found else UNCHECKED
            for name, below in schema["properties"].items()
            for found in [[value[name] for value in objects if name in value]]
        }
    others = schema.get("additionalProperties")
    if isinstance(others, Mapping):
        named = schema.get("properties", {})
        found = [value[name] for value in objects for name in value if name not in named]
        left["additionalProperties"] = cut(others, found, f"{path}.*")
    elif "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        left["additionalProperties"] = False
    if "items" in schema:
        found = [item for value in lists for item in value]
        left["items"] = cut(schema["items"], found, f"{path}[]")
    for branch in BRANCHES:
        if branch in schema:
            left[branch] = [cut(one, values, path) for one in schema[branch]]
    return left


def main() -> None:
    """Prints what is left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=pathlib.Path)
    parser.add_argument("schema", type=pathlib.Path)
    parser.add_argument("--source", required=True, help="repository and commit of the schema")
    args = parser.parse_args()
    manifest = yaml.safe_load(args.manifest.read_text())
    left = cut(read_schema(args.schema, manifest), [manifest])
    dialect = "https://json-schema.org/draft/2020-12/schema"
    print(json.dumps({"$schema": dialect, "$comment": args.source, **left}, indent=1))


if __name__ == "__main__":
    main()
