"""Ways to make a run's folder hostile, each a function of its step folder."""

import io
import json
import os
import pickle
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from tests.fuzz.mutations import BOMB, DIGITS
from tests.unit.checkpoint.hostile_pickles import hostile

Change = Callable[[Path], None]
WEIGHT = "embedding.word_embeddings.weight"
HUGE = 1 << 60


def _pickle(content: bytes, step: Path) -> None:
    (step / ".metadata").write_bytes(content)


def _index(change: Callable[[Metadata], Any]) -> Change:
    """Return a change of the index by its own classes."""

    def edit(step: Path) -> None:
        index = pickle.loads((step / ".metadata").read_bytes())  # noqa: S301 - torch wrote it
        change(index)
        (step / ".metadata").write_bytes(pickle.dumps(index))

    return edit


def _objects(index: Metadata) -> None:
    for name in ("optimizer.step", "rng.torch", WEIGHT):
        index.state_dict_metadata[name] = BytesStorageMetadata()


def _layer_state(index: Metadata) -> None:
    index.state_dict_metadata[f"{WEIGHT}/shard_0"] = BytesStorageMetadata()


def _leads(name: str) -> Callable[[Metadata], None]:
    def change(index: Metadata) -> None:
        for info in index.storage_data.values():
            info.relative_path = name

    return change


def _places(field: str, value: Any) -> Callable[[Metadata], None]:
    def change(index: Metadata) -> None:
        for info in index.storage_data.values():
            setattr(info, field, value)

    return change


def _sized(size: tuple[int, ...], parts: bool) -> Callable[[Metadata], None]:
    def change(index: Metadata) -> None:
        entry = index.state_dict_metadata[WEIGHT]
        entry.size = torch.Size(size)
        if parts:
            object.__setattr__(entry.chunks[0], "sizes", entry.size)

    return change


def _nested(index: Metadata) -> None:
    """Put a tuple that has 2^60 ends when it is written out in place of a number."""
    bomb: Any = ()
    for _ in range(60):
        bomb = (bomb, bomb)
    for info in index.storage_data.values():
        info.offset = bomb


def _transformed(index: Metadata) -> None:
    for info in index.storage_data.values():
        info.transform_descriptors = ["x"]


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def _data(archive: bool, step: Path) -> None:
    """Put a pickle that runs code in place of every tensor, of the same size."""
    for path in step.glob("*.distcp"):
        made = io.BytesIO()
        if archive:
            torch.save(_Runs(), made)
        else:
            made.write(pickle.dumps(_Runs()))
        content = bytearray(path.read_bytes())
        index = pickle.loads((step / ".metadata").read_bytes())  # noqa: S301 - torch wrote it
        for info in index.storage_data.values():
            if info.relative_path == path.name and info.length >= made.tell():
                content[info.offset : info.offset + made.tell()] = made.getvalue()
        path.write_bytes(content)


def _record(change: Callable[[dict[str, Any]], Any]) -> Change:
    def edit(step: Path) -> None:
        tree = json.loads((step / "run.json").read_text())
        change(tree)
        (step / "run.json").write_text(json.dumps(tree))

    return edit


def _text(file: str, content: str, step: Path) -> None:
    (step / file).write_text(content)


def _replaced(file: str, make: Callable[[Path], None], step: Path) -> None:
    path = step / file
    path.unlink()
    make(path)


def _outside(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _common(step: Path) -> None:
    (step / "common.pt").write_bytes(pickle.dumps(_Runs()))


SPECIAL = (".metadata", "run.json", "SHA256SUMS", "../latest", "__0_0.distcp")
"""Files that are replaced by FIFOs, devices and links."""
UNSEALED: dict[str, Change] = {
    **{f"FIFO in place of {file}": partial(_replaced, file, os.mkfifo) for file in SPECIAL},
    **{f"/dev/zero in place of {file}": partial(_replaced, file, _endless) for file in SPECIAL},
    **{f"link out in place of {file}": partial(_replaced, file, _outside) for file in SPECIAL},
    "sums of the wrong form": partial(_text, "SHA256SUMS", "x\n"),
    "latest outside": partial(_text, "../latest", "../../etc\n"),
    "latest, absolute": partial(_text, "../latest", "/etc\n"),
}
"""Changes after which no sums are written."""
RECORDS: dict[str, Change] = {
    "run.json nested deeply": partial(_text, "run.json", '{"format": 1, "settings": ' + BOMB),
    "run.json of long integers": partial(_text, "run.json", '{"format": ' + DIGITS + "}"),
    "run.json, a list": partial(_text, "run.json", "[]"),
    "step is text": _record(lambda tree: tree["progress"].update(step="2")),
    "settings are a list": _record(lambda tree: tree.update(settings=[1])),
    "an unknown field": _record(lambda tree: tree.update(code="os.system('touch pwned')")),
    "2^60 layers": _record(lambda tree: tree["settings"]["model"].update(num_layers=HUGE)),
}
"""Changes of run.json, which the report reads too."""
SEALED: dict[str, Change] = {
    **{f"pickle: {kind}": partial(_pickle, content) for kind, content in hostile().items()},
    "objects in place of tensors": _index(_objects),
    "a layer's state elsewhere": _index(_layer_state),
    "file ../../x": _index(_leads("../../x")),
    "file /etc/hostname": _index(_leads("/etc/hostname")),
    "file a/../../x": _index(_leads("a/../../x")),
    "file with a NUL": _index(_leads("a\0b")),
    "file of the record": _index(_leads("run.json")),
    "2^60 elements": _index(_sized((HUGE,), parts=False)),
    "2^60 elements in one part": _index(_sized((HUGE,), parts=True)),
    "a size that overflows": _index(_sized((1 << 62, 1 << 62), parts=False)),
    "shared bytes": _index(_places("offset", 0)),
    "beyond the end": _index(_places("length", HUGE)),
    "negative place": _index(_places("offset", -1)),
    "memo bomb": _index(_nested),
    "transformed parts": _index(_transformed),
    "files lead out": _record(lambda tree: tree["files"].update({"../x": 1})),
    "files, absolute": _record(lambda tree: tree["files"].update({"/etc/hostname": 1})),
}
"""Changes of the index or of the list of files, which commands that read tensors refuse."""
DATA: dict[str, Change] = {
    "pickles in place of tensors": partial(_data, False),
    "archives in place of tensors": partial(_data, True),
}
"""Changes of tensors, which commands that read their values refuse."""
UNREAD: dict[str, Change] = {
    "common.pt": _common,
    "alias bomb in settings.yaml": partial(
        _text,
        "settings.yaml",
        "a: &a [x, x]\n"
        + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise(ascii_lowercase)),
    ),
}
"""Changes of files that nothing reads."""
KINDS = {**SEALED, **DATA, **RECORDS, **UNSEALED, **UNREAD}
