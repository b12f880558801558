"""Retrieval heads: the few heads that copy from the context into the answer (Wu et al., Retrieval
Head Mechanistically Explains Long-Context Factuality)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subquad.analysis.watch import Head, Watch
from subquad.analysis.words import recall
from subquad.ops import checks

RETRIEVAL, STRONG = 0.1, 0.5
BEST = 100  # heads that random ones are not drawn from, in a model of twice as many or more
ACCEPTED = 0.5  # ROUGE-1 recall over which a sample counts as answered
NEEDLE_OVERLAP = 0.9
BUFFER = 200  # tokens of a prompt's length that are left to the question
QUESTION = "Based on the content of the book, Question: {}\nAnswer:"


@dataclass(frozen=True)
class Sample:
    """A prompt, where its needle stands in it, and what a good answer holds.

    Attributes:
        ids: int64 ``[S]``. span: (s, e), the tokens ``ids[s:e]`` are the needle.
        answer: text whose words the model should say. length, depth: of the grid.
    """

    ids: Tensor
    span: tuple[int, int]
    answer: str
    length: int = 0
    depth: float = 0.0


def locate(ids: Sequence[int], needle: Sequence[int]) -> tuple[int, int]:
    """The first stretch of ``ids``, as long as the needle, that holds more than 90% of its tokens.

    By overlap and not by equality, since a tokenizer may merge across the needle's borders.

    Raises:
        ValueError: where there is none.
    """
    wanted, n = set(needle), len(needle)
    for i in range(len(ids) - n + 1):
        if len(wanted.intersection(ids[i : i + n])) / len(wanted) > NEEDLE_OVERLAP:
            return i, i + n
    raise ValueError(f"needle of {n} tokens must stand in ids, found in none of {len(ids)} places")


def score(
    looked: Tensor, said: Sequence[int], ids: Tensor, span: tuple[int, int], dedup: bool = False
) -> Tensor:
    """How much of the needle each head copied: ``[L,H]``.

    A head copies when, in the step that produces a token, its strongest attention lies on that very
    token in the needle.

    Args:
        looked: int ``[steps,L,H]``, the position of the strongest attention in each step.
        said: the token that each step produced. ids: ``[S]`` of the prompt. span: of the needle.
        dedup: count a token once (the paper's ``|g & k| / |k|``, of sets); otherwise every copy
            counts ``1 / (e - s)``, as the authors' code does, and the sum may exceed 1.
    """
    s, e = span
    if not 0 <= s < e <= len(ids):
        raise ValueError(f"span must lie in 0..{len(ids)} and not be empty, got {span}")
    tokens = torch.as_tensor(said, device=looked.device)
    inside = (looked >= s) & (looked < e)
    found = ids.to(looked.device)[looked.clamp(max=len(ids) - 1)]
    copied = inside & (found == tokens[:, None, None])
    if not dedup:
        return copied.sum(0) / (e - s)
    kinds = torch.unique(ids[s:e]).tolist()
    each = [(copied & (tokens == t)[:, None, None]).any(0) for t in kinds]
    return torch.stack(each).sum(0) / len(kinds)


@dataclass(frozen=True)
class RetrievalScores:
    """What :func:`probe` found.

    Attributes:
        scores: ``[L,H]``, the mean over the answered samples.
        per_sample: ``[n,L,H]`` of these. tried: samples in all.
    """

    scores: Tensor
    per_sample: Tensor
    tried: int

    @property
    def frequency(self) -> Tensor:
        """``[L,H]``: in which share of the samples a head copied at all."""
        return (self.per_sample > 0).float().mean(0)

    def top(self, k: int, lowest: bool = False) -> list[Head]:
        """The k heads with the highest scores (or the lowest), the first one first."""
        checks.positive("k", k)
        order = self.scores.flatten().argsort(descending=not lowest, stable=True)[:k]
        return [divmod(int(i), self.scores.shape[1]) for i in order]

    def heads(self, threshold: float = RETRIEVAL) -> list[Head]:
        """The heads over ``threshold``, the strongest first."""
        count = int((self.scores > threshold).sum())
        return self.top(count) if count else []

    def others(self) -> list[Head]:
        """The heads that random ones are drawn from: no retrieval heads, and in a large model none
        of the best 100 (the authors' control)."""
        total, count = self.scores.numel(), len(self.heads())
        return self.top(total)[max(count, BEST if total >= 2 * BEST else 0) :]


def probe(
    model: Any, tokenizer: Any, samples: Iterable[Sample], *, new: int = 50, dedup: bool = False
) -> RetrievalScores:
    """Let ``model`` answer the samples and score its heads; samples that it fails do not count.

    Attention rows are taken in single-token steps only (from the prompt's last token on), so a step
    costs O(S) a head.

    Raises:
        ValueError: where the model answered no sample.
    """
    found, tried = [], 0
    for sample in samples:
        tried += 1
        with Watch(model, rows=True) as watch:
            cache = _read(model, sample.ids)
            said, looked = _answer(model, tokenizer, sample.ids, cache, new, watch)
        if recall(sample.answer, tokenizer.decode(said)) > ACCEPTED:
            found.append(score(torch.stack(looked), said, sample.ids, sample.span, dedup).cpu())
    if not found:
        raise ValueError(f"model must answer one of the samples, it answered none of {tried}")
    per_sample = torch.stack(found).float()
    return RetrievalScores(per_sample.mean(0), per_sample, tried)


@torch.inference_mode()
def _read(model: Any, ids: Tensor) -> Any:
    """The cache after all of a prompt but its last token."""
    given = ids[None, :-1].to(model.device)
    return model(given, use_cache=True, logits_to_keep=1).past_key_values


@torch.inference_mode()
def _answer(
    model: Any, tokenizer: Any, ids: Tensor, cache: Any, new: int, watch: Watch
) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens up to the end of a line, and where each head looked in each step."""
    token = int(ids[-1])
    said: list[int] = []
    looked: list[Tensor] = []
    for _ in range(new):
        given = torch.tensor([[token]], device=model.device)
        step = model(given, past_key_values=cache, use_cache=True)
        token = int(step.logits[0, -1].argmax())
        if watch.keeps_rows:
            rows, seen = [watch.rows[i][0] for i in sorted(watch.rows)], len(ids) + len(said)
            # A layer with a window holds the last tokens alone.
            looked.append(torch.stack([a.argmax(-1) + seen - a.shape[-1] for a in rows]))
        said.append(token)
        if token == tokenizer.eos_token_id or "\n" in tokenizer.decode([token]):
            break
    return said, looked


def accuracies(
    model: Any, tokenizer: Any, samples: Sequence[Sample], ablations: Sequence[Sequence[Head]], *,
    mode: str = "uniform", phase: str = "decode", new: int = 50,
) -> list[float]:  # fmt: skip
    """Mean ROUGE-1 recall of the answers without each of the sets of heads (see :class:`Watch`);
    an empty set is the model as it is. In phase "decode" a prompt is read once for all sets."""
    checks.positive("samples", len(samples))
    sums = [0.0] * len(ablations)
    for sample in samples:
        cache = _read(model, sample.ids) if phase == "decode" else None
        for i, heads in enumerate(ablations):
            with Watch(model, heads=heads, mode=mode, phase=phase) as watch:
                own = _read(model, sample.ids) if cache is None else deepcopy(cache)
                said, _ = _answer(model, tokenizer, sample.ids, own, new, watch)
            sums[i] += recall(sample.answer, tokenizer.decode(said))
    return [total / len(samples) for total in sums]


def in_haystack(
    tokenizer: Any, haystack: str, needle: str, question: str, length: int, depth: float
) -> Sample:
    """The authors' prompt: the needle behind the period before ``depth`` (0..1) of a haystack.

    Raises:
        ValueError: for a depth out of 0..1 or a haystack that is too short for ``length``.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in 0..1, got {depth}")
    planted = tokenizer.encode(needle, add_special_tokens=False)
    room = length - BUFFER - len(planted)
    text = tokenizer.encode(haystack, add_special_tokens=False)
    if not 0 < room <= len(text):
        raise ValueError(
            f"length must leave 1..{len(text)} tokens to the haystack, got {length}: {room}"
        )
    text, periods = text[:room], set(tokenizer.encode(".", add_special_tokens=False))
    at = int(room * depth)
    while 0 < at < room and text[at - 1] not in periods:
        at -= 1
    ask = tokenizer.encode("\n" + QUESTION.format(question), add_special_tokens=False)
    ids = [*text[:at], *planted, *text[at:], *ask]
    return Sample(torch.tensor(ids), locate(ids, planted), needle, length, depth)


def facts(
    tokenizer: Any, length: int, n: int, seed: int = 0, text: str | None = None
) -> list[Sample]:
    """Prompts with one fact, "One of the special magic numbers for {key} is: {value}.", whose value
    is asked; the needle is the value. The haystack is ``text`` (a file or folder; None: the
    Python standard library)."""
    import sysconfig

    from subquad.tasks import create_task

    task: Any = create_task(
        "niah_text", task="single_word", tokenizer=tokenizer, length=length, keys=1, intro=False,
        reserve=16, path=text or sysconfig.get_paths()["stdlib"],
    )  # fmt: skip
    samples = []
    for prompt in task.prompts(n, seed):
        value = prompt.targets[0]
        made = tokenizer(prompt.text, return_offsets_mapping=True, add_special_tokens=False)
        start = prompt.text.index(f": {value}.") + 2
        inside = [i for i, (a, b) in enumerate(made["offset_mapping"])
                  if b > start and a < start + len(value)]  # fmt: skip
        span = (inside[0], inside[-1] + 1)
        samples.append(Sample(torch.tensor(made["input_ids"]), span, value, length, prompt.depth))
    return samples


@dataclass(frozen=True, kw_only=True)
class RetrievalHeads:
    """The analysis: score the heads, then ablate the best and as many random ones.

    Args:
        length: tokens of a prompt. samples: to score the heads with; tests: others, to ablate on.
        ablate: 1, 2, 4, ... heads are ablated, up to this many, and as many as were found.
        draws: of random heads, from :meth:`RetrievalScores.others`.
        new: most tokens of an answer.
        mode, phase: of the ablation (see :class:`~subquad.analysis.watch.Watch`).
        dedup: see :func:`score`. seed: of samples and random heads.
        text: file or folder of the haystack; None for the Python standard library.
    """

    length: int = 1024
    samples: int = 20
    tests: int = 20
    ablate: int = 8
    draws: int = 3
    new: int = 16
    mode: str = "uniform"
    phase: str = "decode"
    dedup: bool = False
    seed: int = 0
    text: str | None = None

    def __post_init__(self) -> None:
        for name in ("length", "samples", "tests", "ablate", "draws", "new"):
            checks.positive(name, getattr(self, name))

    def run(self, model: Any, tokenizer: Any) -> RetrievalFound:
        found = probe(
            model, tokenizer,
            facts(tokenizer, self.length, self.samples, self.seed, self.text),
            new=self.new, dedup=self.dedup,
        )  # fmt: skip
        tests = facts(tokenizer, self.length, self.tests, self.seed + 1, self.text)
        others = found.others()
        draw = torch.Generator().manual_seed(self.seed)
        asked = {2**i for i in range(self.ablate.bit_length())} | {len(found.heads())}
        counts = sorted(k for k in asked if 0 < k <= min(self.ablate, len(others)))
        sets: list[list[Head]] = [[]]
        for k in counts:
            sets.append(found.top(k))
            for _ in range(self.draws):
                chosen = torch.randperm(len(others), generator=draw)[:k]
                sets.append([others[i] for i in chosen])
        plain, *rest = accuracies(
            model, tokenizer, tests, sets, mode=self.mode, phase=self.phase, new=self.new
        )
        curve = []
        for k, (best, *random) in zip(counts, batched(rest, 1 + self.draws)):
            curve.append({"heads": k, "best": best, "random": sum(random) / len(random)})
        return RetrievalFound(found, plain, curve, self)


def batched(items: Sequence[float], n: int) -> Iterator[Sequence[float]]:
    return (items[i : i + n] for i in range(0, len(items), n))


@dataclass(frozen=True)
class RetrievalFound:
    """The scores, the accuracy of the whole model, and the ablation curve."""

    found: RetrievalScores
    plain: float
    curve: list[dict[str, float]]
    asked: RetrievalHeads

    def summary(self) -> dict[str, Any]:
        s = self.found.scores
        return {
            "length": self.asked.length,
            "answered": len(self.found.per_sample),
            "tried": self.found.tried,
            "scores": s.tolist(),
            "heads": [[*h, float(s[h])] for h in self.found.heads()],
            "share_of_heads": float((s > RETRIEVAL).float().mean()),
            "strong_heads": int((s > STRONG).sum()),
            "accuracy": self.plain,
            "ablation": self.curve,
        }

    def lines(self) -> list[str]:
        """What a terminal shows."""
        s = self.found.scores
        best = ", ".join(f"layer {a} head {b}: {s[a, b]:.2f}" for a, b in self.found.top(5))
        return [
            f"{len(self.found.per_sample)} of {self.found.tried} samples answered; "
            f"{len(self.found.heads())} of {s.numel()} heads score over {RETRIEVAL}",
            best,
            f"accuracy {self.plain:.2f}; without heads: the best, as many random ones",
            *(f"  {c['heads']:>3}: {c['best']:.2f}, {c['random']:.2f}" for c in self.curve),
        ]

    def draw(self, folder: Path) -> list[Path]:
        """The score map and the ablation curve, retrieval_heads.png."""
        from subquad.analysis.drawing import figure, save

        made, (left, right) = figure(2)
        image = left.imshow(self.found.scores, cmap="viridis", vmin=0, aspect="auto")
        made.colorbar(image, ax=left)
        left.set(title="retrieval score", xlabel="head", ylabel="layer")
        ks = [0, *(c["heads"] for c in self.curve)]
        for name in ("best", "random"):
            right.plot(ks, [self.plain, *(c[name] for c in self.curve)], "o-", label=name)
        right.set(title="heads ablated", xlabel="heads", ylabel="accuracy", ylim=(-0.05, 1.05))
        right.legend()
        return [save(made, folder / "retrieval_heads.png")]
