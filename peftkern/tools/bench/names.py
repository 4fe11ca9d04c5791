"""Names of cases for people: "Llama-3-8B q_proj, 256 tokens"."""

from __future__ import annotations

import re

from peftkern.tools.bench.cases import SCALED_BY, SHORT
from peftkern.tools.bench.record import Case
from peftkern.tools.bench.timer import number

OPS = {
    "nf4_lora_linear": "NF4 layer with LoRA",
    "lora_linear": "dense layer with LoRA",
    "nf4_linear": "NF4 layer",
    "nf4_dequantize": "NF4 dequantized",
    "grouped_linear": "experts with LoRA",
}
MODES = {"full": "forward + backward", "no-grad": "inference", "memory": "peak memory"}
SPELLING = {"gpt": "GPT", "oss": "OSS", "deepseek": "DeepSeek"}


def people(case: Case, without: str = "") -> str:
    """Name the weight and the tokens; `without`: "M" to leave them out."""
    shape = re.sub(r"(?<=[0-9])x(?=[0-9])", " x ", case["shape"])
    if case["shape"] == f"{case['M']}x{case['N']}x{case['K']}":
        shape = f"{case['N']} x {case['K']}"
    elif match := re.fullmatch(r"(.+)-([a-z_]+_proj)", case["shape"]):
        shape = f"{_model(match[1])} {match[2]}"
    if case["M"] is None or without == "M":
        return shape
    return f"{shape}, {tokens(case['M'])}"


def tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def _model(name: str) -> str:
    """Spell a model as its authors do: llama3-8b as Llama-3-8B, qwen3-30b-a3b as Qwen3-30B-A3B."""
    words = [SPELLING.get(word, word[:1].upper() + word[1:]) for word in name.split("-")]
    words = [re.sub(r"(?<=[0-9])b$", "B", word) for word in words]
    return re.sub(r"^Llama(?=[0-9])", "Llama-", "-".join(words))


def about(case: Case, without: str = "") -> str:
    """Say the rest: op, mode, rank, dtype."""
    rank = [f"r={case['r']}"] if case["r"] and without != "r" else []
    mode = MODES.get(case["mode"], case["mode"])
    op = OPS.get(case["op"], case["op"].replace("_", " "))
    if other := other_format(case):
        op = op.replace("NF4", other.upper()) if "NF4" in op else f"{op} ({other.upper()})"
    return ", ".join([op, mode, *rank, SHORT[case["dtype"]]])


def other_format(case: Case) -> str:
    """Return the format of a case's 4-bit weight as its name has it, "" for NF4 and dense ones."""
    found = case["name"].partition("/")[2].partition("/")[0]
    return found if found in SCALED_BY and found != "nf4" else ""


def times(ratio: float) -> str:
    """Format with two decimals where significant, else three digits."""
    return f"{ratio:.2f}x" if 0.1 <= ratio < 100 else f"{number(ratio)}x"
