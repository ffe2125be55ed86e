"""Runs a command that ends with whoever started it: python leash.py COMMAND, in a session of its own.

Standard input is the leash, a pipe of which the starter holds the other end: the kernel closes it when the starter
dies, however it dies, and then everything in this session is killed, what the command has started included.
"""

import os
import signal
import subprocess
import sys
import threading


def _hold() -> None:
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_hold, daemon=True).start()
    sys.exit(subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL))  # noqa: S603 - what the starter names
