"""AdaLoRA under transformers' Trainer: the budget moves to the layers that need rank.

The Trainer alone never calls `update_and_allocate`, so that no rank would ever change, and cannot
resume once one has: AdaLoraCallback does both. This run stops in the middle and resumes. The model
is small and random; put yours in its place.
"""

import tempfile
from pydoc_data.topics import topics  # Python's language reference: text that is always there

import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import peftkern
from peftkern.integrations.transformers import AdaLoraCallback

STEPS = 40
SIZES = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
BUDGET = {"init_r": 12, "target_r": 4}  # triplets of a layer: at first, and at last on average
SCHEDULE = {"tinit": 5, "tfinal": 10, "deltaT": 5, "total_step": STEPS}  # shrinks from 5 to 30

text = torch.tensor(list("\n".join(topics.values()).encode()))
rows = [{"input_ids": ids, "labels": ids} for ids in text[: STEPS * 512].view(-1, 128)]
folder = tempfile.TemporaryDirectory()
arguments = TrainingArguments(
    output_dir=folder.name,
    per_device_train_batch_size=4,
    max_steps=STEPS,
    learning_rate=2e-3,
    logging_steps=10,
    save_steps=20,
    report_to=[],
)


def make_trainer(*callbacks):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4)).bfloat16()
    peftkern.quantize_(model)
    every = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, AdaLoraConfig(**BUDGET, **SCHEDULE, **every))
    callbacks = [AdaLoraCallback(), *callbacks]  # it patches the model, too
    return Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)


class StopAfterSaving(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = True


make_trainer(StopAfterSaving()).train()
trainer = make_trainer()
trainer.train(resume_from_checkpoint=True)  # goes on at step 21
ranks = peftkern.export_lora(trainer.model, f"{folder.name}/lora")  # plain LoRA, to serve anywhere
for name, rank in ranks.items():
    print(f"rank {rank:2d}  {name}")
print(peftkern.stats())
