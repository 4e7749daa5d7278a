"""cluster.yaml: valid for Ray, and right where Ray's own validation does not look."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

CHECKOUT = Path(__file__).resolve().parent.parent.parent
TEXT = (CHECKOUT / "cluster.yaml").read_text()
PROVIDER_KEYS = {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips"}
NODE_KEYS = {
    "InstanceType",
    "ImageId",
    "SecurityGroupIds",
    "SubnetIds",
    "BlockDeviceMappings",
    "MetadataOptions",
    "InstanceMarketOptions",
    "IamInstanceProfile",
}


@pytest.fixture
def cluster():
    return yaml.safe_load(TEXT)


def commands(cluster):
    return [command for key, value in cluster.items() if key.endswith("commands") for command in value]


def test_ray_accepts_it(cluster):
    validate_config(prepare_config(cluster))


def test_the_same_file_serves_an_on_premise_cluster(cluster):
    local = {k: v for k, v in cluster.items() if k not in ("available_node_types", "head_node_type")}
    local["provider"] = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]}
    prepared = prepare_config(local)
    validate_config(prepared)
    assert prepared["setup_commands"] == cluster["setup_commands"]


def test_no_key_is_misspelt_where_ray_does_not_check(cluster):
    assert set(cluster["provider"]) <= PROVIDER_KEYS
    assert {"type", "region"} <= set(cluster["provider"])
    zone = cluster["provider"]["availability_zone"]
    assert zone.startswith(cluster["provider"]["region"])
    for node in cluster["available_node_types"].values():
        assert set(node["node_config"]) <= NODE_KEYS
        assert {"InstanceType", "ImageId", "SecurityGroupIds", "SubnetIds"} <= set(node["node_config"])


def test_it_has_a_cpu_head_and_on_demand_and_spot_gpu_workers(cluster):
    types = cluster["available_node_types"]
    assert "GPU" not in types[cluster["head_node_type"]]["resources"]
    gpus = [t for t in types.values() if t["resources"].get("GPU")]
    markets = [t["node_config"].get("InstanceMarketOptions", {}).get("MarketType") for t in gpus]
    assert "spot" in markets
    assert None in markets
    assert max(t["resources"]["GPU"] for t in gpus) > 1
    assert all(t["node_config"]["InstanceType"].startswith("g") for t in gpus)


def test_every_node_may_use_the_bucket_and_only_the_head_may_start_nodes(cluster):
    head = cluster["head_node_type"]
    profiles = {
        name: t["node_config"]["IamInstanceProfile"]["Name"] for name, t in cluster["available_node_types"].items()
    }
    workers = {profile for name, profile in profiles.items() if name != head}
    assert len(workers) == 1  # Ray's own profile would reach the head alone
    assert profiles[head] not in workers
    guide = (CHECKOUT / "docs" / "cluster.md").read_text()
    assert all(profile in guide for profile in profiles.values())  # where they are made
    assert "iam:PassRole" in guide


def test_the_image_is_looked_up_not_the_one_that_ray_ships(cluster):
    from ray.autoscaler._private.aws.config import DEFAULT_AMI

    images = {t["node_config"]["ImageId"] for t in cluster["available_node_types"].values()}
    assert not images & set(DEFAULT_AMI.values())  # Ubuntu 18.04: torch's wheels want glibc 2.28
    assert "ubuntu-24.04/latest/ami-id" in TEXT


def test_the_docker_variant_of_the_guide_is_accepted(cluster):
    guide = (CHECKOUT / "docs" / "cluster.md").read_text()
    (block,) = [b for b in re.findall(r"```yaml\n(.*?)```", guide, re.S) if "container_name" in b]
    validate_config(prepare_config(cluster | yaml.safe_load(block)))
    assert f"ray:{version('ray')}-" in block


def test_nothing_is_open_to_the_world(cluster):
    assert "0.0.0.0" not in TEXT
    # without SecurityGroupIds Ray makes groups that allow SSH from everywhere
    assert all(t["node_config"]["SecurityGroupIds"] for t in cluster["available_node_types"].values())
    servers = [c for c in commands(cluster) if "mlflow server" in c]
    assert servers
    assert all("--host 127.0.0.1" in c for c in servers)


def test_every_ray_start_asks_for_a_token(cluster):
    starts = [c for c in commands(cluster) if "ray start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in c for c in starts)
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert any("chmod 600 ~/.ray/auth_token" in c for c in cluster["setup_commands"])
    dashboards = [c for c in starts if "--head" in c]
    assert "--dashboard-host=127.0.0.1" in dashboards[0]


def test_pins_are_versions_that_the_project_allows_and_runs_with(cluster):
    allowed = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
    ranges = {r.name: r.specifier for r in map(Requirement, allowed)}
    (install,) = [c for c in cluster["setup_commands"] if "torch==" in c]
    pins = {r.name: r for r in (Requirement(word) for word in install.split("'")[1::2])}
    assert {"torch", "ray", "mlflow"} <= set(pins)
    for name in ("torch", "ray", "mlflow"):
        (pin,) = pins[name].specifier
        assert pin.operator == "=="
        assert pin.version in ranges[name]
        assert pin.version == version(name).split("+")[0]


def test_every_package_reaches_the_nodes(cluster):
    packages = {path.name for path in (CHECKOUT / "distrecon").rglob("*") if path.is_dir()} - {"__pycache__"}
    assert not packages & set(cluster["rsync_exclude"])  # a name without a leading slash is left out at every level
