"""Formatting of counts and byte sizes for human readers."""


def format_count(value: float) -> str:
    """Two decimals and a suffix (K, M, B, T): 123_611_033_088 -> `123.61 B`."""
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {suffix}"
    return f"{value:,.0f}"


def format_bytes(value: float) -> str:
    """Two decimals and a binary unit (KiB, MiB, GiB); below 1 KiB, whole bytes."""
    for suffix, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.2f} {suffix}"
    return f"{value:,.0f} B"


def exact(value: int) -> str:
    """The rounded count, then all digits in parentheses: `123.61 B (123,611,033,088)`."""
    return f"{format_count(value)} ({value:,})"
