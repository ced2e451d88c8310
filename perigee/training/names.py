"""What pass keys belong to: pairs of words, some of which are never trained on, and words that nobody ever heard."""

import hashlib
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber ancient arctic autumn bitter black blue bold brave bright broken bronze calm clever cold copper crimson "
    "crystal curious dark distant dusty early eastern empty fallen fancy foggy fragile gentle ghostly giant golden "
    "green hidden hollow honest humble idle ivory jolly lonely lucky marble misty modest narrow noble northern odd "
    "pale patient plain polite proud purple quiet rapid rare royal rusty sacred scarlet secret serene sharp silent "
    "silver simple sleepy smooth solar southern steady stormy strange swift tender tiny velvet violet wandering warm "
    "western white wild winter wooden yellow young"
)
NOUNS = _words(
    "anchor anvil arrow badger banner beacon bear bishop bridge candle canyon castle cedar chapel cloud comet coral "
    "crane crow dolphin dragon eagle ember falcon feather ferry forest fountain fox garden glacier hammer harbor "
    "hawk heron hill horse island jaguar kettle lantern lark lemon lion maple meadow mill mirror moon mountain needle "
    "oak ocean orchard otter owl palace panther pearl piano pine planet prairie raven reef river robin rocket saddle "
    "sailor salmon shadow shepherd shore sparrow spruce star stone stream summit swan temple thistle tiger tower "
    "tulip turtle valley violin walnut whale willow window wolf"
)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"

# One pair of so many is kept for measuring, and one name of so many in training is a new word.
_HELD_OUT_OF = 8
_NEW_WORD_OF = 5


def training_name(random: Random) -> str:
    """Never one that `held_out_name` draws."""
    if random.randrange(_NEW_WORD_OF) == 0:
        return _new_word(random)
    return _pair(random, held_out=False)


def held_out_name(random: Random) -> str:
    """A pair of words that no training name is."""
    return _pair(random, held_out=True)


def _pair(random: Random, held_out: bool) -> str:
    while True:
        name = f"{random.choice(ADJECTIVES)} {random.choice(NOUNS)}"
        if (hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT_OF == 0) == held_out:
            return name


def _new_word(random: Random) -> str:
    syllables = (random.choice(_CONSONANTS) + random.choice(_VOWELS) for _ in range(random.randrange(2, 4)))
    return "".join(syllables) + random.choice(_CONSONANTS)
