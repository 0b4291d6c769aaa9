"""Fine-tuning on chats: every layout, batching and packing against one process."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moetron.data.chat.chat_stream import ChatStream, Normalisation, open_chats
from moetron.moe.verify.parity import Result, Tolerance, compare
from tests.parallel.support.parity_cases import settings
from tests.parallel.support.parity_ranks import Run, results_of
from tests.parallel.support.parity_suite import Suite
from tests.unit.data.chat.chat_cases import TOKENIZER, chat, prepare

S = 112
CHATS = [chat("ab" * (n % 5), "yes" * (1 + n % 4), *["no"] * (n % 3 == 0)) for n in range(16)]
SFT: dict[str, Any] = {
    "sft": True,
    "mock_data": False,
    "data_path": ["chats"],
    "tokenizer_model": "bytes",
    "seq_length": S,
    "vocab_size": TOKENIZER.vocab_size,
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": None,
}
BAR = Tolerance(loss=1e-6, grad_norm=1e-5, gradient=1e-5)


def _open(
    prefix: str, packed: bool, normalisation: Normalisation, seed: int, _: int, length: int
) -> ChatStream:
    known = TOKENIZER.fingerprint
    return open_chats([prefix], length, known, TOKENIZER.pad, seed, packed, normalisation)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("chats")
    assert prepare(folder, CHATS, length=S).counts["used"] == len(CHATS)
    return str(folder / "chats")


@pytest.mark.parametrize("normalisation", ["token", "sample"])
def test_layouts_equal_one_process(
    tmp_path: Path, prefix: str, normalisation: Normalisation
) -> None:
    changes = {**SFT, "sft_loss_normalisation": normalisation}
    samples = partial(_open, prefix, True, normalisation)
    layouts = ("ep2", "tp2", "pp2", "cp2") if normalisation == "token" else ("cp2", "dp2")
    assert not Suite(tmp_path, 2, changes=changes, samples=samples).differences("dropless", layouts)


@pytest.mark.parametrize("normalisation", ["token", "sample"])
def test_batching_and_packing_change_nothing(
    tmp_path: Path, prefix: str, normalisation: Normalisation
) -> None:
    """One epoch as a global batch: micro-batches of 1 and more, packed and not, other lengths."""
    rows = _open(prefix, True, normalisation, 0, 0, S).rows_per_epoch
    assert rows % 2 == 0 and rows < len(CHATS)
    cases = {
        "packed": (rows, 1, True, S),
        "packed, two at once": (rows, 2, True, S),
        "unpacked": (len(CHATS), 1, False, S),
        "unpacked, four at once": (len(CHATS), 4, False, S),
        "all in one sample": (1, 1, True, 16 * S),
    }
    runs = {}
    for name, (samples, micro, packed, length) in cases.items():
        chosen = settings(
            "dp1",
            2,
            **{
                **SFT,
                "sft_loss_normalisation": normalisation,
                "sft_packing": packed,
                "global_batch_size": samples,
                "micro_batch_size": micro,
                "seq_length": length,
            },
        )
        stream = partial(_open, prefix, packed, normalisation)
        runs[name] = Run(chosen, str(tmp_path), name == "packed", stream)
    results = {name: result for name, result, _ in results_of(runs, 1, 1)}
    first: Result = results.pop("packed")
    for name, result in results.items():
        difference = compare(first, result)
        assert difference.within(BAR), (name, difference)
