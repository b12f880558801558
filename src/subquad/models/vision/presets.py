"""Vision models with a name: the published backbones, and small ones for small images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subquad.models.vision.config import VisionConfig
from subquad.models.vision.model import VisionModel
from subquad.ops import checks

LATE = "late"  # the alias of the softmax of the later stages, which ``mixer`` leaves in place

_GATED: dict[str, dict[str, Any]] = {
    "tiny": {
        "dims": [64, 128, 256, 512],
        "depths": [2, 2, 6, 2],
        "heads": [1, 2, 4, 8],
        "layer_scale": 1.0,
        "drop_path": 0.1,
    },
    "small": {
        "dims": [64, 128, 320, 512],
        "depths": [3, 5, 9, 3],
        "heads": [1, 2, 5, 8],
        "layer_scale": 1.0,
        "drop_path": 0.15,
    },
    "base": {
        "dims": [96, 192, 384, 512],
        "depths": [4, 6, 12, 6],
        "heads": [1, 2, 6, 8],
        "layer_scale": [1.0, 1.0, 1e-6, 1e-6],
        "drop_path": 0.4,
    },
    "large": {
        "dims": [96, 192, 448, 640],
        "depths": [4, 7, 19, 8],
        "heads": [1, 2, 7, 10],
        "layer_scale": 1e-6,
        "drop_path": 0.55,
    },
}
_MALA_WIDTH = {"tiny": 2048, "small": 2048, "base": 2048, "large": 2560}
_SOFT: dict[str, tuple[list[int], list[int], list[int]]] = {
    "tiny": ([64, 128, 320, 512], [1, 2, 3, 2], [2, 4, 10, 16]),
    "small": ([64, 128, 320, 512], [1, 3, 20, 4], [2, 4, 10, 16]),
    "medium": ([64, 128, 288, 512], [1, 3, 29, 5], [2, 4, 9, 16]),
    "large": ([64, 128, 320, 512], [1, 3, 40, 5], [2, 4, 10, 16]),
    "huge": ([64, 128, 352, 512], [1, 5, 49, 5], [2, 4, 11, 16]),
}
_INLINE = {"tiny": (192, 6, 224), "small": (320, 10, 288), "base": (384, 12, 448)}


def _presets() -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for key in ("mala", "rala"):
        for size, shape in _GATED.items():
            out[f"{key}_{size}"] = {
                **shape,
                "layers": [key, key, LATE, LATE],
                "mixers": {LATE: {"mixer": key, "attention": "softmax"}},
                "mlp_ratio": 3.5,
                "head_width": _MALA_WIDTH[size] if key == "mala" else 1024,
            }
    for size, (dims, depths, heads) in _SOFT.items():
        near = {"soft8": (8, 9), "soft4": (4, 5), "soft2": (2, 3)}
        out[f"soft_{size}"] = {
            "dims": dims,
            "depths": depths,
            "heads": heads,
            "layers": [*near, LATE],
            "mixers": {
                **{a: {"mixer": "soft", "ratio": r, "conv_size": c} for a, (r, c) in near.items()},
                LATE: {"mixer": "softmax"},
            },
            "norm": "post",
            "position": "learned",
            "mlp_conv": False,
        }
    plain: dict[str, Any] = {"stem": "patch", "patch": 16, "position": "learned", "mlp_conv": False}
    for size, (dim, count, pixels) in _INLINE.items():
        one: dict[str, Any] = {"dims": [dim], "depths": [12], "heads": [count]}
        out[f"inline_{size}"] = {**plain, **one, "image_size": pixels, "layers": "inline"}
    for size, dim, count in (("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12)):
        one = {"dims": [dim], "depths": [12], "heads": [count]}
        out[f"softmax_{size}"] = {**plain, **one, "layers": "softmax"}
    small = {"stem": "patch", "channels": 1, "classes": 10, "mlp_ratio": 2.0}
    out["micro"] = {
        **small,
        "dims": [48],
        "depths": [4],
        "heads": [3],
        "patch": 2,
        "layers": "mala",
    }
    out["micro_pyramid"] = {
        **small,
        "dims": [16, 32, 48, 64],
        "depths": [1, 1, 2, 1],
        "heads": [1, 2, 3, 4],
        "patch": 2,
        "layers": ["mala", "mala", LATE, LATE],
        "mixers": {LATE: {"mixer": "softmax"}},
    }
    return out


VISION_PRESETS: dict[str, dict[str, Any]] = _presets()


def vision_config(
    name: str, mixer: str | Mapping[str, Any] | None = None, **config: Any
) -> VisionConfig:
    """The configuration of a preset; arguments as of :func:`create_vision_model`."""
    checks.one_of("name", name, VISION_PRESETS)
    preset = {**VISION_PRESETS[name]}
    if mixer is not None:
        options = {"mixer": mixer} if isinstance(mixer, str) else mixer
        if not isinstance(options, Mapping) or "mixer" not in options:
            raise ValueError(f"mixer must be a key or have one as 'mixer', got {mixer!r}")
        options = dict(options)
        key = options.pop("mixer")
        layers = preset["layers"]
        old = [layers] if isinstance(layers, str) else layers
        new = [LATE if alias == LATE else key for alias in old]
        late = {a: o for a, o in preset.get("mixers", {}).items() if a == LATE}
        preset["layers"] = new if isinstance(layers, list) else key
        preset["mixers"] = {**late, **({key: options} if options else {})}
    return VisionConfig(**{**preset, **config})


def create_vision_model(
    name: str,
    *,
    mixer: str | Mapping[str, Any] | None = None,
    features_only: bool = False,
    out_indices: tuple[int, ...] | None = None,
    **config: Any,
) -> VisionModel:
    """A :class:`~subquad.models.vision.model.VisionModel` with fresh weights.

    Args:
        name: one of ``VISION_PRESETS``: ``mala_tiny`` to ``mala_large``, ``rala_*``, ``soft_*``
            (four stages), ``inline_*``, ``softmax_*`` (one stage), ``micro`` and
            ``micro_pyramid`` for images of a few pixels.
        mixer: in place of the preset's own, in every stage but those where the preset has softmax
            beside it: a key of the catalogue, or its options with the key as ``"mixer"``.
        features_only: return maps of features, as timm's models do.
        out_indices: which of them; see :class:`VisionConfig`.
        **config: of :class:`VisionConfig`, over the preset's, e.g. ``classes`` and ``channels``.

    Raises:
        ValueError: for an unknown name or mixer (with the nearest ones), and values out of range.
    """
    if out_indices is not None and not isinstance(out_indices, (list, tuple)):
        raise ValueError(f"out_indices must be a tuple of indices, got {out_indices!r}")
    outs = None if out_indices is None else list(out_indices)
    made = vision_config(name, mixer, features_only=features_only, out_indices=outs, **config)
    return VisionModel(made)
