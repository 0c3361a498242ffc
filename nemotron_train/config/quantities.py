"""Counts and bytes as a person reads them."""


def format_count(value: float) -> str:
    """Three or four digits and a suffix: 123_611_033_088 -> `123.61 B`."""
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {suffix}"
    return f"{value:,.0f}"


def format_bytes(value: float) -> str:
    for suffix, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.2f} {suffix}"
    return f"{value:,.0f} B"


def exact(value: int) -> str:
    """Rounded, and all digits in parentheses."""
    return f"{format_count(value)} ({value:,})"
