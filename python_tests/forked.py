"""Training processes that a test kills, or starts several of, without importing torch and transformers for each.

One process imports them and forks for every request: a child is as new as a process that was started by itself, and
dies alone. It has run nothing before it forks, so no thread and no lock is lost.

    forked.py    reads requests from stdin, one JSON object a line, and answers each with the exit codes
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Done:
    codes: list[int]  # of each process; -9 is a death by SIGKILL
    output: str  # stdout and stderr of all


class Forks:
    """`run` starts processes and waits for their end."""

    def __init__(self, folder: Path):
        self._log, self._server = folder / "log.txt", None

    def _serve(self) -> subprocess.Popen:
        if self._server is None:
            paths = os.pathsep.join(path for path in sys.path if path)
            self._server = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
                env={**os.environ, "PYTHONPATH": paths}, start_new_session=True,
            )  # fmt: skip
        return self._server

    def run(self, module: str, *arguments, processes: int = 1, threads: int = 1, seconds: float = 400) -> Done:
        """`main()` of a module of this folder with these arguments, in one process or as the ranks of a launcher."""
        self._log.write_text("")
        request = dict(module=module, arguments=[str(part) for part in arguments], threads=threads, log=str(self._log))
        server = self._serve()
        server.stdin.write(json.dumps(request | dict(environments=launched(processes))) + "\n")
        if not select.select([server.stdout], [], [], seconds)[0]:
            self.close()
            raise TimeoutError(f"{module} did not end: {self._log.read_text()[-4000:]}")
        answer = server.stdout.readline()
        if not answer:
            raise RuntimeError("the process that forks has ended; its stderr says why")
        return Done(json.loads(answer), self._log.read_text())

    def close(self) -> None:
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            self._server = None


def launched(processes: int) -> list[dict[str, str]]:
    """What torchrun would set for each rank."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [shared | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def start(request: dict, environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(environment)
        torch.set_num_threads(request["threads"])
        sys.argv = [request["module"], *request["arguments"]]
        importlib.import_module(request["module"]).main()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ends(children: list[int]) -> list[int]:
    """Exit codes. A child that fails ends the others, which would wait for it."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        for other in children:
            if codes[child] and other not in codes:
                os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


def main() -> None:
    import capture_world  # noqa: F401
    import reuse_worker  # noqa: F401

    gc.freeze()  # trainers collect garbage, of which the imports made none
    for line in sys.stdin:
        request = json.loads(line)
        children = [start(request, environment) for environment in request["environments"]]
        print(json.dumps(ends(children)), flush=True)


if __name__ == "__main__":
    main()
