"""The characters by which byte-level BPE writes bytes (GPT-2): printable ones for themselves, others from U+0100 on."""

_UNPRINTABLE = bytes([*range(0x21), *range(0x7F, 0xA1), 0xAD])

# The character of each byte, by its value.
BYTE_TO_CHARACTER = "".join(
    chr(0x100 + _UNPRINTABLE.index(byte)) if byte in _UNPRINTABLE else chr(byte) for byte in range(256)
)
_CHARACTER_TO_BYTE = {character: bytes([byte]) for byte, character in enumerate(BYTE_TO_CHARACTER)}


def token_bytes(token: str) -> bytes:
    """The bytes that `token` is written for. Characters that stand for no byte are their own UTF-8."""
    return b"".join(_CHARACTER_TO_BYTE.get(character) or character.encode() for character in token)
