"""Functions run in forked processes, for `ranks` and `programs`."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def start(function: Callable[[], int | None], out: Path, err: Path) -> int:
    """A process that writes to these files and ends with the status that function() returns; with 1 if it raises."""
    process = os.fork()
    if process:
        with contextlib.suppress(OSError):  # it does so too: one of the two is first, and it may have ended
            os.setpgid(process, process)
        return process
    status = 1
    try:
        os.setpgid(0, 0)
        files = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (out, err)]
        for stream, target in enumerate((os.open(os.devnull, os.O_RDONLY), *files)):
            os.dup2(target, stream)
        status = function() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def statuses_of(processes: list[int], timeout: float, grace: float = 0.0) -> list[int]:
    """Exit statuses, when all have ended; of a process that had to be killed, minus the signal.

    After `timeout` seconds, or `grace` seconds after one has failed, the others are killed, with what they have started.
    """
    end, codes = time.monotonic() + timeout, {}
    while len(codes) < len(processes):
        left = [process for process in processes if process not in codes]
        if time.monotonic() > end:
            for process in left:
                os.killpg(process, signal.SIGKILL)
        for process in left:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[process] = os.waitstatus_to_exitcode(status)
                if codes[process]:
                    end = min(end, time.monotonic() + grace)
        time.sleep(0.01)
    return [codes[process] for process in processes]
