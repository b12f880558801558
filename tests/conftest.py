import os
from pathlib import Path

# Two cores are shared by the test workers; one thread each is faster than fighting over them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden vectors, data and models that may lie beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED.name}/ beside the checkout")
    return SHARED
