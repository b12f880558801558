"""The small language in which the command line names mixers, models and tasks.

    gla                             a mixer, in every layer
    gla[heads=2]                    with options
    gated_deltanet*3 softmax        a layer pattern, repeated to the depth
    hybrid:6, hybrid:gla:3          a preset: linear layers to one of full attention
    based, kimi_linear              a preset
    mqar[pairs=16], text            tasks
    causal & window(511) | sinks(4) a mask

Lists are joined by commas; a comma inside brackets does not split.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any

from subquad import catalogue
from subquad.ops import checks

if TYPE_CHECKING:
    from subquad.mask import Mask
    from subquad.models.config import CausalLMConfig
    from subquad.models.diffusion import DiTConfig
    from subquad.models.vision import VisionConfig

_NAMED = re.compile(r"(?P<name>\w+)(?:\[(?P<options>[^\[\]]*)\])?")
_PRESET = re.compile(r"(?P<name>\w+)(?P<args>(?::\w+)*)(?:\[(?P<options>.*)\])?")
_SIZES = re.compile(r"\d+(x\d+)+")
_CONSTANTS = {"true": True, "false": False, "none": None}


def value(text: str) -> Any:
    """``"8"`` as int, ``"0.5"`` as float, ``"true"``, ``"none"``, ``"7x7"`` as a list, else the
    text itself."""
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    if _SIZES.fullmatch(text):
        return [int(part) for part in text.split("x")]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def options(text: str | None) -> dict[str, Any]:
    """``"heads=2,window=64"`` as a dict.

    Raises:
        ValueError: for a part that is not ``name=value``.
    """
    out = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, given = part.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ValueError(
                f"options must be name=value joined by commas, got {part!r} in {text!r}"
            )
        out[name.strip()] = value(given.strip())
    return out


def listed(text: str) -> list[str]:
    """The parts of a list, split at the commas outside brackets."""
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", text)]
    if not all(parts):
        raise ValueError(f"a list must have a name between its commas, got {text!r}")
    return parts


def named(text: str) -> tuple[str, dict[str, Any]]:
    """``"mqar[pairs=16]"`` as ``("mqar", {"pairs": 16})``."""
    match = _NAMED.fullmatch(text)
    if match is None:
        raise ValueError(f"expected name or name[option=value,...], got {text!r}")
    return match["name"], options(match["options"])


def model(text: str, **config: Any) -> CausalLMConfig:
    """The configuration of the language model that ``text`` names, for the sizes in ``config``.

    Raises:
        ValueError: for a name that is neither a preset nor a mixer (with the nearest names), and
            for a pattern that cannot be read.
    """
    from subquad.models.config import CausalLMConfig
    from subquad.models.presets import PRESETS

    preset = _PRESET.fullmatch(text)
    if preset is not None and preset["name"] in PRESETS:
        extra = options(preset["options"])
        args = preset["args"].split(":")[1:]
        if args and preset["name"] != "hybrid":
            raise ValueError(f"only hybrid takes arguments after a colon, got {text!r}")
        for arg in map(value, args):
            extra["linear" if isinstance(arg, str) else "ratio"] = arg
        return PRESETS[preset["name"]](**{**config, **extra})
    layers, mixers = _pattern(text, list(PRESETS))
    return CausalLMConfig(layers=layers, mixers=mixers, **config)


def vision(text: str, *, dim: int, depth: int, heads: int, **config: Any) -> VisionConfig:
    """The same names as the configuration of an isotropic vision model."""
    from subquad.models.vision import VisionConfig

    read = model(text, dim=dim, depth=depth)
    layers = read.layers if isinstance(read.layers, str) else " ".join(read.layers)
    sizes: dict[str, Any] = {"dims": [dim], "depths": [depth], "heads": [heads]}
    return VisionConfig(layers=layers, mixers=read.mixers, stem="patch", **sizes, **config)


def diffusion(text: str, *, dim: int, depth: int, **config: Any) -> DiTConfig:
    """The same names as the configuration of a diffusion transformer."""
    from subquad.models.diffusion import DiTConfig

    read = model(text, dim=dim, depth=depth)
    return DiTConfig(layers=read.layers, mixers=read.mixers, dim=dim, depth=depth, **config)


def _pattern(text: str, presets: list[str]) -> tuple[str, dict[str, dict[str, Any]]]:
    """A layer pattern with options in brackets, as the plain pattern and the aliases it needs."""
    known = [card.key for card in catalogue.systems(kind="mixer")]
    tokens, mixers = [], {}
    for token in text.split():
        entry, star, times = token.partition("*")
        if star and not times.isdecimal():
            raise ValueError(f"a repetition must be name*number, got {token!r}")
        name, extra = named(entry)
        if name not in known:
            checks.one_of("mixer", name, sorted({*known, *presets}))
        alias = name
        if extra:
            alias = re.sub(r"\W", "_", name + "".join(f"_{k}{v}" for k, v in extra.items()))
            mixers[alias] = {"mixer": name, **extra}
        tokens.append(alias + star + times)
    return " ".join(tokens), mixers


def mask(text: str) -> Mask:
    """``"causal & (window(511) | sinks(4))"`` as a mask; ``&``, ``|`` and ``~`` join them.

    Raises:
        ValueError: for anything but masks by their names, with whole numbers.
    """
    try:
        return _mask(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError) as error:
        raise ValueError(f"mask {text!r} cannot be read: {error}") from None


def _mask(node: ast.expr) -> Mask:
    from subquad import mask

    arguments: list[ast.expr] = []
    match node:
        case ast.BinOp(left, ast.BitAnd(), right):
            return _mask(left) & _mask(right)
        case ast.BinOp(left, ast.BitOr(), right):
            return _mask(left) | _mask(right)
        case ast.UnaryOp(ast.Invert(), operand):
            return ~_mask(operand)
        case ast.Name(name):
            call = name
        case ast.Call(ast.Name(name), arguments, []):
            call = name
        case _:
            raise ValueError(f"a mask is name or name(number, ...), got {ast.unparse(node)!r}")
    checks.one_of("mask", call, ("causal", "full", "prefix", "sinks", "strided", "window"))
    return getattr(mask, call)(*(ast.literal_eval(a) for a in arguments))
