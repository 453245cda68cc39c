"""What a program or library is made of: include/uapi/linux/elf.h, 64 bits.

Files are read and never mapped, since one that is cut short meanwhile would take
a reader of a mapping with it (SIGBUS).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from ctypes import Structure, c_ubyte, c_uint16, c_uint32, c_uint64, sizeof

import numpy as np
import numpy.typing as npt

MAGIC_64 = b"\x7fELF\x02\x01"  # ELFMAG, ELFCLASS64, ELFDATA2LSB
EM_X86_64 = 62
SHT_DYNSYM = 11


class elf64_hdr(Structure):
    _fields_ = (
        ("e_ident", c_ubyte * 16),
        *((name, c_uint16) for name in ("e_type", "e_machine")),
        ("e_version", c_uint32),
        *((name, c_uint64) for name in ("e_entry", "e_phoff", "e_shoff")),
        ("e_flags", c_uint32),
        *((name, c_uint16) for name in ("e_ehsize", "e_phentsize", "e_phnum")),
        *((name, c_uint16) for name in ("e_shentsize", "e_shnum", "e_shstrndx")),
    )


# struct elf64_shdr and struct elf64_sym: files hold arrays of these.
SHDR = np.dtype(
    [
        *((name, "<u4") for name in ("sh_name", "sh_type")),
        *((name, "<u8") for name in ("sh_flags", "sh_addr", "sh_offset", "sh_size")),
        *((name, "<u4") for name in ("sh_link", "sh_info")),
        *((name, "<u8") for name in ("sh_addralign", "sh_entsize")),
    ]
)
SYM = np.dtype(
    [
        ("st_name", "<u4"),
        *((name, "u1") for name in ("st_info", "st_other")),
        ("st_shndx", "<u2"),
        *((name, "<u8") for name in ("st_value", "st_size")),
    ]
)


@dataclasses.dataclass(frozen=True, slots=True)
class Elf:
    """A file's section headers, which are told by name; it may have none."""

    fd: int
    machine: int  # EM_*
    headers: npt.NDArray[np.void]
    names: tuple[bytes, ...]

    def links(self, symbols: Collection[bytes]) -> bool:
        """Say whether its dynamic symbols, wanted or offered, include one of these."""
        for table in self.headers[self.headers["sh_type"] == SHT_DYNSYM]:
            texts = _section(self.fd, self.headers[table["sh_link"]])
            # A linker lets a name share the end of a longer one, so the table of
            # names alone does not tell `madvise` from `posix_madvise`.
            places = [at for name in symbols for at in _places(texts, name + b"\0")]
            found = np.frombuffer(_section(self.fd, table), SYM)["st_name"]
            if places and bool(np.isin(places, found).any()):
                return True
        return False


def read(fd: int) -> Elf | None:
    """Read the headers of an open file; None if it is no 64-bit ELF file."""
    head = os.pread(fd, sizeof(elf64_hdr), 0)
    if len(head) < sizeof(elf64_hdr) or not head.startswith(MAGIC_64):
        return None
    header = elf64_hdr.from_buffer_copy(head)
    size = header.e_shnum * SHDR.itemsize
    table = os.pread(fd, size, header.e_shoff)
    if len(table) < size or header.e_shentsize != SHDR.itemsize:
        table = b""  # as `e_shnum` 0: stripped of them
    headers = np.frombuffer(table, SHDR)
    return Elf(fd, header.e_machine, headers, _names(fd, headers, header.e_shstrndx))


def _names(fd: int, headers: npt.NDArray[np.void], strings: int) -> tuple[bytes, ...]:
    if strings >= len(headers):
        return ()
    text = _section(fd, headers[strings])
    return tuple(text[at : text.find(b"\0", at)] for at in headers["sh_name"].tolist())


def _section(fd: int, header: np.void) -> bytes:
    return os.pread(fd, int(header["sh_size"]), int(header["sh_offset"]))


def _places(text: bytes, name: bytes) -> list[int]:
    places, at = [], text.find(name)
    while at >= 0:
        places.append(at)
        at = text.find(name, at + 1)
    return places
