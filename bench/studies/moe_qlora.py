"""QLoRA of a mixture of experts on the CPU: PEFT over experts in 16 bits, peftkern over NF4.

A small Qwen3-MoE over bytes is first trained in full on real text, so that its weights mean
something, and saved as one checkpoint. Both runs load it with their attention in 4 bits and put
PEFT's adapters on attention and on every expert, with the same seeds and batches. transformers
leaves fused experts in 16 bits and PEFT adds each update to all of them at every step; peftkern
loads them in NF4 and computes with those that a token has. Each run lives in its own process; the
two take turns of a few steps.

    python bench/studies/moe_qlora.py
    python bench/studies/moe_qlora.py --experts 64 --hidden 1024 --steps 100 --json moe.json

Exit status: 0; 1, over NF4 the loss ends more than a tenth higher, or a run failed; 2, bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import qlora_finetune as finetune
from qlora_training import InputError, Training, read_text, serve, token_ids

TITLES = {"peft": "PEFT, dense experts", "peftkern": "peftkern, NF4 experts"}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MOST = 1.1  # times the loss over dense experts: 4-bit weights cost some


def pretrain(options: Namespace, folder: str) -> float:
    """Train the model in full for some steps and save it; return the last loss."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(options.seed)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=options.hidden,
        moe_intermediate_size=options.hidden // 2,
        intermediate_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 128),
        head_dim=64,
        num_experts=options.experts,
        num_experts_per_tok=options.top,
        norm_topk_prob=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen3MoeForCausalLM(config).train()
    ids = token_ids(read_text(options.text), None)
    if len(ids) <= options.seq:
        raise InputError(f"--seq {options.seq}: the text has only {len(ids)} tokens")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = torch.Generator().manual_seed(options.seed + 1)
    loss = torch.tensor(float("nan"))
    for _ in range(options.pretrain):
        start = int(torch.randint(len(ids) - options.seq, (1,), generator=batches))
        batch = ids[start : start + options.seq].long()[None]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    model.to(dtype).save_pretrained(folder)
    return loss.item()


def load(options: Namespace):
    """Load the checkpoint as a user does: `load_in_4bit`, or with peftkern's config of experts."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    how = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    if options.run == "peftkern":
        from peftkern.integrations.transformers import NF4ExpertsConfig

        config = NF4ExpertsConfig(**how)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **how)
    loading = {"quantization_config": config, "dtype": dtype, "device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(options.folder, **loading), None


def adapt(model, options: Namespace):
    """Add adapters to attention and, one for each expert, to both layers of the experts."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=ATTENTION,
        target_parameters=STACKS,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.config.use_cache = False
    return model.train()


class MoeTraining(Training):
    """Training of qlora_training.py with this model, and adapters on its experts."""

    load, adapt = staticmethod(load), staticmethod(adapt)


def parse_options(argv: list[str] | None) -> Namespace:
    at_least = finetune.at_least
    parser = finetune.Parser(description=__doc__.split("\n\n")[0], prog="moe_qlora.py")
    add = parser.add_argument
    add("--steps", type=at_least(1), default=60, help="optimizer steps of each run (60)")
    add("--pretrain", type=at_least(0), default=60, help="steps of full training before (60)")
    add("--text", metavar="FILE", help="text to learn (default: Python's language reference)")
    add("--experts", type=at_least(2), default=32, help="experts of a layer (32)")
    add("--top", type=at_least(1), default=4, help="experts of a token (4)")
    add("--hidden", type=at_least(64), default=512, help="width; an expert has half of it (512)")
    add("--layers", type=at_least(1), default=2)
    add("--seq", type=at_least(2), default=128, help="tokens per sequence (128)")
    add("--batch", type=at_least(1), default=1, help="sequences per step (1)")
    add("--rank", type=at_least(1), default=8, help="LoRA rank (8); alpha is twice the rank")
    add("--lr", type=at_least(0.0, float), default=3e-4, help="AdamW's learning rate (3e-4)")
    add("--seed", type=at_least(0), default=0)
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    add("--seconds", type=at_least(0, float), default=150, help="train no longer (150; 0: no end)")
    add("--json", metavar="FILE", help="write all that was measured to FILE")
    options = parser.parse_args(argv)
    if options.hidden % 64:
        parser.error(f"argument --hidden: {options.hidden} is not a multiple of 64")
    if options.top > options.experts:
        parser.error(f"argument --top: {options.top} of {options.experts} experts")
    if options.dtype == "auto":
        options.dtype = "bf16" if finetune.has_bf16_arithmetic() else "fp32"
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    runs: list[finetune.Run] = []
    try:
        print(
            f"Qwen3-MoE, hidden {options.hidden}, layers {options.layers}, {options.experts} "
            f"experts, {options.top} for a token; LoRA r={options.rank}, {options.dtype}"
        )
        with tempfile.TemporaryDirectory() as options.folder:
            loss = pretrain(options, options.folder)
            print(f"after {options.pretrain} steps of full training: loss {loss:.3f}", flush=True)
            runs.extend(finetune.Run(name, options, Path(__file__).name) for name in TITLES)
            results = finetune.take_turns(runs, options)
    except InputError as error:
        print(f"moe_qlora.py: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"moe_qlora.py: {error}", file=sys.stderr)
        return 1
    finally:
        for run in runs:
            run.stop()
    summary = finetune.compare(results)
    summary["ratio"] = results["peftkern"]["final_loss"] / results["peft"]["final_loss"]
    finetune.show(options, results, summary, TITLES, f"{summary['ratio']:.3f}x")
    if options.json:
        record = {"options": vars(options), "summary": summary, "runs": results}
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if summary["ratio"] <= MOST else 1


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):  # one of the two runs
        serve(argparse.Namespace(**json.loads(sys.argv[1])), MoeTraining)
    else:
        sys.exit(main())
