"""The adapter workshop: LoRA adapters as files and as live models, read, checked, changed, written.

adapter = read_adapter("my-adapter")          # a folder of PEFT's, or a file that READERS knows
adapter = from_model(model)                   # or of a live PEFT model
write_adapter(adapter, "copy")                # scaling folded to exactly 1: every reader agrees
"""

from peftkern.tools.adapters.adapter import Adapter, AdapterError, Update
from peftkern.tools.adapters.read import from_model, read_adapter
from peftkern.tools.adapters.write import write_adapter

__all__ = ["Adapter", "AdapterError", "Update", "from_model", "read_adapter", "write_adapter"]
