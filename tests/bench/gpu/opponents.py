"""What the programs that we compare ourselves with share: samples and learning rates of ours."""

from collections.abc import Iterator

import numpy as np
import torch

from moetron.data.stream.mock_stream import MockStream
from moetron.moe.checkpoint.position import Progress
from moetron.moe.config.schema.settings import Settings
from moetron.moe.training.schedule import LearningRate


def device_batches(
    settings: Settings, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (tokens, labels), int64 [micro-batch, S], of the whole run: our samples, our order.

    All are on the device before the first is asked for: an opponent pays nothing for its data.
    """
    training, length = settings.training, settings.model.seq_length
    assert settings.model.vocab_size is not None
    stream = MockStream(training.seed, settings.model.vocab_size, length)
    count = training.train_iters * training.global_batch_size
    samples = [stream[number] for number in range(count)]
    made = [
        torch.from_numpy(np.stack([sample[name] for sample in samples]))
        .to(device)
        .split(training.micro_batch_size)
        for name in ("tokens", "labels")
    ]
    return iter(list(zip(*made, strict=True)))


def learning_rates(settings: Settings) -> Iterator[float]:
    """Yield the learning rate of every step of our run."""
    rate, progress = LearningRate.of(settings), Progress()
    for _ in range(settings.training.train_iters):
        yield rate.at(progress)
        progress = progress.after(settings.training.global_batch_size, settings.model.seq_length)
