"""The small language of words in templates, and the words of a text.

    "pleural effusion"                     these words in a row, in singular or plural, in any spelling of English
    "enlarged/dilated aorta"               one of several words at a place
    "aorta .. enlarged"                    up to six words between
    "atelecta*"                            words that begin so

Notes:
- Spelling is folded to the American form (oedema -> edema) and hyphens split words (part-solid -> part solid).
- Plurals are folded by rule; irregular medical plurals by table.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cache, lru_cache

GAP = 6
"""Words that `..` may stand for."""

_WORD = re.compile(r"[a-z]+|\d+(?:st|nd|rd|th)\b|\d+(?:\.\d+)?|[.,;:!?()]|[<>~%]")
_GENITIVE = re.compile(r"'s\b")
_NON = re.compile(r"\bnon-?(?=[a-z]{4})(?!etheless)")
_SPELLING = (
    ("haem", "hem"), ("oedema", "edema"), ("colour", "color"), ("grey", "gray"), ("centre", "center"),
    ("fibre", "fiber"), ("tumour", "tumor"), ("ischaem", "ischem"), ("leucocyt", "leukocyt"), ("oesoph", "esoph"),
)  # fmt: skip
_PLURALS = {
    "masses": "mass", "bullae": "bulla", "vesiculae": "vesicle", "maculae": "macula", "nuclei": "nucleus",
    "atelectases": "atelectasis", "metastases": "metastasis", "diagnoses": "diagnosis", "calculi": "calculus",
    "apices": "apex", "apexes": "apex", "bases": "base", "fistulae": "fistula", "telangiectases": "telangiectasia",
    "purpurae": "purpura", "ulcers": "ulcer", "foci": "focus", "hila": "hilum", "bronchi": "bronchus",
    "pleurae": "pleura", "scleroses": "sclerosis", "comedones": "comedo", "comedos": "comedo", "strata": "stratum",
    "lobi": "lobe", "opacities": "opacity", "cavities": "cavity", "densities": "density", "bodies": "body",
    "pneumothoraces": "pneumothorax", "hydrothoraces": "hydrothorax", "mitoses": "mitosis", "necroses": "necrosis",
    "fibroses": "fibrosis", "stigmata": "stigma", "arteries": "artery", "boundaries": "boundary",
    "teeth": "tooth", "feet": "foot",
}  # fmt: skip
_KEEP_S = frozenset({
    "is", "was", "has", "this", "his", "its", "as", "us", "thus", "plus", "versus", "loss", "mass", "less", "thickness",
    "pus", "focus", "nucleus", "bronchus", "lens", "always", "across", "gas", "pancreas", "redness", "various", "gross",
    "does", "unless", "whereas", "perhaps", "series", "diabetes", "herpes", "dress", "pes",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Token:
    """A folded word or punctuation mark of a text, with where it stood."""

    word: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Pattern:
    """A compiled term: what may stand at each place. None is a gap of up to six words."""

    source: str
    places: tuple[tuple[str, ...] | None, ...]

    def starts(self, index: dict[str, list[int]]) -> list[int]:
        """Where a match may begin, by the positions of each word of the text."""
        first, last = self.places[0], self.places[-1]
        assert first is not None
        assert last is not None
        if not _is_there(last, index):
            return []
        found: set[int] = set()
        for choice in first:
            if choice.endswith("*"):
                found.update(at for word, places in index.items() if word.startswith(choice[:-1]) for at in places)
            else:
                found.update(index.get(choice, ()))
        return sorted(found)

    def match(self, words: list[str], at: int) -> int | None:
        """Where a match that begins at word `at` ends (the shortest), or None. Gaps cross no punctuation but commas."""
        return _match(self.places, words, 0, at)


def may_stand(terms: tuple[str, ...], index: dict[str, list[int]]) -> bool:
    """Whether the last word of one of the terms stands in the text: most terms of a library are not in a caption."""
    whole, beginnings = _last_words(terms)
    return not whole.isdisjoint(index) or (bool(beginnings) and any(word.startswith(beginnings) for word in index))


@lru_cache(maxsize=8192)
def _last_words(terms: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    last = [choice for term in terms for choice in compile_term(term).places[-1] or ()]
    whole = frozenset(choice for choice in last if not choice.endswith("*"))
    return whole, tuple(choice[:-1] for choice in last if choice.endswith("*"))


def _is_there(choices: tuple[str, ...], index: dict[str, list[int]]) -> bool:
    """Whether one of the words of a place stands in the text at all."""
    return any(c in index if not c.endswith("*") else any(w.startswith(c[:-1]) for w in index) for c in choices)


def positions(words: list[str]) -> dict[str, list[int]]:
    """Where each word of a text stands."""
    index: dict[str, list[int]] = {}
    for at, word in enumerate(words):
        index.setdefault(word, []).append(at)
    return index


def fold(text: str) -> str:
    """Lower case, plain ASCII letters, American spelling; of the same length only by chance."""
    text = unicodedata.normalize("NFKD", text.lower()).replace("’", "'").replace("n't", " not")
    text = _GENITIVE.sub("", text)
    for british, american in _SPELLING:
        text = text.replace(british, american)
    return _NON.sub("non ", text)


def singular(word: str) -> str:
    """A word without its plural ending."""
    if word in _PLURALS:
        return _PLURALS[word]
    if word in _KEEP_S or len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is", "ous")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes")):
        return word[:-2]
    return word[:-1]


def tokens(text: str) -> list[Token]:
    """The folded words and punctuation marks of a text. Offsets are those of the folded text."""
    folded = fold(text)
    return [Token(singular(m.group()), m.start(), m.end()) for m in _WORD.finditer(folded)]


@cache
def compile_term(term: str) -> Pattern:
    """A term as a pattern. Raises ValueError for one that is empty or begins or ends with a gap."""
    places: list[tuple[str, ...] | None] = []
    for part in term.split():
        if part == "..":
            places.append(None)
            continue
        choices = [_fold_words(choice) for choice in part.split("/")]
        if len(choices) == 1:
            places += [(word,) for word in choices[0]]
        elif any(len(words) != 1 for words in choices):
            raise ValueError(f"the term {term!r}: each of the words between slashes must be one word")
        else:
            places.append(tuple(words[0] for words in choices))
    if not places or places[0] is None or places[-1] is None or any(p == () for p in places):
        raise ValueError(f"the term {term!r} needs words, and words at both ends of a gap")
    return Pattern(term, tuple(places))


def _fold_words(text: str) -> list[str]:
    words = re.findall(r"[a-z]+\*?|\d+(?:\.\d+)?", fold(text))
    return [w if w.endswith("*") else singular(w) for w in words]


def _match(places: tuple[tuple[str, ...] | None, ...], words: list[str], place: int, at: int) -> int | None:
    if place == len(places):
        return at
    choices = places[place]
    if choices is None:
        for skipped in range(GAP + 1):
            end = _match(places, words, place + 1, at + skipped)
            if end is not None:
                return end
            if at + skipped >= len(words) or words[at + skipped] in ".;!?()":
                return None
        return None
    if at < len(words) and any(_same(choice, words[at]) for choice in choices):
        return _match(places, words, place + 1, at + 1)
    return None


def _same(choice: str, word: str) -> bool:
    return word.startswith(choice[:-1]) if choice.endswith("*") else word == choice
