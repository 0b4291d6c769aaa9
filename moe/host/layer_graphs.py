"""CUDA graphs of parts of layers, captured by Transformer Engine (--cuda-graph-impl)."""

from megatron.core import num_microbatches_calculator as calculator
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
from megatron.core.transformer.transformer_config import TransformerConfig

from moetron.common.errors import UserError
from moetron.moe.config.schema.settings import Settings


class LayerGraphs:
    """Captures after the first steps of the process, as Megatron-LM's training.py does.

    A graph replays what precedes the FFN in a layer (norm, projections, attention and residual
    addition), a dense FFN, or both, forward and backward. Routers, experts and evaluation run as
    without graphs.
    """

    def __init__(
        self,
        settings: Settings,
        config: TransformerConfig,
        chunks: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
    ) -> None:
        chosen = settings.performance
        self._size, self._length = settings.training.micro_batch_size, settings.model.seq_length
        self._config = config
        self._chunks = chunks
        self._optimizer = optimizer
        self._impl = chosen.cuda_graph_impl
        self._wait = chosen.cuda_graph_warmup_steps if chosen.cuda_graph_impl != "none" else None
        self._helper: TECudaGraphHelper | None = None

    def before_step(self, step: int, num_microbatches: int) -> None:
        """Capture if this is the step for it; gradients and auxiliary losses are cleared then.

        Raises:
            UserError: Transformer Engine could not capture; the process cannot train any more.
        """
        if self._wait is None or self._helper is not None:
            return
        if self._wait > 0:
            self._wait -= 1
            return
        size = self._size
        helper = TECudaGraphHelper(
            self._chunks, self._config, self._length, size, [self._optimizer]
        )
        # megatron-core asks its global calculator how often each layer has run before.
        calculator.unset_num_microbatches_calculator()
        calculator.init_num_microbatches_calculator(
            rank=0,
            rampup_batch_size=None,
            global_batch_size=num_microbatches * size,
            micro_batch_size=size,
            data_parallel_size=1,
        )
        try:
            helper.create_cudagraphs()  # barriers over all ranks
        except RuntimeError as error:  # torch.AcceleratorError is one
            cause = str(error).partition("\n")[0]
            raise UserError(
                f"--cuda-graph-impl {self._impl}: the capture before step {step} failed: {cause}; "
                "use --cuda-graph-impl none"
            ) from error
        calculator.unset_num_microbatches_calculator()
        self._helper = helper

    def close(self) -> None:
        """Delete the graphs: communicators in them must end before their process groups."""
        if self._helper is not None:
            self._helper.delete_cuda_graphs()
            self._helper, self._wait = None, None
