"""Import and export of transformers folders with equal logits and weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import load_file, save_file

from moetron.common.errors import UserError
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.convert.from_huggingface import from_hf
from moetron.moe.convert.to_huggingface import Export, to_hf
from moetron.moe.inference.generation import load_model
from moetron.moe.training.runtime import Runtime
from tests.parallel.support import checkpoint_runs
from tests.parallel.support.harness import model_parallel

pytest.importorskip("transformers")
from tests.unit.convert import hf_models

NO_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
VOCABULARY, LENGTH = hf_models.SIZES["vocab_size"], 16


@contextmanager
def our_model(run: Path) -> Iterator[GPTModel]:
    settings = checkpoint_folder.one_rank_settings(checkpoint_folder.read(run).record)
    assert settings.model.vocab_size is not None
    with model_parallel():
        groups = ProcessGroupCollection.use_mpu_process_groups()
        runtime = Runtime(0, 1, torch.device("cpu"), groups)
        yield load_model(run, settings, settings.model.vocab_size, runtime)


def sequences() -> torch.Tensor:
    """Return tokens [1000, LENGTH]: half random, half bytes of this repository's texts."""
    generator = torch.Generator().manual_seed(3)
    random = torch.randint(VOCABULARY, (500, LENGTH), generator=generator)
    texts = sorted(Path(__file__).resolve().parents[3].glob("*.md"))
    content = b"".join(path.read_bytes() for path in texts)[: 500 * LENGTH]
    real = torch.tensor(list(content)).view(500, LENGTH)
    return torch.cat([random, real])


def logits_and_loss(model: GPTModel, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(LENGTH)[None].expand_as(tokens)
    with torch.no_grad():
        logits = model(tokens, positions, None)
        losses = model(tokens[:, :-1], positions[:, :-1], None, labels=tokens[:, 1:])
    return logits[..., :VOCABULARY], losses.double().mean()


def export(run: Path, output: Path, **options: Any) -> None:
    to_hf(run, output, Export(**options), VOCABULARY, NO_IDS, {})


@pytest.mark.parametrize("model_type", hf_models.OF_FAMILY)
def test_import_computes_the_same_and_round_trips(tmp_path: Path, model_type: str) -> None:
    theirs = hf_models.saved(tmp_path / "hf", model_type)
    family, _ = from_hf(tmp_path / "hf", tmp_path / "run", None, None)
    assert family.model_type == model_type
    tokens = sequences()
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert expected.std() > 0.1
    with our_model(tmp_path / "run") as model:
        logits, loss = logits_and_loss(model, tokens)
    assert (logits - expected).abs().max() <= 1e-5
    # In fp64: 15,000 losses summed in fp32 differ by more than the models do.
    theirs_fp64 = expected[:, :-1].flatten(0, 1).double()
    expected_loss = F.cross_entropy(theirs_fp64, tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-6)

    export(tmp_path / "run", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Weights are bit-identical; another batch size may sum in another order.
    with torch.no_grad():
        again = hf_models.loaded(tmp_path / "back")(tokens[:50]).logits
    assert (again - expected[:50]).abs().max() <= 1e-5


@pytest.mark.parametrize("model_type", hf_models.OF_FAMILY)
def test_generation_is_the_same_with_and_without_cache(model_type: str) -> None:
    """Also for our own model class, whichever name transformers gives the cache."""
    model = hf_models.build(model_type)
    prompt = torch.arange(3, 13)[None]
    cached, plain = (
        model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=use, pad_token_id=0)
        for use in (True, False)
    )
    assert cached.shape[1] > prompt.shape[1]
    assert torch.equal(cached, plain)


def test_multi_token_prediction_is_not_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = checkpoint_runs.settings(
        "dp",
        model={"mtp_num_layers": 1},
        training={"train_iters": 1},
        checkpoint={"save": str(tmp_path / "run")},
    )
    with checkpoint_runs.parallel_of(chosen):
        checkpoint_runs.start(chosen).run(lambda: False)
    to_hf(tmp_path / "run", tmp_path / "hf", Export(), checkpoint_runs.VOCABULARY, NO_IDS, {})
    for text in (caplog.text, (tmp_path / "hf" / "README.md").read_text()):
        assert "Multi-token prediction modules are not exported (1, in " in text
        assert "bidirectional" not in text and "capacity" not in text
    tokens = sequences()[:10] % checkpoint_runs.VOCABULARY
    with our_model(tmp_path / "run") as model, torch.no_grad():
        positions = torch.arange(LENGTH)[None].expand_as(tokens)
        ours = model(tokens, positions, None)[..., : checkpoint_runs.VOCABULARY]
        assert (hf_models.loaded(tmp_path / "hf")(tokens).logits - ours).abs().max() <= 1e-5


def test_differences_from_training_are_refused_or_documented(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = checkpoint_runs.settings(
        "dp",
        data={"bidirectional_prefix": True},
        moe={"moe_expert_capacity_factor": 1.25, "moe_eval_capacity_factor": 2.0},
        training={"train_iters": 1},
        checkpoint={"save": str(tmp_path / "run")},
    )
    with checkpoint_runs.parallel_of(chosen):
        checkpoint_runs.start(chosen).run(lambda: False)
    arguments = (checkpoint_runs.VOCABULARY, NO_IDS, {})
    with pytest.raises(UserError, match=r"--bidirectional-prefix: .* --as-causal exports"):
        to_hf(tmp_path / "run", tmp_path / "hf", Export(), *arguments)
    assert not (tmp_path / "hf").exists()
    to_hf(tmp_path / "run", tmp_path / "hf", Export(as_causal=True), *arguments)
    for text in (caplog.text, (tmp_path / "hf" / "README.md").read_text()):
        assert "Trained with --bidirectional-prefix" in text
        assert "--moe-expert-capacity-factor 1.25 (in evaluation 2)" in text
        assert "ulti-token" not in text
    assert "after step 1 (64 tokens)" in (tmp_path / "hf" / "README.md").read_text()


def test_a_wrong_vocabulary_size_is_refused(tmp_path: Path) -> None:
    """Otherwise a row would be lost or missing silently."""
    hf_models.saved(tmp_path / "hf", "olmoe")
    from_hf(tmp_path / "hf", tmp_path / "run", None, None)
    for ids in (VOCABULARY - 1, VOCABULARY + 1):
        with pytest.raises(UserError, match=f"--vocab-size {ids}, .*checkpoint has {VOCABULARY}"):
            to_hf(tmp_path / "run", tmp_path / "back", Export(), ids, NO_IDS, {})
    export(tmp_path / "run", tmp_path / "back")
    assert not (tmp_path / "back" / "README.md").exists(), "nothing differs"


def test_deepseeks_prediction_layers_are_left_out_as_its_key_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "hf"
    hf_models.saved(folder, "deepseek_v3")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {**weights, "model.layers.3.enorm.weight": torch.ones(32)}, folder / "model.safetensors"
    )
    config = json.loads((folder / "config.json").read_text())
    for layers in (0, 1):
        (folder / "config.json").write_text(
            json.dumps({**config, "num_nextn_predict_layers": layers})
        )
        if layers:
            from_hf(folder, tmp_path / "run", None, None)
        else:
            with pytest.raises(UserError, match=r"1 tensors have no place in .*layers\.3\.enorm"):
                from_hf(folder, tmp_path / "run", None, None)
    assert "left out: model.layers.3." in caplog.text


def test_a_tokenizer_that_encodes_differently_is_not_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf_models.saved(tmp_path / "hf", "olmoe")
    from_hf(tmp_path / "hf", tmp_path / "run", None, None)
    files, looked_at = {"tokenizer.json": b"{}"}, []

    def check(folder: Path) -> str | None:
        looked_at.append({path.name for path in folder.iterdir()})
        return None if len(looked_at) == 1 else "other ids"

    for name in ("kept", "left"):
        arguments = (tmp_path / name, Export(), VOCABULARY, NO_IDS, files, check)
        to_hf(tmp_path / "run", *arguments)
    assert looked_at[0] == looked_at[1] >= {"tokenizer.json", "config.json"}
    assert (tmp_path / "kept" / "tokenizer.json").is_file()
    assert not (tmp_path / "left" / "tokenizer.json").exists()
    assert "without a tokenizer: other ids" in caplog.text
