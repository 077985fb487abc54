"""Prints what it was started with, from itself and from a spawned child."""

# mypy: ignore-errors

import json
import multiprocessing as mp
import os
import sys

import torch


def report(who):
    return {
        "who": who,
        "argv": sys.argv[1:],
        "main": __name__,
        "threads": torch.get_num_threads(),
        "npu": hasattr(torch, "npu"),
        "device": str(torch.device("npu:3")),
    }


def child(queue):
    queue.put(report("child"))


if __name__ == "__main__":
    print(json.dumps(report("script")))
    queue = mp.get_context("spawn").Queue()
    p = mp.get_context("spawn").Process(target=child, args=(queue,))
    p.start()
    print(json.dumps(queue.get()))
    p.join()
    sys.exit(int(os.environ.get("EXIT_CODE", "0")))
