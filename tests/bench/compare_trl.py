"""Compare the losses of a fine-tuning run with TRL's on the same model, samples and settings.

    python tests/bench/compare_trl.py --run RUN --model HF_FOLDER

In an environment with trl; HF_FOLDER is the export of the checkpoint that RUN was fine-tuned from,
RUN a run with --sft, --no-sft-packing and one rank. TRL trains without packing, with the same
conversations in the same order and batches. Prints a Markdown table; exit code 1 if losses differ
by more than 1e-4.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from moetron.data.chat.chat_stream import open_chats
from moetron.moe.checkpoint import run_folder
from moetron.moe.config.schema.settings import Settings
from moetron.tokenizers.load import load_tokenizer

TOLERANCE = 1e-4


class InOrder(SFTTrainer):
    """TRL's trainer, without shuffling."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def conversations(settings: Settings) -> Dataset:
    """Return the samples of the run in order, without padding."""
    data, training = settings.data, settings.training
    assert data.data_path is not None and data.tokenizer_model is not None
    tokenizer = load_tokenizer(data.tokenizer_model)
    paths, length = data.rooted(data.data_path), settings.model.seq_length
    stream = open_chats(
        paths, length, tokenizer.fingerprint, tokenizer.pad, training.seed, packed=False
    )
    rows = []
    for n in range(training.train_iters * training.global_batch_size):
        sample = stream[n]
        size = int(sample["documents"][0])
        mask = [0, *sample["loss_mask"][: size - 1].astype(int).tolist()]
        rows.append({"input_ids": sample["tokens"][:size].tolist(), "completion_mask": mask})
    return Dataset.from_list(rows)


def trl_losses(settings: Settings, folder: Path) -> list[float]:
    """Train with TRL; return the loss of each step."""
    training, rate, optimizer = settings.training, settings.learning_rate, settings.optimizer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    config = SFTConfig(
        output_dir=str(folder.with_name("trl")),
        per_device_train_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.global_batch_size // training.micro_batch_size,
        max_steps=training.train_iters,
        learning_rate=rate.lr,
        lr_scheduler_type="linear",
        warmup_steps=rate.lr_warmup_iters or 0,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_epsilon=optimizer.adam_eps,
        max_grad_norm=optimizer.clip_grad,
        max_length=settings.model.seq_length,
        completion_only_loss=True,
        router_aux_loss_coef=0.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    )
    trainer = InOrder(
        model,
        config,
        train_dataset=conversations(settings),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
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
    ours = [json.loads(line)["lm_loss"] for line in lines]
    theirs = trl_losses(settings, options.model)
    print("| step | Moetron | TRL | difference |\n|--:|--:|--:|--:|")
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
        print(f"| {step} | {mine:.6f} | {other:.6f} | {mine - other:.1e} |")
    worst = max(abs(mine - other) for mine, other in zip(ours, theirs, strict=True))
    print(f"largest difference {worst:.1e}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
