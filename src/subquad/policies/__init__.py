"""One file per inference-time system, for pretrained models. See :mod:`subquad.policies.base`."""

from subquad.lazy import getter

_HOMES = {
    "AdaSnapKV": "subquad.policies.ada_snapkv",
    "BlockTopK": "subquad.policies.block_topk",
    "Duo": "subquad.policies.duo",
    "FlexPrefill": "subquad.policies.flexprefill",
    "HiP": "subquad.policies.hip",
    "InfiniRetri": "subquad.policies.infini_retri",
    "LongHeads": "subquad.policies.longheads",
    "Policy": "subquad.policies.base",
    "Quest": "subquad.policies.quest",
    "SnapKV": "subquad.policies.snapkv",
    "StreamingLLM": "subquad.policies.streaming_llm",
    "VerticalSlash": "subquad.policies.vertical_slash",
    "create_policy": "subquad.policies.base",
}

__all__ = [*_HOMES]
__getattr__ = getter(__name__, _HOMES)
