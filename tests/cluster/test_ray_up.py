"""`ray up`, a job, its result, `ray down`, a token asked for: on this machine's loopback, in namespaces of its own."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parent.parent.parent
NEEDED = ("unshare", "ip", "rsync", "ssh", "ssh-keygen")


def missing():
    if os.geteuid() != 0:
        return "needs root for namespaces of its own"
    absent = [tool for tool in NEEDED if shutil.which(tool) is None]
    if shutil.which("sshd") is None and not Path("/usr/sbin/sshd").exists():
        absent.append("sshd")
    return f"needs {', '.join(absent)}" if absent else ""


def wheels(folder):
    """The packages that cluster.yaml's setup installs, and what building distrecon takes, as files."""
    setup = yaml.safe_load((CHECKOUT / "cluster.yaml").read_text())["setup_commands"]
    (install,) = [command for command in setup if "torch==" in command]
    pins = install.split("'")[1::2]
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    needs = [*pins, *project["project"]["dependencies"], *project["build-system"]["requires"]]
    subprocess.run([sys.executable, "-m", "pip", "download", "-qq", "-d", folder, *needs], check=True, timeout=1200)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_ray_up_as_cluster_yaml_says_a_job_and_down(tmp_path, request):
    namespaces = ["unshare", "-n", "-m", "--propagation", "private", "-p", "-f", "--mount-proc"]
    script, packages = Path(__file__).with_name("ray_up.py"), wheels(request.config.cache.mkdir("wheels"))
    done = subprocess.run(
        [*namespaces, sys.executable, script, tmp_path, packages], capture_output=True, text=True, timeout=2400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["synced"]
    assert {"torch==2.13.0+cpu", "torch==2.13.0"} & set(found["installed"])
    assert found["token_mode"] == "0o600"
    assert found["mlflow"]
    assert [t["status"] for t in found["summary"]] == ["completed", "completed"]
    assert found["mlflow_runs"] == ["FINISHED"] * 3  # the sweep and its trials, without a word about it in the job
    assert found["same_mlflow"]
    assert found["mlflow_again"]
    assert found["wrong_token"] != 0
    assert found["no_token"] != 0
    assert all("oken" in words for words in found["refusals"])
    assert not found["left"]
