"""Text of users that is printed: characters that a terminal would obey are made visible.

An escape sequence in a file name could clear the screen or retitle the window, and bidirectional
controls reorder the characters of a line. Loads nothing.
"""

_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029]
_BIDIRECTIONAL = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_SURROGATES = range(0xD800, 0xE000)  # a file name that is not UTF-8 has some


def _shown(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


_VISIBLE = {
    code: _shown(code)
    for code in (*_CONTROLS, *_BIDIRECTIONAL, *_SURROGATES)
    if chr(code) not in "\n\t"
}


def visible(text: str) -> str:
    """`text` with `\\x1b` in place of an escape character, and the same for other control
    characters, bidirectional controls and half surrogates. Newlines and tabs stay."""
    return text.translate(_VISIBLE)


def one_line(text: object) -> str:
    """`visible` text on one line: line breaks become spaces."""
    return visible(" ".join(str(text).splitlines()))
