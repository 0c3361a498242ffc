"""The page's section of sampled rollouts, of bounded size. No torch.

Owns: the section's HTML. Does not own: which rollouts are taken (`runs.rollouts`).

The texts were made up by a model: they are escaped as every text, and control characters are made
visible, so that none can hide a part of a text or reverse it.
"""

from collections.abc import Sequence

from nemotron_train.config.visible import visible
from nemotron_train.report.html.elements import details, element
from nemotron_train.report.runs.rollouts import (
    ENVIRONMENT,
    FORCED,
    SAMPLED,
    UNKNOWN,
    Piece,
    Rollout,
)

MAX_BYTES = 200_000  # of all rollouts on the page
MAX_TEXT, MAX_PROMPT = 4000, 1500  # characters of one

_LEGEND = (
    (SAMPLED, "sampled by the policy"),
    (FORCED, "forced by a budget"),
    (ENVIRONMENT, "prompt, and what the environment said"),
)


def rollout_section(samples: Sequence[tuple[str, Sequence[Rollout]]]) -> str:
    """HTML of the rollouts of each run: (label, rollouts). "" if there are none. Runs and their
    steps share MAX_BYTES evenly; a rollout that does not fit is counted and left out."""
    samples = [(label, rollouts) for label, rollouts in samples if rollouts]
    if not samples:
        return ""
    keys = "".join(f"<span>{element('span', text, cls=cls)}</span>" for cls, text in _LEGEND)
    special = element("span", "<|special token|>", cls="special")
    note = (
        "Of the first, the middle and the last step: the first rollout of each environment that "
        "passed, and the first that did not."
    )
    if any(p.kind == UNKNOWN and p.text for _, rs in samples for r in rs for p in r.text):
        note += (
            " Where the run's tokenizer is not at its place, or is another one, nobody can say "
            "which part of a text was sampled: it has no colours."
        )
    parts = [
        details(label, _run(rollouts, MAX_BYTES // len(samples)), is_open=number == 0)
        for number, (label, rollouts) in enumerate(samples)
    ]
    return (
        '<section id="rollout-samples"><h2>Sampled rollouts</h2>'
        f'{element("p", note, cls="note")}<p class="keys">{keys}<span>{special}</span></p>'
        f"{''.join(parts)}</section>"
    )


def _run(rollouts: Sequence[Rollout], max_bytes: int) -> str:
    steps = sorted({rollout.step for rollout in rollouts})
    parts = []
    for step in steps:
        cards, left_out = _step([r for r in rollouts if r.step == step], max_bytes // len(steps))
        content = f'<div class="grid">{"".join(cards)}</div>'
        if left_out:
            content += element("p", f"{left_out} more do not fit on the page", cls="note")
        parts.append(details(f"step {step:,}", content, is_open=step == steps[-1]))
    return "".join(parts)


def _step(rollouts: Sequence[Rollout], max_bytes: int) -> tuple[list[str], int]:
    """The cards of a step, of at most `max_bytes` together, and how many were left out."""
    cards, size = [], 0
    for rollout in rollouts:
        card = _card(rollout)
        if size + len(card.encode()) <= max_bytes:
            cards.append(card)
            size += len(card.encode())
    return cards, len(rollouts) - len(cards)


def _card(rollout: Rollout) -> str:
    counts = ", ".join(f"{count:,} {kind}" for kind, count in rollout.counts.items() if count)
    facts = f"reward {rollout.reward:g}, advantage {rollout.advantage:.3g}; tokens: {counts}"
    level = "better" if rollout.passed else "worse"
    name = element("strong", visible(f"{rollout.row} #{rollout.sample}"))
    verdict = element("span", visible(rollout.verdict), cls=f"badge {level}")
    message = f"({visible(rollout.message)})" if rollout.message else ""
    return (
        f'<div class="card rollout {level}">{name} {verdict}{element("p", facts, cls="note")}'
        f"<pre>{_text(rollout.prompt, MAX_PROMPT)}{_text(rollout.text, MAX_TEXT)}</pre>"
        f"{element('p', message, cls='note') if message else ''}</div>"
    )


def _text(pieces: Sequence[Piece], most: int) -> str:
    return "".join(
        element("span", visible(piece.text), cls=f"{piece.kind}{' special' * piece.special}")
        for piece in shortened(pieces, most)
    )


def shortened(pieces: Sequence[Piece], most: int) -> list[Piece]:
    """The pieces with at most `most` characters: of a longer text its first and its last half of
    them, and between them a piece that says how many were left out."""
    total = sum(len(piece.text) for piece in pieces)
    if total <= most:
        return list(pieces)
    begin, end = most // 2, total - (most - most // 2)
    head, tail, place = [], [], 0
    for piece in pieces:
        first, last = piece.text[: max(0, begin - place)], piece.text[max(0, end - place) :]
        head += [Piece(first, piece.kind, piece.special)] if first else []
        tail += [Piece(last, piece.kind, piece.special)] if last else []
        place += len(piece.text)
    return [*head, Piece(f"\n[… {end - begin:,} characters left out …]\n", UNKNOWN), *tail]
