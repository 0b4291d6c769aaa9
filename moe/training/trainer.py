"""The model, optimizer and process groups of one rank."""

from dataclasses import dataclass

from megatron.core.optimizer.optimizer import MegatronOptimizer

from moetron.moe.config.bridge import ModelConfig
from moetron.moe.config.schema.settings import Settings
from moetron.moe.optim.qk_clip import AttentionLogits
from moetron.moe.routing.routing_record import RoutingRecorder
from moetron.moe.training.model_chunks import ModelChunks
from moetron.moe.training.runtime import Runtime


@dataclass(frozen=True)
class Trainer:
    """Everything that a training step needs on one rank."""

    settings: Settings
    runtime: Runtime
    config: ModelConfig
    vocab_size: int
    """Before padding."""
    chunks: ModelChunks
    optimizer: MegatronOptimizer
    recorder: RoutingRecorder | None
    """Counter of choices and drops; None: a dense model."""
    logits: AttentionLogits | None
    """Largest attention logits; None: neither logged nor clipped."""
