"""Render a diagnosis for people: the answer first, then the reason, then the sockets."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

from hotport.diagnose.diagnosis import Diagnosis, holders_of
from hotport.model.bind import CHOICES, Can
from hotport.model.port import Port, Sockets, State

__all__ = ["page"]

COLOURS: Final = {Can.YES: "green", Can.NO: "red", Can.UNKNOWN: "yellow"}
COLUMNS_MAX: Final = 120
LABEL_COLUMNS: Final = 9
CHOICE_COLUMNS: Final = 38
ROWS_MAX: Final = 40
ORIGINS_MAX: Final = 3


def page(diagnosis: Diagnosis, *, columns: int, paint: Callable[[str, str], str] = lambda text, _: text) -> str:
    """Render the whole page, without a line break at its end.

    Args:
        columns: Where lines are folded.
        paint: Given a text and the name of a colour.
    """
    return "\n".join(_lines(diagnosis, min(columns, COLUMNS_MAX), paint))


def _lines(diagnosis: Diagnosis, columns: int, paint: Callable[[str, str], str]) -> Iterator[str]:
    answer = diagnosis.answers[diagnosis.usual]
    says = {
        Can.YES: "free",
        Can.NO: f"not free: {answer.error}",
        Can.UNKNOWN: "perhaps free; it depends on what cannot be read",
    }[answer.can]
    yield f"{diagnosis.address} is {paint(says, COLOURS[answer.can])}"
    # On a wide page in one piece, so that the first three lines have cause and remedy.
    because = answer.who or answer.rule
    yield from _labelled("because", because, columns if columns < COLUMNS_MAX else len(because) + COLUMNS_MAX)
    for index, remedy in enumerate(diagnosis.remedies):
        yield f"  {'' if index else 'try':{LABEL_COLUMNS}}{remedy}"  # in one piece, to be pasted
    if answer.who:
        yield from _labelled("rule", answer.rule, columns)
    if answer.until:
        yield from _labelled("until", answer.until, columns)
    yield from _origins(diagnosis, columns)
    if isinstance(diagnosis.facts, Port):
        yield ""
        yield from _answers(diagnosis, columns, paint)
        yield from _table(diagnosis.facts, columns)
    for title, sentences in (("risks", diagnosis.risks), ("not read", diagnosis.facts.unread)):
        if sentences:
            yield ""
            yield title
            for sentence in sentences:
                yield from textwrap.wrap(sentence, columns, initial_indent="  - ", subsequent_indent="    ")


def _origins(diagnosis: Diagnosis, columns: int) -> Iterator[str]:
    """Tell who started the processes that are in the way, if that is known."""
    label = "started"
    for holder in holders_of(diagnosis)[:ORIGINS_MAX]:
        if text := str(holder.origin):
            yield from _labelled(label, f"pid {holder.pid} {text}", columns)
            label = ""


def _labelled(label: str, text: str, columns: int) -> list[str]:
    indent = " " * (LABEL_COLUMNS + 2)
    return textwrap.wrap(text, columns, initial_indent=f"  {label:{LABEL_COLUMNS}}", subsequent_indent=indent)


def _answers(diagnosis: Diagnosis, columns: int, paint: Callable[[str, str], str]) -> Iterator[str]:
    told = "tried" if diagnosis.is_probed else "judged, not tried"
    yield f"bind and listen by user {diagnosis.asker.user} ({told})"
    indent = " " * (CHOICE_COLUMNS + 2)
    for name, options in CHOICES.items():
        answer = diagnosis.answers[name]
        is_all = len(set(diagnosis.answers.values())) == 1
        common = " (as servers do)" if name == diagnosis.usual else ""
        label = "any options" if is_all else f"{options}{common}"
        first, *rest = textwrap.wrap(answer.rule, max(columns - len(indent) - 9, 20))
        yield f"  {label:{CHOICE_COLUMNS}}{paint(f'{answer.can:9}', COLOURS[answer.can])}{first}"
        yield from (f"{indent}{'':9}{line}" for line in rest)
        if is_all:
            break


def _table(port: Port, columns: int) -> Iterator[str]:
    yield ""
    if not port.sockets:
        yield "on the port: nothing"
        return
    yield "on the port"
    order = list(State)
    rows = sorted(port.sockets, key=lambda old: (order.index(old.state), -old.count))
    for old in rows[:ROWS_MAX]:
        options = "" if old.options is None else f"  {old.options}"
        line = f"  {old.state:12}{old.count:>7,}  {old.local!s:16}{options}{_detail(old)}"
        yield from textwrap.wrap(line, columns, subsequent_indent=" " * 24, drop_whitespace=True) or [line]
    if len(rows) > ROWS_MAX:
        yield f"  and {len(rows) - ROWS_MAX} more such lines (--json has them all)"
    if port.protocol == "tcp":
        yield ""
        yield from (f"  {line}" for line in _picture(port))


def _picture(port: Port) -> Iterator[str]:
    """Draw how a connection ends, with the number of connections in each state."""
    counts: Counter[State] = Counter()
    for old in port.sockets:
        counts[old.state] += old.count
    waiting = sum(old.queue for old in port.sockets if old.state == State.LISTEN)

    def chain(*states: State) -> str:
        return " -> ".join(f"{state} {counts[state]:,}" for state in states)

    yield f"{chain(State.LISTEN)} ({waiting:,} to be accepted) -> {chain(State.ESTABLISHED)} -+"
    yield f" +- closed here first -> {chain(State.FIN_WAIT1, State.FIN_WAIT2, State.TIME_WAIT)} -> gone"
    yield f" +- by the peer first -> {chain(State.CLOSE_WAIT, State.LAST_ACK)} -> gone"


def _detail(old: Sockets) -> str:
    parts = [str(holder) for holder in old.holders[:3]]
    if len(old.holders) > 3:
        parts.append(f"{len(old.holders) - 3} more")
    if not old.holders and old.is_held:
        parts.append(f"user {old.user}{f', {old.unit}' if old.unit else ''}, pid not permitted")
    if old.state == State.LISTEN:
        parts.append(f"queue {old.queue:,} of {old.backlog:,}")
    if not old.is_held:
        parts.append(f"the last one ends in {old.ends_in_s:.0f} s" if old.is_timed else "no process")
    if old.peers:
        parts.append(f"peers {', '.join(old.peers)}")
    return "  " + "; ".join(parts)
