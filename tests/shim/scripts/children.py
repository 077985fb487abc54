"""Starts processes that end in the ways named by the arguments, and itself ends with 0, saying that all went well."""

# mypy: ignore-errors

import multiprocessing as mp
import os
import signal
import sys
import time


def well():
    pass


def raises():
    raise ValueError("this rank failed")


def exits():
    sys.exit(3)


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def sleeps():
    time.sleep(60)


def starts_one_that_fails():
    start("fork", raises).join()


def start(method, target):
    p = mp.get_context(method).Process(target=target)
    p.start()
    return p


def spawn_of_torch(rank):
    if rank == 1:
        raises()
    time.sleep(60)


def case(how):
    if how in ("fork", "spawn", "forkserver"):
        for p in [start(how, well), start(how, raises), start(how, exits)]:
            p.join()
    elif how == "killed":
        start("fork", is_killed).join()
    elif how == "grandchild":
        start("fork", starts_one_that_fails).join()
    elif how == "not joined":
        start("fork", raises)
    elif how == "looked at":
        p = start("fork", exits)
        p.join()
        assert p.exitcode == 3
    elif how == "ended":
        for end in (lambda p: p.terminate(), lambda p: p.kill()):
            p = start("fork", sleeps)
            end(p)
            p.join()
    elif how == "daemon":
        mp.get_context("fork").Process(target=sleeps, daemon=True).start()
    elif how == "pool":
        with mp.get_context("fork").Pool(2) as pool:
            assert pool.map(abs, [-1, -2]) == [1, 2]
    elif how == "torch spawn":
        torch.multiprocessing.spawn(spawn_of_torch, nprocs=2)
    else:
        raise ValueError(how)


if __name__ == "__main__":
    import torch  # not in the spawned children: a second each

    for how in sys.argv[1:]:
        case(how)
    print("run success.", flush=True)
