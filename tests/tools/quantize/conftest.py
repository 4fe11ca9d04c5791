from pathlib import Path

import pytest
from quantized_folders import save_small


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return save_small(tmp_path / "src")
