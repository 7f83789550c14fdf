"""One real `mserve launch` of the demo model for each test that asks for it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("MSERVE_BINARY", ROOT / "target" / "debug" / "mserve"))
START_DEADLINE_S = 60


def wait_until(what, condition, deadline_s=30):
    """Poll `condition` until it returns something true; fail naming `what`."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    pytest.fail(f"not within {deadline_s} s: {what}")


class Deployment:
    def __init__(self, directory, *arguments):
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(directory), "XDG_CACHE_HOME": str(directory / "cache")}
        directory.chmod(0o700)
        self.log = open(directory / "launch.log", "wb")
        self.process = subprocess.Popen(
            [BINARY, "launch", "--port", "0", *arguments],
            env=self.environment, cwd=directory, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
        )
        self.log_path = directory / "launch.log"

    def status(self):
        """The deployment's status, or None while it has no endpoint to ask."""
        done = subprocess.run([BINARY, "ps", "--json"], env=self.environment, capture_output=True, text=True)
        if done.returncode != 0 or not done.stdout.strip():
            return None
        deployments = json.loads(done.stdout)
        if isinstance(deployments, list):
            deployments = deployments[0] if deployments else None
        return deployments

    def all_ready(self):
        if self.process.poll() is not None:
            pytest.fail(f"launch ended with {self.process.returncode}:\n{self.log_path.read_text()}")
        status = self.status()
        ready = status and status["replicas"] and all(r["state"]["state"] == "ready" for r in status["replicas"])
        return status if ready else None

    def wait_ready(self):
        return wait_until("all replicas ready", self.all_ready, START_DEADLINE_S)

    def pids(self):
        return [replica["pid"] for replica in self.status()["replicas"]]

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()


@pytest.fixture
def deployment(tmp_path):
    deployment = Deployment(tmp_path)
    deployment.wait_ready()
    yield deployment
    deployment.close()
