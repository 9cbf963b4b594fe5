"""The demonstration service: who answers, in which version. Served by gunicorn (see Dockerfile)."""

import os
import socket

from flask import Flask, Response, request

VERSION = os.environ.get("APP_VERSION", "unknown")
HOSTNAME = socket.gethostname()

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = 1024 * 1024  # bytes; a longer body is answered with 413


def _plain(body: str | bytes) -> Response:
    return Response(body, mimetype="text/plain", headers={"X-Content-Type-Options": "nosniff"})


@app.get("/")
def hello() -> Response:
    return _plain(f"Hello from {HOSTNAME}!\n")


@app.get("/version")
def version() -> Response:
    return _plain(f"Version: {VERSION}\n")


@app.get("/status")
def status() -> Response:
    return _plain("OK\n")


@app.post("/echo")
def echo() -> Response:
    """The line that /version answers, and then the request's body, byte for byte."""
    return _plain(f"Version: {VERSION}\n".encode() + request.get_data())
