"""What others call the keys of the configuration and the cluster file, for messages alone.

LLaMA-Factory's and transformers' flags, Slurm's options, and what people say.
"""

from __future__ import annotations

CONFIG = {
    **dict.fromkeys(("lr", "learningrate", "peak_lr"), "train.learning_rate"),
    **dict.fromkeys(("epoch", "num_epochs", "num_train_epochs"), "train.epochs"),
    **dict.fromkeys(
        ("batch", "batch_size", "bs", "train_batch_size", "per_device_train_batch_size",
         "gradient_accumulation_steps", "accumulation", "grad_accum", "global_batch_size"),
        "train.global_batch",
    ),
    **dict.fromkeys(("eval_batch_size", "per_device_eval_batch_size"), "infer.max_tokens"),
    **dict.fromkeys(("steps", "num_steps", "max_train_steps"), "train.max_steps"),
    **dict.fromkeys(("warmup", "warmup_ratio", "num_warmup_steps"), "train.warmup_steps"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "lr_scheduler_type"), "train.schedule"),
    **dict.fromkeys(("fp16", "bf16", "dtype", "torch_dtype", "mixed_precision", "pure_bf16"),
                    "train.precision"),
    **dict.fromkeys(("eval_steps", "eval_every", "evaluation_steps"), "train.evaluate_every"),
    **dict.fromkeys(("logging_steps", "log_steps"), "train.log_every"),
    **dict.fromkeys(("save_steps", "checkpoint_every"), "train.save_every_steps"),
    **dict.fromkeys(("save_total_limit", "keep"), "train.keep_checkpoints"),
    **dict.fromkeys(("grad_clip", "clip", "max_norm"), "train.max_grad_norm"),
    **dict.fromkeys(("betas", "adam_beta1", "adam_beta2"), "train.adam_betas"),
    **dict.fromkeys(("eps", "adam_eps"), "train.adam_epsilon"),
    **dict.fromkeys(("wd", "decay"), "train.weight_decay"),
    **dict.fromkeys(("report_to", "tb", "logging_dir"), "train.tensorboard"),
    **dict.fromkeys(("nproc_per_node", "world_size", "num_gpus", "num_processes"), "train.nproc"),
    **dict.fromkeys(("lora_rank", "lora_r", "r"), "lora.rank"),
    **dict.fromkeys(("lora_alpha",), "lora.alpha"),
    **dict.fromkeys(("lora_dropout",), "lora.dropout"),
    **dict.fromkeys(("lora_target", "target_modules", "lora_target_modules"), "lora.target"),
    **dict.fromkeys(
        ("model_name", "model_path", "model_name_or_path", "base_model", "model_id", "checkpoint"),
        "model.path",
    ),
    **dict.fromkeys(("dataset_name", "dataset_dir", "train_file"), "data.train"),
    **dict.fromkeys(("test_file", "eval_dataset", "validation_file"), "data.test"),
    **dict.fromkeys(("max_samples", "n_train", "num_samples"), "data.train_rows"),
    **dict.fromkeys(("val_size", "validation_split", "eval_ratio"), "data.validation_share"),
    **dict.fromkeys(("cutoff_len", "max_length", "max_seq_length", "max_len", "max_seq_len",
                     "model_max_length"), "data.cutoff"),
    **dict.fromkeys(("text", "text_field", "content", "prompt_column"), "data.text_column"),
    **dict.fromkeys(("label", "labels_column", "response_column"), "data.label_column"),
    **dict.fromkeys(("instruction",), "prompt.template"),
    **dict.fromkeys(("random_seed", "random_state", "manual_seed"), "seed"),
    **dict.fromkeys(("num_shards", "shard", "n_shards"), "infer.shards"),
    **dict.fromkeys(("predict_with_generate", "do_predict", "generate"), "infer.mode"),
    **dict.fromkeys(("max_generate_length", "max_new", "generation_max_length"),
                    "infer.max_new_tokens"),
    **dict.fromkeys(("hub_model_id", "repo", "repository", "push_to_hub"), "publish.repo_id"),
    **dict.fromkeys(("hub_private", "private_repo", "hub_private_repo"), "publish.private"),
    **dict.fromkeys(("hub_token", "token", "hf_token"), "publish.token_file"),
}  # fmt: skip
"""Name, lower case with `_`, without its section → dotted key."""

CLUSTER = {
    **dict.fromkeys(("walltime", "timelimit", "time_limit", "limit", "hours"), "time"),
    **dict.fromkeys(("mem", "ram", "mem_per_node"), "memory"),
    **dict.fromkeys(("cpus_per_task", "ncpus", "cores", "num_cpus"), "cpus"),
    **dict.fromkeys(("gres", "num_gpus", "gpus_per_node", "ngpus", "gpu"), "gpus"),
    **dict.fromkeys(("gputype", "gpu_name", "card"), "gpu_type"),
    **dict.fromkeys(("queue",), "partition"),
    **dict.fromkeys(("project", "allocation"), "account"),
    **dict.fromkeys(("nnodes", "num_nodes"), "nodes"),
    **dict.fromkeys(("feature", "features"), "constraint"),
    **dict.fromkeys(("email", "mail"), "mail_user"),
    **dict.fromkeys(("sif", "apptainer", "singularity", "img", "path"), "image"),
    **dict.fromkeys(("bind", "mounts", "mount", "volumes"), "binds"),
    **dict.fromkeys(("modules", "module", "prologue", "init"), "setup"),
}
"""Name → key of the section that it stands in."""

COMMANDS = {
    **dict.fromkeys(("finetune", "fine-tune", "fit", "sft"), "submit train"),
    **dict.fromkeys(("predict-all", "inference", "test"), "submit infer"),
    **dict.fromkeys(("evaluate", "eval", "metrics", "report", "table"), "collect"),
    **dict.fromkeys(("upload", "push"), "publish"),
    **dict.fromkeys(("download", "pull", "get"), "fetch"),
    **dict.fromkeys(("kill", "stop", "scancel", "abort"), "cancel"),
    **dict.fromkeys(("log", "tail"), "logs"),
    **dict.fromkeys(("resume", "start", "launch", "sbatch", "all"), "submit all"),
    **dict.fromkeys(("show", "show-config"), "config show"),
    **dict.fromkeys(("build",), "image build"),
    **dict.fromkeys(("check", "diagnose"), "doctor"),
    **dict.fromkeys(("merge",), "export --merged"),
    **dict.fromkeys(("cost", "estimate", "forecast"), "plan"),
    **dict.fromkeys(("squeue", "ps", "top"), "status"),
}
"""What is typed for a command → the command."""


def key_of(name: str) -> str | None:
    """The configuration's key that a flag or a key of another tool means."""
    return CONFIG.get(name.strip("-").rpartition(".")[2].lower().replace("-", "_"))
