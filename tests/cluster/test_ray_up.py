"""`ray up`, a job, its result, `ray down`, a token asked for: on this machine's loopback, in namespaces of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NEEDED = ("unshare", "ip", "rsync", "ssh", "ssh-keygen")


def missing():
    if os.geteuid() != 0:
        return "needs root for namespaces of its own"
    absent = [tool for tool in NEEDED if shutil.which(tool) is None]
    if shutil.which("sshd") is None and not Path("/usr/sbin/sshd").exists():
        absent.append("sshd")
    return f"needs {', '.join(absent)}" if absent else ""


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_ray_up_job_and_down_with_a_token(tmp_path):
    script = Path(__file__).with_name("ray_up.py")
    done = subprocess.run(
        [
            "unshare",
            "-n",
            "-m",
            "--propagation",
            "private",
            "-p",
            "-f",
            "--mount-proc",
            sys.executable,
            script,
            tmp_path,
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["synced"]
    assert told["token_mode"] == "0o600"
    assert told["job"] == 0
    assert [t["status"] for t in told["summary"]] == ["completed", "completed"]
    assert told["wrong_token"] != 0
    assert told["no_token"] != 0
    assert all("oken" in words for words in told["refusals"])
    assert not told["left"]
