"""Setting names of other programs, with ours or with advice.

Keys have underscores. ``{field}`` in an answer is a setting of ours. Sources: flags of Megatron-LM
core_v0.16.1 (megatron/training/arguments.py) and earlier versions; keys of config.json and of
TrainingArguments in transformers.
"""

SAME: dict[str, str] = {
    # Megatron-LM
    "batch_size": "micro_batch_size",
    "checkpoint_activations": "recompute_granularity",
    "decoder_num_layers": "num_layers",
    "decoder_seq_length": "seq_length",
    "model_parallel_size": "tensor_model_parallel_size",
    "moe_router_padding_for_fp8": "moe_router_padding_for_quantization",
    "most_recent_k": "keep_last",
    "keep_every": "save_retain_interval",
    "persistent_save_interval": "save_interval",
    "rope_scaling_factor": "rotary_scaling_factor",
    "train_data_path": "data_path",
    # short names of parallel sizes
    "cp": "context_parallel_size",
    "cp_size": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "ep_size": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "etp_size": "expert_tensor_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "pp_size": "pipeline_model_parallel_size",
    "tp": "tensor_model_parallel_size",
    "tp_size": "tensor_model_parallel_size",
    # config.json of HuggingFace models
    "attention_probs_dropout_prob": "attention_dropout",
    "attn_pdrop": "attention_dropout",
    "beta_1": "adam_beta1",
    "beta_2": "adam_beta2",
    "context_length": "seq_length",
    "d_ff": "ffn_hidden_size",
    "d_model": "hidden_size",
    "head_dim": "kv_channels",
    "hidden_dropout_prob": "hidden_dropout",
    "initializer_range": "init_method_std",
    "intermediate_size": "ffn_hidden_size",
    "layer_norm_eps": "norm_epsilon",
    "layer_norm_epsilon": "norm_epsilon",
    "max_seq_len": "seq_length",
    "max_seq_length": "seq_length",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "moe_topk": "moe_router_topk",
    "n_embd": "hidden_size",
    "n_group": "moe_router_num_groups",
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "n_inner": "ffn_hidden_size",
    "n_layer": "num_layers",
    "n_layers": "num_layers",
    "n_positions": "seq_length",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "moe_router_topk",
    "num_experts_per_token": "moe_router_topk",
    "num_heads": "num_attention_heads",
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "num_query_groups",
    "num_kv_heads": "num_query_groups",
    "num_local_experts": "num_experts",
    "num_nextn_predict_layers": "mtp_num_layers",
    "partial_rotary_factor": "rotary_percent",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "qkv_bias": "add_qkv_bias",
    "rms_norm_eps": "norm_epsilon",
    "rope_theta": "rotary_base",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
    "scoring_func": "moe_router_score_function",
    "sequence_length": "seq_length",
    "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "topk_group": "moe_router_group_topk",
    "use_qk_norm": "qk_layernorm",
    # TrainingArguments and other trainers
    "adam_epsilon": "adam_eps",
    "dataloader_num_workers": "num_workers",
    "eval_steps": "eval_interval",
    "learning_rate": "lr",
    "logging_steps": "log_interval",
    "lr_scheduler_type": "lr_decay_style",
    "max_grad_norm": "clip_grad",
    "max_steps": "train_iters",
    "min_learning_rate": "min_lr",
    "optim": "optimizer",
    "output_dir": "save",
    "per_device_train_batch_size": "micro_batch_size",
    "resume_from_checkpoint": "load",
    "save_steps": "save_interval",
    "save_total_limit": "keep_last",
    "tokenizer": "tokenizer_model",
    "tokenizer_name_or_path": "tokenizer_model",
    "train_batch_size": "global_batch_size",
    "train_steps": "train_iters",
    "warmup_steps": "lr_warmup_iters",
}
"""Foreign name -> our setting of the same meaning and scale."""

_FUSED = "leave it out: the layer implementation chooses its kernels ({transformer_impl})"
_LOGGED = "leave it out: metrics.jsonl has all metrics of every step"
_FP16 = "float16 and its loss scale are not supported: use {bf16}"
_SIGNAL = "leave it out: on SIGTERM or SIGINT the run saves and exits with code 75"
_ALWAYS = "leave it out: it is always on"
_COPIES = (
    "leave it out: it is the ranks / ({tensor_model_parallel_size} x "
    "{pipeline_model_parallel_size} x {context_parallel_size})"
)
_DECOUPLED = "not supported; routers and experts have {router_lr_mult} and {expert_lr_mult}"
_TOKENIZER = "give {tokenizer_model} a tokenizer.json, a SentencePiece .model, or bytes"
_EXPERTS = "use {moe_shared_expert_intermediate_size}: all shared experts' widths together"
_TORCHRUN = "an option of torchrun or srun: give it before pretrain_moe.py"
_AUX = (
    "use {moe_aux_loss_coeff}, on megatron-core's scale: a sum over layers, 1 x the coefficient a "
    "layer when balanced"
)
_SCHEDULE_SAMPLES = "give it in steps or in tokens: {lr_decay_iters} or {lr_decay_tokens}"
_WARMUP = "give it in steps or in tokens: {lr_warmup_iters} or {lr_warmup_tokens}"

DIFFERENT: dict[str, str] = {
    # Megatron-LM: parallelism and memory
    "cpu_offloading_num_layers": "activations are not offloaded: use {recompute_granularity}",
    "data_parallel_size": _COPIES,
    "data_parallel_sharding_strategy": "FSDP is not supported: use {use_distributed_optimizer}",
    "dp": _COPIES,
    "dp_size": _COPIES,
    "distribute_saved_activations": "not supported: use {sequence_parallel}",
    "distributed_backend": "leave it out: NCCL on GPUs, gloo on CPUs, as {device} says",
    "distributed_timeout_seconds_after_init": "use {distributed_timeout_minutes}",
    "local_rank": "leave it out: torchrun sets it in the environment",
    "microbatch_group_size_per_virtual_pipeline_stage": (
        "leave it out: a group is {pipeline_model_parallel_size} micro-batches"
    ),
    "num_virtual_stages_per_pipeline_rank": (
        "use {num_layers_per_virtual_pipeline_stage}: a stage's layers / its virtual stages"
    ),
    "recompute_activations": "use {recompute_granularity} selective",
    "te_rng_tracker": "leave it out: {cuda_graph_impl} includes it",
    "use_cpu_initialization": "leave it out: weights are initialised on {device}",
    "use_megatron_fsdp": "FSDP is not supported: use {use_distributed_optimizer}",
    "use_torch_fsdp2": "FSDP is not supported: use {use_distributed_optimizer}",
    # Megatron-LM: model
    "apply_layernorm_1p": "not supported: weights of norms start at one without it",
    "group_query_attention": "leave it out: {num_query_groups} alone groups the queries",
    "max_position_embeddings": (
        "leave it out: rotary positions need no table; {seq_length} is a sample's length, "
        "{original_max_position_embeddings} that before YaRN"
    ),
    "no_position_embedding": "leave it out: positions are not learned ({position_embedding_type})",
    "openai_gelu": "use {ffn_type} gelu",
    "padded_vocab_size": "use {vocab_size} and {make_vocab_size_divisible_by}",
    "quick_geglu": "use {ffn_type} geglu",
    "squared_relu": "not supported: see {ffn_type}",
    "rotary_interleaved": "not supported: channels are rotated in halves, as HuggingFace does",
    "rotary_seq_len_interpolation_factor": "use {rope_type} yarn with {rotary_scaling_factor}",
    "spec": "leave it out: layers follow from the model settings",
    "use_mcore_models": _ALWAYS,
    "use_rope_scaling": "use {rope_type} llama3 with {rotary_scaling_factor}",
    "use_rotary_position_embeddings": "use {position_embedding_type} rope, which is the default",
    "window_attn_skip_freq": "a sliding window is not supported",
    "window_size": "a sliding window is not supported",
    # Megatron-LM: experts
    "moe_enable_deepep": "use {moe_token_dispatcher_type} flex",
    "moe_extended_tp": "use {expert_tensor_parallel_size}",
    "moe_layer_recompute": "use {recompute_granularity} selective with {recompute_modules} moe",
    "moe_per_layer_logging": "leave it out: {expert_load_interval} sets its interval",
    "moe_use_legacy_grouped_gemm": "use {moe_grouped_gemm}",
    "moe_use_upcycling": "make the checkpoint with tools/upcycle.py, then {load} with {finetune}",
    "moe_upcycling_granularity": "tools/upcycle.py takes {moe_ffn_hidden_size}",
    # Megatron-LM: kernels
    "attention_softmax_in_fp32": _FUSED,
    "no_bias_gelu_fusion": "leave it out: only {bias_swiglu_fusion} is fused",
    "no_persist_layer_norm": _FUSED,
    "use_flash_attn": "leave it out: {attention_backend} chooses the attention",
    # Megatron-LM: precision
    "fp16": _FP16,
    "grad_reduce_in_bf16": "turn {accumulate_allreduce_grads_in_fp32} off",
    "hysteresis": _FP16,
    "initial_loss_scale": _FP16,
    "loss_scale": _FP16,
    "loss_scale_window": _FP16,
    "min_loss_scale": _FP16,
    # Megatron-LM: training
    "data_parallel_random_init": "not supported: all replicas start equal",
    "decoupled_lr": _DECOUPLED,
    "decoupled_min_lr": _DECOUPLED,
    "end_weight_decay": "not supported: {weight_decay} is constant",
    "exit_duration_in_mins": _SIGNAL,
    "exit_signal": _SIGNAL,
    "exit_signal_handler": _SIGNAL,
    "lr_decay_samples": _SCHEDULE_SAMPLES,
    "lr_warmup_fraction": _WARMUP,
    "lr_warmup_samples": _WARMUP,
    "lr_wsd_decay_samples": (
        "give it in steps or in tokens: {lr_wsd_decay_iters} or {lr_wsd_decay_tokens}"
    ),
    "override_opt_param_scheduler": "leave it out: the schedule always follows the settings",
    "start_weight_decay": "not supported: {weight_decay} is constant",
    "train_samples": "use {train_iters}: samples / {global_batch_size}",
    "use_checkpoint_opt_param_scheduler": "leave it out: the schedule always follows the settings",
    "warmup": _WARMUP,
    "weight_decay_incr_style": "not supported: {weight_decay} is constant",
    # Megatron-LM: data
    "data_cache_path": "leave it out: there is no index cache",
    "dataloader_type": "leave it out: samples are reshuffled in each epoch",
    "fim_data": "use {objective} fim",
    "merge_file": _TOKENIZER,
    "num_dataset_builder_threads": "leave it out: there is no index to build",
    "split": (
        "hold out documents with tools/preprocess_corpus.py --holdout-fraction, and give them as "
        "{valid_data_path}"
    ),
    "test_data_path": "no test in the run: use {valid_data_path}, or tools/evaluate.py after it",
    "tokenizer_type": "leave it out: it follows from the file; " + _TOKENIZER,
    "vocab_extra_ids": "leave it out: sentinels are the tokenizer's (tools/train_tokenizer.py)",
    "vocab_file": _TOKENIZER,
    "yaml_cfg": "use --config RECIPE.yaml",
    # Megatron-LM: checkpoints and logs
    "auto_detect_ckpt_format": _ALWAYS,
    "ckpt_format": "leave it out: checkpoints are megatron-core's torch_dist",
    "ckpt_fully_parallel_load": "leave it out: megatron-core decides",
    "ckpt_fully_parallel_save": "leave it out: megatron-core decides",
    "ckpt_step": "give the folder of the step: {load} RUN/step_0000100",
    "dist_ckpt_format": "leave it out: checkpoints are megatron-core's torch_dist",
    "exit_on_missing_checkpoint": _ALWAYS,
    "log_memory_to_tensorboard": _LOGGED,
    "log_num_zeros_in_grad": "not measured: leave it out",
    "log_params_norm": "not measured: leave it out",
    "log_progress": _LOGGED,
    "log_throughput": _LOGGED,
    "log_timers_to_tensorboard": _LOGGED,
    "log_validation_ppl_to_tensorboard": _LOGGED,
    "no_save_optim": "not supported: a checkpoint has the optimizer; {no_load_optim} skips it",
    "no_save_rng": "not supported: a checkpoint has the states; {no_load_rng} skips them",
    "non_persistent_save_interval": "use {save_interval} with {keep_last}",
    "pretrained_checkpoint": "use {load} with {finetune}",
    "tensorboard_log_interval": "leave it out: TensorBoard has every step",
    "use_checkpoint_args": "give --config RUN/settings.yaml with {load} RUN",
    "use_dist_ckpt": _ALWAYS,
    # config.json of HuggingFace models
    "activation_function": "use {ffn_type}",
    "architectures": "tools/convert_checkpoint.py from-hf reads a model's config.json",
    "attention_bias": "use {add_qkv_bias}, or {add_bias_linear} for all linear layers",
    "aux_loss_alpha": _AUX,
    "clip_qkv": "not supported: use {qk_layernorm}",
    "decoder_sparse_step": "use {moe_layer_freq} with {moe_layer_position} last",
    "dtype": "use {bf16}",
    "hidden_act": "use {ffn_type}: silu is swiglu, gelu with a gate is geglu",
    "mlp_bias": "use {add_bias_linear}",
    "mlp_only_layers": "use {moe_layer_freq} as a list of 0 and 1",
    "model_type": "tools/convert_checkpoint.py from-hf reads a model's config.json",
    "n_shared_experts": _EXPERTS,
    "norm_topk_prob": "true: turn {moe_router_pre_softmax} off; false: turn it on",
    "num_shared_experts": _EXPERTS,
    "rope_scaling": "use {rope_type} with {rotary_scaling_factor}",
    "router_aux_loss_coef": _AUX,
    "router_jitter_noise": "use {moe_input_jitter_eps}",
    "router_z_loss_coef": "use {moe_z_loss_coeff}, a sum over layers",
    "sliding_window": "a sliding window is not supported",
    "tie_word_embeddings": "use {untie_embeddings_and_output_weights}, its opposite",
    "topk_method": "use {moe_router_num_groups}, {moe_router_enable_expert_bias}",
    "torch_dtype": "use {bf16}",
    "use_cache": "leave it out: it is for generation (tools/generate.py)",
    "use_sliding_window": "a sliding window is not supported",
    # TrainingArguments, DeepSpeed, launchers
    "deepspeed": "not supported: parallelism is megatron-core's; use {use_distributed_optimizer}",
    "dropout": "use {hidden_dropout}, {attention_dropout}",
    "epochs": "use {train_iters}; {max_epochs} is a limit",
    "gradient_accumulation_steps": (
        "leave it out: it is {global_batch_size} / ({micro_batch_size} x data-parallel ranks)"
    ),
    "gradient_checkpointing": "use {recompute_granularity} full with {recompute_method} uniform",
    "model_name_or_path": "import it with tools/convert_checkpoint.py from-hf, then {load} it",
    "nnodes": _TORCHRUN,
    "nodes": _TORCHRUN,
    "nproc_per_node": _TORCHRUN,
    "ntasks": _TORCHRUN,
    "ntasks_per_node": _TORCHRUN,
    "num_epochs": "use {train_iters}; {max_epochs} is a limit",
    "num_train_epochs": "use {train_iters}; {max_epochs} is a limit",
    "overwrite_output_dir": "not supported: a run is never overwritten; choose another {save}",
    "per_device_eval_batch_size": "leave it out: evaluation takes {micro_batch_size}",
    "report_to": "use {tensorboard} or {wandb_project}",
    "warmup_ratio": _WARMUP,
    "zero_stage": "use {use_distributed_optimizer}, which is stage 1",
}
"""Foreign name -> advice, where no setting has the same meaning, scale or sign."""

PREFIXES: dict[str, str] = {
    "dino": "vision models are not supported",
    "grpo": "reinforcement learning is not supported",
    "hybrid": "state-space layers are not supported",
    "inference": "generation has a tool of its own: tools/generate.py",
    "inprocess": "restarts within a process are not supported: run the same command again",
    "langrl": "reinforcement learning is not supported",
    "linear": "linear attention is not supported",
    "mamba": "state-space layers are not supported",
    "retriever": "retrieval is not supported",
    "rl": "reinforcement learning is not supported",
    "straggler": "only --log-straggler is supported; see --log-straggler-interval",
    "vision": "vision models are not supported",
}
"""First word of Megatron-LM's flags of an unsupported subject -> advice."""
