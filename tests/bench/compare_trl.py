"""Compare the losses of a fine-tuning run with TRL's on the same model, samples and settings.

    python tests/bench/compare_trl.py --run RUN --model HF_FOLDER

In an environment with trl; HF_FOLDER is the export of the checkpoint that RUN was fine-tuned from,
RUN a run with --sft, --no-sft-packing and one rank, perhaps with --preference-loss. TRL trains
without packing, with the same conversations in the same order and batches. KTO's baseline is TRL's
of a micro-batch, so that a step has to be one. Prints a Markdown table; exit code 1 if losses
differ by more than 1e-4.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from moetron.data.chat.chat_stream import open_chats
from moetron.moe.checkpoint import run_folder
from moetron.moe.config.schema.settings import Settings
from moetron.tokenizers.load import load_tokenizer

TOLERANCE = 1e-4


class _InOrder:
    """Part of TRL's trainers: no shuffling, and rows that are token ids already."""

    train_dataset: Any

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


class _Sft(SFTTrainer):
    """TRL's trainer, without shuffling."""

    _get_train_sampler = _InOrder._get_train_sampler


class _Dpo(_InOrder, DPOTrainer):
    """TRL's trainer of pairs."""


class _Kto(_InOrder, KTOTrainer):
    """TRL's trainer of labelled answers."""


def _parts(sample: Mapping[str, Any], number: int) -> tuple[list[int], list[int]]:
    """Return the prompt and the answer of a sample's conversation."""
    ends = np.cumsum(sample["documents"])
    start, end = int(ends[number - 1]) if number else 0, int(ends[number])
    ids = sample["tokens"][start:end].tolist()
    trained = np.flatnonzero(sample["loss_mask"][start : end - 1]) + 1
    first = int(trained[0])
    assert len(trained) == len(ids) - first, "TRL trains all tokens after the prompt"
    return ids[:first], ids[first:]


def _sft_row(sample: Mapping[str, Any]) -> dict[str, Any]:
    size = int(sample["documents"][0])
    mask = [0, *sample["loss_mask"][: size - 1].astype(int).tolist()]
    return {"input_ids": sample["tokens"][:size].tolist(), "completion_mask": mask}


def _pair_row(sample: Mapping[str, Any]) -> dict[str, Any]:
    (prompt, chosen), (same, rejected) = _parts(sample, 0), _parts(sample, 1)
    assert prompt == same
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def _labelled_row(sample: Mapping[str, Any]) -> dict[str, Any]:
    (prompt, answer), (same, other) = _parts(sample, 0), _parts(sample["mismatched"], 0)
    assert prompt == same
    return {
        "prompt_ids": prompt,
        "completion_ids": answer,
        "KL_completion_ids": other,
        "label": bool(sample["wanted"][0]),
    }


def _rows(settings: Settings, kind: Any, row: Callable[[Any], dict[str, Any]]) -> Dataset:
    """Return the samples of the run in order, without padding."""
    data, training = settings.data, settings.training
    assert data.data_path is not None and data.tokenizer_model is not None
    tokenizer = load_tokenizer(data.tokenizer_model)
    stream = open_chats(
        data.rooted(data.data_path),
        settings.model.seq_length,
        tokenizer.fingerprint,
        tokenizer.pad,
        training.seed,
        packed=False,
        kind=kind,
    )
    count = training.train_iters * training.global_batch_size
    return Dataset.from_list([row(stream[n]) for n in range(count)])


def _common(settings: Settings, folder: Path) -> dict[str, Any]:
    """Return the settings of all trainers."""
    training, rate, optimizer = settings.training, settings.learning_rate, settings.optimizer
    return {
        "output_dir": str(folder.with_name("trl")),
        "per_device_train_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size // training.micro_batch_size,
        "max_steps": training.train_iters,
        "learning_rate": rate.lr,
        "lr_scheduler_type": "linear",
        "warmup_steps": rate.lr_warmup_iters or 0,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.adam_beta1,
        "adam_beta2": optimizer.adam_beta2,
        "adam_epsilon": optimizer.adam_eps,
        "max_grad_norm": optimizer.clip_grad,
        "max_length": settings.model.seq_length,
        "router_aux_loss_coef": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
    }


def _trainer(settings: Settings, folder: Path) -> Any:
    """Return TRL's trainer for the run's loss."""
    chosen, common = settings.adaptation, _common(settings, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    preferences = {"beta": chosen.preference_beta, "precompute_ref_log_probs": True}
    config: Any
    if chosen.preference_loss is None:
        config = SFTConfig(**common, completion_only_loss=True)
        rows = _rows(settings, "chats", _sft_row)
        return _Sft(model, config, train_dataset=rows, processing_class=tokenizer)
    if chosen.preference_loss == "kto":
        assert settings.training.micro_batch_size == settings.training.global_batch_size
        config = KTOConfig(
            **common,
            **preferences,
            desirable_weight=chosen.preference_desirable_weight,
            undesirable_weight=chosen.preference_undesirable_weight,
        )
        rows = _rows(settings, "labelled", _labelled_row)
        return _Kto(model, args=config, train_dataset=rows, processing_class=tokenizer)
    loss = {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm"}[chosen.preference_loss]
    config = DPOConfig(**common, **preferences, loss_type=[loss])
    rows = _rows(settings, "pairs", _pair_row)
    return _Dpo(model, args=config, train_dataset=rows, processing_class=tokenizer)


def trl_losses(settings: Settings, folder: Path) -> list[float]:
    """Train with TRL; return the loss of each step."""
    trainer = _trainer(settings, folder)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def main() -> int:
    """Print both losses by step; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    options = parser.parse_args()
    settings = run_folder.one_rank_settings(run_folder.read_record(run_folder.find(options.run)))
    lines = (options.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    name = "preference_loss" if settings.adaptation.preference_loss else "lm_loss"
    ours = [json.loads(line)[name] for line in lines]
    theirs = trl_losses(settings, options.model)
    print("| step | Moetron | TRL | difference |\n|--:|--:|--:|--:|")
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
        print(f"| {step} | {mine:.6f} | {other:.6f} | {mine - other:.1e} |")
    worst = max(abs(mine - other) for mine, other in zip(ours, theirs, strict=True))
    print(f"largest difference {worst:.1e}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
