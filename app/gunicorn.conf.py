"""gunicorn reads this file from its working directory."""

bind = "0.0.0.0:8000"
worker_class = "gthread"
workers = 2
threads = 8
preload_app = True

# Shorter than the 25 s (app_kill_timeout_s) after which the scheduler kills what still runs.
graceful_timeout = 20
# Longer than any idle time of the balancer: the balancer closes idle connections, never the app,
# so no request is sent into a connection that is just being closed.
keepalive = 75

# The root file system is read-only.
worker_tmp_dir = "/dev/shm"
control_socket_disable = True

accesslog = None
errorlog = "-"
loglevel = "info"
