"""Comparison of data-parallel replicas by hashes of their parameters.

megatron-core's ``check_param_hashes_across_dp_replicas`` compares with the first replica and
returns one truth value; here the ranks that differ are named, and the expert bias is compared too.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from moetron.moe.health.events import Event

DIGEST_BYTES = 8
SHOWN_NAMES = 8
_DENSE, _EXPERT = "dense", "expert"


@dataclass(frozen=True)
class Difference:
    """Replicas that differ."""

    ranks: list[int]
    """Those in the minority; all replicas of a tensor without a majority."""
    parameters: list[str]
    """Names of the first few tensors that differ."""
    majority: bool
    """Whether every tensor that differs has equal replicas on most ranks."""

    @property
    def text(self) -> str:
        """Return the difference in words."""
        ranks, names = ", ".join(map(str, self.ranks)), ", ".join(self.parameters)
        who = f"ranks {ranks} differ from the others" if self.majority else f"ranks {ranks} differ"
        return f"replicas: {who} in {names}"

    def event(self, step: int) -> Event:
        """Return the event."""
        values = {"parameters": self.parameters}
        return Event(step, "replicas_differ", "stop", self.text, ranks=self.ranks, values=values)


def compare_replicas(
    chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection
) -> Difference | None:
    """Hash every parameter and expert bias and compare them; None: all replicas are equal.

    Collective over all ranks; every rank gets the same result. Each tensor is copied to the host:
    not for every step.
    """
    names, hashes = _hashes(chunks)
    found: list[tuple[str, list[int], bool]] = []
    for kind, group in ((_DENSE, groups.dp_cp), (_EXPERT, groups.expt_dp)):
        mine = [(name, each) for name, each in zip(names[kind], hashes[kind], strict=True)]
        found += _compare(mine, group)
    # All-gather over all ranks: a replica group sees its own tensors only, and all ranks have to
    # stop together.
    everywhere: list[list[tuple[str, list[int], bool]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, found)
    all_found = [each for part in everywhere for each in part]
    if not all_found:
        return None
    ranks = sorted({rank for _, odd, _ in all_found for rank in odd})
    parameters = list(dict.fromkeys(name for name, _, _ in all_found))[:SHOWN_NAMES]
    return Difference(ranks, parameters, all(majority for _, _, majority in all_found))


def _compare(
    mine: Sequence[tuple[str, int]], group: dist.ProcessGroup
) -> list[tuple[str, list[int], bool]]:
    """Return (name, odd ranks, whether the others are a majority) of tensors that differ."""
    if group.size() == 1 or not mine:
        return []
    own = torch.tensor([each for _, each in mine], device=torch.cuda.current_device())
    gathered = [torch.empty_like(own) for _ in range(group.size())]
    # All-gather over the replicas' group (data-parallel and context ranks; experts: theirs): 8
    # bytes for each tensor.
    dist.all_gather(gathered, own, group=group)
    ranks, found = dist.get_process_group_ranks(group), []
    for (name, _), replicas in zip(mine, torch.stack(gathered).T.tolist(), strict=True):
        value, count = Counter(replicas).most_common(1)[0]
        if count == len(replicas):
            continue
        majority = 2 * count > len(replicas)
        odd = [r for r, each in zip(ranks, replicas, strict=True) if each != value or not majority]
        found.append((name, odd, majority))
    return found


def _hashes(
    chunks: Sequence[torch.nn.Module],
) -> tuple[dict[str, list[str]], dict[str, list[int]]]:
    names: dict[str, list[str]] = {_DENSE: [], _EXPERT: []}
    hashes: dict[str, list[int]] = {_DENSE: [], _EXPERT: []}
    for name, tensor, is_expert in _tensors(chunks):
        kind = _EXPERT if is_expert else _DENSE
        flat = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
        digest = hashlib.blake2b(flat.data, digest_size=DIGEST_BYTES).digest()
        names[kind].append(name)
        hashes[kind].append(int.from_bytes(digest, "little", signed=True))
    return names, hashes


def _tensors(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield (name, tensor, whether it is an expert's) of all that replicas have in common."""
    for number, chunk in enumerate(unwrap_model(list(chunks))):
        for name, parameter in chunk.named_parameters():
            # megatron-core marks parameters of routed experts with ``allreduce = False``.
            yield f"chunk {number}: {name}", parameter, not getattr(parameter, "allreduce", True)
        for name, buffer in chunk.named_buffers():
            if name.endswith("expert_bias"):
                yield f"chunk {number}: {name}", buffer, False
