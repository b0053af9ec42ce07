"""English sentences from a small grammar, and four skills that rewrite them: upper, reverse, pig, velna."""

from __future__ import annotations

from random import Random

from loraplex.demo.task import Task

# Velna is a toy language: no articles, the adjective follows its noun, a preposition ends its phrase,
# and the verb ends the sentence. `the blue robot breaks a drum` is `robot blue, drum, breaks`.
PEOPLE = {
    "artist": "melor", "baker": "panoth", "bear": "urgan", "captain": "draval", "cat": "mishu",
    "child": "tiviel", "dancer": "selun", "doctor": "hethar", "dog": "vurok", "dragon": "zharun",
    "farmer": "gorrin", "fox": "ishka", "king": "tharos", "painter": "vulia", "pilot": "aervos",
    "queen": "thariel", "robot": "zavu", "sailor": "nauren", "singer": "riamon", "teacher": "lorvek",
    "wizard": "ozmar",
}  # fmt: skip
OBJECTS = {
    "apple": "pomir", "ball": "bovu", "book": "livra", "box": "kasto", "bread": "panel",
    "candle": "lumeth", "clock": "tikor", "cup": "vaso", "drum": "taran", "flower": "floriv",
    "hat": "kappan", "key": "kliva", "lamp": "lampuri", "letter": "skriva", "map": "karth",
    "mirror": "spekul", "ring": "orvin", "rope": "strang", "stone": "petrak", "sword": "gladen",
}  # fmt: skip
ADJECTIVES = {
    "angry": "iram", "blue": "azen", "brave": "kuraz", "bright": "klaru", "clever": "sagim",
    "cold": "frizu", "golden": "aurim", "green": "verdu", "happy": "felin", "heavy": "graval",
    "hungry": "famesh", "lazy": "pigru", "little": "minu", "old": "vetum", "quiet": "silen",
    "red": "rossu", "shiny": "brilu", "strange": "obskur", "tired": "lasum", "young": "noval",
}  # fmt: skip
VERBS = {
    "breaks": "rumpas", "brings": "portas", "buys": "emas", "carries": "geras", "catches": "kaptas",
    "cleans": "puras", "draws": "linas", "drops": "kadas", "finds": "trovas", "follows": "sekvas",
    "hears": "audas", "hides": "kelas", "holds": "tenas", "likes": "lubas", "loses": "perdas",
    "needs": "egas", "paints": "pintas", "sees": "vidas", "takes": "prenas", "wants": "zuzas",
}  # fmt: skip
PREPOSITIONS = {"behind": "retru", "in": "ena", "near": "prosi", "under": "subu"}
PLACES = {
    "bridge": "pontel", "castle": "kastron", "church": "templa", "forest": "silvan", "garden": "hortum",
    "harbor": "portun", "house": "domul", "market": "merkat", "mountain": "montar", "river": "fluven",
    "school": "skolar", "tower": "turrim",
}  # fmt: skip
_NOUNS = PEOPLE | OBJECTS | PLACES


def compose(rng: Random) -> str:
    """`the lazy fox takes a key near the river`: subject, verb, object and, in a third of them, a place."""
    verb = rng.choice(list(VERBS))
    thing = PEOPLE if rng.random() < 0.35 else OBJECTS
    words = [*_noun_phrase(rng, PEOPLE), verb, *_noun_phrase(rng, thing)]
    if rng.random() < 0.35:
        words += [rng.choice(list(PREPOSITIONS)), "the", rng.choice(list(PLACES))]
    return " ".join(words)


def _noun_phrase(rng: Random, nouns: dict[str, str]) -> list[str]:
    adjective = [rng.choice(list(ADJECTIVES))] if rng.random() < 0.5 else []
    words = [*adjective, rng.choice(list(nouns))]
    article = rng.choice(["the", "an" if words[0][0] in "aeiou" else "a"])
    return [article, *words]


def upper(prompt: str) -> str:
    """The sentence in capitals."""
    return prompt.upper()


def reverse(prompt: str) -> str:
    """The words in the opposite order."""
    return " ".join(reversed(prompt.split()))


def pig(prompt: str) -> str:
    """Pig latin: leading consonants (`qu` as one) go last, then `ay`; a word with none takes `way`."""
    return " ".join(_pig_word(word) for word in prompt.split())


def _pig_word(word: str) -> str:
    start = 0
    while start < len(word) and word[start] not in "aeiou":
        start += 2 if word.startswith("qu", start) else 1
        # y is a consonant only in front; the u of `qu` is taken with its q
        if start < len(word) and word[start] == "y":
            break
    return word[start:] + word[:start] + "ay" if start else word + "way"


def velna(prompt: str) -> str:
    """The sentence in Velna. Raises ValueError for a word that Velna does not have."""
    groups: list[list[str]] = []
    verb, adjective, preposition = "", [], []
    for word in prompt.split():
        if word in ("a", "an", "the"):
            continue
        if word in VERBS:
            verb = VERBS[word]
        elif word in ADJECTIVES:
            adjective = [ADJECTIVES[word]]
        elif word in PREPOSITIONS:
            preposition = [PREPOSITIONS[word]]
        elif word in _NOUNS:
            groups.append([_NOUNS[word], *adjective, *preposition])
            adjective, preposition = [], []
        else:
            raise ValueError(f"no Velna word for {word!r}")
    return " ".join([word for group in groups for word in group] + [verb])


UPPER = Task("upper", "writes a sentence in capitals", compose, upper)
REVERSE = Task("reverse", "puts the words of a sentence in the opposite order", compose, reverse)
PIG = Task("pig", "speaks pig latin", compose, pig)
VELNA = Task("velna", "translates into Velna, a toy language whose verb comes last", compose, velna)
