"""The two operations that act on one host alone."""

from tasks import rolling

rolling.start_if_stopped(name="Start Consul where it is stopped", unit="consul", files=["/a"])
rolling.restart_if_stale(name="Restart the journal if stale", unit="systemd-journald", files=["/b"])
