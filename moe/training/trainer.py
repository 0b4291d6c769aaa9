"""What one rank trains: the model, its optimizer and its place among the ranks."""

from dataclasses import dataclass

from megatron.core.optimizer.optimizer import MegatronOptimizer

from moetron.moe.config.bridge import ModelConfig
from moetron.moe.config.schema.settings import Settings
from moetron.moe.routing.routing_record import RoutingRecorder
from moetron.moe.training.model_chunks import ModelChunks
from moetron.moe.training.runtime import Runtime


@dataclass(frozen=True)
class Trainer:
    """The model of one rank and all that a step needs."""

    settings: Settings
    runtime: Runtime
    config: ModelConfig
    vocab_size: int
    """Before padding."""
    chunks: ModelChunks
    optimizer: MegatronOptimizer
    recorder: RoutingRecorder | None
    """Counts where tokens go; None: a dense model."""
