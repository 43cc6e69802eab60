"""A program that knows nothing of hotport: sockets as systemd passes them, READY=1, a drain on SIGTERM."""

import os
import signal
import socket

listener = socket.socket(fileno=3)  # LISTEN_FDS=1: the first one is descriptor 3
listener.settimeout(0.5)  # how often to look whether to leave; other workers share the queue
leaving = False


def leave(signum, frame):
    global leaving
    leaving = True


signal.signal(signal.SIGTERM, leave)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
    manager.sendto(b"READY=1\nSTATUS=listening", os.environ["NOTIFY_SOCKET"])
while not leaving:
    try:
        connection, _ = listener.accept()
    except TimeoutError:
        continue
    with connection:
        connection.sendall(b"hello\n")
