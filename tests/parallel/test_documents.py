"""Training with documents that do not see each other: layouts, recomputation, packing, padding.

Samples of `PackedStream` hold documents of several lengths, one of a token, and padding.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetron.data.stream.mock_stream import MockStream
from moetron.moe.verify.parity import compare
from tests.parallel.support.parity_cases import settings, tolerance
from tests.parallel.support.parity_ranks import PackedStream, Run, results_of
from tests.parallel.support.parity_suite import Suite

DOCUMENTS: dict[str, Any] = {"reset_attention_mask": True, "reset_position_ids": True}
STEPS = 2


def test_layouts_equal_one_process(tmp_path: Path) -> None:
    """Losses, gradients and auxiliary losses; padding is in the routers' counts of no layout."""
    suite = Suite(tmp_path, STEPS, changes=DOCUMENTS)
    assert not suite.differences("dropless", ("tp2", "pp2vpp2", "ep2", "cp2ep2"))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"mtp_num_layers": 1, "moe_layer_freq": [1, 1]}, id="mtp"),
        pytest.param({"moe_expert_capacity_factor": 1.25}, id="capacity"),
        pytest.param(
            {
                "moe_router_score_function": "sigmoid",
                "moe_router_pre_softmax": False,
                "moe_router_enable_expert_bias": True,
                "moe_aux_loss_coeff": 0.0,
            },
            id="bias",
        ),
    ],
)
def test_features_equal_one_process(tmp_path: Path, changes: dict[str, Any]) -> None:
    suite = Suite(tmp_path, STEPS, changes={**DOCUMENTS, **changes})
    assert not suite.differences("dropless", ("cp2", "tp2"))


def test_recomputation_changes_nothing(tmp_path: Path) -> None:
    """The documents of a micro-batch reach its second forward pass, after those of others."""
    full = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    runs = {
        name: Run(settings("pp2", 2, **DOCUMENTS, **changes), str(tmp_path), write=not changes)
        for name, changes in (("plain", {}), ("recomputed", full))
    }
    (_, plain, _), (_, recomputed, _) = results_of(runs, 2, STEPS)
    assert compare(plain, recomputed).within(tolerance("dp1"))


class OtherPadding(PackedStream):
    """The same samples with other ids in their padding."""

    def __getitem__(self, n: int) -> dict[str, Any]:
        sample = super().__getitem__(n)
        padded = slice(self.seq_length - sample["padding"], None)
        ids = {name: sample[name].copy() for name in ("tokens", "labels")}
        for each in ids.values():
            each[padded] = (each[padded] + 7) % self.vocab_size
        return {**sample, **ids}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="losses"),
        pytest.param({"moe_expert_capacity_factor": 1.0}, id="slots"),
        pytest.param({"moe_router_type": "hash", "moe_aux_loss_coeff": 0.0}, id="hash"),
    ],
)
def test_content_of_padding_changes_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Neither losses, balance loss, z-loss and gradients, nor what is dropped."""
    hashed = (
        {"moe_router_pre_softmax": False, "moe_z_loss_coeff": None} if len(changes) == 2 else {}
    )
    chosen = settings("dp1", 2, **DOCUMENTS, **changes, **hashed)
    runs = {
        kind.__name__: Run(chosen, str(tmp_path), write=kind is PackedStream, samples=kind)
        for kind in (PackedStream, OtherPadding)
    }
    (_, one, expected), (_, other, rows) = results_of(runs, 1, STEPS)
    assert compare(one, other).within(tolerance("dp1"))
    assert rows == [pytest.approx(row, rel=1e-6) for row in expected]


class Documents(MockStream):
    """Documents of 5 and 9 tokens: the first two of ``packed`` samples, or one in each sample."""

    packed = True

    def __getitem__(self, n: int) -> dict[str, Any]:
        if not self.packed:
            sample = super().__getitem__(n // 2)
            return {**sample, **self._part(sample, 5 * (n % 2), (5, 9)[n % 2])}
        sample = super().__getitem__(n)
        sample["loss_mask"][[4, 13, 14, 15]] = 0  # the ends of documents, and padding
        return {**sample, "documents": np.array([5, 9, 2]), "padding": 2}

    def _part(self, sample: dict[str, Any], first: int, count: int) -> dict[str, Any]:
        """Return the fields of one document, moved to the start of a sample."""
        moved = {name: np.roll(sample[name], -first) for name in ("tokens", "labels")}
        mask = (np.arange(self.seq_length) < count - 1).astype(np.float32)
        rest = self.seq_length - count
        return {**moved, "loss_mask": mask, "documents": np.array([count, rest]), "padding": rest}


class Unpacked(Documents):
    packed = False


@pytest.mark.parametrize("mtp", [None, 1])
def test_packed_equals_unpacked(tmp_path: Path, mtp: int | None) -> None:
    """The same documents, two in a sample or one: equal losses and gradients.

    So documents see nothing of each other, nor of padding, and multi-token prediction does not
    cross them. The number of tokens that a balance loss or z-loss averages over differs.
    """
    off = {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": None}
    frequency = {"moe_layer_freq": [1, 1]} if mtp else {}
    results = []
    for kind, samples in ((Documents, 8), (Unpacked, 16)):
        chosen = settings(
            "dp1", 2, **DOCUMENTS, **off, **frequency, mtp_num_layers=mtp, global_batch_size=samples
        )
        run = Run(chosen, str(tmp_path), write=kind is Documents, samples=kind)
        ((_, result, rows),) = results_of({"one": run}, 1, 1)
        results.append(result)
        assert rows[0]["loss_tokens"] == 8 * (4 + 8)
    assert compare(*results).within(tolerance("dp1"))
