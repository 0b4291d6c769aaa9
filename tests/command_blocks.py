"""Fenced command blocks of README.md and docs/: found, marked, executed.

A block of ``bash`` or ``sh`` is executed unless an HTML comment stands right above it:

    <!-- not run: needs eight GPUs -->

Blocks of a page run in order, in one shell and one folder, so that a later one finds what an
earlier one made. The folder has links to the checkout's commands, and what pages take for granted
(``prepare``): a run ``RUN``, a dense run ``DENSE``, text in ``corpus/``.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHELLS = ("bash", "sh")
LANGUAGES = (*SHELLS, "yaml", "python", "text", "json")
LINKS = ("docs", "examples", "tests", "tools", "pretrain_moe.py", "README.md")
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>\S*)\s*$")
_MARK = re.compile(r"^<!-- not run: (?P<reason>\S.*) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None
    """Why it is not executed."""

    @property
    def is_command(self) -> bool:
        """Whether a reader would type it."""
        return self.language in SHELLS

    @property
    def name(self) -> str:
        """Where it stands."""
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """README.md and every page of docs/."""
    return [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if _is_page(p))]


def _is_page(path: Path) -> bool:
    return "_build" not in path.parts


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a page; directives of Sphinx (```{name}) are none."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start, info, body = 0, "", list[str]()
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        if fence is None:
            body.append(line)
        elif not start:
            start, info, body = number, fence["info"], []
        else:
            if not info.startswith("{"):
                mark = _MARK.match(lines[start - 2]) if start > 1 else None
                page = path.relative_to(ROOT).as_posix()
                yield Block(page, start, info, "\n".join(body), mark["reason"] if mark else None)
            start = 0


def commands(path: Path) -> list[Block]:
    """The blocks of a page that are to be executed."""
    return [block for block in blocks(path) if block.is_command and block.reason is None]


def environment() -> dict[str, str]:
    """What commands run in: this interpreter first, one thread, no network for models."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MOETRON_VENV": str(Path(sys.executable).parents[1]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }


def script(found: list[Block]) -> str:
    """The blocks as one program that says where it is and stops at the first failure."""
    parts = ["set -euo pipefail"]
    for block in found:
        parts += [f"echo '== {block.name}'", block.text]
    return "\n".join(parts) + "\n"


def execute(program: str, folder: Path, timeout_s: float) -> "subprocess.CompletedProcess[str]":
    """Run a program of Bash in ``folder``; standard error joins the output."""
    return subprocess.run(
        ["bash", "-c", program],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )


_PREPARE = """
set -euo pipefail
mkdir -p corpus
python - <<'EOF'
import gzip, json, pathlib, sysconfig
files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
with gzip.open("corpus/code.jsonl.gz", "wt") as out:
    for file in files:
        out.write(json.dumps({"text": file.read_text(errors="ignore")}) + "\\n")
EOF
python tools/preprocess_corpus.py --input corpus --tokenizer bytes --append-eod \\
  --output-prefix bytes/train --holdout-fraction 0.1 --holdout-prefix bytes/valid
for kind in bin idx json; do ln -s "bytes/train.$kind" "PREFIX.$kind"; done
train() { # RECIPE FOLDER
  python pretrain_moe.py --config "examples/$1/tiny.yaml" --no-mock-data --vocab-size none \\
    --tokenizer-model bytes --data-path bytes/train --valid-data-path bytes/valid \\
    --train-iters 6 --lr-warmup-iters 2 --save-interval 3 --save "$2"
}
train olmoe_1b_7b RUN
train olmoe_dense_1b DENSE
"""


def prepare(folder: Path, timeout_s: float) -> "subprocess.CompletedProcess[str]":
    """Fill an empty folder with what pages take for granted."""
    for name in LINKS:
        (folder / name).symlink_to(ROOT / name)
    return execute(_PREPARE, folder, timeout_s)


if __name__ == "__main__":
    for path in pages():
        for block in blocks(path):
            if block.is_command:
                print(f"{block.name}: {f'not run: {block.reason}' if block.reason else 'run'}")
