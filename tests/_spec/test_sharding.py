"""Sharded parameters on 8 virtual devices, and over two processes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).with_name("sharded_program.py")
# The smallest kernel has 64 · 32 entries. All neurons together, on every side of a kernel that
# they meet, are fewer than 512.
NEURON_VECTORS = 512


def start(*arguments):
    root = str(PROGRAM.parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def finished(processes, timeout):
    """What each process reported; none outlives this call."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    # The library that connects processes prints there too.
    lines = [[line for line in out.splitlines() if line.startswith("{")] for out, _ in outputs]
    return [[json.loads(line) for line in found] for found in lines]


@pytest.fixture(scope="module")
def reports():
    (found,) = finished([start(8, 1)], timeout=400)
    return {report["name"]: report for report in found}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["condition", "step", "init", "explicit", "explicit score"])
def test_sharded_equals_single_device(reports, name):
    report = reports[name]
    assert report["deviation"] < 1e-5
    assert report["kept"]
    assert report["gathered"] <= NEURON_VECTORS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scanned fully", "scanned hidden"])
def test_scanned_stack_is_gathered_nowhere(reports, name):
    report = reports[name]
    assert 3 * 64 in report["groups"]
    assert report["deviation"] < 1e-5
    assert report["kept"]
    assert report["gathered"] <= NEURON_VECTORS


@pytest.mark.slow
def test_two_processes():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for (report,) in finished([start(8, 2, rank, port) for rank in (0, 1)], timeout=200):
        assert report["count"] == 8
        assert report["deviation"] < 1e-5
        assert report["kept"]
        assert report["gathered"] <= NEURON_VECTORS
