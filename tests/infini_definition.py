"""InfiniRetri in the table: its attention is the model's own, its text another."""

from policy_kit import Row
from subquad.policies.infini_retri import InfiniRetri


class Marked:
    """A token is a letter; the last ten are the question, behind a mark that has no token."""

    def encode(self, text, add_special_tokens=False):
        return [ord(c) - 1000 for c in text if c not in "\n."]

    def decode(self, ids):
        letters = [chr(i + 1000) for i in ids]
        context = "".join(c + "." * (i % 12 == 11) for i, c in enumerate(letters[:-10]))
        return context + "\n\n" + "".join(letters[-10:])


def _make(**options):
    return InfiniRetri(tokenizer=Marked(), **options)


ROWS = [
    Row(
        "infini_retri",
        {"window": 24, "topk": 5, "phrase": 3},
        {"window": 100, "topk": 100},
        make=_make,
    )
]
