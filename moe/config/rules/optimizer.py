"""Rules on the optimizer, its parameter groups and overlapped communication."""

from collections.abc import Iterator

from moetron.moe.config.rules.case import Case


def distributed(case: Case) -> Iterator[str]:
    """Check the distributed optimizer and overlaps."""
    parallel = case.settings.parallel
    if parallel.use_distributed_optimizer and case.settings.optimizer.optimizer != "adam":
        yield f"--use-distributed-optimizer needs --optimizer adam, not {case.given('optimizer')}"
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        yield "--overlap-param-gather needs --use-distributed-optimizer"
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield "--overlap-param-gather needs --overlap-grad-reduce"
    if parallel.ddp_bucket_size is not None and not parallel.overlap_grad_reduce:
        used = case.given("ddp_bucket_size")
        yield f"{used} has no effect without --overlap-grad-reduce: add it"


def groups(case: Case) -> Iterator[str]:
    """Check multipliers of parameter groups that the model lacks."""
    moe, chosen = case.settings.moe, case.settings.optimizer
    for name in ("router_lr_mult", "router_wd_mult", "expert_lr_mult", "expert_wd_mult"):
        if getattr(chosen, name) == 1:
            continue
        if moe.num_experts is None:
            yield f"{case.given(name)} needs --num-experts: add it or leave this out"
        elif name.startswith("router") and moe.moe_router_type == "hash":
            yield f"{case.given(name)}: --moe-router-type hash has no weights: leave it out"


RULES = (distributed, groups)
