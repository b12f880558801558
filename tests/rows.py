"""The table of mixers under test: a system joins with one row."""

from kit import Row

ROWS = [
    Row("gated_deltanet", {"dim": 16, "heads": 2, "head_dim": 8, "conv_size": 4}),
    Row(
        "gated_deltanet",
        {"dim": 16, "heads": 1, "value_heads": 2, "head_dim": 8, "negative_eigenvalues": True},
        name="grouped",
    ),
]
