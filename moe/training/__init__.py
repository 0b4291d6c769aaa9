"""The training run: runtime, optimizer, schedule, step, loop, evaluation, checkpoints, report."""
