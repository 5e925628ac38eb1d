"""A cache over the devices of two processes, which `jax.distributed` brings together."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LIMIT = 120  # seconds; it takes a few


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_two_processes_share_a_cache():
    """Each step as dense attention in both; the one that waits for a dead one is ended with it."""
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(TESTS / "two_processes.py")]
    port, pipe = str(free_port()), subprocess.PIPE
    same = {"env": environment, "stdout": pipe, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen([*command, str(rank), port], **same) for rank in range(2)]
    stop = time.monotonic() + LIMIT
    while (states := [p.poll() for p in both]) != [0, 0] and time.monotonic() < stop:
        if any(states):
            break
        time.sleep(0.05)
    for process in both:
        process.kill()
    outputs = [process.communicate()[0] for process in both]
    if states != [0, 0]:
        pytest.fail(f"status {states} within {LIMIT} s\n" + "\n".join(outputs))
    for rank, output in enumerate(outputs):
        assert f"process {rank}: 9 steps as dense attention" in output
