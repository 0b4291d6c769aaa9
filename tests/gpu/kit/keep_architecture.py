"""Overwrite a library's GPU kernels for other architectures with zeros, so that it compresses.

    python tests/gpu/kit/keep_architecture.py LIBRARY 90

90 keeps sm_90 and sm_90a. PTX goes too: on any other GPU the library finds no kernel.
"""

import collections
import struct
import sys
from pathlib import Path

SECTIONS = (b".nv_fatbin", b"__nv_relfatbin")
MAGIC = 0xBA55ED50
"""Of a fat binary: magic, version (2 bytes), bytes of the header (2), bytes of the entries (8)."""
MACHINE_CODE = 2
"""Kind of an entry; PTX is 1."""


def sections(data: bytearray) -> dict[bytes, tuple[int, int]]:
    """Return name -> (offset, bytes) of the sections of a 64-bit ELF file."""
    if data[:5] != b"\x7fELF\x02":
        raise SystemExit("not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", data, 0x3A)
    # Name, type, flags, address, offset, bytes.
    headers = [struct.unpack_from("<IIQQQQ", data, table + size * n) for n in range(count)]
    names = headers[of_names][4]
    found = {}
    for name, _, _, _, offset, length in headers:
        found[bytes(data[names + name : data.index(0, names + name)])] = (offset, length)
    return found


def keep(data: bytearray, architecture: int) -> tuple[collections.Counter[int], int]:
    """Zero all entries but the machine code of ``architecture``, in place.

    Returns:
        Bytes of machine code found for each architecture; bytes kept.
    """
    found: collections.Counter[int] = collections.Counter()
    kept = 0
    present = sections(data)
    for offset, length in (present[name] for name in SECTIONS if name in present):
        position, end = offset, offset + length
        while position < end:
            magic, _, header, size = struct.unpack_from("<IHHQ", data, position)
            if magic != MAGIC:  # alignment
                position += 8
                continue
            entry, position = position + header, position + header + size
            while entry < position:
                kind, _, before, payload = struct.unpack_from("<HHIQ", data, entry)
                (built_for,) = struct.unpack_from("<I", data, entry + 28)
                if kind == MACHINE_CODE:
                    found[built_for] += payload
                if kind == MACHINE_CODE and built_for == architecture:
                    kept += payload
                else:
                    data[entry + before : entry + before + payload] = bytes(payload)
                entry += before + payload
    return found, kept


def main() -> int:
    """Overwrite the library; fail if it has nothing for the architecture."""
    path, architecture = Path(sys.argv[1]), int(sys.argv[2])
    data = bytearray(path.read_bytes())
    found, kept = keep(data, architecture)
    listed = ", ".join(f"sm_{name} {size >> 20} MiB" for name, size in sorted(found.items()))
    print(f"{path.name}: {listed}; kept {kept >> 20} MiB of sm_{architecture}")
    if not kept:
        return 1
    path.write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
