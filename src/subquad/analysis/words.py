"""Words of an answer found again in another text: ROUGE-1 recall with Porter's stems.

Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004; Porter, "An algorithm
for suffix stripping", Program 14(3), 1980.
"""

from __future__ import annotations

import re

# Suffixes that change behind a stem of a syllable at least, then those that fall behind two.
_SECOND = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize",
    "abli": "able", "alli": "al", "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize",
    "ation": "ate", "ator": "ate", "alism": "al", "iveness": "ive", "fulness": "ful",
    "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble",
}  # fmt: skip
_THIRD = {
    "icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": "",
}  # fmt: skip
_FOURTH = dict.fromkeys(
    (
        "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion",
        "ou", "ism", "ate", "iti", "ous", "ive", "ize",
    ),
    "",
)  # fmt: skip


def recall(answer: str, said: str) -> float:
    """ROUGE-1 recall, stemmed: the share of the answer's words that were said, in 0..1.

    Raises:
        ValueError: for an answer without a word.
    """
    words, heard = (
        [stem(w) for w in re.findall(r"[a-z0-9]+", text.lower())] for text in (answer, said)
    )
    if not words:
        raise ValueError(f"answer must hold a word, got {answer!r}")
    return sum(min(words.count(w), heard.count(w)) for w in set(words)) / len(words)


def stem(word: str) -> str:
    """A word in small letters without its endings; one of three letters or fewer stays."""
    if len(word) <= 3:
        return word
    w = _plural(word)
    w = _past(w)
    if w.endswith("y") and "v" in _shape(w[:-1]):
        w = w[:-1] + "i"
    for rules, least in ((_SECOND, 1), (_THIRD, 1), (_FOURTH, 2)):
        w = _changed(w, rules, least)
    if w.endswith("e"):
        m = _syllables(w[:-1])
        if m > 1 or (m == 1 and not _short(w[:-1])):
            w = w[:-1]
    return w[:-1] if w.endswith("ll") and _syllables(w) > 1 else w


def _shape(w: str) -> str:
    """c and v for consonants and vowels; y is a vowel behind a consonant."""
    out = ""
    for letter in w:
        out += "v" if letter in "aeiou" or (letter == "y" and out.endswith("c")) else "c"
    return out


def _syllables(w: str) -> int:
    """Porter's measure: vowels with consonants behind them."""
    return _shape(w).count("vc")


def _short(w: str) -> bool:
    """Ends consonant, vowel, consonant, the last not w, x or y."""
    return _shape(w).endswith("cvc") and w[-1] not in "wxy"


def _plural(w: str) -> str:
    if w.endswith(("sses", "ies")):
        return w[:-2]
    return w[:-1] if w.endswith("s") and not w.endswith("ss") else w


def _past(w: str) -> str:
    if w.endswith("eed"):
        return w[:-1] if _syllables(w[:-3]) else w
    ending = next((e for e in ("ed", "ing") if w.endswith(e)), "")
    bare = w.removesuffix(ending)
    if not ending or "v" not in _shape(bare):
        return w
    if bare.endswith(("at", "bl", "iz")) or (_syllables(bare) == 1 and _short(bare)):
        return bare + "e"
    if bare[-2:-1] == bare[-1] and _shape(bare)[-1] == "c" and bare[-1] not in "lsz":
        return bare[:-1]
    return bare


def _changed(w: str, rules: dict[str, str], least: int) -> str:
    """The longest suffix of the rules replaced, if the stem has ``least`` syllables."""
    suffix = max((s for s in rules if w.endswith(s)), key=len, default="")
    bare = w.removesuffix(suffix)
    if not suffix or _syllables(bare) < least or (suffix == "ion" and bare[-1] not in "st"):
        return w
    return bare + rules[suffix]
