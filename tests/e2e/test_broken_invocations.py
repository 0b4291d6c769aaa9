"""Invalid commands: each exits with 2, one readable message and no traceback."""

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.run_folder import Record
from moetron.moe.config.schema.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
CPU_LIMIT_S = 10.0
"""Limit of processor time per command, since the machine may be busy."""
HANG_S = 120.0

RECIPE = {
    "model": {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 16},
    "moe": {"num_experts": 4, "moe_ffn_hidden_size": 8},
    "training": {"train_iters": 4, "micro_batch_size": 1, "global_batch_size": 4},
    "learning_rate": {"lr": 1e-3},
    "validation": {"eval_iters": 0},
}
TEXT = "To be, or not to be, that is the question. " * 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with recipes, texts, shards and checkpoints, some of them broken."""
    here = tmp_path_factory.mktemp("world")
    for name, content in _files().items():
        (here / name).write_text(content, encoding="utf-8")
    (here / "nothing").mkdir()
    code, message = run(
        here, f"{PREPROCESS} --input text.jsonl --tokenizer bytes --output-prefix ok"
    )
    assert code == 0, message
    _break_shards(here)
    for name in ("run", "torn"):
        _write_checkpoint(here / name)
    (here / "torn" / "step_0000003" / "data.distcp").write_bytes(b"12")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (here / "port").write_text(str(taken.getsockname()[1]))
        yield here


def _files() -> dict[str, str]:
    mock = {**RECIPE, "data": {"mock_data": True}}
    mock["model"] = {**RECIPE["model"], "vocab_size": 256}
    return {
        "good.yaml": yaml.safe_dump(mock),
        "data.yaml": yaml.safe_dump(RECIPE),
        "bad.yaml": "model: {num_layers: 2",
        "list.yaml": "- model\n- moe\n",
        "key.yaml": yaml.safe_dump({**mock, "moe": {"num_expert": 4}}),
        "parallel.yaml": yaml.safe_dump({**mock, "parallel": {"tensor_parallel": 2}}),
        "section.yaml": yaml.safe_dump({**mock, "modle": {"num_layers": 2}}),
        "twice.yaml": "model:\n  num_layers: 2\n  num_layers: 3\n",
        "dense.yaml": yaml.safe_dump({**mock, "moe": {}}),
        "flat.yaml": "num_layers: 2\n",
        "huggingface.yaml": yaml.safe_dump({**mock, "attention": {"num_key_value_heads": 2}}),
        "text.jsonl": json.dumps({"text": TEXT}) + "\n",
        "wrong_key.jsonl": json.dumps({"content": TEXT}) + "\n",
        "not_json.jsonl": "{'text': 1}\n" * 5,
        "empty.jsonl": "",
        "file": "a regular file",
        "junk.model": "junk",
        "junk.json": "{}",
    }


def _break_shards(here: Path) -> None:
    for name in ("no_idx", "cut", "bad_idx", "other", "foreign"):
        for end in (".bin", ".idx", ".json"):
            shutil.copy(here / f"ok{end}", here / f"{name}{end}")
    (here / "no_idx.idx").unlink()
    os.truncate(here / "cut.bin", 100)
    (here / "bad_idx.idx").write_bytes(b"not an index")
    manifest = json.loads((here / "other.json").read_text())
    manifest["tokenizer"]["fingerprint"] = "0" * 64
    (here / "other.json").write_text(json.dumps(manifest))
    manifest = json.loads((here / "ok.json").read_text())
    (here / "foreign.json").write_text(json.dumps({**manifest, "max_id": 400}))


def _write_checkpoint(run_folder: Path) -> None:
    """Write the parts of a checkpoint that are read before torch is imported."""
    recipe = yaml.safe_load(_files()["good.yaml"])
    folder = checkpoint_folder.step_folder(run_folder, 3)
    temporary = checkpoint_folder.prepare(folder)
    (temporary / "data.distcp").write_bytes(b"123")
    files = checkpoint_folder.file_sizes(temporary)
    settings = Settings.model_validate(recipe).model_dump(mode="json")
    record = Record(Progress(3, 12, 192), settings, {}, {}, {}, files)
    checkpoint_folder.write_record(temporary, record, {})
    checkpoint_folder.commit(folder, None)


def run(here: Path, command: str, **environment: str) -> tuple[int, str]:
    """Run a command; return its exit code and standard error."""
    program, *words = command.split()
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(
        [sys.executable, str(ROOT / program), *words],
        cwd=here,
        env=variables,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    return done.returncode, done.stderr


PRETRAIN = "pretrain_moe.py"
MOCK = f"{PRETRAIN} --config good.yaml"
DATA = f"{PRETRAIN} --config data.yaml --tokenizer-model bytes --data-path"
DRY = f"{MOCK} --dry-run --world-size"
PREPROCESS = "tools/preprocess_corpus.py"
TRAIN_TOKENIZER = "tools/train_tokenizer.py"
GENERATE = "tools/generate.py"
NGRAM = "tools/ngram_baseline.py"
CONVERT = "tools/convert_checkpoint.py"

BROKEN = {
    # recipes and flags
    f"{PRETRAIN}": "--num-layers is missing",
    f"{PRETRAIN} --config absent.yaml": "absent.yaml: No such file",
    f"{PRETRAIN} --config nothing": "nothing: Is a directory",
    f"{PRETRAIN} --config bad.yaml": "bad.yaml: line 1",
    f"{PRETRAIN} --config list.yaml": "must hold sections",
    f"{PRETRAIN} --config key.yaml": "`num_expert`.*did you mean num_experts",
    f"{PRETRAIN} --config section.yaml": "`modle:`.*did you mean model",
    f"{PRETRAIN} --config twice.yaml": "'num_layers' is given twice",
    f"{MOCK} --num-layer 2": "--num-layer.*did you mean --num-layers",
    f"{MOCK} --num-layers": "--num-layers",
    f"{MOCK} --num-layers many": "--num-layers many: must be integer",
    f"{MOCK} --lr -1": "--lr -1",
    f"{MOCK} --lr nan": "--lr nan",
    f"{MOCK} stray": "stray",
    f"{MOCK} --group-query-attention": "--num-query-groups alone groups the queries",
    f"{MOCK} --bf16 true --fp32 false": "--fp32 false: it turns off and takes no value",
    f"{MOCK} --lr abc --moe-router-topk 5": "--lr abc: must be.*--moe-router-topk 5 exceeds",
    f"{PRETRAIN} --config huggingface.yaml": "use `num_query_groups` under `model:`",
    f"{PRETRAIN} --config flat.yaml": "key `num_layers` belongs under `model:`, indented",
    # addresses
    f"{MOCK} --save s3://bucket/run": r"--save s3://bucket/run.*remote storage \(s3://\)",
    f"{MOCK} --load az://b/run --tensorboard-dir r2://b": "az://.*r2://",
    f"{PRETRAIN} --config hdfs://node/good.yaml": "--config hdfs://node/good.yaml: an address",
    f"{GENERATE} --load gs://bucket/run": r"--load: gs://bucket/run.*remote storage \(gs://\)",
    f"{PREPROCESS} --input https://host/t.jsonl --tokenizer bytes --output-prefix out": "https://",
    f"{NGRAM} --train-data-path ok --valid-data-path ok --seq-length 8 --output s3://b/o": "s3://b",
    f"{CONVERT} to-hf --load run --output s3://b/o": "--output: s3://b/o: an address",
    "tools/report.py file:///runs/a": "give the path alone, /runs/a",
    # combinations
    f"{DRY} 3 --tensor-model-parallel-size 3": "--tensor-model-parallel-size 3.*heads",
    f"{DRY} 3 --expert-model-parallel-size 3": "--expert-model-parallel-size 3",
    f"{DRY} 3 --tensor-model-parallel-size 2": r"3 rank\(s\) are not a multiple",
    f"{DRY} 3 --pipeline-model-parallel-size 3": "--pipeline-model-parallel-size 3",
    f"{DRY} 2 --rank 2": "--rank 2",
    f"{MOCK} --micro-batch-size 3": "--micro-batch-size 3",
    f"{MOCK} --moe-router-topk 5": "--moe-router-topk 5",
    f"{MOCK} --lr-warmup-iters 9": "--lr-warmup-iters 9",
    f"{MOCK} --finetune": "--finetune needs --load",
    f"{MOCK} --device cuda": "--device cuda",
    f"{PRETRAIN} --config dense.yaml --dry-run --world-size 2 --expert-model-parallel-size 2": (
        "--expert-model-parallel-size 2.*experts"
    ),
    # data
    f"{PRETRAIN} --config data.yaml": "no data",
    f"{DATA} absent": "no file absent.bin",
    f"{DATA} nothing": "nothing: a folder: give the prefix of a shard in it",
    f"{DATA} text.jsonl": "text.jsonl: not a token shard: make one with tools/preprocess_corpus",
    f"{DATA} no_idx": "no file no_idx.idx",
    f"{DATA} cut": "cut",
    f"{DATA} bad_idx": "bad_idx.idx",
    f"{DATA} other": "tokenizer",
    f"{DATA} foreign": r"token ids outside the vocabulary of \d+: foreign \(ids 0 to 400\)",
    f"{DATA} 0 ok": "weight '0' must be",
    f"{DATA} ok --seq-length 100000": "100000|100001",
    f"{DATA} ok --vocab-size 10": "--vocab-size 10",
    f"{PRETRAIN} --config data.yaml --data-path ok": "--tokenizer-model",
    f"{PRETRAIN} --config data.yaml --data-path ok --tokenizer-model absent": "absent",
    f"{PRETRAIN} --config data.yaml --data-path ok --tokenizer-model junk.model": "junk.model",
    f"{PRETRAIN} --config data.yaml --data-path ok --tokenizer-model junk.json": "junk.json",
    # folders
    f"{MOCK} --save file": "--save file is a file",
    f"{MOCK} --save file/run": "--save file/run: cannot write",
    f"{MOCK} --save run": "--save run: holds a run that reached step 3",
    f"{MOCK} --save-interval 2": "--save-interval 2 needs --save",
    f"{MOCK} --load absent": "--load absent",
    f"{MOCK} --load nothing": "--load nothing: holds no checkpoint",
    f"{MOCK} --load run --hidden-size 32": "--hidden-size 32: the checkpoint has 16",
    f"{MOCK} --load run --vocab-size 300": (
        r"--vocab-size 300.*\(384 rows.*checkpoint has 256 \(256 rows\).*--vocab-size 256"
    ),
    f"{MOCK} --load torn": "data.distcp has 2 bytes instead of 3",
    # tools
    f"{PREPROCESS} --input absent.jsonl --tokenizer bytes --output-prefix out": "absent.jsonl",
    f"{PREPROCESS} --input wrong_key.jsonl --tokenizer bytes --output-prefix out": (
        "no key 'text'; the row has content"
    ),
    f"{TRAIN_TOKENIZER} --input wrong_key.jsonl --output tok": "no key 'text'; the row has content",
    f"{PREPROCESS} --input text.jsonl --tokenizer bytes --output-prefix out.bin": "without .bin",
    f"{PREPROCESS} --input not_json.jsonl --tokenizer bytes --output-prefix out": "not_json",
    f"{PREPROCESS} --input empty.jsonl --tokenizer bytes --output-prefix out": "empty|no doc",
    f"{PREPROCESS} --input text.jsonl --tokenizer junk.model --output-prefix out": "junk.model",
    f"{PREPROCESS} --input text.jsonl --tokenizer bytes --output-prefix file/out": "file",
    f"{PREPROCESS} --input text.jsonl": "--tokenizer",
    f"{TRAIN_TOKENIZER} --input absent.jsonl --output tok": "absent.jsonl",
    f"{TRAIN_TOKENIZER} --input empty.jsonl --output tok": "empty|no text",
    f"{TRAIN_TOKENIZER} --input text.jsonl --output tok --vocab-size 100000": "vocab",
    f"{TRAIN_TOKENIZER} --input text.jsonl --output tok --vocab-size 10": "vocab",
    f"{GENERATE} --load absent": "absent: no such folder",
    f"{GENERATE} --load nothing": "nothing: holds no checkpoint",
    f"{GENERATE} --load run --temperature -1": "temperature",
    "tools/inspect_data.py absent": "absent",
    "tools/upcycle.py --load run --output up --num-experts 2 --router-init-std -1": (
        "--router-init-std -1.0: Input should be greater than 0\n"
    ),
    "tools/check_parity.py --config good.yaml --layouts ep2 --load absent": (
        "--load absent: no such folder"
    ),
    "tools/plan.py parallel.yaml": "`tensor_parallel` under `parallel:`",
    "tools/plan.py good.yaml --world-size 0": "--world-size 0: must be an integer >= 1",
    "tools/inspect_data.py cut": "cut",
    f"{NGRAM} --train-data-path ok --valid-data-path absent --seq-length 8": "absent",
}


@pytest.mark.parametrize("command", BROKEN)
def test_an_invalid_command_reports_the_reason(world: Path, command: str) -> None:
    code, message = _timed(world, command)
    assert code == 2, message
    assert re.search(BROKEN[command], message, re.DOTALL), message
    assert "Traceback" not in message
    assert 0 < len(message.splitlines()) < 20, message


def test_a_port_in_use(world: Path) -> None:
    port = (world / "port").read_text()
    rank = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    code, message = _timed(world, MOCK, **rank)
    assert code == 2, message
    assert f"MASTER_PORT={port}: another program" in message
    assert "Traceback" not in message


def test_shards_are_named_by_prefix_file_or_shard_set(world: Path) -> None:
    """As completed by a shell, and as written by --shard-size-tokens."""
    code, message = run(
        world,
        f"{PREPROCESS} --input text.jsonl --tokenizer bytes --output-prefix split "
        "--shard-size-tokens 100",
    )
    assert code == 0, message
    for words in ("ok.bin", "ok.bin ok.idx", "split"):
        code, message = run(world, f"{DATA} {words} --train-iters 1 --no-tensorboard --bf16 false")
        assert code == 0, message


def test_a_loss_that_is_not_finite_names_the_step(world: Path) -> None:
    code, message = run(world, f"{MOCK} --lr 1e30 --clip-grad 0 --no-tensorboard")
    assert code == 1, message
    assert re.search(
        r"(?m)^rank 0: NotFiniteError: lm_loss is .*norm nan \(of rank 0\) in step \d; checkpoints",
        message,
    )
    assert "Traceback" not in message


def _timed(world: Path, command: str, **environment: str) -> tuple[int, str]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    outcome = run(world, command, **environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_LIMIT_S
    return outcome
