"""An SSH server on loopback, in this process: any key is welcome, and all it does is forward."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread

import paramiko
from paramiko import common

Socket = socket.socket


class _Forwarder(paramiko.ServerInterface):
    """Like OpenSSH it connects first, and refuses a channel to where nothing listens."""

    def __init__(self) -> None:
        self.connected: SimpleQueue[Socket] = SimpleQueue()

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return common.AUTH_SUCCESSFUL

    def check_channel_direct_tcpip_request(
        self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        try:
            self.connected.put(socket.create_connection(destination))
        except OSError:
            return common.OPEN_FAILED_CONNECT_FAILED
        return common.OPEN_SUCCEEDED


def _serve(client: Socket, key: paramiko.PKey) -> None:
    transport = paramiko.Transport(client)
    transport.add_server_key(key)
    forwarder = _Forwarder()
    transport.start_server(server=forwarder)
    while transport.is_active():
        channel = transport.accept(timeout=0.5)
        if channel is not None:
            upstream = forwarder.connected.get()
            for source, sink in ((channel, upstream), (upstream, channel)):
                Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: Socket | paramiko.Channel, sink: Socket | paramiko.Channel) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except (OSError, EOFError):
        source.close()
        sink.close()


@contextmanager
def ssh_server(key: paramiko.PKey) -> Iterator[int]:
    """The port of a server whose host key is `key`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    client = listener.accept()[0]
                except OSError:
                    return
                Thread(target=_serve, args=(client, key), daemon=True).start()

        Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
