"""Runs of a tiny model in the real loop, for tests of checkpoints."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import distributed_c10d

from moetron.data.stream.mock_stream import MockStream
from moetron.moe.checkpoint.random_states import seed_generators
from moetron.moe.checkpoint.save_load import save_checkpoint
from moetron.moe.checkpoint.writer.writer_process import WriterProcess
from moetron.moe.config.schema.pipeline_split import virtual_pipeline_size
from moetron.moe.config.schema.settings import Settings
from moetron.moe.monitoring.sinks import MACHINE_METRICS
from moetron.moe.training.build_trainer import build_loop, build_trainer
from moetron.moe.training.loop import Loop
from moetron.moe.training.runtime import Runtime
from moetron.moe.training.sample_stream import Streams
from tests.parallel.support.harness import model_parallel

VOCABULARY = 96
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {},
    "zero": {"use_distributed_optimizer": True},
    "ep2": {"expert_model_parallel_size": 2},
    "ep2_zero": {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_etp1": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2vpp2": {
        "pipeline_model_parallel_size": 2,
        "num_layers_per_virtual_pipeline_stage": 1,
    },
    "pp2uneven": {
        "pipeline_model_parallel_size": 2,
        "decoder_first_pipeline_num_layers": 1,
    },
    "cp2": {"context_parallel_size": 2},
    "ep2etp2": {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "tp2ep2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "pp2ep2": {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
}

Groups = dict[str, dict[str, Any]]


def settings(layout: str, **groups: dict[str, Any]) -> Settings:
    """Return settings: two layers, four experts, dropout (random states matter), six steps."""
    tree: Groups = {
        "model": {
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "seq_length": 16,
            "vocab_size": VOCABULARY,
            "make_vocab_size_divisible_by": 8,
            "hidden_dropout": 0.1,
        },
        "moe": {"num_experts": 4, "moe_ffn_hidden_size": 24, "moe_aux_loss_coeff": 0.01},
        "parallel": LAYOUTS[layout],
        "training": {"train_iters": 6, "micro_batch_size": 1, "global_batch_size": 4},
        "learning_rate": {"lr": 1e-2, "lr_warmup_iters": 2},
        "data": {"mock_data": True},
        "validation": {"eval_iters": 0},
        "logging": {"tensorboard": False, "peak_tflops_per_s": 1.0},
    }
    for group, fields in groups.items():
        tree[group] = {**tree.get(group, {}), **fields}
    return Settings.model_validate(tree)


def start(chosen: Settings) -> Loop:
    """Return the loop of a run on this rank; call it inside ``parallel_of(chosen)``."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # A run starts its writer before its groups: this one forgets those of the test.
    with patch.object(distributed_c10d, "_world", distributed_c10d._World()):
        writer = WriterProcess() if chosen.checkpoint.async_save else None
    runtime = Runtime(rank, ranks, torch.device("cpu"), groups, writer)
    seed_generators(chosen.training.seed)
    stream = MockStream(chosen.training.seed, VOCABULARY, chosen.model.seq_length)
    validation = stream if chosen.validation.eval_iters else None
    return build_loop(build_trainer(chosen, runtime, VOCABULARY), Streams(stream, validation))


def parallel_of(chosen: Settings) -> Any:
    """Return megatron's parallel state for these settings."""
    parallel = chosen.parallel
    return model_parallel(
        chosen.training.seed,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size(chosen),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
    )


def run(chosen: Settings) -> None:
    """Train with the settings, from --load if set; save to --save."""
    with parallel_of(chosen):
        start(chosen).run(lambda: False)


def write(folder: str, layout: str, groups: Groups) -> None:
    """Train, saving every second step."""
    run(settings(layout, **groups, checkpoint={"save": folder, "save_interval": 2}))


def read_and_go_on(source: str, folder: str, layout: str, groups: Groups) -> None:
    """Save the loaded state unchanged, then continue training."""
    chosen = settings(layout, **groups, checkpoint={"load": source, "save": folder})
    with parallel_of(chosen):
        loop = start(chosen)
        trainer, stream = loop.trainer, loop.streams.training
        save_checkpoint(
            Path(folder), loop.progress, trainer.chunks, trainer.optimizer, chosen, stream.state()
        )
        loop.run(lambda: False)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run without machine metrics; floats compare to the last bit."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{name: row[name] for name in row if name not in MACHINE_METRICS} for row in rows]


def assert_identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Assert equal tensors, including moments, to the last bit."""
    assert one.keys() == other.keys()
    assert any(".exp_avg" in key for key in one)
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert torch.equal(tensor, other[key]), key


def tensors(folder: Path, states: bool = False) -> dict[str, torch.Tensor]:
    """Read every global tensor of a step folder; random-number ``states`` only if asked for."""
    reader = dcp.FileSystemReader(folder)
    index = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in index.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
        and (states or not key.startswith("rng."))
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state
