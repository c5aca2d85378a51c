"""Exit with a one-line error if a port of this machine is in use: ``python tools/check_port.py 29500``."""

import errno
import socket
import sys

if __name__ == "__main__":
    port = int(sys.argv[1])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        why = (
            "is in use, perhaps by another run"
            if error.errno == errno.EADDRINUSE
            else error.strerror
        )
        sys.exit(
            f"error: port {port}: {why}; choose another one with the environment variable PORT"
        )
