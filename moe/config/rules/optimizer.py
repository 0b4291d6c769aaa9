"""Rules on the optimizer, its parameter groups and overlapped communication."""

from collections.abc import Iterator

from moetron.moe.config.rules.case import Case

_FORMATS = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


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


def precision(case: Case) -> Iterator[str]:
    """Check formats of optimizer state (OptimizerConfig.__post_init__ of megatron-core)."""
    chosen, flag = case.settings.optimizer, "--use-precision-aware-optimizer"
    if not chosen.use_precision_aware_optimizer:
        for name in _FORMATS:
            if getattr(chosen, name) != "fp32":
                yield f"{case.given(name)} needs {flag}: add it"
        return
    if not case.te_on_gpu:
        yield f"{flag} needs Transformer Engine on a GPU: leave it out"
    if not case.settings.parallel.use_distributed_optimizer:
        yield f"{flag} needs --use-distributed-optimizer: add it"
    if not case.settings.precision.bf16:
        yield f"{flag} needs --bf16: add it"
    if case.settings.precision.fp8_param_gather:
        yield f"{flag} is not supported with --fp8-param-gather: drop one"
    reduced_in_fp32 = case.settings.precision.accumulate_allreduce_grads_in_fp32
    if reduced_in_fp32 != (chosen.main_grads_dtype == "fp32"):
        remedy = (
            "add --no-accumulate-allreduce-grads-in-fp32"
            if reduced_in_fp32
            else "use --main-grads-dtype bf16"
        )
        yield f"{case.given('main_grads_dtype')} is not the format of gradient buffers: {remedy}"


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


RULES = (distributed, precision, groups)
