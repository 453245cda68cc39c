"""How gunicorn runs the application of bench/programs/python_worker.py."""

from __future__ import annotations

import gc
from typing import Any

preload_app = True
control_socket_disable = True
timeout = 0  # nobody is killed for being slow


def post_worker_init(worker: Any) -> None:
    """Have a worker use what it inherited, which makes it its own, and say so."""
    gc.collect()
    worker.wsgi.config["HELD"].look()
    print("ready", flush=True)
