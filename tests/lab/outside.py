"""What somebody outside the cluster finds: the controller, whose address is none of the inventory's."""

from __future__ import annotations

import errno
import resource
import select
import socket
import time

ANSWER_S = 0.6  # the kernel answers a SYN within 1 ms, busy or not


def open_ports(address: str) -> set[int]:
    """All TCP ports that take a connection from here."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    step = most // 6  # all hosts are tried at once
    return set().union(*(_open(address, range(n, min(n + step, 65536))) for n in range(1, 65536, step)))


def _open(address: str, ports: range) -> set[int]:
    """Connect to all of them at once; what neither connects nor fails in time is closed to us."""
    waiting: dict[int, tuple[socket.socket, int]] = {}
    found = set()
    with select.epoll() as poll:
        for port in ports:
            client = socket.socket()
            client.setblocking(False)
            assert client.connect_ex((address, port)) in (0, errno.EINPROGRESS)
            poll.register(client, select.EPOLLOUT)
            waiting[client.fileno()] = client, port
        end = time.monotonic() + ANSWER_S
        while waiting and (left := end - time.monotonic()) > 0:
            for file, _ in poll.poll(left):
                client, port = waiting.pop(file)
                if client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    found.add(port)
                client.close()
    for client, _ in waiting.values():
        client.close()
    return found


def says_closed(address: str, udp_port: int) -> bool:
    """The host answers that nothing listens there: a firewall that lets nobody in says nothing at all."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(ANSWER_S)
        client.connect((address, udp_port))
        client.send(b"?")
        try:
            client.recv(1)
        except ConnectionRefusedError:
            return True
        except TimeoutError:
            return False
    return False
