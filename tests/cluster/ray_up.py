"""`ray up` with this checkout's cluster.yaml on this machine alone, its provider exchanged for `local`.

Run by test_ray_up.py as root inside fresh network and mount namespaces (`unshare -n -m`): the loopback interface here
is nobody else's, and the home directory is a temporary one. Prints one JSON line of what happened at each step.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

CHECKOUT = Path(__file__).resolve().parent.parent.parent
SPACE = """
name: recoveries
kind: expand_cluster
base: {teacher.hidden: [3], students.count: 2, budget.attempts: 1}
space: {seed: {grid: [0, 1]}}
"""


def sh(command: str, timeout: int = 240, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", command], env={**os.environ, **env}, capture_output=True, text=True, timeout=timeout
    )


def must(command: str, timeout: int = 240, **env: str) -> str:
    done = sh(command, timeout, **env)
    if done.returncode:
        sys.exit(f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def private_home(folder: Path) -> Path:
    """Mounts an empty home over the real one, keeping what of it this Python needs."""
    home, real = folder / "home", Path.home()
    home.mkdir()
    base = Path(sys.base_prefix)
    if base.is_relative_to(real):
        kept = home / base.relative_to(real)
        kept.mkdir(parents=True)
        must(f"mount --bind {base} {kept}")
    must(f"mount --rbind {home} {real}")
    (real / "venv").symlink_to(sys.prefix)
    return real


def start_sshd(folder: Path, home: Path) -> None:
    must(f"ssh-keygen -q -t ed25519 -N '' -f {folder}/host && ssh-keygen -q -t ed25519 -N '' -f {folder}/user")
    ssh = home / ".ssh"
    ssh.mkdir(mode=0o700)
    (ssh / "authorized_keys").write_text((folder / "user.pub").read_text())
    (ssh / "authorized_keys").chmod(0o600)
    config = folder / "sshd_config"
    config.write_text(
        f"Port 22\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPermitRootLogin prohibit-password\n"
        f"PasswordAuthentication no\nUsePAM no\nPidFile {folder}/sshd.pid\nStrictModes no\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    must(f"$(which sshd || echo /usr/sbin/sshd) -f {config}")


def cluster_file(folder: Path) -> Path:
    """cluster.yaml as it is, but for the provider and for what would download packages or start MLflow."""
    cluster = yaml.safe_load((CHECKOUT / "cluster.yaml").read_text())
    for key in ("available_node_types", "head_node_type", "max_workers", "upscaling_speed", "idle_timeout_minutes"):
        cluster.pop(key)
    cluster["provider"] = {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []}
    cluster["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "user")}
    cluster["file_mounts"]["~/distrecon"] = str(CHECKOUT)
    left_out = ("pip install", "python3 -m venv", "mlflow server")
    for key in ("setup_commands", "head_start_ray_commands"):
        cluster[key] = [c for c in cluster[key] if not any(words in c for words in left_out)]
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster))
    return path


def main(folder: Path) -> None:
    must("ip link set lo up")
    home = private_home(folder)
    start_sshd(folder, home)
    cluster = cluster_file(folder)
    ray = f"{home}/venv/bin/ray"
    must(f"mkdir -p -m 700 ~/.ray && {ray} get-auth-token --generate && chmod 600 ~/.ray/auth_token")
    told: dict = {}
    began = time.monotonic()
    must(f"{ray} up -y --no-config-cache {cluster}", RAY_AUTH_MODE="token")
    told["up_seconds"] = round(time.monotonic() - began, 1)
    told["synced"] = (home / "distrecon" / "pyproject.toml").exists()
    told["token_mode"] = oct((home / ".ray" / "auth_token").stat().st_mode & 0o777)
    (home / "space.yaml").write_text(SPACE)
    job = f"{ray} job submit --address http://127.0.0.1:8265"
    work = f"{home}/venv/bin/python -m distrecon.tune --address auto --space {home}/space.yaml --out {home}/runs/small"
    env = f"env PYTHONPATH={home}/distrecon RAY_AUTH_MODE=token"
    told["job"] = sh(f"{job} -- {env} {work}", RAY_AUTH_MODE="token").returncode
    must(f"{ray} rsync-down {cluster} {home}/runs/small/ {folder}/fetched/", RAY_AUTH_MODE="token")
    told["summary"] = json.loads((folder / "fetched" / "summary.json").read_text())["sweeps"][0]["trials"]
    wrong = folder / "wrong_token"
    wrong.write_text("0" * 64)
    refused = sh(f"{job} -- true", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(wrong))
    told["wrong_token"] = refused.returncode
    absent = sh(f"{job} -- true", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(folder / "none"))
    told["no_token"] = absent.returncode
    told["refusals"] = [(r.stdout + r.stderr)[-600:] for r in (refused, absent)]
    told["listening"] = must("cat /proc/net/tcp | awk '$4 == \"0A\" {print $2}'").split()
    must(f"{ray} down -y {cluster}", RAY_AUTH_MODE="token")
    alive = must("ps -eo stat,comm").splitlines()
    told["left"] = [line for line in alive if not line.startswith("Z") and line.split()[1] in ("raylet", "gcs_server")]
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
