"""One QLoRA training run in its own process; qlora_finetune.py starts it and reads its replies.

The model, the data and the training step are here, written as a user of transformers, PEFT and
bitsandbytes writes them. All that peftkern adds is `peftkern.patch(model)`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

WARM_UP = 3  # steps whose time and memory are not counted
LR_WARM_UP = 10  # steps; AdamW's first steps amplify rounding noise to full size
MAX_TEXT_BYTES = 16 << 20


class InputError(Exception):
    """Unusable input; the message is the one line to print."""


def read_text(path: str | None) -> bytes:
    """Read the user's file, or the language reference that comes with every Python."""
    if path is not None:
        try:
            with open(path, "rb") as file:
                return file.read(MAX_TEXT_BYTES)
        except OSError as error:
            raise InputError(f"--text {path}: {error.strerror}") from None
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError("this Python has no pydoc_data.topics: name a file with --text") from None
    return "\n".join(topics.values()).encode()


def load_model(options: Namespace):
    """Load the 4-bit model and its tokenizer (None: bytes are tokens), as QLoRA users do."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    loading = {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        "dtype": dtype,
        "device_map": "cpu",
        "local_files_only": True,
    }
    if options.model is None:
        with tempfile.TemporaryDirectory() as folder:
            random_llama(options).to(dtype).save_pretrained(folder)
            return AutoModelForCausalLM.from_pretrained(folder, **loading), None
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
        return AutoModelForCausalLM.from_pretrained(options.model, **loading), tokenizer
    except (OSError, ValueError) as error:
        raise InputError(f"--model {options.model}: {' '.join(str(error).split())}") from None


def random_llama(options: Namespace):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4 // 64 * 64,  # rows of whole 64-blocks
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        max_position_embeddings=max(options.seq, 512),
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def add_adapters(model, options: Namespace):
    """Follow PEFT's recipe: prepare for k-bit training (checkpointing), adapters everywhere."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=options.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.config.use_cache = False
    return model.train()


def token_ids(text: bytes, tokenizer):
    """Tokenize the text into one long vector of ids."""
    import torch

    if tokenizer is not None:
        return torch.tensor(tokenizer(text.decode("utf-8", "replace"))["input_ids"])
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0)


class Training:
    """Model, data and optimizer of one run, advanced step by step."""

    load = staticmethod(load_model)
    adapt = staticmethod(add_adapters)

    def __init__(self, options: Namespace) -> None:
        import torch

        text = read_text(options.text)
        model, tokenizer = self.load(options)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and options.seq > limit:
            raise InputError(f"--seq {options.seq}: the model takes at most {limit} positions")
        self.ids = token_ids(text, tokenizer)
        if len(self.ids) <= options.seq:
            raise InputError(f"--seq {options.seq}: the text has only {len(self.ids)} tokens")
        torch.manual_seed(options.seed)  # adapters' initial values, then dropout
        self.options = options
        self.model = self.adapt(model, options)
        self.report = None
        if options.run == "peftkern":
            import peftkern

            self.report = peftkern.patch(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=options.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / LR_WARM_UP)
        )
        self.batches = torch.Generator().manual_seed(options.seed)

    def forward_backward(self):
        import torch

        seq, batch = self.options.seq, self.options.batch
        starts = torch.randint(len(self.ids) - seq, (batch,), generator=self.batches).tolist()
        ids = torch.stack([self.ids[s : s + seq] for s in starts]).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.options.dtype == "bf16"):
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    def step(self) -> dict[str, float]:
        start = time.perf_counter()
        loss = self.forward_backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item(), "seconds": time.perf_counter() - start}

    def about(self) -> dict:
        import bitsandbytes
        import peft
        import torch
        import transformers

        about = {
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)}
            | {"bitsandbytes": bitsandbytes.__version__},
            "threads": torch.get_num_threads(),
            "parameters": self.model.num_parameters(),
            "trainable": self.model.num_parameters(only_trainable=True),
        }
        if self.report is not None:
            about["report"] = {
                "text": str(self.report),
                "patched": list(self.report.patched),
                "skipped": dict(self.report.skipped),
            }
        return about


def forget_peak_memory() -> None:
    """Reset the peak, so that loading and quantizing do not hide the training's."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    # Where Linux refuses, the peak covers the whole process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Return the peak resident memory of this process, since forget_peak_memory() if supported."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def serve(options: Namespace, training_class: type[Training] = Training) -> None:
    """Serve requests: a line `n` runs n steps, `end` prints the figures; replies are JSON."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of libraries must not mix with the replies

    def reply(**message) -> None:
        print(json.dumps(message), file=replies, flush=True)

    try:
        training = training_class(options)
    except InputError as error:
        reply(error=str(error))
        return
    reply(about=training.about())
    done = 0
    for line in sys.stdin:
        if line.strip() == "end":
            break
        for _ in range(int(line)):
            reply(**training.step())
            done += 1
            if done == WARM_UP:
                forget_peak_memory()
    figures = {"resident_peak_mb": peak_memory_mb()}  # before anything more is imported
    if training.report is not None:
        import peftkern

        figures["stats"] = str(peftkern.stats())  # before the profiled step adds to it
    import torch

    from peftkern.tools.bench.memory import peak_bytes

    peak = peak_bytes(training.forward_backward, torch.device("cpu"))
    figures["tensor_peak_mb"] = peak / 1e6
    reply(figures=figures)


if __name__ == "__main__":
    serve(Namespace(**json.loads(sys.argv[1])))
