"""One rule for threads: the setting, the user's OMP_NUM_THREADS, a share of the usable cores."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moetron.common import cores, threads
from moetron.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TORCH_TOOLS = ("generate", "evaluate", "analyze_routing", "convert_checkpoint", "upcycle")
VARIABLES = (
    *("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
    *threads.WAIT_VARIABLES,
)


@pytest.fixture(autouse=True)
def _six_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A host of six cores without a quota, and nothing set."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    before = os.environ.copy()
    yield
    os.environ.clear()
    os.environ.update(before)


def _quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, **files: str) -> None:
    """Put this process into a cgroup: ``line`` of /proc/self/cgroup, files by path."""
    membership = tmp_path / "membership"
    membership.write_text(f"12:memory:/other\n{line}\n")
    monkeypatch.setattr(cores, "_MEMBERSHIP", membership)
    for name, text in files.items():
        path = tmp_path / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_setting_wins_then_the_environment_then_a_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert threads.cpu_threads(0, local_ranks=1) == 6
    assert threads.cpu_threads(0, local_ranks=4) == 1
    assert threads.cpu_threads(0, local_ranks=8) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads.cpu_threads(0, local_ranks=1) == 3
    assert threads.cpu_threads(0, local_ranks=6) == 3
    assert threads.cpu_threads(5, local_ranks=8) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")
    assert threads.cpu_threads(0, local_ranks=1) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert threads.cpu_threads(0, local_ranks=1) == 6


@pytest.mark.parametrize("text", ["0", "many", "-2", "1.5"])
def test_a_thread_count_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(UserError, match=f"OMP_NUM_THREADS={text}: must be an integer >= 1"):
        threads.cpu_threads(0, local_ranks=1)


def test_a_cpu_quota_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Version 2 of cgroups: the tightest quota on the way to the root."""
    files = {"a__b__cpu.max": "max 100000\n", "a__cpu.max": "250000 100000\n"}
    _quota(monkeypatch, tmp_path, "0::/a/b", **files)
    assert cores.usable_cores() == 2
    assert threads.cpu_threads(0, local_ranks=2) == 1


def test_a_cpu_quota_of_the_first_version_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a container sees it: its own group is the mounted root, whatever the path says."""
    period = {"cpu__cpu.cfs_period_us": "100000\n"}
    _quota(monkeypatch, tmp_path, "3:cpu,cpuacct:/docker/0123", **period)
    for quota, expected in (("-1", 6), ("400000", 4), ("50000", 1)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        assert cores.usable_cores() == expected


PROGRAM = (
    "import os; os.sched_getaffinity = lambda _: set(range(6))\n"
    "from moetron.common.threads import cpu_threads\n"
    "open(os.environ['FOLDER'] + '/' + os.environ['RANK'], 'w').write(str(cpu_threads(0, 2)))\n"
)


@pytest.mark.parametrize(("given", "expected"), [(None, "3"), ("1", "1"), ("2", "2")])
def test_torchruns_own_number_is_not_the_users(
    tmp_path: Path, given: str | None, expected: str
) -> None:
    """Ranks of a real torchrun, which sets OMP_NUM_THREADS=1 where the user has not set it."""
    script = tmp_path / "rank.py"
    script.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    environment |= {"FOLDER": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment |= {} if given is None else {"OMP_NUM_THREADS": given}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, *torchrun, str(script)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    assert [(tmp_path / rank).read_text() for rank in "01"] == [expected] * 2


@pytest.mark.parametrize("chosen", [None, *threads.WAIT_VARIABLES])
def test_idle_threads_sleep_unless_the_user_chooses(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    if chosen is not None:
        monkeypatch.setenv(chosen, "ACTIVE")
    threads.use_passive_waits()
    assert os.environ.get("OMP_WAIT_POLICY") == {
        None: "PASSIVE",
        "OMP_WAIT_POLICY": "ACTIVE",
    }.get(chosen)


def test_openmp_learns_of_it_before_it_is_loaded() -> None:
    """Libgomp reports the value that it read, in a command started like every other."""
    program = (
        "from moetron.common.process import run_guarded\n"
        "def main():\n  import torch\n  print(torch.ones(2).sum().item())\n  return 0\n"
        "run_guarded(main)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "GOMP_SPINCOUNT = '0'" in done.stderr, done.stderr


@pytest.mark.parametrize("name", [*TORCH_TOOLS, "check_parity", "ablate", "plan", "pretrain_moe"])
def test_no_command_loads_torch_before_it_starts(name: str) -> None:
    path = ROOT / ("pretrain_moe.py" if name == "pretrain_moe" else f"tools/{name}.py")
    program = (
        f"import runpy, sys; runpy.run_path({str(path)!r}, run_name='imported'); "
        "sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)


@pytest.mark.parametrize("name", TORCH_TOOLS)
def test_every_tool_that_runs_torch_has_the_option(name: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py")]
    command += ["to-hf"] if name == "convert_checkpoint" else []
    done = subprocess.run(
        [*command, "--cpu-threads", "many"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "--cpu-threads: many: must be an integer >= 0" in done.stderr
