"""Two processes that work together, as on two machines."""

import json
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start_workers(data, folder, *overrides, command="train", flags=()):
    """Two processes of one command on the recipe of boxes, on the loopback address."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    processes = []
    for index in range(2):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        with open(folder.parent / f"worker{index}.log", "a", encoding="utf-8") as log:
            processes.append(
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", f"official_selftrain.{command}"),
                        f"--experiment={data}/recipe.py:mini",
                        f"--data_dir={data}",
                        f"--model_dir={folder}",
                        "--strategy=multi_worker_mirrored",
                        *(f"--params_override={text}" for text in overrides),
                        *flags,
                    ],
                    cwd=ROOT,
                    env=os.environ | {"TF_CONFIG": json.dumps(task)},
                    stdout=log,
                    stderr=log,
                )
            )
    return processes


def finish(processes, seconds=240):
    """Exit statuses; none is left behind."""
    try:
        return [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
