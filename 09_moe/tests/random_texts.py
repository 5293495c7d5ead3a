"""Texts of all that a tokenizer has to take apart, and the comparison with Hugging Face's on them."""

import random
import unicodedata


def random_texts(n: int, special, seed: int = 0) -> list[str]:
    """Texts of all that a tokenizer has to take apart: all planes of Unicode, runs of spaces, contractions, names."""
    chance = random.Random(seed)
    words = [" the", "Hello", " don", "naïve", "été", "Straße", " 東京", "Привет", "x_y", "http://a.b", "==", "..."]
    short = ["'s", "'S", "'t", "'Re", "'VE", "'m", "'LL", "'d", "’s", "'", "'ſ", "'1"]
    marks = ["e\u0301", "\u0323a", "\u0338", ">\u0338", "\u1100\u1161\u11a8", "ﬁ", "\u212b", "a\u0300\u0301"]
    blank = [" ", "  ", "    ", "\n", "\n\n", " \n", "\r\n", "\t", "\u00a0", "\u3000", "\u0085", "\u2028", "\u200b"]
    digit = ["0", "7", "12", "345", " 6", "  78", "½", "Ⅷ", "٣", "௧", "𝟘", "³", "3.14", "1,000", "\n9"]

    def anywhere():
        places = [(0, 0x80), (0x80, 0x3000), (0x3000, 0x20000), (0x20000, 0x31000), (0x40000, 0x110000)]
        char = chr(chance.randrange(*chance.choice(places)))
        # A letter of last year's Unicode is no letter to the library that was built before: those that all know, and
        # the planes where there are none.
        known = unicodedata.ucd_3_2_0.category(char) not in ("Cn", "Cs")
        return char if known or 0x30000 <= ord(char) < 0x31000 or ord(char) >= 0x40000 else ""

    def piece():
        kind = chance.choice([words, short, marks, blank, digit, [anywhere()], [anywhere()], special])
        return chance.choice(list(kind) or [""])

    return ["".join(piece() for _ in range(chance.randint(1, 14))) for _ in range(n)]


def same_ids(ours, theirs, n: int, special):
    """Both ways, with special tokens as such and as text like any other."""
    texts = random_texts(n, special)
    for as_such in (True, False):
        theirs.encode_special_tokens = not as_such
        for text, expected in zip(texts, theirs.encode_batch(texts, add_special_tokens=False), strict=True):
            found = ours.encode(text, special=as_such)
            assert found == expected.ids, f"{text!r} {'with' if as_such else 'without'} special tokens: other ids"
    theirs.encode_special_tokens = False
