"""Registers the models with transformers' Auto classes once someone imports those.

Importing transformers costs more than all the rest, so ``import subquad`` only leaves word: a
finder that looks up no module itself, but notices when the Auto classes have been imported. It
changes nothing in transformers; it calls the public ``register``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"
# Half imported, any of these would make the import of the model a circle: wait for its end.
_WATCHED = (
    _CONFIGS,
    _MODELS,
    "transformers.generation.utils",
    "transformers.modeling_utils",
    "transformers.modeling_layers",
    "subquad.models.blocks",
    "subquad.models.checkpoint",
    "subquad.models.config",
    "subquad.models.causal_lm",
    "subquad.models.diffusion.blocks",
    "subquad.models.diffusion.config",
    "subquad.models.diffusion.model",
    "subquad.models.vision.blocks",
    "subquad.models.vision.config",
    "subquad.models.vision.model",
)


class _Announced(Loader):
    """A module's own loader, with word given when the module is complete."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _finder.complete(module.__name__)


class _Finder(MetaPathFinder):
    """Wraps the loaders of the watched modules; every other name is left to the other finders."""

    def __init__(self) -> None:
        self._done: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _WATCHED:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Announced(spec.loader)
                return spec
        return None

    def complete(self, name: str) -> None:
        self._done.add(name)
        self.settle()

    def settle(self) -> None:
        """Register what can be registered now; leave when all is."""
        if any(name in sys.modules and not self._complete(name) for name in _WATCHED):
            return
        try:
            if _CONFIGS in sys.modules:
                _register_config()
            if _MODELS in sys.modules:
                _register_model()
        except ImportError as error:  # the user's import of transformers must not fail for it
            warnings.warn(f"subquad's models are unknown to transformers: {error}", stacklevel=2)
        if _MODELS in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)

    def _complete(self, name: str) -> bool:
        spec = getattr(sys.modules[name], "__spec__", None)
        return name in self._done or not getattr(spec, "_initializing", False)


_finder = _Finder()


def install() -> None:
    """Wait for transformers' Auto classes, or register at once where they are imported."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
        _finder.settle()


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from subquad.models.config import CausalLMConfig
    from subquad.models.diffusion.config import DiTConfig
    from subquad.models.vision.config import VisionConfig

    AutoConfig.register(DiTConfig.model_type, DiTConfig, exist_ok=True)
    AutoConfig.register(CausalLMConfig.model_type, CausalLMConfig, exist_ok=True)
    AutoConfig.register(VisionConfig.model_type, VisionConfig, exist_ok=True)


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
    )

    from subquad.models.causal_lm import CausalLM
    from subquad.models.config import CausalLMConfig
    from subquad.models.diffusion.config import DiTConfig
    from subquad.models.diffusion.model import DiT
    from subquad.models.vision.config import VisionConfig
    from subquad.models.vision.model import VisionModel

    AutoModel.register(DiTConfig, DiT, exist_ok=True)
    AutoModelForCausalLM.register(CausalLMConfig, CausalLM, exist_ok=True)
    AutoModelForImageClassification.register(VisionConfig, VisionModel, exist_ok=True)
