"""Rules on learning rate, data and loading, each triggered alone."""

from typing import Any

import pytest

from tests.unit.config.config_cases import found

TRACE = {"profile": True, "use_pytorch_profiler": True, "save": "x"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"min_lr": 1.0}, "--min-lr 1.0 exceeds --lr 0.001"),
        ({"lr_warmup_init": 1.0}, "--lr-warmup-init 1.0 exceeds --lr 0.001"),
        (
            {"lr_warmup_iters": 1, "lr_warmup_tokens": 1},
            "--lr-warmup-iters 1 and --lr-warmup-tokens 1 measure the schedule in steps and in "
            "tokens",
        ),
        ({"lr_warmup_iters": 1, "lr_decay_tokens": 9999}, "use one unit"),
        ({"lr_warmup_iters": 101}, "--lr-warmup-iters 101 is longer than the run of 100 steps"),
        (
            {"lr_warmup_tokens": 51201},
            "--lr-warmup-tokens 51201 is longer than the run of 51200 tokens",
        ),
        ({"lr_warmup_iters": 100}, "leaves nothing of the schedule, which ends at 100 steps"),
        (
            {"lr_warmup_iters": 50, "lr_decay_iters": 40},
            "leaves nothing of the schedule, which ends at 40 steps",
        ),
        ({"lr_decay_style": "WSD"}, "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
        ({"lr_wsd_decay_iters": 5}, "--lr-wsd-decay-iters 5 needs --lr-decay-style WSD"),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 60, "lr_warmup_iters": 50},
            "and a warm-up of 50 exceed the schedule, which ends at 100 steps",
        ),
        ({"data_path": ["a"]}, "--mock-data and --data-path exclude each other"),
        ({"vocab_size": None}, "the vocabulary size is unknown"),
        ({"valid_data_path": ["1", "a", "b"]}, "give only prefixes, or pairs WEIGHT PREFIX"),
        ({"valid_data_path": []}, "--valid-data-path is empty"),
        ({"valid_data_path": ["a", "1"]}, "--valid-data-path a 1: give only prefixes"),
        ({"valid_data_path": ["0", "a"]}, "weight '0' must be a number above 0"),
        ({"valid_data_path": ["inf", "a"]}, "weight 'inf' must be a number above 0"),
        ({"finetune": True, "reset_progress": True}, "exclude each other"),
        ({"eval_interval": 5, "eval_iters": 0}, "--eval-interval 5 needs --eval-iters above 0"),
        ({"skip_train": True}, "--skip-train evaluates a checkpoint: give --load"),
        ({"skip_train": True, "load": "x", "eval_iters": 0}, "--skip-train evaluates: give"),
        ({"use_pytorch_profiler": True}, "--use-pytorch-profiler needs --profile"),
        ({"nvtx_ranges": True}, "--nvtx-ranges needs --profile"),
        ({"profile_ranks": [1]}, "--profile-ranks 1 needs --profile"),
        ({"profile_step_start": 3}, "--profile-step-start 3 needs --profile"),
        ({"memory_snapshot_path": "m"}, "--memory-snapshot-path m needs --record-memory-history"),
        ({"manual_gc_interval": 5}, "--manual-gc-interval 5 needs --manual-gc"),
        (
            {**TRACE, "profile_step_start": 4, "profile_step_end": 4},
            "--profile-step-end 4 is not above --profile-step-start 4: use --profile-step-end 5",
        ),
        ({**TRACE, "profile_step_end": 101}, "--profile-step-end 101 exceeds --train-iters 100"),
        ({**TRACE, "profile_ranks": [0, 7]}, "--profile-ranks 0 7: there is no rank 7 of 1"),
        ({**TRACE, "save": None}, "--use-pytorch-profiler writes to SAVE/profile: give --save"),
        ({"profile": True}, "--profile needs --use-pytorch-profiler on a CPU"),
        ({"record_memory_history": True, "save": "x"}, "--record-memory-history needs a GPU"),
    ],
)
def test_rule(changes: dict[str, Any], expected: str) -> None:
    (line,) = found(**changes)
    assert expected in line
