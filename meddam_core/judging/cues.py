"""The cue words of the assertion rules: what negates, hedges, ends a clause, compares.

Cues come from the published lists of NegEx and ConText and from usage in radiology, dermatology and pathology reports.
Words are folded as texts are: lower case, American spelling, no plural.
"""

from __future__ import annotations

from qa_library.terms import singular


def words(text: str) -> frozenset[str]:
    """Words of a text, folded."""
    return frozenset(singular(word) for word in text.split())


def phrases(text: str) -> tuple[tuple[str, ...], ...]:
    """Phrases, separated by commas, as tuples of words."""
    return tuple(tuple(singular(word) for word in phrase.split()) for phrase in text.split(","))


NEGATIONS = phrases(
    "no, not, without, absence of, absent, free of, free from, clear of, devoid of, void of, negative for, lack of,"
    "lack, lacking, neither, nor, never, rather than, instead of, as opposed to, unlike, resolution of, resolved,"
    "rule out, ruled out, exclude, excluded, excluding, non, deny, fail to, cannot, nothing, none of, spare, sparing,"
    "absent are, absent is, not seen are, not visible are, argue against, speak against, evidence against"
)
"""Before a phrase."""
REACH: dict[tuple[str, ...], int] = {
    ("not",): 7,
    ("non",): 1,
    ("absent",): 2,
    ("resolved",): 3,
    ("cannot",): 6,
    ("never",): 6,
}
"""Negations that reach only so many words; the others reach through a list."""
LONG_REACH = 25
NO_NEGATION: dict[str, tuple[tuple[str, ...], ...]] = {
    "no": phrases(
        "change, interval, significant change, doubt, increase, decrease, progression, longer, more than, less than"
    ),
    "not": phrases(
        "only, change, changed, necessarily, just, merely, exclude, excluded, be excluded, be ruled, be entirely,"
        "be completely, unlike, uncommon, infrequently, simply, certain, clear whether"
    ),
    "without": phrases("change, interval, significant change, doubt"),
    "cannot": phrases("exclude, be excluded, be ruled, rule"),
}
"""What makes a negation negate nothing when it follows."""
OTHERS = words("other additional further satellite second another more new neighboring")
"""After a negation: other lesions are denied, not this one."""

BREAKS = words(
    "but however although though whereas while yet except which nevertheless nonetheless despite apart"
) | set(";.!?:()")
"""Ends the reach of a negation."""
CLAUSE_STARTS = words(
    "the a an this these there its it with showing they his her only just mainly instead likely consistent suggesting"
    " indicating"
)
"""After a comma or "and": a new clause begins."""
BE = words("is are was were has have had been be can could do does did appear appears seem look remain may might")
VERBS = BE | words(
    "show contain measure extend occupy demonstrate reveal exhibit display indicate suggest represent lie project abut"
    " obscure produce"
)
EXISTENCE = words(
    "seen identified visible visualized visualised present noted observed evident detected demonstrated apparent found"
    " appreciated shown described confirmed recognized discernible recognizable detectable existent depicted noticeable"
    " perceptible obvious developed appreciable suspected mentioned reported"
)
"""After "is not": the subject is not there."""
GONE = words(
    "absent lacking missing excluded unlikely resolved disappeared cleared negative nonexistent unseen none nil"
    " improbable"
)
"""After "is" or "has": the subject is not there."""
NOTHING = words("none absent no negative not nil nonexistent")
"""After a colon: the subject is not there."""

HEDGES = words(
    "may might could possible possibly probable probably likely suspicious suspected suspect suspicion suggest"
    " suggesting suggestive questionable equivocal unclear uncertain perhaps presumably presumed potential potentially"
    " differential versus unlikely cannot doubtful raise whether question appear seem"
)
SURROUNDINGS = words("surrounding background contralateral opposite remaining remainder rest neighboring adjacent")
PLACES = words("lung parenchyma skin tissue side hemithorax zone field area lobe retina stroma region")
"""After one of SURROUNDINGS: what follows is said of another place."""
COMPARED = phrases(
    "compared with, compared to, relative to, than, unlike, contralateral, opposite, versus, asymmetric to"
)
UNAFFECTED = words("clear normal unremarkable spared unaffected uninvolved preserved healthy sharp intact")

PICTURE = words("image picture film radiograph photograph photo scan frame slice view screen")
"""Sides of these are sides of the picture, not of the patient."""
NUMBERS = {
    w: i for i, (w,) in enumerate(phrases("zero,one,two,three,four,five,six,seven,eight,nine,ten,eleven,twelve"))
}
