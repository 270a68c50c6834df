"""Servers on loopback that tests start, kill and start again."""

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Program:
    """A server that can be killed and started again."""

    def __init__(self, command: list[str], port: int, **of):
        self.command, self.port, self.of, self.process = command, port, of, None

    def start(self) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        self.process = subprocess.Popen(self.command, **quiet, **self.of)
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        raise AssertionError(f"{self.command[0]} does not listen")

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
