"""Golden vectors of vision systems: channels first, as their authors lay images out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

import subquad
from kit import close

Golden = Mapping[str, Tensor]


def mala(golden: Golden) -> None:
    for prefix, attention in (("", "linear"), ("vanilla.", "softmax")):
        mixer = subquad.create_mixer("mala", dim=32, heads=2, attention=attention)
        names = {n.removeprefix(prefix + "w."): n for n in golden if n.startswith(prefix + "w.")}
        mixer.load_state_dict(mixer.translate({n: golden[full] for n, full in names.items()}))
        x = golden[prefix + "x"].clone().requires_grad_()
        y, _ = mixer(x.flatten(2).mT, grid=tuple(x.shape[2:]))
        close(y.mT.view_as(x), golden[prefix + "out"], 2e-4)
        y.square().mean().backward()
        close(x.grad, golden[prefix + "g.x"], 2e-4)
        found = {name: p.grad for name, p in mixer.named_parameters()}
        wanted = mixer.translate({n: golden[f"{prefix}gw.{n}"] for n in names})
        assert set(found) == set(wanted)
        for name, g in wanted.items():
            close(found[name], g, 2e-4)
