"""Text to integers and back: the characters of a text, numbered."""

from shared.errors import BadInput


class CharTokenizer:
    """The distinct characters of a text, numbered in sorted order.

    CharTokenizer("hello").chars == "ehlo", so "hole" encodes to [1, 3, 2, 0].
    """

    def __init__(self, text: str):
        self.chars = "".join(sorted(set(text)))
        self.index = {char: i for i, char in enumerate(self.chars)}

    def __len__(self):
        return len(self.chars)

    def encode(self, text: str) -> list[int]:
        """Text of N characters -> N token ids. Raises BadInput for a character that is not in the vocabulary."""
        try:
            return [self.index[char] for char in text]
        except KeyError as error:
            raise BadInput(f"character {error.args[0]!r} is not among the {len(self)} known: {self.chars!r}") from None

    def decode(self, ids) -> str:
        """Token ids, a list or a tensor [N] -> text."""
        return "".join(self.chars[i] for i in ids)
