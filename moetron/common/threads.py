"""Number of CPU threads of a process, and how idle threads wait. Imports no torch.

One rule for training and for every tool that runs torch (``cpu_threads``): ``--cpu-threads``, else
``OMP_NUM_THREADS``, else usable cores divided by the ranks of the host.
"""

import argparse
import os
from pathlib import Path

from moetron.common.cores import usable_cores
from moetron.common.errors import UserError

WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Environment variables that set how OpenMP threads wait."""


def use_passive_waits() -> None:
    """Make idle OpenMP threads sleep instead of spin, unless the environment sets it.

    Must run before torch is imported: its Linux wheels bundle GNU OpenMP (libgomp), which reads the
    environment once, when loaded. By default libgomp spins for milliseconds at the end of every
    parallel region. Where processes compete for cores, a spinning thread keeps the thread that it
    waits for from running; docs/launching.md has measurements.
    """
    if not any(name in os.environ for name in WAIT_VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def add_option(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--cpu-threads`` to a parser and return it; 0, the default, applies the rule above."""
    help_text = "CPU threads (default: OMP_NUM_THREADS, else all usable cores)"
    parser.add_argument("--cpu-threads", type=_count, default=0, metavar="N", help=help_text)
    return parser


def _count(text: str) -> int:
    """Parse an integer >= 0; argparse turns the error into exit code 2."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: must be an integer >= 0")
    return int(text)


def use_threads(requested: int) -> None:
    """Set torch's threads to ``cpu_threads(requested, local ranks)``.

    Local ranks are those that torchrun started on this host (``LOCAL_WORLD_SIZE``).
    """
    import torch  # seconds

    torch.set_num_threads(cpu_threads(requested, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def cpu_threads(requested: int, local_ranks: int) -> int:
    """Return the number of threads of one rank.

    Args:
        requested: ``--cpu-threads``; 0: not given.
        local_ranks: processes that share this host's cores, at least 1.

    Raises:
        UserError: ``OMP_NUM_THREADS`` is not a positive integer.
    """
    return requested or _from_environment() or max(1, usable_cores() // local_ranks)


def _from_environment() -> int | None:
    """Return the user's ``OMP_NUM_THREADS``, None where it is unset or torchrun's own."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    if not text or _set_by_torchrun(text):
        return None
    first = text.split(",")[0].strip()  # OpenMP: one number for each level of nesting
    if not first.isdecimal() or int(first) < 1:
        raise UserError(f"OMP_NUM_THREADS={text}: must be an integer >= 1, or unset")
    return int(first)


def _set_by_torchrun(text: str) -> bool:
    """Return whether torchrun, not the user, set ``OMP_NUM_THREADS`` to ``text``.

    torchrun sets 1 for several ranks on a host where the variable is unset. Its own start
    environment (Linux: ``/proc/PID/environ``) shows whether it was; where that cannot be read, the
    1 counts as torchrun's.
    """
    several = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1
    if text != "1" or not several or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        start = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return True
    return not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in start.split(b"\0"))
