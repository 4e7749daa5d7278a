"""`ray up` with this checkout's cluster.yaml on this machine alone: every setup and start command as it stands there.

Only the provider is exchanged for `local`, the bucket for a folder, and the package index for a folder of wheels. Run
by test_ray_up.py as root inside fresh network and mount namespaces (`unshare -n -m`): the loopback interface here is
nobody else's, and the home directory is a temporary one. Prints one JSON line of what happened at each step.
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
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


def private_home(folder: Path, wheels: Path) -> Path:
    """Mounts an empty home over the real one; Python comes from where it is installed, packages from `wheels`."""
    home, real = folder / "home", Path.home()
    home.mkdir()
    base = Path(sys.base_prefix)
    if base.is_relative_to(real):
        kept = home / base.relative_to(real)
        kept.mkdir(parents=True)
        must(f"mount --bind {base} {kept}")
    (home / ".config" / "pip").mkdir(parents=True)
    (home / ".config" / "pip" / "pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {wheels}\n")
    (home / ".profile").write_text(f"export PATH={base}/bin:$PATH\n")
    must(f"mount --rbind {home} {real}")
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
    """cluster.yaml as it is, but for the provider, the key to log in with and the bucket."""
    cluster = yaml.safe_load((CHECKOUT / "cluster.yaml").read_text().replace("s3://my-bucket", str(folder / "bucket")))
    for key in ("available_node_types", "head_node_type", "max_workers", "upscaling_speed", "idle_timeout_minutes"):
        cluster.pop(key)
    cluster["provider"] = {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []}
    cluster["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "user")}
    cluster["file_mounts"]["~/distrecon"] = str(CHECKOUT)
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster))
    return path


def mlflow_answers(seconds: float) -> bool:
    """Whether the tracking server is healthy within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            return urllib.request.urlopen("http://127.0.0.1:5000/health", timeout=5).status == 200
        except OSError:
            time.sleep(1)
    return False


def mlflow_runs() -> list[str]:
    """The state of every run that the tracking server knows."""

    def ask(what: str, body: dict) -> dict:
        headers = {"Content-Type": "application/json"}
        url = f"http://127.0.0.1:5000/api/2.0/mlflow/{what}/search"
        return json.load(urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)))

    ids = [e["experiment_id"] for e in ask("experiments", {"max_results": 100})["experiments"]]
    return [r["info"]["status"] for r in ask("runs", {"experiment_ids": ids, "max_results": 100}).get("runs", [])]


def processes(words: str) -> list[int]:
    found = sh(f"pgrep -f '{words}'").stdout.split()
    return [int(pid) for pid in found if int(pid) != os.getpid()]


def left() -> list[str]:
    """Ray's processes that are still there."""
    alive = must("ps -eo stat,comm").splitlines()
    return [line for line in alive if not line.startswith("Z") and line.split()[1] in ("raylet", "gcs_server")]


def main(folder: Path, wheels: Path) -> None:
    must("ip link set lo up")
    home = private_home(folder, wheels)
    start_sshd(folder, home)
    cluster = cluster_file(folder)
    launcher = f"{sys.executable} -m ray.scripts.scripts"  # the laptop's; the head has what setup_commands installed
    must(f"mkdir -p -m 700 ~/.ray && {launcher} get-auth-token --generate && chmod 600 ~/.ray/auth_token")
    found: dict = {}
    began = time.monotonic()
    must(f"{launcher} up -y --no-config-cache {cluster}", timeout=900, RAY_AUTH_MODE="token")
    found["up_seconds"] = round(time.monotonic() - began, 1)
    ray = f"{home}/venv/bin/ray"
    found["synced"] = (home / "distrecon" / "distrecon" / "zoos").exists()
    found["installed"] = must(f"{home}/venv/bin/pip list --format=freeze").split()
    found["token_mode"] = oct((home / ".ray" / "auth_token").stat().st_mode & 0o777)
    found["mlflow"] = mlflow_answers(120)
    (home / "space.yaml").write_text(SPACE)
    job = f"{ray} job submit --address http://127.0.0.1:8265"
    work = f"python -m distrecon.tune --address auto --space {home}/space.yaml --out {home}/runs/small"
    must(f"{job} -- {work}", timeout=400, RAY_AUTH_MODE="token")
    must(f"{launcher} rsync-down {cluster} {home}/runs/small/ {folder}/fetched/", RAY_AUTH_MODE="token")
    found["summary"] = json.loads((folder / "fetched" / "summary.json").read_text())["sweeps"][0]["trials"]
    found["mlflow_runs"] = mlflow_runs()
    # a second `ray up` starts Ray anew and leaves MLflow's server alone; a server that dies is started again
    servers = processes("[m]lflow server --host")
    must(f"{launcher} up -y --no-config-cache {cluster}", timeout=900, RAY_AUTH_MODE="token")
    found["same_mlflow"] = processes("[m]lflow server --host") == servers
    must("pkill -9 -f '^[^ ]*python[^ ]* [^ ]*mlflow server'; pkill -9 -f 'mlflow[.]server' || true")
    time.sleep(2)
    found["mlflow_again"] = mlflow_answers(120)
    wrong = folder / "wrong_token"
    wrong.write_text("0" * 64)
    refused = sh(f"{job} -- true", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(wrong))
    found["wrong_token"] = refused.returncode
    absent = sh(f"{job} -- true", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(folder / "none"))
    found["no_token"] = absent.returncode
    found["refusals"] = [(r.stdout + r.stderr)[-600:] for r in (refused, absent)]
    must(f"{launcher} down -y {cluster}", RAY_AUTH_MODE="token")
    found["left"] = left()
    for _ in range(60):  # `ray stop` asks them to end, and they take a while on a busy machine
        if not found["left"]:
            break
        time.sleep(1)
        found["left"] = left()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
