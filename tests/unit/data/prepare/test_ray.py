"""A Ray cluster gives the bytes of local processes."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from moetron.data.prepare import output as output_module
from moetron.data.prepare.options import Options
from moetron.data.prepare.preprocess import preprocess
from moetron.data.readers import rows as inputs_module

pytestmark = pytest.mark.slow


@pytest.fixture
def options(tmp_path: Path, monkeypatch) -> Options:
    monkeypatch.setattr(inputs_module, "CHUNK_BYTES", 20_000)
    rows = [json.dumps({"text": f"document {i}: {'äöü 漢字 ' * (i % 70)}"}) for i in range(2000)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    return Options([str(tmp_path / "in.jsonl")], "bytes", str(tmp_path / "local"), append_eod=True)


def test_two_nodes_and_a_killed_worker_give_the_local_bytes(
    options: Options, tmp_path: Path, monkeypatch
) -> None:
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray.cluster_utils import Cluster

    preprocess(options)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    killed = []

    def take(output: output_module.Output, encoded) -> None:
        if not killed:
            workers = [p for p in psutil.process_iter(["cmdline"]) if is_worker(p, own)]
            killed.extend(worker.pid for worker in workers[:1])
            os.kill(killed[0], signal.SIGKILL)
        real(output, encoded)

    real = output_module.Output.take
    monkeypatch.setattr(output_module.Output, "take", take)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        own = {child.pid for child in psutil.Process().children(recursive=True)}
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        preprocess(replace(options, output_prefix=str(tmp_path / "ray"), engine="ray"))
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert len(nodes) == 2 and len(killed) == 1
    for suffix in (".bin", ".idx"):
        expected = (tmp_path / f"local{suffix}").read_bytes()
        assert (tmp_path / f"ray{suffix}").read_bytes() == expected


def is_worker(process: psutil.Process, own: set[int]) -> bool:
    """Return whether a process is a Ray worker of this test."""
    command = process.info["cmdline"] or [""]
    return command[0].startswith(("ray::_call", "ray::IDLE")) and any(
        parent.pid in own for parent in process.parents()
    )
