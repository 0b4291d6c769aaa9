"""The Python API: each function used on a tiny model, and the signatures that stay."""

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from moetron import api
from moetron.data.prepare.options import Options
from moetron.data.prepare.preprocess import preprocess

TINY = "olmoe_1b_7b/tiny"
SIGNATURES = {
    "load_settings": "(recipe, *, world_size=None, **overrides)",
    "open_shard": "(prefix)",
    "open_stream": "(settings)",
    "build_model": "(settings)",
    "train": "(settings)",
    "load_run": "(folder)",
    "generate": (
        "(run, prompts, *, max_new_tokens=100, temperature=0.8, top_k=0, top_p=0.95, seed=0, "
        "mode='causal')"
    ),
    "analyze_routing": "(run, shards, *, tokens_per_class=16384, seq_length=None, layers=None)",
    "Run": "(folder, settings, step, consumed_samples, tokenizer, vocab_size, model, ranks)",
    "UserError": "",
}


def signature(name: str) -> str:
    """Parameters with their defaults, without annotations."""
    value = getattr(api, name)
    if inspect.isclass(value) and issubclass(value, Exception):
        return ""
    found = inspect.signature(value)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def test_signatures_stay() -> None:
    assert {name: signature(name) for name in api.__all__} == SIGNATURES


def test_the_import_loads_neither_torch_nor_matplotlib() -> None:
    program = (
        "import sys, moetron.api\n"
        "sys.exit(bool({'torch', 'megatron', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("shards")
    texts = {"prose": "The quick brown fox jumps. ", "code": "def f(x):\n    return x + 1\n"}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text * 200)
        preprocess(Options([str(folder / f"{name}.txt")], "bytes", str(folder / name)))
    return {name: str(folder / name) for name in texts}


@pytest.fixture(scope="module")
def settings(shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> api.Settings:
    return api.load_settings(
        TINY,
        **{"seq_length": 32, "train_iters": 3, "lr_warmup_iters": 0, "eval_iters": 1},
        **{"mock_data": False, "data_path": list(shards.values()), "tokenizer_model": "bytes"},
        valid_data_path=list(shards.values()),
        **{"save": tmp_path_factory.mktemp("run"), "tensorboard": False, "cpu_threads": 1},
        peak_tflops_per_s=1.0,
    )


@pytest.fixture(scope="module")
def rows(settings: api.Settings) -> list[dict]:
    return api.train(settings)


@pytest.fixture(scope="module")
def run(settings: api.Settings, rows: list[dict]) -> Iterator[api.Run]:
    assert rows
    with api.load_run(settings.checkpoint.save) as opened:
        yield opened


def test_an_evaluation_shorter_than_the_first_source_reads_all(
    settings: api.Settings, rows: list[dict]
) -> None:
    assert rows and settings.checkpoint.save is not None
    (line,) = (Path(settings.checkpoint.save) / "validation.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["tokens_evaluated"] == 16 * 32
    assert set(found["source_losses"]) == {"prose", "code"}


def test_settings_are_read_and_overridden() -> None:
    settings = api.load_settings(TINY, num_layers=4, moe_z_loss_coeff=None)
    assert (settings.model.num_layers, settings.model.hidden_size) == (4, 64)
    assert settings.moe.moe_z_loss_coeff is None


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(api.UserError) as error:
        api.load_settings(TINY, num_layer=2, lr=-1, moe_router_topk=17)
    for part in ("unknown setting num_layer; did you mean num_layers?", "--lr -1", "topk 17"):
        assert part in str(error.value)
    with pytest.raises(api.UserError, match=r"--config none/such.yaml: No such file"):
        api.load_settings("none/such.yaml")
    with pytest.raises(api.UserError, match=r"directory; did you mean olmoe_1b_7b/tiny\?"):
        api.load_settings("olmoe_1b_7b/tinny")


def test_a_layout_of_several_ranks_is_checked_but_not_built() -> None:
    with pytest.raises(api.UserError, match=r"1 rank\(s\) are not a multiple"):
        api.load_settings("olmoe_1b_7b")
    settings = api.load_settings("olmoe_1b_7b", world_size=64)
    with (
        pytest.raises(api.UserError, match="the layout needs"),
        api.build_model(settings),
    ):
        pass


def test_a_shard_is_opened(shards: dict[str, str]) -> None:
    shard = api.open_shard(shards["code"])
    assert len(shard) == 1 and shard.tokens.dtype == np.uint16
    assert shard.document(0).tolist() == shard.tokens.tolist()
    with pytest.raises(api.UserError, match="no such file"):
        api.open_shard(shards["code"] + "x")


def test_a_stream_gives_samples_by_number(settings: api.Settings) -> None:
    sample = api.open_stream(settings)[5]
    tokens, labels = sample["tokens"], sample["labels"]
    assert tokens.shape == labels.shape == sample["loss_mask"].shape == (32,)
    assert (tokens.dtype, labels.dtype) == (np.int64, np.int64)
    assert np.array_equal(tokens[1:], labels[:-1])


@pytest.mark.parametrize("flag", ["reset_attention_mask", "eod_mask_loss"])
def test_documents_without_ends_cannot_be_told_apart(
    settings: api.Settings, shards: dict[str, str], flag: str
) -> None:
    """Shards made without --append-eod: the flag changed nothing, without a word."""
    data = settings.data.model_copy(update={flag: True})
    with pytest.raises(api.UserError, match=f"--{flag.replace('_', '-')}: .*{shards['code']}"):
        api.open_stream(settings.model_copy(update={"data": data}))


def test_a_stream_without_data_is_refused() -> None:
    with pytest.raises(api.UserError, match="no data: give --data-path"):
        api.open_stream(api.load_settings(TINY, mock_data=False))


def test_a_model_is_built_and_its_rank_taken_down(settings: api.Settings) -> None:
    ids = torch.arange(64).view(2, 32)
    for _ in range(2):
        with api.build_model(settings) as model:
            logits = model(ids, torch.arange(32).expand(2, 32), None)
            assert logits.shape == (2, 32, 512)
            with pytest.raises(api.UserError, match="a model is open"):
                api.train(settings)
        assert not torch.distributed.is_initialized()


def test_training_returns_the_rows_of_the_metrics_file(
    settings: api.Settings, rows: list[dict]
) -> None:
    written = (Path(settings.checkpoint.save) / "metrics.jsonl").read_text().splitlines()
    assert rows == [json.loads(line) for line in written]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"]


def test_a_run_is_loaded(run: api.Run) -> None:
    assert (run.step, run.consumed_samples, run.vocab_size) == (3, 48, 512)
    assert run.tokenizer is not None and run.tokenizer.name == "bytes"


def test_prompts_are_continued(run: api.Run) -> None:
    prompts = ["The quick", "def f("]
    texts = api.generate(run, prompts, max_new_tokens=5, temperature=0)
    assert len(texts) == 2
    assert texts == api.generate(run, prompts, max_new_tokens=5, temperature=0)
    with pytest.raises(api.UserError, match="max_new_tokens 0"):
        api.generate(run, prompts, max_new_tokens=0)
    with pytest.raises(api.UserError, match="--top-p 0"):
        api.generate(run, prompts, top_p=0)


def test_routing_is_analysed(run: api.Run, shards: dict[str, str]) -> None:
    found = api.analyze_routing(run, shards, tokens_per_class=256)
    assert found["domains"] == ["prose", "code"] and found["step"] == 3
    assert np.array(found["load"]).shape == (2, 16)
    assert np.array(found["coactivation"]).shape == (2, 16, 16)
    assert np.allclose(np.mean(found["load"], axis=1), 1)
    json.dumps(found)
