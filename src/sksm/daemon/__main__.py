"""Run the daemon with `python -m sksm.daemon`."""

from sksm.daemon.main import main

main()
