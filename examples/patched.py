"""Code patching: every executable page of libc is rewritten, and merged again.

    sksm run -- python3 patched.py

A tool that patches code (tracing, static keys, a JIT) turns shared file pages into
private copies, the same ones in each process. MADV_MERGE makes them one again.
"""

import ctypes

MADV_MERGE = 26
READ, WRITE, EXEC = 1, 2, 4
libc = ctypes.CDLL(None, use_errno=True)
for call in (libc.mprotect, libc.madvise):
    call.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def own_kib() -> int:
    """Read how much memory this process has that is no file's, and no pool's."""
    with open("/proc/self/smaps_rollup") as lines:
        return sum(int(line.split()[1]) for line in lines if "Anonymous:" in line)


with open("/proc/self/maps") as lines:
    line = next(line for line in lines if "libc.so" in line and " r-xp " in line)
start, stop = (int(word, 16) for word in line.split()[0].split("-"))
before = own_kib()
libc.mprotect(start, stop - start, READ | WRITE | EXEC)
for page in range(start, stop, 4096):
    byte = ctypes.c_ubyte.from_address(page)
    byte.value = byte.value  # a patch that changes nothing copies the page all the same
libc.mprotect(start, stop - start, READ | EXEC)
patched = own_kib()
merged = libc.madvise(start, stop - start, MADV_MERGE) == 0
print(f"memory of its own: {before} KiB, patched {patched} KiB, ", end="")
print(f"merged {own_kib()} KiB" if merged else "and the kernel has no MADV_MERGE")
