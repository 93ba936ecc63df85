"""Training by Lightning, accelerate and transformers, on the CPU. Importing them takes seconds: do so in a fixture."""

import os
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
from transformers import Trainer as TransformersTrainer

INIT_SCALE = 16.0


def layer():
    torch.manual_seed(1)
    return nn.Linear(6, 5)


def loss_of(model, batch):
    """Linear in the parameters: gradients do not depend on them, and are to the bit the same for every optimizer."""
    inputs, weights = batch
    return (model(inputs) * weights).sum()


def batches(number, overflows=()):
    """In float16, gradients of the batches in `overflows` are infinite."""
    generator = torch.Generator().manual_seed(5)
    made = [(torch.randn(4, 6, generator=generator), torch.randn(4, 5, generator=generator)) for _ in range(number)]
    return [(x, y * 1e6 if i in overflows else y) for i, (x, y) in enumerate(made)]


class Seen(NamedTuple):
    """The parameters after training, and for each batch the learning rate after it and whether it was skipped."""

    params: list[Tensor]
    lrs: list[float]
    skipped: list[bool]


class Task(LightningModule):
    def __init__(self, make, manual):
        super().__init__()
        self.layer = layer()
        self.make = make
        self.automatic_optimization = not manual
        self.lrs = []

    def training_step(self, batch, index):
        loss = loss_of(self.layer, batch)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
            self.lr_schedulers().step()
        return loss

    def on_train_batch_end(self, *_):
        self.lrs.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = self.make(self.layer.parameters())
        return [optimizer], [{"scheduler": StepLR(optimizer, 2, 0.5), "interval": "step"}]


def lightning(make, precision, data, *, manual=False, epochs=1, resume=None, save=None):
    """Trains with Lightning, which clips gradients to norm one."""
    task = Task(make, manual)
    plugins = []
    if precision == "16-mixed":  # Trainer(precision=...) refuses it on a CPU
        scaler = torch.amp.GradScaler("cpu", init_scale=INIT_SCALE, growth_interval=3)
        plugins, precision = [MixedPrecision("16-mixed", "cpu", scaler)], None
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        plugins=plugins,
        gradient_clip_val=None if manual else 1.0,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return Seen([p.detach() for p in task.layer.parameters()], task.lrs, [])


def accelerate(make, precision, data, *, accumulate=1, resume=None, save=None):
    """Trains with accelerate, which clips gradients to norm one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate)
    if precision == "fp16":  # which it does without on a CPU
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=INIT_SCALE, growth_interval=3)
    model = layer()
    optimizer = make(model.parameters())
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, StepLR(optimizer, 2, 0.5))
    if resume is not None:
        accelerator.load_state(resume)
    lrs, skipped = [], []
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        lrs.append(optimizer.param_groups[0]["lr"])
        skipped.append(optimizer.step_was_skipped)
    if save is not None:
        accelerator.save_state(save)
    return Seen([p.detach() for p in model.parameters()], lrs, skipped)


def transformers(make, folder, *, bf16=False, resume=None):
    """Trains a small GPT-2 with transformers' Trainer, which clips and saves; returns parameters and losses."""
    torch.manual_seed(2)
    sizes = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0))
    tokens = torch.randint(32, (32, 8), generator=torch.Generator().manual_seed(3))
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        bf16=bf16,
        max_steps=6,
        per_device_train_batch_size=4,
        max_grad_norm=0.5,
        logging_steps=1,
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
    )
    optimizer = make(model.parameters())
    trainer = TransformersTrainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        optimizers=(optimizer, StepLR(optimizer, 2, 0.5)),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses, norms = ([float(entry[key]) for entry in history] for key in ("loss", "grad_norm"))
    return [p.detach() for p in model.parameters()], losses, norms
