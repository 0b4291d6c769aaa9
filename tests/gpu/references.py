"""Make on a CPU what `tests.gpu.compare` compares with on a GPU.

    python -m tests.gpu.references FOLDER [--only REGEX]

One process trains every case of `tests/gpu/gpu_cases.py` in fp32: ten steps, from matrices large
enough for every layer to count, make weights, which are rounded to bf16 (so that all precisions
start equal, and the folder packs well) and saved as a checkpoint; cases of one shape share them.
The losses of five steps from there, with a fresh optimizer, go to FOLDER/references.jsonl as they
come. A case with dropout runs with three seeds, for the mean and the spread of its losses. Cases
that the folder holds already are kept.
"""

import argparse
import hashlib
import json
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from moetron.common.errors import ConfigError
from moetron.moe.checkpoint.optimizer_state import leaves
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.save_load import save_checkpoint
from moetron.moe.config.command import load
from moetron.moe.config.schema.settings import Settings
from moetron.moe.monitoring.sinks import Row
from moetron.moe.training.trainer import Trainer
from tests.gpu.gpu_cases import STEPS, WARM_STEPS, Case, cases
from tests.gpu.in_process import built, train

FILE = "references.jsonl"
SEEDS = 3
FIRST_STEP = (
    *("aux_loss", "z_loss", "output_z_loss", "dropped_fraction", "loss_tokens"),
    *("preference_loss", "margin", "kl", "max_attention_logit"),
)
"""Metrics of the first step that local fp32 runs must equal too."""


def main() -> int:
    """Make the references; return 1 if a case failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases to make")
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        parser.error("references come from a CPU: hide the GPUs with CUDA_VISIBLE_DEVICES=")
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    known, failed, start_s = read(folder), 0, time.perf_counter()
    for case in cases():
        if case.like or case.name in known or not re.search(arguments.only, case.name):
            continue
        try:
            reference = make(case, folder)
        except Exception as error:
            failed += 1
            print(f"{case.name:<22} FAILED: {one_line(error)}", flush=True)
            continue
        with (folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(reference) + "\n")
        losses = " ".join(f"{loss:.4f}" for loss in reference["lm_loss"])
        print(f"{case.name:<22} {losses}", flush=True)
    print(f"{len(read(folder))} references, {failed} failed, {time.perf_counter() - start_s:.0f} s")
    return int(failed > 0)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the references of a folder by case."""
    path = folder / FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line["case"]: line for line in map(json.loads, lines)}


def weights_folder(folder: Path, reference: dict[str, Any]) -> Path:
    """Return the checkpoint that a case starts from."""
    return folder / "weights" / str(reference["weights"])


def make(case: Case, folder: Path) -> dict[str, Any]:
    """Train a case, after weights of its shape if there are none; return its reference."""
    settings = load(case.reference_argv()).settings
    name = shape_name(settings)
    weights = folder / "weights" / name
    if not weights.exists():
        save = partial(_save, weights)
        train(settings, WARM_STEPS, case.samples, before=_enlarge, after=save)
    runs = []
    for number in range(SEEDS if case.is_noisy else 1):
        seed = ("--seed", str(settings.training.seed + number))
        runs.append(
            train(load([*case.reference_argv(), *seed]).settings, STEPS, case.samples, weights)
        )
    reference = {"case": case.name, "weights": name, "torch": torch.__version__}
    for metric in ("lm_loss", "grad_norm"):
        reference.update(_mean_and_spread(runs, metric))
    reference["first_step"] = {key: runs[0][0][key] for key in FIRST_STEP if key in runs[0][0]}
    return reference


def shape_name(settings: Settings) -> str:
    """Return a name for the model's names and shapes of tensors."""
    with built(settings) as trainer:
        held = [
            f"{name} {list(tensor.shape)}"
            for chunk in unwrap_model(trainer.chunks)
            for name, tensor in chunk.state_dict().items()
            if isinstance(tensor, torch.Tensor)
        ]
    return hashlib.sha256("\n".join(sorted(held)).encode()).hexdigest()[:12]


def _enlarge(trainer: Trainer) -> None:
    """Scale the layers' matrices so that outputs are as large as inputs, and FFNs' twice.

    At the recipes' initialisation a model without its experts has almost the same losses: a bound
    for bf16 would not notice.
    """
    for chunk in trainer.chunks:
        for name, parameter in chunk.named_parameters():
            if "layers." in name and parameter.dim() > 1 and (spread := parameter.data.std()) > 0:
                gain = 2 if ".mlp." in name and "router" not in name else 1
                parameter.data *= gain / (spread * parameter.shape[-1] ** 0.5)


def _save(weights: Path, trainer: Trainer) -> None:
    """Round the parameters to bf16 and save them, with an untouched optimizer."""
    for chunk in trainer.chunks:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.data.bfloat16())
    for leaf in leaves(trainer.optimizer):
        leaf.optimizer.state.clear()  # saved as zeros, which pack to nothing
    empty = dict[str, Any]()
    save_checkpoint(weights, Progress(), trainer.chunks, trainer.optimizer, trainer.settings, empty)


def _mean_and_spread(runs: list[list[Row]], metric: str) -> dict[str, list[float]]:
    """Return the mean over runs at each step, and the largest relative distance from it."""
    values = torch.tensor([[row[metric] for row in rows] for rows in runs], dtype=torch.float64)
    mean = values.mean(0)
    spread = ((values - mean).abs() / mean).amax(0)
    return {metric: mean.tolist(), f"{metric}_spread": spread.tolist()}


def one_line(error: BaseException) -> str:
    """Return the error and where it was raised."""
    if isinstance(error, ConfigError):
        return " | ".join(error.problems)
    place, trace = "", error.__traceback__
    while trace is not None:
        place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({place})"


if __name__ == "__main__":  # megatron-core's checkpoint writer spawns processes
    sys.exit(main())
