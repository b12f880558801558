"""The main claim of each conversion mixer, in direction, with models small enough for a CPU.

``python benchmarks/claims_conversion.py`` trains some fifteen small models, a claim at a time
(minutes each; ``--claim`` picks one), writes results/claims_conversion.json after every model and
the tables in docs/evidence.md at the end. Deterministic; what is in the JSON is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from claims_sparse import EVIDENCE, ROOT, Cells, FarRecall, Row, caption, fit, model, score, trained

from subquad.bench.results import machine, table, write_json, write_section
from subquad.models import CausalLM, CausalLMConfig

RESULTS = ROOT / "benchmarks" / "results" / "claims_conversion.json"


def hedgehog() -> Cells:
    """Far recall from scratch, two layers behind a convolution: softmax, Hedgehog's learned map,
    and fixed ones."""
    for name, options in {
        "softmax": {"mixer": "softmax"},
        "hedgehog": {"mixer": "hedgehog"},
        "elu + 1": {"mixer": "linear_attention"},
        "relu": {"mixer": "linear_attention", "feature_map": "relu"},
    }.items():
        nope = {} if options["mixer"] == "linear_attention" else {"rope_theta": None}
        shape = "base_conv m m", 3, {"m": {**options, **nope}}
        yield name, partial(trained, FarRecall(), 600, *shape)


def sala() -> Cells:
    """Far recall from scratch, two layers behind a convolution: all linear, one of them softmax
    without positions (a hybrid), both."""
    full = {"mixer": "softmax", "rope_theta": None}
    for name, layers in {
        "all linear": "base_conv sala sala",
        "hybrid": "base_conv sala full",
        "all softmax": "base_conv full full",
    }.items():
        mixers = {alias: o for alias, o in (("sala", {}), ("full", full)) if alias in layers}
        yield name, partial(trained, FarRecall(), 600, layers, 3, mixers)


def ready(base: CausalLM) -> CausalLM:
    if not hasattr(base, "ready"):
        fit(base, FarRecall(), 800)
        base.ready = True  # type: ignore[assignment]
    return base.eval()


def tuned(base: CausalLM, new: str, long: int = 128, **options: Any) -> Row:
    """Softmax replaced, all weights trained on for 300 steps of 128 tokens."""
    kept = {**base.config.mixers["softmax"], "mixer": new, **options}
    torch.manual_seed(0)
    made = {**base.config.to_dict(), "mixers": {"softmax": kept}}
    lm = CausalLM(CausalLMConfig.from_dict(made))
    lm.load_state_dict(ready(base).state_dict(), strict=False)  # what the new mixer adds is fresh
    row = {"accuracy": fit(lm, FarRecall(), 300, lr=1e-3)["accuracy"]}
    if long != 128:
        row[f"at {long}"] = score(lm, FarRecall(length=long))
    row["state, bytes"] = sum(block.mixer.state_bytes(long) for block in lm.blocks[1:])
    return row


def still() -> Cells:
    """Far recall, a softmax layer converted: salient tokens beside the state against a longer
    window beside it. Heads of 32 and maps of 16 to keep the state small."""
    base = model(48, "base_conv softmax", 2, {"softmax": {"rope_theta": None}})
    yield "softmax", lambda: {"accuracy": score(ready(base), FarRecall())}
    for name, options in {
        "still, chunks of 8, an eighth salient": {"new": "still", "chunk": 8, "ratio": 1 / 8},
        "none salient": {"new": "still", "chunk": 8, "ratio": 0.0},
        "lolcats, terraces of 16": {"new": "lolcats", "window": 16},
    }.items():
        yield name, partial(tuned, base, features=8, **options)


def lawcat() -> Cells:
    """Far recall, a softmax layer with rotation converted at 128 tokens and asked at 512."""
    base = model(48, "base_conv softmax", 2, {"softmax": {}})
    yield (
        "softmax",
        lambda: {
            "accuracy": score(ready(base), FarRecall()),
            "at 512": score(ready(base), FarRecall(length=512)),
        },
    )
    for name, options in {
        "lawcat": {"new": "lawcat"},
        "without convolution": {"new": "lawcat", "conv_size": 1},
        "lolcats, window of 32": {"new": "lolcats", "window": 32, "layout": "sliding"},
    }.items():
        yield name, partial(tuned, base, long=512, **options)


CLAIMS: dict[str, Callable[[], Cells]] = {
    "hedgehog": hedgehog,
    "sala": sala,
    "still": still,
    "lawcat": lawcat,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--claim", choices=list(CLAIMS))
    asked = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"made": {}, "claims": {}}
    made, done = kept["made"], kept["claims"]
    for name in [asked.claim] if asked.claim else CLAIMS:
        for entry, cell in CLAIMS[name]():
            if entry not in done.setdefault(name, {}):
                done[name][entry], made = cell(), machine()
                write_json(RESULTS, {"made": made, "claims": done})
            print(name, "|", entry, "|", done[name][entry], flush=True)
    lines = [
        f"`python benchmarks/claims_conversion.py` on {made['device']}, torch {made['torch']}.",
        "",
    ]
    for name in (name for name in CLAIMS if name in done):
        lines += [caption(name, CLAIMS[name]), "", *table(done[name])]
    write_section(
        EVIDENCE, "claims_conversion", "Claims of the conversion mixers", "\n".join(lines)
    )


if __name__ == "__main__":
    main()
