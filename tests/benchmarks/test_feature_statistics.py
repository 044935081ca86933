# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks/feature_statistics.py` counts, and the file that it made."""

from __future__ import annotations

import json
from pathlib import Path

import bench_kernels
import feature_statistics
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

D, F, ROW = 8, 600, 64


def weights() -> dict[str, torch.Tensor]:
    """Feature 0 is active where x[0] > 1, feature 1 where x[1] > 1; others never."""
    rows = torch.zeros(F, D)
    rows[0, 0] = rows[1, 1] = 1.0
    rows[2:, 3] = 1.0
    return {
        "W_enc": rows,
        "b_enc": torch.zeros(F),
        "threshold": torch.ones(F),
    }


def test_frequencies_and_distinct_features() -> None:
    x = torch.zeros(ROW, D)
    x[:, 0] = 2.0
    x[::8, 1] = 3.0
    found = feature_statistics.statistics(weights(), iter([x, x]))
    assert found["tokens"] == 2 * ROW
    assert found["frequency"][:3] == [1.0, 0.125, 0.0]
    assert found["l0"] == pytest.approx(1.12, abs=0.006)
    assert found["distinct"]["1"] == pytest.approx(1.1, abs=0.03)
    assert found["distinct"]["8"] == found["distinct"]["64"] == 2.0
    assert found["active_quantiles"]["1.0"] == 2.0
    energy = 4 * ROW + 9 * ROW / 8
    assert found["energy_of_dimensions"][0] == pytest.approx(4 * ROW / energy, rel=1e-3)


def test_the_file_is_of_the_shipped_sae() -> None:
    content = json.loads((BENCHMARKS / "smollm2_features.json").read_text())
    frequency = content["frequency"]
    assert (content["d_sae"], content["d_model"]) == (3456, 576)
    assert len(frequency) == 3456
    assert frequency == sorted(frequency, reverse=True)
    assert sum(frequency) == pytest.approx(content["l0"], rel=1e-3)
    # Uniform would be 64 / 3456 = 2 % and 15 %.
    most_64, most_512 = content["share_of_the_64_and_512_most_frequent"]
    assert most_64 > 0.1
    assert most_512 > 0.4


def test_the_uneven_benchmark_fires_as_the_shipped_sae_does() -> None:
    share = bench_kernels.heavy_tail(16384).sort(descending=True).values
    assert float(share.sum()) == pytest.approx(bench_kernels.L0, rel=1e-3)
    content = json.loads((BENCHMARKS / "smollm2_features.json").read_text())
    # A sixteenth of the features carries as much of all activations as in the SAE.
    frequency = content["frequency"]
    carried = sum(frequency[: 3456 // 16]) / sum(frequency)
    assert carried > 0.5
    assert float(share[:1024].sum()) / bench_kernels.L0 == pytest.approx(carried, 0.01)
