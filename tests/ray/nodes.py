"""Several Ray nodes on this machine's loopback, until standard input ends: prints the cluster's address when they run.

    python nodes.py NODES

A line of standard input adds a node, and a line is printed when it runs. Each node has one CPU, and a GPU that only Ray
believes in. A process of its own, for what keeps Ray on the loopback address is read when ray is imported.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from typing import Any


def main(nodes: int) -> None:
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-")  # not the tests' own: sockets lie in it, whose paths must be short
    node: dict[str, Any] = {"node_ip_address": "127.0.0.1", "num_cpus": 1, "num_gpus": 1, "memory": 8 << 30}
    node |= {"object_store_memory": 80 << 20}
    # That a node is gone is known after five of its checks, which are 3 s apart by default.
    system = {"worker_niceness": 0, "health_check_period_ms": 1000}
    head = {**node, "include_dashboard": False, "temp_dir": folder, "_system_config": system}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**node, wait=False)
        cluster.wait_for_nodes()
        print(cluster.address, flush=True)
        for _ in sys.stdin:
            cluster.add_node(**node)
            print("added", flush=True)
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
