"""LoRA on `query_key_value`: a step with peft equals the one made on the published code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file

from yelp_hpc.models.load import load_model

GOLDEN = Path(__file__).parent / "golden"
STEP = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "lora" / "golden_lora.npz").items()}
BATCH = {name: STEP[name] for name in ("input_ids", "attention_mask", "labels")}


def adapted(adapter: str) -> PeftModel:
    base = load_model(GOLDEN / "model", "fp32")
    return PeftModel.from_pretrained(base, GOLDEN / "lora" / adapter, is_trainable=True)


def test_one_step_gives_the_published_loss_gradients_and_adapter(tmp_path: Path) -> None:
    model = adapted("init").train()
    loss = model(**BATCH).loss
    assert abs(loss.item() - STEP["loss0"].item()) < 1e-6
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {f"grad.{name}" for name in trained} == {n for n in STEP if n.startswith("grad.")}
    for name, parameter in trained.items():
        assert parameter.grad is not None
        assert (parameter.grad - STEP[f"grad.{name}"]).abs().max() < 1e-6

    torch.optim.SGD(trained.values(), lr=0.5).step()
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    expected = load_file(GOLDEN / "lora" / "after_sgd1" / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    for name, weight in expected.items():
        assert (saved[name] - weight).abs().max() < 1e-6
    with torch.no_grad():
        assert abs(model.eval()(**BATCH).loss.item() - STEP["loss1"].item()) < 1e-6


def test_merged_adapter_gives_the_published_logits() -> None:
    merged = adapted("after_sgd1").merge_and_unload().eval()
    real = BATCH["attention_mask"].bool()
    with torch.no_grad():
        logits = merged(BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits
    assert (logits[real] - STEP["logits1_merged"][real]).abs().max() < 1e-5


def test_trainable_parameters_at_6b_are_those_of_the_report() -> None:
    from peft import LoraConfig, get_peft_model

    from yelp_hpc.models.chatglm3.model import ChatGLMConfig, ChatGLMForCausalLM

    with torch.device("meta"):
        model = ChatGLMForCausalLM(ChatGLMConfig())
        assert sum(p.numel() for p in model.parameters()) == 6_243_584_000
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query_key_value"])
        trainable, _ = get_peft_model(model, lora).get_nb_trainable_parameters()
    assert trainable == 1_949_696
