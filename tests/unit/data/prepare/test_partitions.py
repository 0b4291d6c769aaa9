"""Partitions of a corpus give the bytes of a single run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moetron.common.errors import UserError
from moetron.data.encoding.filters import Filters
from moetron.data.prepare.options import Options
from moetron.data.prepare.partitions import Partition
from moetron.data.prepare.preprocess import preprocess

SCRIPT = Path(__file__).parents[4] / "examples" / "slurm" / "preprocess_array.sh"
SBATCH = """#!/usr/bin/env bash
# A mock of SLURM: runs its command here, array tasks in sequence, the last first.
while [[ "$1" == --* ]]; do
  case "$1" in
    --parsable) shift ;;
    --array) last="${2#0-}"; shift 2 ;;
    *) echo "$1 $2" >>"$SBATCH_LOG"; shift 2 ;;
  esac
done
if [ -z "${last:-}" ]; then SLURM_JOB_ID=8 bash "$@"; exit; fi
export SLURM_JOB_ID=7 SLURM_ARRAY_TASK_COUNT=$((last + 1)) SLURM_ARRAY_TASK_MIN=0
for ((task = last; task >= 0; task--)); do SLURM_ARRAY_TASK_ID=$task bash "$@" >&2 || exit; done
echo "7;cluster"
"""


@pytest.fixture
def options(tmp_path: Path) -> Options:
    """Seven files of different sizes, with bad rows and copies."""
    for number in range(7):
        texts = [f"document {i % 40}: {'äöü 漢字 ' * (i % 7)}" for i in range(9 * number)]
        rows = [json.dumps({"text": text}) for text in texts] + ["bad"]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(rows))
    return Options(
        [str(tmp_path / "*.jsonl")],
        "bytes",
        str(tmp_path / "one" / "p"),
        append_eod=True,
        holdout_fraction=0.2,
        holdout_prefix=str(tmp_path / "one" / "v"),
        max_bad_fraction=0.1,
        shard_size_tokens=900,
        filters=Filters(deduplicate=True, min_tokens=14),
    )


def moved(options: Options, folder: str) -> Options:
    """Return the same options with other outputs."""
    out = Path(options.output_prefix).parents[1] / folder
    return replace(options, output_prefix=str(out / "p"), holdout_prefix=str(out / "v"))


def contents(folder: Path) -> dict[str, object]:
    """Return files by name; of manifests, the parts independent of the folder."""
    files: dict[str, object] = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = path.read_bytes()
        if path.suffix == ".json":
            files[path.name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "key"}
    return files


@pytest.mark.parametrize("count", [1, 3, 9])
def test_partitions_give_the_bytes_of_one_run(options: Options, count: int, tmp_path: Path) -> None:
    preprocess(options)
    parts = moved(options, "parts")
    with pytest.raises(UserError, match=r"missing, or .*share-00000-of"):
        preprocess(replace(parts, merge_shares=count))
    for number in reversed(range(count)):
        preprocess(replace(parts, share=f"{number}/{count}"))
    preprocess(replace(parts, merge_shares=count))
    expected = contents(tmp_path / "one")
    assert contents(tmp_path / "parts") == expected
    assert {"p_00001.bin", "p.rejects.jsonl", "v_00000.idx"} < set(expected)
    assert preprocess(replace(parts, merge_shares=count)).current


def test_every_file_is_in_one_partition(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(20)]
    for number, file in enumerate(files):
        file.write_bytes(b"x" * number)
    for count in (1, 3, 50):
        partitions = [Partition(number, count).select(files) for number in range(count)]
        assert [file for partition in partitions for file in partition] == files
    sizes = [sum(file.stat().st_size for file in Partition(n, 3).select(files)) for n in range(3)]
    assert max(sizes) - min(sizes) <= 20


@pytest.mark.parametrize("text", ["3", "3/3", "-1/3", "a/b", "1/"])
def test_wrong_partitions_are_named(options: Options, text: str) -> None:
    with pytest.raises(UserError, match=r"--share .*must be I/N"):
        preprocess(replace(options, share=text))


def test_the_slurm_array_gives_the_bytes_of_one_run(options: Options, tmp_path: Path) -> None:
    options = replace(options, filters=Filters(), shard_size_tokens=None, holdout_fraction=0.0)
    options = replace(options, holdout_prefix=None)
    preprocess(options)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SBATCH_LOG": str(tmp_path / "log"),
        "PYTHON": sys.executable,
        "SHARES": "2",
    }
    flags = ["--input", *options.inputs, "--tokenizer", "bytes", "--append-eod"]
    flags += ["--max-bad-fraction", "0.1", "--output-prefix", str(tmp_path / "slurm" / "p")]
    subprocess.run(
        ["bash", str(SCRIPT), *flags], env=environment, check=True, timeout=120, cwd=tmp_path
    )
    assert contents(tmp_path / "slurm") == contents(tmp_path / "one")
    assert "--dependency afterok:7\n" in (tmp_path / "log").read_text()
