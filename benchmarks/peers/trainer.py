"""transformers' Trainer with its own bf16 flag, on the same Qwen3 network that ours is built from.

T tokens of a window.
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from benchmarks.measuring import FORMS, RANK, Job, Sizes
from benchmarks.peers.tokens import batches
from benchmarks.watching import Watch

LINEARS = {"low_rank": ["gate_proj", "up_proj", "down_proj"], "adapter": "all-linear"}


class Windows(Dataset):
    """Windows of the text as Trainer wants them; the model shifts the labels itself."""

    def __init__(self, job: Job):
        self.batch, self.count = batches(job), job.steps * job.sizes.batch_sequences

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, _number: int) -> dict[str, torch.Tensor]:
        ids_T = self.batch(1)[0, :-1]
        return {"input_ids": ids_T, "labels": ids_T}


class Steps(TrainerCallback):
    """Tells the watch of every optimizer step and logged loss."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def on_step_end(self, args, state, control, **_) -> None:
        """Take note of a step."""
        self.watch.step()

    def on_log(self, args, state, control, logs=None, **_) -> None:
        """Keep the loss of the last step."""
        if logs and "loss" in logs:
            self.watch.nats.append(float(logs["loss"]))


def train(job: Job, watch: Watch) -> None:
    """Train the whole network, or only its feed-forward networks."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    model = network(job.sizes)
    if job.task in FORMS:
        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS[job.task])
        )
    elif job.task == "expert":
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.mlp.requires_grad_(True)
    sequences = job.sizes.batch_sequences
    micro = job.micro or sequences
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=job.steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=sequences // micro,
            learning_rate=3e-4,
            bf16=True,
            use_cpu=job.device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model, args=args, train_dataset=Windows(job), callbacks=[Steps(watch)]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def network(sizes: Sizes) -> Qwen3ForCausalLM:
    """Return a new Qwen3 of these sizes."""
    config = Qwen3Config(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.d_model,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        head_dim=sizes.d_model // sizes.heads,
        intermediate_size=sizes.d_ff,
        max_position_embeddings=sizes.context_tokens,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return Qwen3ForCausalLM(config)
