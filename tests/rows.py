"""The table of mixers under test: a system joins with one row."""

from kit import Row

MLA_SIZES = {
    "dim": 16, "heads": 2, "latent_dim": 6, "nope_dim": 4, "rope_dim": 2, "value_dim": 5,
}  # fmt: skip

ROWS = [
    Row("base_conv", {"dim": 16}),
    Row("based", {"dim": 16, "heads": 2, "feature_dim": 4}),
    Row(
        "based",
        {"dim": 16, "heads": 4, "kv_heads": 2, "feature_dim": 4, "compressed": True},
        name="compressed",
    ),
    Row("lightning", {"dim": 24, "heads": 3}),
    Row("lightning", {"dim": 16, "heads": 2, "preset": "paper", "layers": 4}, name="paper"),
    Row(
        "lightning",
        {
            "dim": 16,
            "heads": 2,
            "preset": "paper",
            "decay": "paper",
            "layer": 1,
            "layers": 4,
        },
        name="paper-layer",
    ),
    Row("linear_attention", {"dim": 32, "heads": 2}, golden="foreign"),
    Row(
        "linear_attention",
        {
            "dim": 32,
            "heads": 2,
            "feature_map": "elementwise_product",
            "normalize": False,
        },
        name="had",
        golden="foreign",
    ),
    Row(
        "linear_attention",
        {
            "dim": 16,
            "heads": 4,
            "kv_heads": 2,
            "value_dim": 6,
            "feature_map": "hedgehog",
            "normalize_features": True,
        },
        name="grouped",
    ),
    Row(
        "linear_attention",
        {"dim": 16, "heads": 2, "causal": False},
        name="bidirectional",
        causal=False,
    ),
    Row("mla", MLA_SIZES),
    Row("mla", {**MLA_SIZES, "rope_theta": 100.0, "form": "absorbed"}, name="rope"),
    Row("retnet", {"dim": 32, "heads": 2}, golden="foreign"),
    Row(
        "retnet",
        {"dim": 16, "heads": 2, "variant": "library", "score_norm": "decay"},
        name="library",
    ),
    Row("softmax", {"dim": 16, "heads": 2, "out_bias": True}),
    Row(
        "softmax",
        {"dim": 16, "heads": 4, "kv_heads": 2, "qk_norm": True, "rope_dim": 2, "bias": True},
        name="grouped",
    ),
    Row("softmax", {"dim": 16, "heads": 2, "rope_theta": None, "window": 5}, name="window"),
    Row("softmax", {"dim": 16, "heads": 2, "window": 4, "sinks": 3}, name="sinks"),
    Row("gla", {"dim": 32, "heads": 2}, golden="foreign"),
    Row(
        "gla",
        {
            "dim": 16,
            "heads": 4,
            "kv_heads": 2,
            "conv_size": 4,
            "feature_map": "relu",
            "clamp_min": -0.05,
        },
        name="grouped",
    ),
    Row("hgrn", {"dim": 16}),
    Row("hgrn", {"dim": 16, "layer": 1, "layers": 3}, name="bounded"),
    Row("hgrn", {"dim": 16, "variant": "complex", "layer": 2, "layers": 3}, name="complex"),
    Row("hgrn2", {"dim": 16, "heads": 2}),
    Row("hgrn2", {"dim": 16, "expand_ratio": 4, "layer": 2, "layers": 3}, name="bounded"),
    Row("hgrn2", {"dim": 16, "heads": 2, "variant": "standalone"}, name="standalone"),
    Row("deltanet", {"dim": 32, "heads": 2}, golden="foreign"),
    Row(
        "deltanet",
        {"dim": 32, "heads": 2, "qk_activation": "elu", "qk_norm": "sum", "use_gate": True},
        name="sum",
        golden="foreign",
    ),
    Row("deltanet", {"dim": 16, "heads": 2, "conv_size": 0, "expand_v": 0.5}, name="unconvolved"),
    Row("kimi_linear", {"dim": 16, "heads": 2}),
    Row(
        "kimi_linear",
        {"dim": 16, "heads": 1, "value_heads": 2, "head_dim": 8, "decay_floor": -5.0},
        name="bounded",
    ),
    Row("mamba2", {"dim": 16, "heads": 4, "state_dim": 8}),
    Row(
        "mamba2",
        {"dim": 16, "head_dim": 8, "state_dim": 4, "groups": 2, "dt_limit": (0.05, 0.5)},
        name="grouped",
    ),
    Row("gated_deltanet", {"dim": 16, "heads": 2, "head_dim": 8, "conv_size": 4}),
    Row(
        "gated_deltanet",
        {"dim": 16, "heads": 1, "value_heads": 2, "head_dim": 8, "negative_eigenvalues": True},
        name="grouped",
    ),
]
