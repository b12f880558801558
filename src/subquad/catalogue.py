"""One frozen card per system: pure data. What exists, where it lives, what was shown of it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, kw_only=True)
class System:
    """The card of one system.

    Attributes:
        key: the name it goes by in code and on the command line.
        name: the name it goes by in print.
        paper: title of the paper.
        arxiv: identifier on arxiv.org; empty where there is none.
        family: e.g. "linear recurrence", "sparse", "hybrid".
        kind: the room, "mixer", "policy", "recipe", "parallel", "analysis", "task" or "op".
        home: ``"module:Class"``, imported when asked for.
        causal: whether it is a causal (left to right) system.
        trains: whether it has parameters that train.
        evidence: what was shown: "facts" (the sheet's checks), "golden" (the authors' vectors),
            "claim" (the paper's main claim, in direction, in an experiment).
    """

    key: str
    name: str
    paper: str
    arxiv: str
    family: str
    kind: str
    home: str
    causal: bool = True
    trains: bool = True
    evidence: tuple[str, ...] = ()

    def load(self) -> Any:
        """Import and return the system's home."""
        module, _, attribute = self.home.partition(":")
        return getattr(import_module(module), attribute)


_CARDS = (
    System(
        key="lasp2",
        name="LASP-2 and LASP-2H",
        paper="LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid",
        arxiv="2502.07563",
        family="distributed",
        kind="parallel",
        home="subquad.parallel.lasp2:lasp2",
        trains=False,
        evidence=("facts",),
    ),
    System(
        key="ring_attention",
        name="Ring Attention",
        paper="Ring Attention with Blockwise Transformers for Near-Infinite Context",
        arxiv="2310.01889",
        family="distributed",
        kind="parallel",
        home="subquad.parallel.ring_attention:ring_attention",
        trains=False,
        evidence=("facts",),
    ),
    System(
        key="ulysses",
        name="DeepSpeed-Ulysses",
        paper="DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long "
        "Sequence Transformer Models",
        arxiv="2309.14509",
        family="distributed",
        kind="parallel",
        home="subquad.parallel.ulysses:ulysses",
        trains=False,
        evidence=("facts",),
    ),
    System(
        key="base_conv",
        name="BaseConv",
        paper="Simple linear attention language models balance the recall-throughput tradeoff",
        arxiv="2402.18668",
        family="convolution",
        kind="mixer",
        home="subquad.mixers.based:BaseConv",
        evidence=("facts",),
    ),
    System(
        key="based",
        name="BASED",
        paper="Simple linear attention language models balance the recall-throughput tradeoff",
        arxiv="2402.18668",
        family="kernel linear attention",
        kind="mixer",
        home="subquad.mixers.based:Based",
        evidence=("facts",),
    ),
    System(
        key="lightning",
        name="Lightning Attention",
        paper="Various Lengths, Constant Speed: "
        "Efficient Language Modeling with Lightning Attention",
        arxiv="2405.17381",
        family="linear recurrence",
        kind="mixer",
        home="subquad.mixers.lightning:Lightning",
        evidence=("facts",),
    ),
    System(
        key="linear_attention",
        name="Linear Attention",
        paper="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        arxiv="2006.16236",
        family="kernel linear attention",
        kind="mixer",
        home="subquad.mixers.linear_attention:LinearAttention",
        evidence=("facts", "golden"),
    ),
    System(
        key="hedgehog",
        name="Hedgehog",
        paper="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        arxiv="2402.04347",
        family="kernel linear attention",
        kind="mixer",
        home="subquad.mixers.hedgehog:Hedgehog",
        evidence=("facts",),
    ),
    System(
        key="lawcat",
        name="LAWCAT",
        paper="LAWCAT: Efficient Distillation from Quadratic to Linear Attention with Convolution "
        "across Tokens for Long Context Modeling",
        arxiv="2509.18467",
        family="conversion",
        kind="mixer",
        home="subquad.mixers.lawcat:LAWCAT",
        evidence=("facts",),
    ),
    System(
        key="lolcats",
        name="LoLCATs",
        paper="LoLCATs: On Low-Rank Linearizing of Large Language Models",
        arxiv="2410.10254",
        family="conversion",
        kind="mixer",
        home="subquad.mixers.lolcats:LoLCATs",
        evidence=("facts", "golden"),
    ),
    System(
        key="sala",
        name="MiniCPM-SALA",
        paper="MiniCPM-SALA: Hybridizing Sparse and Linear Attention for Efficient Long-Context "
        "Modeling",
        arxiv="2602.11761",
        family="hybrid",
        kind="mixer",
        home="subquad.mixers.sala:SALA",
        evidence=("facts",),
    ),
    System(
        key="still",
        name="STILL",
        paper="STILL: Selecting Tokens for Intra-Layer Hybrid Attention to Linearize LLMs",
        arxiv="2602.02180",
        family="conversion",
        kind="mixer",
        home="subquad.mixers.still:STILL",
        evidence=("facts",),
    ),
    System(
        key="mla",
        name="MLA",
        paper="DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
        arxiv="2405.04434",
        family="softmax",
        kind="mixer",
        home="subquad.mixers.mla:MLA",
        evidence=("facts",),
    ),
    System(
        key="retnet",
        name="RetNet",
        paper="Retentive Network: A Successor to Transformer for Large Language Models",
        arxiv="2307.08621",
        family="linear recurrence",
        kind="mixer",
        home="subquad.mixers.retnet:RetNet",
        evidence=("facts", "golden"),
    ),
    System(
        key="softmax",
        name="Softmax Attention",
        paper="Attention Is All You Need",
        arxiv="1706.03762",
        family="softmax",
        kind="mixer",
        home="subquad.mixers.softmax:Softmax",
        evidence=("facts",),
    ),
    System(
        key="deltanet",
        name="DeltaNet",
        paper="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
        arxiv="2406.06484",
        family="linear recurrence",
        kind="mixer",
        home="subquad.mixers.deltanet:DeltaNet",
        evidence=("facts", "golden"),
    ),
    System(
        key="parallax",
        name="Parallax",
        paper="Parallax: Parameterized Local Linear Attention for Language Modeling",
        arxiv="2605.29157",
        family="kernel regression",
        kind="mixer",
        home="subquad.mixers.parallax:Parallax",
        evidence=("facts", "golden"),
    ),
    System(
        key="lla",
        name="Local Linear Attention",
        paper="Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention "
        "For Test-Time Regression",
        arxiv="2510.01450",
        family="kernel regression",
        kind="mixer",
        home="subquad.mixers.lla:LLA",
        evidence=("facts", "claim"),
    ),
    System(
        key="gla",
        name="GLA",
        paper="Gated Linear Attention Transformers with Hardware-Efficient Training",
        arxiv="2312.06635",
        family="linear recurrence",
        kind="mixer",
        home="subquad.mixers.gla:GLA",
        evidence=("facts", "golden"),
    ),
    System(
        key="hgrn",
        name="HGRN",
        paper="Hierarchically Gated Recurrent Neural Network for Sequence Modeling",
        arxiv="2311.04823",
        family="linear recurrence",
        kind="mixer",
        home="subquad.mixers.hgrn:HGRN",
        evidence=("facts",),
    ),
    System(
        key="hgrn2",
        name="HGRN2",
        paper="HGRN2: Gated Linear RNNs with State Expansion",
        arxiv="2404.07904",
        family="linear recurrence",
        kind="mixer",
        home="subquad.mixers.hgrn2:HGRN2",
        evidence=("facts",),
    ),
    System(
        key="kimi_linear",
        name="Kimi Linear (KDA)",
        paper="Kimi Linear: An Expressive, Efficient Attention Architecture",
        arxiv="2510.26692",
        family="linear recurrence",
        kind="mixer",
        home="subquad.mixers.kimi_linear:KimiDeltaAttention",
        evidence=("facts",),
    ),
    System(
        key="mamba2",
        name="Mamba-2",
        paper="Transformers are SSMs: "
        "Generalized Models and Efficient Algorithms Through Structured State Space Duality",
        arxiv="2405.21060",
        family="linear recurrence",
        kind="mixer",
        home="subquad.mixers.mamba2:Mamba2",
        evidence=("facts",),
    ),
    System(
        key="gated_deltanet",
        name="Gated DeltaNet",
        paper="Gated Delta Networks: Improving Mamba2 with Delta Rule",
        arxiv="2412.06464",
        family="linear recurrence",
        kind="mixer",
        home="subquad.mixers.gated_deltanet:GatedDeltaNet",
        evidence=("facts",),
    ),
    System(
        key="inline",
        name="InLine",
        paper="Bridging the Divide: Reconsidering Softmax and Linear Attention",
        arxiv="2412.06590",
        family="vision",
        kind="mixer",
        home="subquad.mixers.inline:InLine",
        causal=False,
        evidence=("facts", "claim"),
    ),
    System(
        key="mala",
        name="MALA",
        paper="Rectifying Magnitude Neglect in Linear Attention",
        arxiv="2507.00698",
        family="vision",
        kind="mixer",
        home="subquad.mixers.mala:MALA",
        causal=False,
        evidence=("facts", "golden", "claim"),
    ),
    System(
        key="rala",
        name="RALA",
        paper="Breaking the Low-Rank Dilemma of Linear Attention",
        arxiv="2411.07635",
        family="vision",
        kind="mixer",
        home="subquad.mixers.rala:RALA",
        causal=False,
        evidence=("facts",),
    ),
    System(
        key="soft",
        name="SOFT and SOFT++",
        paper="Softmax-free Linear Transformers",
        arxiv="2207.03341",
        family="vision",
        kind="mixer",
        home="subquad.mixers.soft:SOFT",
        causal=False,
        evidence=("facts",),
    ),
    System(
        key="sla",
        name="SLA",
        paper="SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear "
        "Attention",
        arxiv="2509.24006",
        family="diffusion",
        kind="mixer",
        home="subquad.mixers.sla:SLA",
        causal=False,
        evidence=("facts", "claim"),
    ),
    System(
        key="titans",
        name="Titans",
        paper="Titans: Learning to Memorize at Test Time",
        arxiv="2501.00663",
        family="memory",
        kind="mixer",
        home="subquad.mixers.titans:Titans",
        evidence=("facts", "golden", "claim"),
    ),
    System(
        key="neighborhood",
        name="Neighborhood attention",
        paper="Faster Neighborhood Attention: "
        "Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
        arxiv="2403.04690",
        family="sparse",
        kind="mixer",
        home="subquad.mixers.neighborhood:NeighborhoodAttention",
        causal=False,
        evidence=("facts", "golden"),
    ),
    System(
        key="gna",
        name="Generalized neighborhood attention",
        paper="Generalized Neighborhood Attention: "
        "Multi-dimensional Sparse Attention at the Speed of Light",
        arxiv="2504.16922",
        family="sparse",
        kind="mixer",
        home="subquad.mixers.gna:GNA",
        causal=False,
        evidence=("facts",),
    ),
    System(
        key="power_attention",
        name="PowerAttention",
        paper="PowerAttention: "
        "Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
        arxiv="2503.03588",
        family="sparse",
        kind="mixer",
        home="subquad.mixers.power_attention:PowerAttention",
        evidence=("facts", "golden"),
    ),
    System(
        key="longlora",
        name="LongLoRA (S2 attention)",
        paper="LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models",
        arxiv="2309.12307",
        family="sparse",
        kind="mixer",
        home="subquad.mixers.longlora:LongLoRA",
        evidence=("facts", "golden"),
    ),
    System(
        key="masformer",
        name="MASFormer",
        paper="Efficient Long-Range Transformers: "
        "You Need to Attend More, but Not Necessarily at Every Layer",
        arxiv="2310.12442",
        family="hybrid",
        kind="mixer",
        home="subquad.mixers.masformer:MASFormer",
        evidence=("facts",),
    ),
    System(
        key="ls_attention",
        name="LS-attention",
        paper="Short-Range Dependency Effects on Transformer Instability "
        "and a Decomposed Attention Solution",
        arxiv="2505.15548",
        family="hybrid",
        kind="mixer",
        home="subquad.mixers.ls_attention:LSAttention",
        evidence=("facts",),
    ),
    System(
        key="infllm_v2",
        name="InfLLM-V2",
        paper="InfLLM-V2: Dense-Sparse Switchable Attention for Seamless Short-to-Long Adaptation",
        arxiv="2509.24663",
        family="sparse",
        kind="mixer",
        home="subquad.mixers.infllm_v2:InfLLMv2",
        evidence=("facts", "golden"),
    ),
    System(
        key="cca",
        name="Core context aware attention",
        paper="Core Context Aware Transformers for Long Context Language Modeling",
        arxiv="2412.12465",
        family="sparse",
        kind="mixer",
        home="subquad.mixers.cca:CCA",
        evidence=("facts",),
    ),
    System(
        key="streaming_llm",
        name="StreamingLLM",
        paper="Efficient Streaming Language Models with Attention Sinks",
        arxiv="2309.17453",
        family="sparse",
        kind="policy",
        home="subquad.policies.streaming_llm:StreamingLLM",
        trains=False,
        evidence=("facts", "golden"),
    ),
    System(
        key="quest",
        name="Quest",
        paper="QUEST: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
        arxiv="2406.10774",
        family="sparse",
        kind="policy",
        home="subquad.policies.quest:Quest",
        trains=False,
        evidence=("facts", "golden"),
    ),
    System(
        key="vertical_slash",
        name="Vertical-Slash",
        paper="MInference 1.0: "
        "Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
        arxiv="2407.02490",
        family="sparse",
        kind="policy",
        home="subquad.policies.vertical_slash:VerticalSlash",
        trains=False,
        evidence=("facts",),
    ),
    System(
        key="flexprefill",
        name="FlexPrefill",
        paper="FlexPrefill: "
        "A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
        arxiv="2502.20766",
        family="sparse",
        kind="policy",
        home="subquad.policies.flexprefill:FlexPrefill",
        trains=False,
        evidence=("facts",),
    ),
    System(
        key="block_topk",
        name="Block-sparse top-k",
        paper="MInference 1.0: "
        "Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
        arxiv="2407.02490",
        family="sparse",
        kind="policy",
        home="subquad.policies.block_topk:BlockTopK",
        trains=False,
        evidence=("facts",),
    ),
    System(
        key="snapkv",
        name="SnapKV",
        paper="SnapKV: LLM Knows What You are Looking for Before Generation",
        arxiv="2404.14469",
        family="sparse",
        kind="policy",
        home="subquad.policies.snapkv:SnapKV",
        trains=False,
        evidence=("facts", "golden"),
    ),
    System(
        key="ada_snapkv",
        name="Ada-SnapKV",
        paper="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation "
        "for Efficient LLM Inference",
        arxiv="2407.11550",
        family="sparse",
        kind="policy",
        home="subquad.policies.ada_snapkv:AdaSnapKV",
        trains=False,
        evidence=("facts",),
    ),
    System(
        key="hip",
        name="HiP Attention",
        paper="A Training-free Sub-quadratic Cost Transformer Model Serving Framework "
        "with Hierarchically Pruned Attention",
        arxiv="2406.09827",
        family="sparse",
        kind="policy",
        home="subquad.policies.hip:HiP",
        trains=False,
        evidence=("facts", "golden"),
    ),
    System(
        key="longheads",
        name="LongHeads",
        paper="LongHeads: Multi-Head Attention is Secretly a Long Context Processor",
        arxiv="2402.10685",
        family="sparse",
        kind="policy",
        home="subquad.policies.longheads:LongHeads",
        trains=False,
        evidence=("facts",),
    ),
    System(
        key="duo",
        name="DuoAttention",
        paper="DuoAttention: "
        "Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
        arxiv="2410.10819",
        family="sparse",
        kind="policy",
        home="subquad.policies.duo:Duo",
        trains=False,
        evidence=("facts",),
    ),
    System(
        key="infini_retri",
        name="InfiniRetri",
        paper="Infinite Retrieval: Attention Enhanced LLMs in Long-Context Processing",
        arxiv="2502.12962",
        family="memory",
        kind="policy",
        home="subquad.policies.infini_retri:InfiniRetri",
        trains=False,
        evidence=("facts",),
    ),
    System(
        key="retrieval_heads",
        name="Retrieval heads",
        paper="Retrieval Head Mechanistically Explains Long-Context Factuality",
        arxiv="2404.15574",
        family="analysis",
        kind="analysis",
        home="subquad.analysis.retrieval_heads:RetrievalHeads",
        trains=False,
        evidence=("facts", "claim"),
    ),
    System(
        key="secondary_sinks",
        name="Secondary attention sinks",
        paper="On the Existence and Behaviour of Secondary Attention Sinks",
        arxiv="2512.22213",
        family="analysis",
        kind="analysis",
        home="subquad.analysis.secondary_sinks:SecondarySinks",
        trains=False,
        evidence=("facts",),
    ),
    System(
        key="eval_tasks",
        name="Evaluation tasks",
        paper="Zoology: Measuring and Improving Recall in Efficient Language Models; RULER; others",
        arxiv="2312.04927",
        family="benchmark",
        kind="task",
        home="subquad.tasks:create_task",
        trains=False,
        evidence=("facts", "golden"),
    ),
)


def systems(kind: str | None = None, family: str | None = None) -> tuple[System, ...]:
    """The cards, of one kind or family where given, in the order of their keys."""
    return tuple(
        sorted(
            (c for c in _CARDS if kind in (None, c.kind) and family in (None, c.family)),
            key=lambda c: c.key,
        )
    )


def system(key: str) -> System:
    """The card of one system.

    Raises:
        ValueError: if there is none, naming the nearest keys.
    """
    for card in _CARDS:
        if card.key == key:
            return card
    import difflib

    near = difflib.get_close_matches(key, [c.key for c in _CARDS], n=3, cutoff=0.5)
    raise ValueError(f"system must be a key of the catalogue, got {key!r}; nearest: {near}")
