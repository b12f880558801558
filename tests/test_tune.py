"""Tuning the recurrence's kernels: what it tries, and that a candidate cannot end it."""

import os

import pytest
import torch

from subquad.bench.tune import TUNED, apart, candidates, tune


def test_a_candidate_that_ends_its_process_is_refused():
    assert apart(str, 7) == "7"
    assert "exit code 3" in apart(os._exit, 3)


@pytest.mark.parametrize("kernel", TUNED)
@pytest.mark.parametrize("width", [64, 256])
def test_candidates_fit_the_widths(kernel, width):
    found = list(candidates(kernel, width, width, 2))
    assert found
    assert all(c.get("BV", 0) <= width and c.get("BK", 0) <= width for c in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_without_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="CUDA"):
        tune(out=tmp_path / "table.json")
    assert not list(tmp_path.iterdir())
