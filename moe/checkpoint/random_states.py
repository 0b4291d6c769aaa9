"""Random-number states of a rank, as tensors that a checkpoint can hold without pickle."""

import json
import random
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.random import (
    convert_cuda_rng_state,
    is_graph_safe_cuda_rng_tracker,
)
from torch import Tensor

CUDA = "rng.cuda"
"""Key of the default CUDA generator's state: present only in checkpoints written on GPUs."""
HOST = frozenset({"rng.python", "rng.numpy"})
"""Keys of the states that any device can restore."""
_TEXT_BYTES = 16_384
"""Size of the JSON text of a Mersenne Twister's 624 words, padded."""


def rng_entries() -> ShardedStateDict:
    """Return this rank's states, {key: sharded uint8 [1, bytes]}, a row of [ranks, bytes]."""
    place = (0, dist.get_rank(), dist.get_world_size())
    return {
        f"rng.{name}": ShardedTensor.from_rank_offsets(f"rng.{name}", state[None], place)
        for name, state in _states().items()
    }


def mismatch(wanted: Collection[str], held: Collection[str]) -> str | None:
    """Return why this rank cannot restore its device's states, None if it can.

    Args:
        wanted: keys of ``rng_entries`` here.
        held: keys of the checkpoint. A tracker's state has the same key but another size and
            meaning on another kind of device, so the kind of device is compared first.
    """
    if (CUDA in wanted) != (CUDA in held) and set(held) >= HOST:
        return f"the checkpoint was written on a {'GPU' if CUDA in held else 'CPU'}"
    absent = sorted(set(wanted) - set(held))
    return f"the checkpoint holds no {', '.join(absent)}" if absent else None


def restore_rng(loaded: ShardedStateDict) -> None:
    """Restore states that ``rng_entries`` requested: all of them, or only some of ``HOST``."""
    states = {key.removeprefix("rng."): state[0].cpu() for key, state in loaded.items()}
    if "python" in states:
        random.setstate(_python_state(_from_bytes(states.pop("python"))))
    if "numpy" in states:
        np.random.set_state(_numpy_state(_from_bytes(states.pop("numpy"))))
    if not states:
        return
    torch.set_rng_state(states.pop("torch"))
    if "cuda" in states:
        torch.cuda.set_rng_state(states.pop("cuda"))
    tracker = get_cuda_rng_tracker()
    tracked = {name.removeprefix("tracker."): state for name, state in states.items()}
    if is_graph_safe_cuda_rng_tracker(tracker):  # it holds generators, which modules refer to
        for name, generator in tracker.get_states().items():
            generator.set_state(tracked[name])
    else:
        tracker.set_states(tracked)


def reseed(seed: int, step: int) -> None:
    """Seed every generator from (seed, step) and the rank's place in the layout."""
    _seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]) >> 2)


def seed_generators(seed: int, graph_safe: bool = False) -> None:
    """Seed every generator of this rank, with a new tracker.

    ``graph_safe``: Transformer Engine's tracker, for CUDA graphs.
    """
    _seed(seed, te_rng_tracker=graph_safe, force_reset_rng=True)


def _seed(seed: int, **tracker: bool) -> None:
    """Seed every generator; pipeline stages differ by 100, as in Megatron.

    Attention keeps the tracker of its construction: without ``tracker`` it stays the same.
    """
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, **tracker)


def _states() -> dict[str, Tensor]:
    version, words, gauss = random.getstate()
    twister = np.random.get_state(legacy=False)
    twister["state"]["key"] = twister["state"]["key"].tolist()
    states = {
        "torch": torch.get_rng_state(),
        "python": _to_bytes([version, words, gauss]),
        "numpy": _to_bytes(twister),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    tracked = get_cuda_rng_tracker().get_states()
    return states | {
        f"tracker.{name}": convert_cuda_rng_state(state) for name, state in tracked.items()
    }


def _to_bytes(value: Any) -> Tensor:
    text = json.dumps(value).encode().ljust(_TEXT_BYTES)
    assert len(text) == _TEXT_BYTES
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _from_bytes(text: Tensor) -> Any:
    return json.loads(text.numpy().tobytes())


def _python_state(state: list[Any]) -> tuple[Any, ...]:
    version, words, gauss = state
    return version, tuple(words), gauss


def _numpy_state(state: dict[str, Any]) -> dict[str, Any]:
    words = np.asarray(state["state"]["key"], dtype=np.uint32)
    return {**state, "state": {**state["state"], "key": words}}
