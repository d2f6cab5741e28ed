"""KubeRay's published schemas, for all that a test would have it take."""

import os
from pathlib import Path

import jsonschema
import pytest
import yaml

from cluster import kubernetes

ROOT = Path(__file__).parents[2]


def strict(schema):
    """The schema with unknown fields refused, as `kubectl --validate=strict` does; an API server just drops them."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


class Judges(dict):
    """Validators by kind, too long to be shown where a test fails."""

    def __repr__(self):
        return "KubeRay's schemas"


@pytest.fixture(scope="session")
def crds():
    """A judge for each kind, from KubeRay's published CRDs in the folder that MOVIOLA_CRD names."""
    folder = Path(os.environ.get("MOVIOLA_CRD", ROOT / "../shared/crd"))
    if not folder.is_dir():
        pytest.skip(f"no custom resource definitions at {folder}; MOVIOLA_CRD names a folder of KubeRay's")
    judges = Judges()
    for kind in ("rayjobs", "rayclusters"):
        with (folder / f"ray.io_{kind}.yaml").open() as text:
            definition = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        (version,) = (v for v in definition["versions"] if v["name"] == kubernetes.VERSION)
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        judges[definition["names"]["kind"]] = jsonschema.Draft202012Validator(schema)
    return judges


def faults(judge, resource):
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in judge.iter_errors(resource)]
