"""Natural mistakes: the message names the thing and the next command; nothing is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_malformed import call
from tests.tiny import SIF
from yelp_hpc.cli.main import cli

SUBMIT = "submit all --config c.yaml --run run --executor local"
LONG = "x" * 300
SHOW = "config show --config c.yaml --set"
DRY = "submit all --config c.yaml --run run --dry-run --cluster cl.yaml"

TYPED = [
    # flags of other tools
    (f"{SUBMIT} --lr 1e-4", "--set train.learning_rate=VALUE"),
    (f"{SUBMIT} --learning_rate 1e-4", "--set train.learning_rate=VALUE"),
    (f"{SUBMIT} --epochs 3", "--set train.epochs=VALUE"),
    (f"{SUBMIT} --num_train_epochs 3.0", "--set train.epochs=VALUE"),
    (f"{SUBMIT} --batch-size 8", "--set train.global_batch=VALUE"),
    (f"{SUBMIT} --per_device_train_batch_size 4", "--set train.global_batch=VALUE"),
    (f"{SUBMIT} --gradient_accumulation_steps 2", "--set train.global_batch=VALUE"),
    (f"{SUBMIT} --lora_rank 8", "--set lora.rank=VALUE"),
    (f"{SUBMIT} --lora_target q_proj", "--set lora.target=VALUE"),
    (f"{SUBMIT} --model_name_or_path x", "--set model.path=VALUE"),
    (f"{SUBMIT} --cutoff_len 512", "--set data.cutoff=VALUE"),
    (f"{SUBMIT} --max_samples 100", "--set data.train_rows=VALUE"),
    (f"{SUBMIT} --val_size 0.1", "--set data.validation_share=VALUE"),
    (f"{SUBMIT} --lr_scheduler_type cosine", "--set train.schedule=VALUE"),
    (f"{SUBMIT} --logging_steps 10", "--set train.log_every=VALUE"),
    (f"{SUBMIT} --save_steps 100", "--set train.save_every_steps=VALUE"),
    (f"{SUBMIT} --fp16", "--set train.precision=VALUE"),
    (f"{SUBMIT} --seed 1", "--set seed=VALUE"),
    (f"{SUBMIT} --train.epochs 1", "--set train.epochs=VALUE"),
    (f"{SUBMIT} --hub_model_id a/b", "--set publish.repo_id=VALUE"),
    (f"{SUBMIT} --shards 4", "--set infer.shards=VALUE"),
    (f"{SUBMIT} --model x", "--set model.path=VALUE"),
    (f"{SUBMIT} --adam_beta1 0.9", "--set train.adam_betas=VALUE"),
    (f"{SUBMIT} --eval_strategy steps", "--set train.evaluate_every=VALUE"),
    (f"{SUBMIT} --sequence_len 512", "--set data.cutoff=VALUE"),
    (f"{SUBMIT} --micro_batch_size 2", "--set train.global_batch=VALUE"),
    (f"{SUBMIT} --val_set_size 0.1", "--set data.validation_share=VALUE"),
    (f"{SUBMIT} --wandb_project x", "--set train.trackers=VALUE"),
    # flags for which there is something else
    (f"{SUBMIT} --sample_packing", "always; leave it out"),
    (f"{SUBMIT} --train_on_inputs false", "the answer alone, always"),
    (f"{SUBMIT} --adapter_name_or_path x", "named by train.adapter"),
    (f"{SUBMIT} --tensor_parallel_size 4", "a job a shard: infer.shards"),
    (f"{SUBMIT} --eos_token x", "model's own folder"),
    (f"{SUBMIT} --device cuda", "taken where there is one"),
    (f"{SUBMIT} --verbose", "`logs --run DIR`"),
    (f"{SUBMIT} --yes", "nothing is asked"),
    (f"{SUBMIT} --frobnicate", "submit takes no --frobnicate; it takes {prepare|train"),
    ("compare --run a --run b", "it takes RUN…, --json, --html"),
    ("study s.yaml --config c.yaml --run out", "did you mean --out DIR?"),
    ("--run run status", "`python -m yelp_hpc COMMAND --run …`"),
    (f"{SUBMIT} --stage sft", "submit train"),
    (f"{SUBMIT} --do_train", "submit train"),
    (f"{SUBMIT} --finetuning_type lora", "lora.rank"),
    (f"{SUBMIT} --output_dir out", "--run DIR"),
    (f"{SUBMIT} --overwrite_output_dir", "name another --run DIR"),
    (f"{SUBMIT} --resume_from_checkpoint last", "submit it again with the same --run"),
    (f"{SUBMIT} --quantization_bit 4", "train.precision"),
    (f"{SUBMIT} --deepspeed ds.json", "train.nproc"),
    (f"{SUBMIT} --plot_loss", "train/loss.png"),
    (f"{SUBMIT} --packing", "always; leave it out"),
    (f"{SUBMIT} --load_best_model_at_end", "after the last step"),
    (f"{SUBMIT} --run_name x", "--set name="),
    # the cluster's, and our own spelt otherwise
    (f"{SUBMIT} --partition gpu", "`partition: VALUE` under `defaults:`"),
    (f"{SUBMIT} --mem 64G", "`memory: VALUE` under `defaults:`"),
    (f"{SUBMIT} --gres gpu:1", "`gpus: VALUE` under `defaults:`"),
    (f"{SUBMIT} --reservation x", "`sbatch: {reservation: VALUE}`"),
    (f"{SUBMIT} --qos high", "`qos: VALUE` under `defaults:`"),
    (f"{SUBMIT} --exclude n1", "`exclude: VALUE` under `defaults:`"),
    (f"{SUBMIT} -p gpu", "`partition: VALUE`"),
    (f"{SUBMIT} -L matlab", "sbatch: {licenses: VALUE}"),
    (f"{SUBMIT} --ntasks 4", "ranks are started by the toolkit"),
    (f"{SUBMIT} --dryrun", "did you mean --dry-run?"),
    (f"{SUBMIT} --follow", "did you mean --wait?"),
    ("submit all -c c.yaml --run run", "did you mean --config FILE?"),
    ("submit all --config c.yaml --out run", "did you mean --run DIR?"),
    ("submit all --config c.yaml --run run --local", "did you mean --executor local?"),
    ("submit all --config c.yaml --run run --set train.epochs 3", "`--set train.epochs=3`"),
    ("submit all --config c.yaml --run run --set name=my run", "quotes: --set 'name=my run'"),
    ("predict reviews.csv", "`--input reviews.csv`"),
    ("init reviews.csv", "`--data reviews.csv`"),
    ("reproduce run", "`--from run`"),
    ("predict --run run --data reviews.csv", "did you mean --input FILE?"),
    ("predict --run run --input reviews.csv --output x.csv", "did you mean --out FILE?"),
    ("status --run run train", "status takes no train; it takes --run, --json, --watch"),
    ("collect --run run --set collect.bootstrap=9", "`python -m yelp_hpc submit collect --config"),
    ("init --data revews.csv", "revews.csv does not exist; did you mean reviews.csv?"),
    ("submit all --config c.yaml --run run --set", "--set needs a.b=c behind it"),
    ("status --run c.yaml", "--run takes a folder, and c.yaml is a file"),
    ("run all --run run", "`submit all --executor local`"),
    ("submit train infer --config c.yaml --run run", "one stage at a time"),
    ("submit train,infer --config c.yaml --run run", "one at a time"),
    ("collect --config c.yaml --run run", "the run directory holds its configuration"),
    ("status run", "write `--run run`"),
    ("cancel", "--run DIR is missing"),
    ("plan c.yaml", "`--config c.yaml`"),
    ("submit --config c.yaml --run run", "submit needs one of prepare, train"),
    ("logs --follow --run run", "status --run DIR --watch"),
    ("submit all --config c.yaml --run run --executor apptainer", "did you mean local?"),
    ("submit training --config c.yaml --run run", "did you mean train?"),
    ("submit evaluate --config c.yaml --run run", "did you mean collect?"),
    # keys that are called otherwise
    (f"{SHOW} train.lr=1", "did you mean train.learning_rate?"),
    (f"{SHOW} train.batch=1", "did you mean train.global_batch?"),
    (f"{SHOW} train.batch_size=1", "did you mean train.global_batch?"),
    (f"{SHOW} train.num_train_epochs=1", "did you mean train.epochs?"),
    (f"{SHOW} model.name_or_path=x", "did you mean model.path?"),
    (f"{SHOW} lora.r=4", "did you mean lora.rank?"),
    (f"{SHOW} data.max_length=4", "did you mean data.cutoff?"),
    (f"{SHOW} train.seed=4", "did you mean seed?"),
    (f"{SHOW} learning_rate=4", "did you mean train.learning_rate?"),
    (f"{SHOW} lora.bias=none", "a plain LoRA adapter is trained"),
    (f"{SHOW} train.optim=adamw_8bit", "the optimizer is AdamW"),
    (f"{SHOW} defaults.time=3", "it belongs into a cluster file"),
    # values
    (
        f"{SHOW} train.precision=float16",
        "input should be auto or fp32 or bf16 or fp16; did you mean fp16?",
    ),
    (f"{SHOW} train.epochs=0.5", "train.epochs: input should be a whole number (got 0.5)"),
    (f"{SHOW} train.epochs=yes", "must be a number, not true or false"),
    (f"{SHOW} train.learning_rate=0,001", "with a decimal point"),
    (f"{SHOW} train.max_steps=-1", "null for none"),
    (f"{SHOW} train.warmup_steps=0.1", "input should be auto, or a whole number"),
    (f"{SHOW} lora.target=q_proj,v_proj", "input should be a list: [q_proj, v_proj]"),
    (f"{SHOW} infer.models=[finetuned]", "did you mean tuned?"),
    (f"{SHOW} data.source=csv", "did you mean file?"),
    (f"{SHOW} data.source=huggingface", "did you mean hub?"),
    (f"{SHOW} infer.mode=greedy", "did you mean generate?"),
    (f"{SHOW} model=chatglm3", "model: is a section"),
    (f"{SHOW} lora.target=all-linear", "no word stands for all modules"),
    (f"{SHOW} lora.target=[]", "input should hold at least 1 entry (got [])"),
    (f"{SHOW} lora.dropout=8%", "with a decimal point; write 0.08 (got '8%')"),
    (f"{SHOW} data.cutoff=1k", "a whole number; write 1000 (got '1k')"),
    (f"{SHOW} infer.models=both", "input should be a list, of base, tuned (got 'both')"),
    (f"{SHOW} infer.models=[base,runs/other]", "`train.adapter: [A, B]`"),
    (f"{SHOW} train.learning_rate.x=3", "--set: train.learning_rate: takes one value"),
    (f"{SHOW} seed=", "(got null)"),
    (f"{SHOW} seed=2024-13-45", "'2024-13-45' cannot be read as a date; a text stands in quotes"),
    (f"{SHOW} seed=!!python/name:os.system", "!!python/name:os.system is no kind of value here"),
    (f"{SHOW} train={{epochs:1,epochs:2}}", "--set:1: needs a space after the colon"),
    (f"{SHOW} model.revision=''", "--set: model.revision: is empty; leave it out"),
    (f"{SHOW} train.adapter=\x1b[31m", "holds the control character '\\x1b'"),
    (f"{SHOW} train.adapter=\udcff", "holds the control character '\\udcff'"),
    # commands
    ("train --config c.yaml --run run", "submit train --config FILE --run DIR"),
    ("infer --run run", "run infer --run DIR"),
    ("prepare", "submit prepare"),
    ("eval --run run", "python -m yelp_hpc collect"),
    ("kill --run run", "python -m yelp_hpc cancel"),
    ("download --config c.yaml", "python -m yelp_hpc fetch"),
    ("finetune", "python -m yelp_hpc submit train"),
    ("sumbit all", "python -m yelp_hpc submit`"),
    ("upload --run run", "python -m yelp_hpc publish`"),
    ("help", "python -m yelp_hpc --help"),
    ("version", "python -m yelp_hpc --version"),
    # the request
    ("submit publish --config c.yaml --run run --executor local", "--set publish.repo_id="),
    ("submit collect --config c.yaml --run run --executor local", "submit infer"),
    ("submit infer --config c.yaml --run run --executor local", "submit prepare"),
    ("submit train --config cc.yaml --run run", "did you mean c.yaml?"),
    ("status --run run", "submit all --config FILE --run run"),
    (f"{SUBMIT} --set model.path=modle", "did you mean model?"),
    (f"{SUBMIT} --set data.train=rewiews.csv", "did you mean reviews.csv?"),
    (f"{SUBMIT} --set data.label_column=stars", "it has: label, text"),
    (f"{SUBMIT} --cluster gone.yaml", "gone.yaml does not exist"),
    (f"{SUBMIT} --cluster c.yaml", "it belongs into a config, which --config names"),
    (f"{SUBMIT} --set model.path=model/config.json", "is a file; name its folder"),
    (f"{SUBMIT} --set model.path=https://huggingface.co/a/b", "model.path: a/b"),
    (f"{SUBMIT} --set data.train=https://x.org/r.csv", "is an address; download it"),
    (f"{SUBMIT} --set prompt.template={{review}}", "a text that begins with { stands in quotes"),
    (f"{SUBMIT} --set prompt.template={{a}}{{b}}", "a text with { [ : or # stands in quotes"),
    (
        "submit all --config c.yaml --run model --executor local",
        "model holds a model (config.json)",
    ),
    ("submit all --config old/run.json --run run", "reproduce --from old/run.json --run DIR"),
    ("study --config c.yaml --out s", "`python -m yelp_hpc study FILE --config FILE --out DIR`"),
    (
        "study lr.yaml --config c.yaml --out s --executor local",
        "be made: - model.path gone: there is",
    ),
    ("compare", "compare needs RUN…: `python -m yelp_hpc compare RUN…`"),
    ("config --config c.yaml", "`python -m yelp_hpc config COMMAND --config …`"),
    ("image --cuda", "`python -m yelp_hpc image COMMAND --cuda …`"),
    (f"{SUBMIT} --set model.path=c.yaml/x", "c.yaml/x cannot be there: c.yaml is a file"),
    (f"{SUBMIT} --set data.train=c.yaml/x", "c.yaml/x cannot be there: c.yaml is a file"),
    (f"{SUBMIT} --set data.train=~nobody9/x.csv", "data.train: ~nobody9 is no user here"),
    (f"{SUBMIT} --set model.path=~nobody9/x", "model.path: ~nobody9 is no user here"),
    (f"{SUBMIT} --set train.from=~nobody9/x", "~nobody9 is no user here"),
    (f"{SUBMIT} --set data.train=dead", "it is a link to gone, which is not there"),
    (f"{SUBMIT} --set train.adapter={LONG}", "is too long a name; choose a shorter one"),
    ("study c.yaml --config c.yaml --out c.yaml", "--out takes a folder, and c.yaml is a file"),
]
# a path that can be none, and every option that takes one
NO_PLACES = [
    ("c.yaml/x", "c.yaml/x cannot be there: c.yaml is a file; name another"),
    ("dead", "dead does not exist: it is a link to gone, which is not there"),
    ("dead/x", "dead does not exist: it is a link to gone, which is not there"),
    (LONG, "is too long a name; choose a shorter one"),
    ("", "it is empty (a variable that is not set?); write a name"),
    ("~nobody9/x", "~nobody9 is no user here"),
]
WRITING = [
    *("submit all --config c.yaml --run", "submit all --config c.yaml --dry-run --run"),
    *("demo --run", "study seeds.yaml --config c.yaml --out", "collect --run"),
    *("track --run", "plan --config c.yaml --run", "reproduce --from c.yaml --run"),
    *("predict --run . --input reviews.csv --out", "export --run . --merged --out"),
    *("export --run . --predictions", "compare . --html", "init --config", "init --cluster"),
]
READING = [
    *("status --run", "logs --run", "cancel --run", "verify --run", "publish --run", "compare"),
    *("run train --run", "reproduce --run new --from", "predict --run . --out o.csv --input"),
    *(
        "init --data",
        "submit all --run new --config",
        "submit all --run new --config c.yaml --cluster",
    ),
    *("fetch --config", "config show --config", "doctor --config", "doctor --run", "image check"),
]
CLUSTERS = [
    ("defaults: {account: 0123}", "defaults.account: put it in quotes: YAML reads it as a number"),
    ("defaults: {gpu_type: 3090}", "put it in quotes"),
    ("defaults: {partition: 2024-01-01}", "put it in quotes"),
    ("defaults: {walltime: '1:00:00'}", "did you mean defaults.time?"),
    ("defaults: {mem: 4G}", "did you mean defaults.memory?"),
    ("train: {gres: 'gpu:4'}", "did you mean train.gpus?"),
    ("defaults: {queue: gpu}", "did you mean defaults.partition?"),
    ("container: {sif: x.sif}", "did you mean container.image?"),
    ("container: {image: gone.sif}", "image build"),
    ("container: {image: reviews.csv}", "reviews.csv is no SIF image → python -m yelp_hpc image"),
    ("container: {image: model}", "model is no SIF image: it is no file"),
    ("container: {image: docker://a/b}", "apptainer pull FILE.sif docker://a/b"),
    ("container: x.sif", "container: is a section"),
    ("setup: module load apptainer", "input should be a list: [module load apptainer]"),
    ("defaults: {memory: 64}", "say the unit, as in 64G"),
    ("defaults: {memory: 64 GB}", "as 64G"),
    ("defaults: {time: 12h}", "H:M:S"),
    ("defaults: {gpus: 'rtx3090:4'}", "input should be a whole number"),
    ("defaults: {partition: [a, b]}", "input should be one text"),
    ("defaults: {nodelist: n1}", "`sbatch: {nodelist: VALUE}`"),
    ("defaults: {job_name: x}", "the launchers set it themselves"),
    ("defaults:\n\ttime: 30", "a tab (indent with spaces)"),
    ("train: {shards: 4}", "unknown key train.shards: it belongs into a config"),
    ("train: {lr: 1e-4}", "unknown key train.lr: it belongs into a config"),
    ("image: x.sif", "did you mean container.image?"),
    ("defaults:", "defaults: has no keys below it"),
    ("train: {gpus: 'a100:4'}", "gpus: 4, gpu_type: a100 (got 'a100:4')"),
    ("defaults: {exclude: [n1, n2]}", "input should be one text, as n1,n2"),
    ("defaults: {partition: on}", "put it in quotes: YAML reads it as true or false"),
    ("defaults: {sbatch: {exclusive: true}}", "'' for an option that takes no value"),
    ("defaults: {sbatch: {array: 0-3}}", "array is set by the launchers"),
    ("defaults: {sbatch: {mem: 4G}}", "mem is the key memory: write `memory: VALUE` beside"),
    ("train: {sbatch: {--mem: 4G}}", "--mem is the key memory: write `memory: VALUE` beside"),
    ("defaults: {sbatch: {t: '5'}}", "t is the key time: write `time: VALUE`"),
    ("defaults: {sbatch: {-c: 4}}", "-c is the key cpus: write `cpus: VALUE`"),
    ("defaults: {sbatch: {part: x}}", "part is the key partition: write `partition: VALUE`"),
    ("defaults: {sbatch: {Cpus_Per_Task: 4}}", "is the key cpus: write `cpus: VALUE`"),
    ("defaults: {sbatch: {gres: 'lscratch:9,gpu:a100:2'}}", "gres is the key gpus: write"),
    (
        "defaults: {sbatch: {gpus-per-node: 2, time: 5}}",
        "is the key gpus: write `gpus: VALUE` beside `sbatch:`; option time is the key time",
    ),
    ("defaults: {sbatch: {mail-user: a@b.c}}", "is the key mail_user: write `mail_user: VALUE`"),
    ("defaults: {sbatch: {J: x}}", "J is set by the launchers"),
    ("defaults: {sbatch: {job_name: x}}", "job_name is set by the launchers"),
    ("defaults: {sbatch: {-d: 'afterok:1'}}", "-d is set by the launchers"),
    ("defaults: {sbatch: {depend: 'afterok:1'}}", "depend is set by the launchers"),
    ("defaults: {sbatch: {ntasks: 4}}", "ntasks is set by the launchers"),
    ("defaults: {sbatch: {wait: ''}}", "wait is set by the launchers"),
    ("defaults: {sbatch: {mem_per_cpu: 4G}}", "write it in full, without dashes in front, as mem"),
    ("defaults: {sbatch: {w: n1}}", "without dashes in front, as nodelist"),
    (
        "defaults: {memory: 4G}\ntrain: {sbatch: {mem-per-cpu: 4G}}",
        "memory and sbatch.mem-per-cpu say the same: leave one out (in train",
    ),
    (
        "train: {gpus: 2, sbatch: {gpus-per-task: '2'}}",
        "gpus and sbatch.gpus-per-task say the same",
    ),
    ("defaults: {time: 0}", "0 is no limit to Slurm"),
    (
        "defaults: {time: 10, save_seconds: 600}",
        "save_seconds 600 is all of the time limit, 600 s: raise time, or lower save_seconds "
        "(in defaults)",
    ),
    (
        "defaults: {time: 10}\ntrain: {save_seconds: 700}\ninfer: {save_seconds: 700}",
        "save_seconds 700 is all of the time limit, 600 s: raise time, or lower save_seconds "
        "(in train, infer, or defaults)",
    ),
    ("defaults: {save_seconds: 300}\ncollect: {time: '5:00'}", "(in collect, or defaults)"),
    ("train: {save_seconds: 3600}", "save_seconds 3600 is all of the time limit, 3600 s"),
    ("programs: {docker: x}", "docker is none of sbatch"),
    ("setup: {load: x}", "input should be a list: [A, B]"),
    ("slurm: {partition: gpu}", "resources stand under `defaults:`"),
    ("defaults: {partition: ' '}", "cl.yaml:1: defaults.partition: is empty; leave it out"),
    ('defaults: {partition: "a\\tb"}', "must not hold line breaks or control characters"),
    ('defaults: {sbatch: {comment: "a\\nb"}}', "must not hold line breaks or control characters"),
    ("setup: [module load x, '']", "setup: an entry is empty; leave it out"),
    (f"defaults: {{cpus: {10**40}}}", "defaults.cpus: is too large: at most 4294967295"),
    (f"defaults: {{time: '{10**40}'}}", "defaults.time: is more than Slurm can count"),
    ("defaults: {memory: '\u0663'}", "defaults.memory: must fit: memory a node: a number and K"),
    ("defaults: {time: '\u0663'}", "write it as minutes, H:M:S or D-H:M:S"),
    ("defaults: {nodes: '\u0663'}", "must be a number of nodes"),
    ("defaults: {time: 2024-13-45}", "cannot be read as a date; a text stands in quotes"),
]
MODEL = "model: {path: model}\ndata: {source: file, train: reviews.csv, test_rows: 1}\n"
# the same, where stages run here; as it is shown, and without --dry-run
LOCAL = [
    ("container: {image: reviews.csv}", "reviews.csv is no SIF image"),
    ("container: {image: a.sif}\nprograms: {apptainer: gone}", "gone is not on PATH"),
    ("command: [gone, x]", "command: gone is no program here"),
    ("command: [./reviews.csv]", "command: ./reviews.csv is no program here"),
    ("python: gone", "python: gone is no Python that starts here"),
    ("python: ./c.yaml", "python: ./c.yaml is no Python that starts here"),
    ("python: /bin/ls", "python: /bin/ls is no Python that starts here"),
]
CONFIGS = [
    (f"{MODEL}train:\n", "c.yaml:3: train: has no keys below it"),
    (f"{MODEL}data.cutoff: 5\n", "write `data:` and below it, indented, `cutoff: VALUE`"),
    (f"{MODEL}cluster: {{partition: gpu}}\n", "belongs into a cluster file"),
    (f"{MODEL}adapter: qlora\n", "named by train.adapter"),
    (f"{MODEL}train: {{learning_rate: 1,000}}\n", "a number is written without separators"),
    (f"{MODEL}---\nseed: 3\n", "c.yaml:3:1 is not YAML: a second document begins"),
    ("- model\n", "at its top level, not a list"),
    ("model: {path: model\n", "got the end of the file; it began in line 1"),
    ("model:\n  path: model\n   revision: x\n", "look at the indentation"),
    (f"# caf\xe9\n{MODEL}".encode("latin1"), "not UTF-8 text (line 1); save it as UTF-8"),
    (MODEL.encode("utf-16"), "`iconv -f UTF-16 -t UTF-8`"),
    (MODEL.encode("utf-16-le"), "c.yaml:1 is not YAML: it holds the control character '\\x00'"),
    (f"{MODEL}name: a\x1bb\n", "c.yaml:3 is not YAML: it holds the control character '\\x1b'"),
    (b"#" * 2**21, "c.yaml holds over 1 MB, which no settings do"),
    (f"{MODEL}seed: 2024-13-45\n", "c.yaml:3:7 is not YAML: '2024-13-45' cannot be read as a date"),
    (f"{MODEL}seed: {'9' * 5000}\n", "cannot be read as a whole number"),
    (f"{MODEL}seed: 0x{'f' * 5000}\n", "cannot be read as a whole number"),
    (f"{MODEL}seed: !!int abc\n", "c.yaml:3:7 is not YAML: 'abc' cannot be read as a whole number"),
    (f"{MODEL}seed: !!bool abc\n", "'abc' cannot be read as a truth value; a text stands in"),
    (f"{MODEL}name: !!python/name:os.system\n", "!!python/name:os.system is no kind of value"),
    (f"{MODEL}task: {{labels: !!set {{a, b}}}}\n", "!!set is no kind of value here"),
    (f"{MODEL}name: !mine x\n", "a text that begins with ! stands in quotes"),
    (f"{MODEL}? [a]\n: b\n", "a key is a word, no list and no section"),
    (
        f"{MODEL}seed: {[*range(999)]}\n",
        "seed: input should be a whole number (got [0, 1, 2, 3, 4,",
    ),
    (f"{MODEL}train: {{epochs: 2024-01-01}}\n", "a whole number (got 2024-01-01)"),
    (f"{MODEL}train: {{epochs: [null, true]}}\n", "a number, not true or false (got [null, true])"),
    (f"{MODEL}train: {{epochs: {10**400}}}\n", "train.epochs: is too large: at most 4294967295"),
    (f"{MODEL}train: {{learning_rate: {10**400}}}\n", "train.learning_rate: is too large"),
    (f"{MODEL}train: {{adam_betas: [false, false]}}\n", "must be a number, not true or false"),
    (f"{MODEL}train: {{adam_betas: [0.9]}}\n", "train.adam_betas: input should hold 2 entries"),
    (
        f"{MODEL}train: {{trackers: null}}\n",
        "a list, of tensorboard, wandb, trackio, mlflow (got nu",
    ),
    (f"{MODEL}collect: {{calibration_bins: 9999999}}\n", "less than or equal to 1000"),
    (f"{MODEL}publish: {{license: ' '}}\n", "c.yaml:3: publish.license: is empty; leave it out"),
    (f"{MODEL}publish: {{tags: [a, '']}}\n", "publish.tags: an entry is empty; leave it out"),
    (f'{MODEL}publish: {{branch: "a\\0b"}}\n', "branch: must not hold line breaks or control char"),
    (f'{MODEL}publish: {{branch: "a\\ud800"}}\n', "branch: must not hold line breaks or control"),
    (f'{MODEL}infer: {{mode: "\\ud800"}}\n', "infer.mode: holds half a character"),
    (f"{MODEL}publish: {{repo_id: ../x}}\n", "must look like owner/name: letters, digits"),
    (f"{MODEL}publish: {{repo_id: ~/x}}\n", "must look like owner/name: letters, digits"),
    (
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1},' * 9}]\n" for n in range(1, 15)),
        "unknown key a14",
    ),
    (
        "a0: &a0 {x: y}\n"
        + "".join(
            f"a{n}: &a{n} {{{', '.join(f'b{k}: *a{n - 1}' for k in range(9))}}}\n"
            for n in range(1, 15)
        ),
        "unknown key a14",
    ),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "reviews.csv").write_text("label,text\n0,bad\n4,good\n")
    (tmp_path / "c.yaml").write_text(
        "model: {path: model}\ndata: {source: file, train: reviews.csv, test_rows: 1}\n"
    )
    (tmp_path / "dead").symlink_to("gone")
    (tmp_path / "a.sif").write_bytes(SIF)
    (tmp_path / "lr.yaml").write_text("model.path: [gone]\n")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit code and output of a command line."""
    return call(line.split(), monkeypatch, capsys)


@pytest.mark.parametrize(("line", "expected"), TYPED, ids=[line for line, _ in TYPED])
def test_the_message_names_the_thing_and_the_next_command(
    folder: Path,
    line: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(folder.rglob("*"))
    code, said = typed(line, monkeypatch, capsys)
    assert code == 2 and expected in " ".join(said.split()), said
    assert "Traceback" not in said and sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("line", [*WRITING, *READING])
def test_a_path_that_can_be_none_is_refused(
    folder: Path,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(folder.rglob("*"))
    for place, expected in NO_PLACES:
        code, said = call([*line.split(), place], monkeypatch, capsys)
        said = " ".join(said.split())
        assert code == 2 and expected in said, (place, said)
        assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("line", WRITING)
def test_a_folder_that_may_not_be_written_is_refused(folder: Path, line: str) -> None:
    (folder / "shut").mkdir()
    before = sorted(folder.rglob("*"))
    (folder / "shut").chmod(0o555)
    rights = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]  # root's own
    typed = [sys.executable, "-m", "yelp_hpc", *line.split(), "shut/new/x.csv"]
    argv = [*(rights if os.geteuid() == 0 else []), *typed]
    done = subprocess.run(argv, capture_output=True, text=True)
    said = " ".join(done.stderr.split())
    assert done.returncode == 2 and f"you may not write in {folder}/shut" in said, said
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("text", "expected"), CLUSTERS, ids=[text for text, _ in CLUSTERS])
def test_a_cluster_file_is_mended_by_its_message(
    folder: Path,
    text: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "cl.yaml").write_text(text + "\n")
    code, said = typed(DRY, monkeypatch, capsys)
    assert code == 2 and expected in " ".join(said.split()), said


@pytest.mark.parametrize(("text", "expected"), LOCAL, ids=[text for text, _ in LOCAL])
def test_what_cannot_start_here_is_said_before_anything_is_written(
    folder: Path,
    text: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "cl.yaml").write_text(text + "\n")
    (folder / "seeds.yaml").write_text("seed: [1, 2]\n")
    before = sorted(folder.rglob("*"))
    study = "study seeds.yaml --config c.yaml --out study --executor local"
    for line in (SUBMIT, f"{SUBMIT} --dry-run", study):
        code, said = typed(f"{line} --cluster cl.yaml", monkeypatch, capsys)
        assert code == 2 and expected in " ".join(said.split()), said
        assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("text", "expected"), CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_is_mended_by_its_message(
    folder: Path,
    text: str | bytes,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    code, said = typed("config show --config c.yaml", monkeypatch, capsys)
    assert code == 2 and expected in " ".join(said.split()), said


def test_a_config_that_is_no_file_says_what_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "link.yaml").symlink_to("gone")
    for name, expected in {
        "link.yaml": "link.yaml does not exist: it is a link to gone, which is not there",
        ".": ". cannot be read: it is a folder; name a file, as c.yaml",
        "c": "c does not exist; did you mean c.yaml?",
        "https://x.org/c.yaml": "it is an address; download it first",
    }.items():
        for line in (f"config show --config {name}", f"study {name} --config c.yaml --out s"):
            code, said = typed(line, monkeypatch, capsys)
            assert code == 2 and expected in " ".join(said.split()), said


@pytest.mark.parametrize(
    ("shell", "code", "expected"),
    [
        (
            "{} config show --config c.yaml > /dev/full",
            1,
            "cannot be written where it is sent: No sp",
        ),
        ("mkdir in; cd in; rmdir ../in; {} plan --config c.yaml", 2, "c.yaml does not exist"),
        ("mkdir in; cd in; rmdir ../in; {} status --run ../x", 1, "you are in is no longer there"),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {} plan --config gone", 2, "does not exist"),
        ("{} status --run gone <&-", 2, "gone is not a run directory"),
        ("{} status --run gone 2>/dev/full", 2, ""),
        ("{} status --gone 2>/dev/full", 2, ""),
        ("{{ {} plan 2>&1; echo $? >&3; }} 3>&2 | true", 0, "2"),
    ],
)
def test_an_odd_shell_is_no_traceback(folder: Path, shell: str, code: int, expected: str) -> None:
    before = sorted(folder.rglob("*"))
    argv = ["bash", "-c", shell.format(f"{sys.executable} -m yelp_hpc")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == code and expected in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr and sorted(folder.rglob("*")) == before


def test_what_other_editors_add_is_no_mistake(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in (f"\ufeff{MODEL}", MODEL.replace("\n", "\r\n")):
        (folder / "c.yaml").write_bytes(text.encode())
        code, said = typed("config show --config c.yaml", monkeypatch, capsys)
        assert code == 0 and "reviews.csv" in said


def test_numbers_and_texts_are_what_stands_there(folder: Path) -> None:
    from yelp_hpc.config import load_config

    (folder / "c.yaml").write_text(
        MODEL + 'seed: 010\ntrain: {epochs: 1_0}\ntask: {labels: [a, "\\ud83d\\ude00", =]}\n'
        "prompt: {template: 'a\tb\n\n{review}{label}'}\n"
    )
    config = load_config("c.yaml").config
    assert (config.seed, config.train.epochs) == (10, 10)
    assert config.task.labels == ("a", "\U0001f600", "=")
    assert config.prompt.template == "a\tb\n{review}{label}"


def test_memory_is_taken_as_people_write_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from yelp_hpc.jobs.cluster import load_cluster

    for text in ("64GB", "64GiB", "64g", "64G"):
        (folder / "cl.yaml").write_text(f"defaults: {{memory: {text}}}\n")
        assert load_cluster(folder / "cl.yaml").defaults.memory == "64G"


def test_a_folder_and_a_glob_of_data_are_no_mistake(folder: Path) -> None:
    from yelp_hpc.config import load_config
    from yelp_hpc.jobs.doctor.request import inputs

    (folder / "rows").mkdir()
    (folder / "rows" / "a.tsv").write_text("label\ttext\n0\tbad\n")
    for place in ("rows", "rows/*.tsv"):
        (found,) = inputs(load_config("c.yaml", (f"data.train={place}",)).config).data
        assert (found.state, found.columns) == ("file", ("label", "text"))


def test_every_other_name_leads_to_a_key_that_is_there() -> None:
    from yelp_hpc import synonyms
    from yelp_hpc.config import Config
    from yelp_hpc.explain import dotted_keys
    from yelp_hpc.jobs.cluster import ClusterConfig, Container, Resources

    assert set(synonyms.CONFIG.values()) <= set(dotted_keys(Config))
    sections = (ClusterConfig, Resources, Container)
    assert set(synonyms.CLUSTER.values()) <= {k for s in sections for k in s.model_fields}
    stages_and_commands = {meant.split()[0] for meant in synonyms.COMMANDS.values()}
    assert {word for word in stages_and_commands if word[0] != "-"} <= set(cli.commands)
