"""Folders of HuggingFace's T5 and Switch: imported, exported, with equal logits and weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import load_file

from moetron.assembly import train
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.config.schema import derived
from moetron.moe.config.schema.experts import MoESettings
from moetron.moe.config.schema.settings import Settings
from moetron.moe.config.upcycling import UpcyclingSettings
from moetron.moe.convert.from_huggingface import from_hf
from moetron.moe.convert.to_huggingface import Export, to_hf
from moetron.moe.convert.upcycle import dense_folder, upcycle
from moetron.moe.inference.generation import load_model
from moetron.moe.layers.language_model import LanguageModel
from moetron.moe.training.runtime import Runtime
from tests.parallel.support.harness import model_parallel
from tests.unit.encoder_decoder.stack_cases import (
    DECODER,
    ENCODER,
    VOCABULARY,
    stack_batch,
    stack_settings,
    switch,
    t5,
)

IDS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
LIMIT = 1e-5


@contextmanager
def our_model(run: Path, settings: Settings | None = None) -> Iterator[LanguageModel]:
    found = checkpoint_folder.one_rank_settings(checkpoint_folder.read(run).record)
    with model_parallel():
        groups = ProcessGroupCollection.use_mpu_process_groups()
        ranks = Runtime(0, 1, torch.device("cpu"), groups)
        yield load_model(run, settings or found, VOCABULARY, ranks, limited=True)


def short(run: Path) -> Settings:
    """Return the settings of an imported run, with the lengths of `stack_batch`."""
    settings = checkpoint_folder.one_rank_settings(checkpoint_folder.read(run).record)
    model = settings.model.model_copy(update={"seq_length": ENCODER + DECODER})
    data = settings.data.model_copy(update={"encoder_seq_length": ENCODER})
    return settings.model_copy(update={"model": model, "data": data})


def both(tokens: torch.Tensor, ours: LanguageModel, theirs: Any) -> list[torch.Tensor]:
    inputs, targets = tokens.split([ENCODER, DECODER], dim=1)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=inputs, decoder_input_ids=targets).logits
        return [ours(tokens)[..., :VOCABULARY], expected]


@pytest.mark.parametrize("name", ["t5", "t5 tied", "switch"])
def test_import_computes_the_same_and_round_trips(tmp_path: Path, name: str) -> None:
    theirs = switch(expert_capacity=64) if name == "switch" else t5(tied=name == "t5 tied")
    theirs.save_pretrained(tmp_path / "hf")
    family, settings = from_hf(tmp_path / "hf", tmp_path / "run", None, None)
    assert family.architecture == type(theirs).__name__
    assert (settings.model.seq_length, settings.data.encoder_seq_length) == (626, 512)
    with our_model(tmp_path / "run", short(tmp_path / "run")) as ours:
        logits, expected = both(stack_batch()["tokens"], ours, theirs)
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() <= LIMIT * expected.abs().max()

    to_hf(tmp_path / "run", tmp_path / "back", Export(), VOCABULARY, IDS, {})
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert _same_logits(tmp_path / "back", expected)


def _same_logits(folder: Path, expected: torch.Tensor) -> bool:
    """Return whether transformers computes these logits from a folder that we wrote."""
    again, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    assert again.generation_config.decoder_start_token_id == IDS["pad_token_id"]
    inputs, targets = stack_batch()["tokens"].split([ENCODER, DECODER], dim=1)
    with torch.no_grad():
        found = again.eval()(input_ids=inputs, decoder_input_ids=targets).logits
    return bool((found - expected).abs().max() <= LIMIT * expected.abs().max())


def test_an_upcycled_t5_computes_the_same(tmp_path: Path) -> None:
    """Experts in the last of each two layers of both stacks, each a copy of the FFN."""
    theirs = t5(tied=False)
    theirs.save_pretrained(tmp_path / "hf")
    dense = dense_folder(tmp_path / "hf", None, None)
    moe = {"num_experts": 4, "moe_layer_freq": 2, "moe_layer_position": "last"}
    chosen = MoESettings.model_validate({**moe, "moe_router_topk": 2})
    settings = upcycle(dense, tmp_path / "run", chosen, UpcyclingSettings())
    assert derived.moe_layers(settings) == [False, True, False, True, False]
    assert "encoder_seq_length: 512" in (tmp_path / "run" / "model.yaml").read_text()
    with our_model(tmp_path / "run", short(tmp_path / "run")) as ours:
        logits, expected = both(stack_batch()["tokens"], ours, theirs)
    assert (logits - expected).abs().max() <= LIMIT * expected.abs().max()


@pytest.mark.parametrize("routed", [False, True])
def test_a_trained_run_is_exported(tmp_path: Path, routed: bool) -> None:
    """Its README says that the exported Switch drops no token."""
    model = {"num_layers": 6, "ffn_type": "relu"} if routed else {}
    moe = {
        "num_experts": 4,
        "moe_layer_freq": 2,
        "moe_layer_position": "last",
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_expert_capacity_factor": 8.0,
        "moe_input_jitter_eps": 1e-2,  # whose position in the checkpoint is no weight
    }
    settings = stack_settings(
        {**model, "untie_embeddings_and_output_weights": not routed},
        moe if routed else {},
        checkpoint={"save": str(tmp_path / "run")},
        logging={"tensorboard": False},
    )
    assert train(settings, None, VOCABULARY) == 0
    family = to_hf(tmp_path / "run", tmp_path / "hf", Export(), VOCABULARY, IDS, {})
    assert family.model_type == ("switch_transformers" if routed else "t5")
    with our_model(tmp_path / "run") as ours, torch.no_grad():
        expected = ours(stack_batch()["tokens"])[..., :VOCABULARY]
    assert _same_logits(tmp_path / "hf", expected)
    assert (tmp_path / "hf" / "README.md").exists() == routed
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["decoder_start_token_id"] == 0
    assert config["tie_word_embeddings"] == routed
