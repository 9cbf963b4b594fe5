"""An SSH server on loopback, in this process: any key is welcome, and it only forwards (direct-tcpip)."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

import paramiko


class _Server(paramiko.ServerInterface):
    def __init__(self) -> None:
        self.targets: dict[int, tuple[str, int]] = {}

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.AUTH_SUCCESSFUL

    def check_channel_direct_tcpip_request(
        self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        """As OpenSSH does: connect first, and refuse the channel where nothing listens."""
        try:
            self.targets[chanid] = destination
            self.upstream = socket.create_connection(destination, timeout=5)
            self.upstream.settimeout(None)
        except OSError:
            return paramiko.OPEN_FAILED_CONNECT_FAILED
        return paramiko.OPEN_SUCCEEDED
