"""Real programs that know nothing of sksm, merged from outside while they work.

Each crew starts real programs, asks them questions whose answers it knows, and
ends them. What a merge brought is read from the kernel.
"""

# Name of the crew, and its title. In the order of the table.
CREWS = {
    "forked": "8 forked Python workers, idle",
    "working": "8 forked Python workers, working",
    "separate": "8 separate Python workers, addresses not random",
    "postgres": "PostgreSQL, 8 sessions",
    "redis": "2 Redis servers",
    "node": "3 Node servers",
    "guests": "3 QEMU guests of 512 MiB",
}
