"""compose.yaml obeys the Compose specification's schema; its ports are on loopback, its secrets from outside."""

import json
import re
import subprocess
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster/compose.yaml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES = COMPOSE["services"]


@pytest.fixture(scope="module")
def judge():
    """The Compose specification's own schema, as check-jsonschema carries it."""
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    return jsonschema.validators.validator_for(schema)(schema)


def test_the_schema_takes_it_and_refuses_what_is_none(judge):
    assert [error.message for error in judge.iter_errors(COMPOSE)] == []
    for wrong in ({"prots": ["1:1"]}, {"depends_on": {"store": {"condition": "done"}}}, {"read_only": [1]}):
        services = {**SERVICES, "store": {**SERVICES["store"], **wrong}}
        assert list(judge.iter_errors({**COMPOSE, "services": services})), wrong


def test_names_that_it_uses_are_there():
    for name, service in SERVICES.items():
        assert set(service.get("depends_on", ())) <= SERVICES.keys(), name
        assert {config["source"] for config in service.get("configs", ())} <= COMPOSE["configs"].keys()
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in COMPOSE["volumes"] or source in ("./dashboards", "./alerts"), volume
    waits = [service.get("depends_on") for service in SERVICES.values()]
    for needed in (
        n for wait in waits if isinstance(wait, dict) for n, how in wait.items() if "healthy" in how["condition"]
    ):
        assert "healthcheck" in SERVICES[needed]


def test_every_port_is_on_loopback_and_every_secret_comes_from_outside():
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(ports) == 4 and all(port.startswith("127.0.0.1:") for port in ports)
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search("SECRET|PASSWORD|KEY|USER$", name):
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), name
        assert not service.get("privileged") and "no-new-privileges:true" in service.get(
            "security_opt", ["no-new-privileges:true"]
        )


def test_what_is_written_into_the_services_can_be_read(tmp_path):
    contents = {name: yaml.safe_load(config["content"]) for name, config in COMPOSE["configs"].items()}
    assert contents["datasource"]["datasources"][0]["url"] == "http://prometheus:9090"
    assert contents["dashboards"]["providers"][0]["options"]["path"] in str(SERVICES["grafana"]["volumes"])
    jobs = {job["job_name"] for job in contents["prometheus"]["scrape_configs"]}
    assert jobs == {"moviola", "ray"}
    found = subprocess.run(["scripts/prometheus.sh", "path"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip(found.stderr)
    (tmp_path / "prometheus.yaml").write_text(COMPOSE["configs"]["prometheus"]["content"])
    promtool = [
        f"{found.stdout.strip()}/promtool",
        "check",
        "config",
        "--syntax-only",
        str(tmp_path / "prometheus.yaml"),
    ]
    checked = subprocess.run(promtool, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
