"""A process that evaluates what it is told, line by line, and answers.

Nothing is imported here but what Python brings: it begins at once, and nothing in
it moves while it waits.
"""

import contextlib
import ctypes
import mmap
import os
import resource
import signal
import sys
import threading
import time

_EVERYBODY = 2**64 - 1  # PR_SET_PTRACER_ANY, for Yama
_PR_SET_PTRACER, _PR_SET_DUMPABLE = 0x59616D61, 4
MAP_FIXED = 0x10

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_size_t
heard = []  # signals, by number


def call(name, *args):
    """Call a function of libc with addresses and numbers."""
    words = [ctypes.c_ulong(arg % 2**64) for arg in args]
    result = getattr(libc, name)(*words)
    if result in (-1, 2**64 - 1):
        raise OSError(ctypes.get_errno(), name)
    return result


def write(address, data):
    ctypes.memmove(address, data, len(data))


def hear(number):
    """Write down each signal of this number that comes."""
    signal.signal(number, lambda *_: heard.append(int(number)))


def become(uid):
    """Be that user from now on, as a program of theirs that they may look at."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)


def hide():
    """Let nobody look at this process but root."""
    call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def threads(count):
    """Start threads that sleep, and give their numbers."""
    found = []
    for _ in range(count):
        ready = threading.Event()

        def sleep(ready=ready):
            found.append(threading.get_native_id())
            ready.set()
            while True:
                time.sleep(1000)

        threading.Thread(target=sleep, daemon=True).start()
        ready.wait()
    return found


def leave_no_descriptor(room):
    """Fill the table of open files but for `room` descriptors."""
    used = max(map(int, os.listdir("/proc/self/fd")))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, hard))
    opened = []
    with contextlib.suppress(OSError):
        while True:
            opened.append(os.open("/dev/null", os.O_RDONLY))
    for fd in opened[len(opened) - room :]:
        os.close(fd)


def end_main_thread():
    """End this thread only: with another alive, the process goes on, as a zombie."""
    libc.syscall(60, 0)  # exit, of one thread; x86-64


def keep_writing(pages):
    """Write to pages, by address, again and again, for ever."""
    turn = 0
    while True:
        turn += 1
        for page in pages:
            write(page, (turn % 256).to_bytes(1, "little"))
        time.sleep(0.001)


def in_thread(function, *args):
    threading.Thread(target=function, args=args, daemon=True).start()


def wait_for(how, path):
    """Wait in one of several ways until the first byte of a file is not zero."""
    with open(path, "r+b") as file:
        flag = mmap.mmap(file.fileno(), 1)
    _WAYS[how](flag)
    return how


def _doze(flag):
    while not flag[0]:
        time.sleep(0.05)


def _spin(flag):
    while not flag[0]:
        pass


def _lock(flag):
    lock = threading.Lock()
    lock.acquire()
    in_thread(lambda: (_doze(flag), lock.release()))
    lock.acquire()


def _read(flag):
    near, far = os.pipe()
    in_thread(lambda: (_doze(flag), os.write(far, b"x")))
    assert os.read(near, 1) == b"x"


_WAYS = {"nanosleep": _doze, "busy": _spin, "futex": _lock, "read": _read}


def main():
    """Obey until stdin ends."""
    with contextlib.suppress(OSError):  # EINVAL without Yama
        call("prctl", _PR_SET_PTRACER, _EVERYBODY, 0, 0, 0)
    for line in sys.stdin:
        print(repr(eval(line, globals())), flush=True)


if __name__ == "__main__":
    main()
