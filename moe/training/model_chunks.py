"""The model's chunks on this rank, wrapped for training by megatron-core's schedules."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import unwrap_model

from moetron.moe.config.bridge import ModelConfig, ddp_config
from moetron.moe.config.schema.derived import separates_documents
from moetron.moe.config.schema.settings import Settings
from moetron.moe.encoder_decoder.build_stacks import build
from moetron.moe.encoder_decoder.relative_bias import finalize_stack_gradients
from moetron.moe.routing.expert_bias import finalize_gradients
from moetron.moe.training.runtime import Runtime

ModelChunks = list[DistributedDataParallel]
"""One chunk for each virtual pipeline stage of this rank; a single one without interleaving."""


def build_chunks(
    settings: Settings, config: ModelConfig, vocab_size: int, runtime: Runtime
) -> ModelChunks:
    """Build this rank's chunks, broadcast their parameters and register them with the schedules.

    Sets the callbacks of megatron-core's schedules on ``config``.
    """
    virtual_size = config.virtual_pipeline_model_parallel_size
    chunks = []
    for index in range(virtual_size or 1):
        first = is_pp_first_stage(runtime.groups.pp) and index == 0
        last = is_pp_last_stage(runtime.groups.pp) and index == (virtual_size or 1) - 1
        vp_stage = None if virtual_size is None else index
        module = build(settings, config, vocab_size, first, last, vp_stage)
        module.to(runtime.device)
        with _gradient_stream(settings, runtime.device):
            chunks.append(
                DistributedDataParallel(
                    config=config,
                    ddp_config=ddp_config(settings),
                    module=Float16Module(config, module) if settings.precision.bf16 else module,
                    disable_bucketing=index > 0,
                    pg_collection=runtime.groups,
                )
            )
    for chunk in chunks:
        # Broadcast over the data-parallel group (experts: theirs) from its first rank: replicas
        # must start equal.
        chunk.broadcast_params()
    _set_schedule_callbacks(chunks, config, settings)
    return chunks


@contextmanager
def _gradient_stream(settings: Settings, device: torch.device) -> Iterator[None]:
    """Let gradients of parameters be accumulated on a stream of their own, for CUDA graphs.

    Autograd accumulates a gradient on the stream on which its accumulator was made, by
    DistributedDataParallel. The default stream may not wait for a stream that is being captured
    (cudaErrorStreamCaptureImplicit). Megatron-LM's training.py does this for every run.
    """
    if settings.performance.cuda_graph_impl == "none" or device.type != "cuda":
        yield
        return
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def _set_schedule_callbacks(chunks: ModelChunks, config: ModelConfig, settings: Settings) -> None:
    """Set what megatron/training sets; no ``grad_scale_func``, since only fp16 scales its loss."""
    config.finalize_model_grads_func = finalize_gradients
    if settings.model.encoder_num_layers is not None:
        config.finalize_model_grads_func = finalize_stack_gradients
    if settings.parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        grad_sync = [chunk.start_grad_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        config.grad_sync_func = grad_sync if len(chunks) > 1 else grad_sync[0]


@contextmanager
def parameters_gathered(chunks: ModelChunks, settings: Settings) -> Iterator[None]:
    """Keep all parameters gathered, for evaluation and checkpoints between two steps."""
    overlapped = settings.parallel.overlap_param_gather
    if overlapped:
        for chunk in chunks:
            # Completes the all-gather of parameters over the data-parallel group, which otherwise
            # runs bucket by bucket in the next forward pass.
            chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        if overlapped:
            for chunk in chunks:
                chunk.enable_forward_pre_hook()


def set_training(chunks: ModelChunks, training: bool) -> None:
    """Switch dropout and auxiliary losses on or off."""
    for chunk in chunks:
        chunk.train(training)


def needs_samples(chunk: DistributedDataParallel, settings: Settings) -> bool:
    """Return whether a chunk reads samples.

    The first and last stage read tokens and labels. All stages do for hash routers, masks,
    documents, examples of an encoder-decoder, and routers that weight their losses by the number of
    loss tokens: every rank reads its own samples instead of receiving them through the pipeline.
    """
    model, hashed = unwrap_model(chunk), settings.moe.moe_router_type == "hash"
    ends = model.pre_process or model.post_process
    weighted = settings.moe.num_experts is not None and settings.training.calculate_per_token_loss
    masked = settings.data.bidirectional_prefix or separates_documents(settings)
    two_stacks = settings.model.encoder_num_layers is not None
    return bool(ends or hashed or weighted or masked or two_stacks)
