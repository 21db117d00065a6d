"""What others call our keys, values, options and commands, for messages alone.

LLaMA-Factory's, transformers', TRL's and PEFT's names, Slurm's options, and what people say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from yelp_hpc.errors import nearest


def _names(meant: Mapping[str, str]) -> dict[str, str]:
    """What is meant → its other names, turned round: name → what is meant."""
    return {name: key for key, names in meant.items() for name in names.split()}


CONFIG = _names(
    {
        "train.learning_rate": "lr learningrate peak_lr max_lr",
        "train.epochs": "epoch num_epochs num_train_epochs n_epochs max_epochs",
        "train.global_batch": (
            "batch batch_size bs train_batch_size per_device_train_batch_size "
            "gradient_accumulation_steps accumulation grad_accum global_batch_size "
            "per_device_batch_size auto_find_batch_size batchsize micro_batch_size"
        ),
        "infer.max_tokens": "eval_batch_size per_device_eval_batch_size",
        "train.max_steps": "steps num_steps max_train_steps",
        "train.warmup_steps": (
            "warmup warmup_ratio num_warmup_steps warmup_proportion lr_warmup_steps"
        ),
        "train.schedule": "scheduler lr_scheduler lr_scheduler_type",
        "train.precision": (
            "fp16 bf16 fp32 tf32 dtype torch_dtype mixed_precision pure_bf16 compute_dtype "
            "bnb_4bit_compute_dtype infer_dtype"
        ),
        "train.evaluate_every": (
            "eval_steps eval_every evaluation_steps eval_strategy evaluation_strategy "
            "do_eval evals_per_epoch eval_interval"
        ),
        "train.log_every": "logging_steps log_steps logging_strategy log_interval",
        "train.save_every_steps": (
            "save_steps checkpoint_every save_strategy save_every saves_per_epoch save_interval"
        ),
        "train.keep_checkpoints": "save_total_limit keep",
        "train.max_grad_norm": "grad_clip clip max_norm gradient_clipping clip_grad_norm",
        "train.adam_betas": "betas beta1 beta2 adam_beta1 adam_beta2",
        "train.adam_epsilon": "eps epsilon adam_eps",
        "train.weight_decay": "wd decay",
        "train.trackers": (
            "report_to tb logging_dir wandb mlflow trackio use_wandb tracker swanlab "
            "wandb_project wandb_run use_mlflow mlflow_experiment_name"
        ),
        "train.nproc": "nproc_per_node world_size num_processes ddp",
        "train.gradient_checkpointing": (
            "gradient_checkpoint disable_gradient_checkpointing activation_checkpointing "
            "use_gradient_checkpointing"
        ),
        "lora.rank": "lora_rank lora_r r lora_dim",
        "lora.alpha": "lora_alpha lora_scaling",
        "lora.dropout": "lora_dropout",
        "lora.target": (
            "lora_target target_modules lora_target_modules targets lora_target_linear"
        ),
        "model.path": (
            "model_name model_path model_name_or_path base_model model_id checkpoint "
            "name_or_path pretrained_model_name_or_path model tokenizer tokenizer_name "
            "model_dir"
        ),
        "data.train": (
            "dataset_name dataset_dir train_file train_files train_data train_dataset "
            "data_path dataset data input data_file data_files datasets dataset_path"
        ),
        "data.test": (
            "test_file eval_dataset validation_file test_data test_dataset eval_file dev_file"
        ),
        "data.train_rows": "max_samples n_train num_samples max_train_samples",
        "data.validation_share": (
            "val_size validation_split eval_ratio val_ratio dev_ratio test_split_ratio val_set_size"
        ),
        "data.cutoff": (
            "cutoff_len max_length max_seq_length max_len max_seq_len model_max_length "
            "seq_length sequence_length block_size context_length sequence_len"
        ),
        "data.test_rows": "max_eval_samples max_predict_samples n_test",
        "data.text_column": (
            "text text_field content prompt_column dataset_text_field input_column review_column"
        ),
        "data.label_column": "label labels_column response_column target_column rating_column",
        "prompt.template": "instruction prompt chat_template system_prompt",
        "seed": "random_seed random_state manual_seed data_seed",
        "infer.shards": "num_shards shard n_shards array sharding",
        "infer.mode": "predict_with_generate generate generation",
        "infer.max_new_tokens": "max_generate_length max_new generation_max_length",
        "publish.repo_id": "hub_model_id repo repository push_to_hub hub_repo export_hub_model_id",
        "publish.private": "hub_private private_repo hub_private_repo",
        "publish.token_file": "hub_token token hf_token",
    }
)
"""Name, lower case with `_`, without its section → dotted key."""

CLUSTER = _names(
    {
        "time": "walltime timelimit time_limit limit hours",
        "memory": "mem ram mem_per_node",
        "cpus": "cpus_per_task ncpus cores num_cpus",
        "gpus": "gres num_gpus gpus_per_node ngpus gpu",
        "gpu_type": "gputype gpu_name card",
        "partition": "queue",
        "account": "project allocation",
        "nodes": "nnodes num_nodes",
        "constraint": "feature features",
        "mail_user": "email mail",
        "qos": "quality_of_service",
        "exclude": "exclude_nodes",
        "image": "sif apptainer singularity img path",
        "binds": "bind mounts mount volumes",
        "setup": "modules module prologue init",
    }
)
"""Name → key of the section that it stands in."""

_SECTIONS = ("defaults", "container", "array_parallelism", "cluster", "slurm", "sbatch")
OF_A_SITE = frozenset((*_SECTIONS, *CLUSTER, *CLUSTER.values()))
"""What belongs into a cluster file, and not into a config."""

NO_KEY = _names(
    {
        "what a run writes goes into its run directory: --run DIR": (
            "output_dir logging_path export_dir save_path out_dir"
        ),
        ("nothing is overwritten: name another --run DIR, or remove the old one"): (
            "overwrite_output_dir overwrite_cache overwrite force clean restart"
        ),
        ("a run goes on by itself from its last checkpoint: submit it again with the same --run"): (
            "resume resume_from_checkpoint continue requeue ignore_data_skip"
        ),
        ("each stage is a word of the command line: `python -m yelp_hpc submit train`, or all"): (
            "stage do_train do_predict do_infer"
        ),
        (
            "a plain LoRA adapter is trained, always; its keys are lora.rank, lora.alpha, "
            "lora.dropout and lora.target"
        ): (
            "finetuning_type use_peft use_lora peft peft_type task_type bias modules_to_save "
            "lora_modules_to_save "
            "additional_target use_rslora use_dora init_lora_weights"
        ),
        ("the optimizer is AdamW in fp32; leave it out (train.adam_betas, …)"): ("optim optimizer"),
        (
            "ranks are started by the toolkit, plain data parallel: train.nproc, and gpus and "
            "nodes of the cluster file; leave it out"
        ): (
            "deepspeed fsdp fsdp_config ddp_timeout ddp_find_unused_parameters ddp_backend "
            "local_rank accelerate distributed ntasks ntasks_per_node"
        ),
        (
            "quantised training is not done; what saves memory: train.precision and "
            "train.gradient_checkpointing"
        ): (
            "quantization_bit quantization_method load_in_4bit load_in_8bit "
            "quantization_config use_qlora double_quantization use_4bit"
        ),
        (
            "a run trains its own adapter; one that exists is named by train.adapter, to be "
            "evaluated, or by train.from, to be trained on"
        ): ("adapter_name_or_path adapter adapter_path lora_weights create_new_adapter"),
        (
            "the adapter is the one after the last step; validation is in train/log.jsonl; "
            "leave it out"
        ): (
            "load_best_model_at_end metric_for_best_model greater_is_better "
            "early_stopping_patience early_stopping_steps early_stopping "
            "early_stopping_callback"
        ),
        "sequences are packed without padding, always; leave it out": (
            "packing neat_packing group_by_length flash_attn attn_implementation use_unsloth "
            "enable_liger_kernel use_flash_attention_2 sdp_attention padding "
            "pad_to_max_length sample_packing pad_to_sequence_len flash_attention sdpa"
        ),
        "the loss is of the answer alone, always; leave it out": (
            "train_on_inputs train_on_prompt mask_prompt mask_history completion_only_loss "
            "assistant_only_loss"
        ),
        "the model's own folder says it: model.path; leave it out": (
            "model_type architecture tokenizer_type use_fast_tokenizer special_tokens eos_token "
            "bos_token pad_token resize_vocab split_special_tokens tokenizer_config"
        ),
        "answers are given by the toolkit itself, a job a shard: infer.shards; leave it out": (
            "vllm infer_backend gpu_memory_utilization tensor_parallel_size "
            "pipeline_parallel_size vllm_maxlen engine"
        ),
        "a GPU is taken where there is one; leave it out": (
            "device device_map use_cpu no_cuda cuda cpu"
        ),
        "`logs --run DIR` shows the log and `status --run DIR` the state; leave it out": (
            "verbose quiet silent debug log_level loglevel logging_level"
        ),
        "nothing is asked; leave it out": "yes assume_yes no_input",
        "data are read once, by prepare; leave it out": (
            "dataloader_num_workers preprocessing_num_workers num_workers streaming "
            "remove_unused_columns dataloader_pin_memory dataset_num_proc buffer_size"
        ),
        ("the loss is always drawn: train/loss.png and report.html; leave it out"): ("plot_loss"),
        "`status --run DIR --watch` follows a run": "follow live f",
        "it is not done; leave it out": (
            "neftune_noise_alpha label_smoothing_factor label_smoothing loraplus_lr_ratio "
            "mixture_of_depths pissa_init use_badam use_galore torch_compile compile ema "
            "cpu_offload offload"
        ),
        ("answers are scored, or decoded greedily (infer.mode): nothing is drawn; leave it out"): (
            "temperature top_p do_sample num_beams repetition_penalty"
        ),
        "the key is name: --set name=…": "run_name experiment_name job_name project_name",
        "code that comes with a model is never run; leave it out": "trust_remote_code",
        ("downloads go to YELP_HPC_CACHE, a variable of the shell; HF_HOME is looked at first"): (
            "cache_dir hf_home"
        ),
        ("the labels are listed: task.labels, and task.names for people"): (
            "num_labels classes num_classes label_names id2label"
        ),
    }
)
"""Name of another tool that has no key here → what there is instead."""

OPTIONS = {
    "--input FILE": "in data infile file text source i",
    "--out DIR": "output o outfile target run run_dir dir",
    "--version": "v version",
    "--run DIR": "out output run_dir rundir run_directory dir d output_dir out_dir",
    "--config FILE": "c f conf cfg config_file yaml file",
    "--cluster FILE": "cluster_file cluster_config slurm site",
    "--executor local": "local here no_slurm",
    "--set a.b=c": "s override overrides o",
    "--dry-run": "n dryrun dry test_only print",
    "--wait": "f follow w block foreground",
    "--watch": "follow w live",
    "--lines": "n tail num_lines",
    "--json": "j jsonl format",
    "--gpu NAME": "card gpu_type gpus",
}
"""Option → what is typed for it."""

CHOICES = {
    "prepare": "preprocess preparation tokenize tokenise data prep",
    "train": "training finetune fine-tune finetuning sft fit",
    "infer": "inference predict prediction predictions test generate",
    "collect": "evaluate evaluation eval metrics report score table",
    "publish": "upload push push_to_hub hub",
    "all": "everything chain pipeline full",
    "local": "here none bash direct debug apptainer",
    "slurm": "sbatch cluster hpc queue",
    "fp16": "float16 half torch.float16 16 amp",
    "bf16": "bfloat16 torch.bfloat16 bf",
    "fp32": "float32 float full torch.float32 32 tf32",
    "cosine": "cosine_with_restarts cosine_with_min_lr cos",
    "constant": "constant_with_warmup const none",
    "linear": "polynomial lin",
    "file": "csv tsv json jsonl parquet local files path",
    "hub": "huggingface hugging_face hf datasets hf_hub",
    "generate": "greedy generation sample sampling text",
    "score": "scoring likelihood logits logprob classify",
    "tuned": "finetuned fine-tuned lora adapter sft trained",
    "base": "pretrained original raw vanilla untuned",
    "on": "true yes always",
    "off": "false no never",
}
"""Word that a key or an argument takes → what is written for it."""

SBATCH = frozenset(
    {
        *("reservation", "nodelist", "exclusive", "comment", "mem-per-cpu", "mem-per-gpu", "begin"),
        *("gpus-per-task", "gpu-bind", "licenses", "tmp", "switches", "nice", "priority", "hint"),
        *("distribution", "cpus-per-gpu", "gres-flags", "deadline", "clusters", "wckey", "chdir"),
        *("get-user-env", "prefer", "profile", "threads-per-core", "use-min-nodes"),
    }
)
"""sbatch's options that have no key of their own: they go into `sbatch:`."""

SHORT = {
    **{"p": "partition", "A": "account", "t": "time", "N": "nodes", "C": "constraint", "q": "qos"},
    **{"G": "gpus", "x": "exclude", "c": "cpus-per-task", "n": "ntasks", "J": "job-name"},
    **{"o": "output", "e": "error", "d": "dependency", "a": "array", "W": "wait", "Q": "quiet"},
    **{"w": "nodelist", "L": "licenses", "D": "chdir", "M": "clusters", "m": "distribution"},
    **{"H": "hold", "b": "begin", "S": "core-spec", "B": "extra-node-info", "k": "no-kill"},
}
"""sbatch's short option → the long one."""

COMMANDS = _names(
    {
        "submit train": "finetune fine-tune fit sft",
        "submit infer": "predict-all inference test",
        "collect": "evaluate eval metrics report table",
        "publish": "upload push",
        "fetch": "download pull get",
        "cancel": "kill stop scancel abort",
        "logs": "log tail",
        "submit all": "resume start launch sbatch all",
        "config show": "show show-config",
        "image build": "build container apptainer singularity",
        "doctor": "check diagnose",
        "export --merged": "merge",
        "plan": "cost estimate forecast",
        "status": "squeue ps top state jobs queue watch",
        "--help": "help h usage man commands",
        "--version": "version v",
        "init": "setup configure new",
        "reproduce": "replicate repeat",
    }
)
"""What is typed for a command → the command."""


def key_of(name: str) -> str | None:
    """The configuration's key that a flag or a key of another tool means."""
    return CONFIG.get(name.strip("-").rpartition(".")[2].lower().replace("-", "_"))


def word_meant(written: object, allowed: Iterable[str]) -> str | None:
    """The one of the `allowed` words that is meant; None when nothing like it is known."""
    text = str(written).strip().lower()
    known = list(allowed)
    other = (word for word in known if text in CHOICES.get(word, "").split())
    return next(other, None) or nearest(text, known, cutoff=0.6)


def value_meant(key: str, value: object) -> str | None:
    """What there is instead of a value that `key` does not take; None: its type says it all."""
    if key == "lora.target" and str(value).strip() in ("all", "all-linear", "all_linear"):
        return (
            "no word stands for all modules: name them, as in [q_proj, v_proj]; a name that the "
            "model does not know is answered with those that it has"
        )
    if key.startswith("infer.models.") and word_meant(value, ("base", "tuned")) is None:
        return (
            "input should be base or tuned; an adapter that exists is named by train.adapter, "
            "several are a study, whose FILE has `train.adapter: [A, B]`"
        )
    if key.endswith(".gpus") and ":" in str(value):
        kind, _, count = str(value).removeprefix("gpu:").rpartition(":")
        return f"input should be a whole number: gpus: {count}" + (kind and f", gpu_type: {kind}")
    if key.endswith(".sbatch") and (value is True or value is None):
        return "input should be text: '' for an option that takes no value"
    return None
