"""The kit for GPU machines: a library keeps the kernels of one architecture alone."""

import struct
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = b"\0.nv_fatbin\0.shstrtab\0"
KERNELS = {75: b"old" * 8, 90: b"hopper" * 4, 100: b"new" * 8}
PTX = (1, 90)


def entry(kind: int, architecture: int, payload: bytes) -> bytes:
    head = struct.pack("<HHIQ", kind, 0, 64, len(payload)) + bytes(12)
    return (head + struct.pack("<I", architecture)).ljust(64, b"\0") + payload


def fat_binary(entries: bytes) -> bytes:
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def library() -> bytes:
    """Return an ELF file: header, two fat binaries with a gap between them, names, table."""
    kernels = b"".join(entry(2, number, code) for number, code in KERNELS.items())
    section = fat_binary(kernels) + bytes(8) + fat_binary(entry(*PTX, b"portable" * 2))
    table = 64 + len(section) + len(NAMES)
    header = b"\x7fELF\x02".ljust(0x28, b"\0") + struct.pack("<Q", table)
    header = header.ljust(0x3A, b"\0") + struct.pack("<HHH", 64, 3, 2)
    rows = [(0, 0, 0), (1, 64, len(section)), (12, 64 + len(section), len(NAMES))]
    headers = [struct.pack("<IIQQQQ", n, 0, 0, 0, start, size) for n, start, size in rows]
    return header + section + NAMES + b"".join(row.ljust(64, b"\0") for row in headers)


def keep(path: Path, architecture: int) -> subprocess.CompletedProcess[str]:
    program = ROOT / "tests" / "gpu" / "kit" / "keep_architecture.py"
    command = [sys.executable, str(program), str(path), str(architecture)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_other_kernels_are_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(library())
    done = keep(path, 90)
    assert done.returncode == 0, done.stderr
    expected = library()
    for removed in (KERNELS[75], KERNELS[100], b"portable" * 2):
        expected = expected.replace(removed, bytes(len(removed)))
    assert path.read_bytes() == expected != library()


def test_a_library_without_the_architecture_stays(tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(library())
    done = keep(path, 70)
    assert done.returncode == 1 and "kept 0 MiB of sm_70" in done.stdout
    assert path.read_bytes() == library()
