"""`peftkern plan` against torch's allocator: tiny models of many architectures, on a CPU.

Recorded under PEFT alone and patched: the peak of a training step beyond the model, its adapters
and the optimizer's states, measured (`peak_bytes`) and planned (`planned_bytes`). Kernels are not
on trial, and small products are ours, as a large model's are.

python bench/bench_plan.py
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from folders import RESULTS, slug
from tiny_models import ARCHITECTURES, SIZES, make_model, tiny_config

from peftkern.backends import trust
from peftkern.backends.cpu import crossovers
from peftkern.tools.bench import machine, memory
from peftkern.tools.bench.record import OURS, Case
from peftkern.tools.bench.rows import Row, case_record, new_record
from peftkern.tools.plan.plan import Training, plan

TRAINING = Training("lora", r=8, batch=2, sequence=160, device="cpu")


def case(kind: str) -> Case:
    """Measure and plan one architecture."""
    rows = {}
    for name in (OURS, "PEFT"):
        training = replace(TRAINING, patched=name == OURS)
        model = make_model(kind, training)
        ids = torch.randint(SIZES["vocab_size"], (training.batch, training.sequence))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

        def step(model=model, ids=ids, optimizer=optimizer) -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        found = plan(tiny_config(kind), training)
        beyond = found.peak - sum(found.fixed.values())
        rows[name] = Row(peak_bytes=memory.peak_bytes(step, ids.device), planned_bytes=beyond)
    tokens = TRAINING.batch * TRAINING.sequence
    facts = {"name": f"plan/{kind}", "op": "training_step", "shape": kind, "M": tokens, "N": None}
    facts |= {"K": None, "r": TRAINING.r, "dtype": "bfloat16", "mode": "memory"}
    return case_record(facts, rows, work=(0, 0), roof={}, labels={n: n for n in rows})


def main() -> int:
    crossovers.crossover = lambda name: 0
    environment = machine.describe(torch.get_num_threads())
    more = {"bench": "plan", "device": "cpu", "seed": 0, "budget_s": None, "elapsed_s": 0.0}
    with trust.use_mode("always"):
        cases = [case(kind) for kind in ARCHITECTURES]
    record = new_record(environment, {}, command="python bench/bench_plan.py", cases=cases, **more)
    path = RESULTS / slug(environment) / "plan.json"
    machine.write_json(path, record)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
