"""Render a run as one self-contained page: no network, no other file, no library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any, Final

import msgspec

from hotport.churn.certainty import bounds, percent
from hotport.churn.fates import LOSSES, MEANINGS, ConnectionEvent, Fate
from hotport.churn.histogram import Histogram
from hotport.churn.result import Bucket, RestartMark, Result
from hotport.churn.verdict import (
    PERCENTILES,
    PHASES,
    answered_by,
    attempts_of,
    count_of,
    counts_of,
    latency_by_phase,
    losses_by_restart,
    losses_of,
    milliseconds,
    named,
    named_connections,
    sentences,
    window,
)

__all__ = ["render"]

#: A chart is drawn in so many columns at most; longer runs have more buckets in each.
COLUMNS_MAX: Final = 300

#: What could end a script element or confuse one, as JSON writes it otherwise.
_UNSAFE: Final = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}

#: The order of columns in tables: fates, then events.
_COLUMNS: Final = tuple(what.value for what in (*Fate, *ConnectionEvent))
_MEANINGS: Final = {what.value: meaning for what, meaning in MEANINGS.items()}
_LOSSES: Final = frozenset(fate.value for fate in LOSSES)


def render(result: Result) -> str:
    """Render the page; strings in the result are untrusted, and never become markup or script."""
    template = files("hotport.churn").joinpath("page.html").read_text("utf-8")
    verdict = result.verdict
    mood = "invalid" if not verdict.is_valid else "clean" if verdict.is_clean else "lost"
    words = {"invalid": "the run means nothing", "clean": "nothing lost", "lost": "lost"}[mood]
    said = sentences(result)
    parts = {
        "TITLE": escape(f"{words}: {result.target.url}"),
        "MOOD": f"is-{mood}",
        "SUBJECT": f"{escape(result.target.url)} &middot; {escape(result.started_at)}",
        "VERDICT": escape(said[0]),
        "MORE": "".join(f"<p>{escape(line)}.</p>" for line in said[1:]),
        "FIGURES": _figures(result),
        "FATES": _fates(result),
        "LOSSES": _losses(result),
        "LATENCY": _latency(result),
        "PHASES": "; ".join(f"<b>{name}</b>: {escape(meaning)}" for name, meaning in PHASES.items()),
        "RESTARTS": _restarts(result),
        "ANSWERED": _answered(result),
        "INCIDENTS_HEADING": _incidents_heading(result),
        "OPTIONS": _options(result),
        "MACHINE": _machine(result.machine),
        "VIEW": _script(msgspec.json.encode(_view(result))),
        "RAW": _script(msgspec.json.encode(result)),
    }
    before, *rest = template.split("@@")  # name and text by turns: what is put in is never looked at again
    pieces = [before]
    for name, text in zip(rest[::2], rest[1::2], strict=True):
        pieces += [parts[name], text]
    return "".join(pieces)


# -- for the charts -----------------------------------------------------------------------------------------


def _view(result: Result) -> dict[str, Any]:
    """Prepare the data of the charts, in as many columns as fit."""
    size = max(1, math.ceil(result.duration_ms / result.bucket_ms / COLUMNS_MAX))
    width_ms = size * result.bucket_ms
    groups: dict[int, list[Bucket]] = {}
    for bucket in result.buckets:
        groups.setdefault(bucket.at_ms // width_ms, []).append(bucket)
    end_ms = max([result.duration_ms, *(bucket.at_ms + result.bucket_ms for bucket in result.buckets)])
    return {
        "width": width_ms,
        "end": end_ms,
        "columns": [_column(number * width_ms, group) for number, group in sorted(groups.items())],
        "restarts": [_band(mark, end_ms) for mark in result.restarts],
        "curves": [
            {"name": name, "points": _curve(histogram)}
            for name, histogram in latency_by_phase(result).items()
            if len(histogram)
        ],
        "lag": [result.lag.p50, result.lag.p99, result.lag.maximum],
    }


def _column(at_ms: int, group: Sequence[Bucket]) -> dict[str, Any]:
    totals: dict[str, int] = {}
    latency = Histogram()
    for bucket in group:
        for name, count in counts_of(bucket.fates).items():
            totals[name] = totals.get(name, 0) + count
        for counts in bucket.latency.values():
            latency.merge(counts)
    lost = losses_of({"": totals})
    return {
        "at": at_ms,
        "answered": totals.get(Fate.ANSWERED.value, 0),
        "late": totals.get(Fate.LATE.value, 0),
        "lost": sum(lost.values()),
        "by": lost,
        "us": [latency.percentile(0.5), latency.percentile(0.99), latency.maximum] if len(latency) else None,
        "in_flight": max(bucket.in_flight for bucket in group),
        "connections": group[-1].connections,
    }


def _band(mark: RestartMark, end_ms: float) -> dict[str, Any]:
    return {
        "number": mark.number,
        "from": mark.began_ms,
        "to": mark.ended_ms if mark.ended_ms is not None else mark.began_ms,
        "until": min(window(mark)[1], end_ms),
        "outcome": mark.outcome or "no outcome",
        "bad": mark.outcome not in ("done", "sent"),
    }


def _curve(histogram: Histogram) -> list[tuple[float, float]]:
    """Latency at each share, the axis being one nine further with each unit: 0 is 0 %, 1 is 90 %, 2 is 99 %."""
    total, seen = len(histogram), 0
    points = []
    for index in sorted(histogram.counts):
        value = Histogram({index: 1}).maximum
        points.append((round(-math.log10(1 - seen / total), 4), value))
        seen += histogram.counts[index]
    points.append((round(math.log10(total), 4), points[-1][1]))
    return points


def _script(data: bytes) -> str:
    """Encode JSON that cannot end a script element."""
    text = data.decode()
    for character, escaped in _UNSAFE.items():
        text = text.replace(character, escaped)
    return text


# -- tables -------------------------------------------------------------------------------------------------


def _table(name: str, headings: Sequence[str], rows: Iterable[Sequence[str]], *, words: Iterable[int] = (0,)) -> str:
    """Render a table; cells are HTML already, and columns other than `words` are numbers."""
    words = set(words)
    kinds = ["word" if column in words else "number" for column in range(len(headings))]
    head = "".join(f'<th scope="col" class="{kind}">{text}</th>' for kind, text in zip(kinds, headings, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(count: int, name: str = "") -> str:
    kind = "zero" if not count else "bad" if name in _LOSSES else ""
    return f'<span class="{kind}">{count:,}</span>' if kind else f"{count:,}"


def _bar(share: float, kind: str) -> str:
    return f'<span class="bar"><span class="{kind}" style="width:{max(0.0, min(1.0, share)) * 100:.2f}%"></span></span>'


def _figures(result: Result) -> str:
    attempts, lost = attempts_of(result.totals), sum(losses_of(result.totals).values())
    seconds = result.duration_ms / 1000
    during = latency_by_phase(result)["during" if result.restarts else "before"]
    gaps = [gap for gap in result.accept_gap_ms if gap is not None]
    known = {"without a restart": result.quiet_gap_ms, "by chance": result.usual_gap_ms}
    others = ", ".join(f"{when} {gap:,.0f} ms" for when, gap in known.items() if gap is not None)
    figures = [
        ("attempts", f"{attempts:,}", f"{attempts / seconds:,.0f} a second" if seconds else ""),
        (
            "lost",
            f"{lost:,}",
            f"{_bounds(lost, attempts)} of attempts, 95 %" if attempts else "",
        ),
        ("restarts", f"{len(result.restarts):,}", f"in {seconds:,.1f} s"),
        (
            "p99 latency",
            milliseconds(during.percentile(0.99)) if len(during) else "none",
            "during restarts" if result.restarts else "over the whole run",
        ),
        (
            "longest accept gap",
            f"{max(gaps):,.0f} ms" if gaps else "none",
            others or "no new connection answered" if gaps else "",
        ),
        ("own lag", milliseconds(result.lag.p99), "p99, of these clients"),
    ]
    return "".join(
        f'<div id="figure-{name.replace(" ", "-")}"><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>'
        for name, value, more in figures
    )


def _fates(result: Result) -> str:
    counts = counts_of(result.totals)
    columns = [name for name in _COLUMNS if counts[name]]
    rows = [
        [escape(kind), *(_number(found.get(name, 0), name) for name in columns)]
        for kind, found in result.totals.items()
    ]
    if len(rows) > 1:
        rows.append(["<b>all</b>", *(f"<b>{_number(counts[name], name)}</b>" for name in columns)])
    headings = [f'<span title="{escape(_MEANINGS[name])}">{name}</span>' for name in columns]
    return _table("fates", ["clients", *headings], rows)


def _losses(result: Result) -> str:
    losses = losses_of(result.totals)
    if not losses:
        return '<p id="losses">Nothing was lost.</p>'
    most = max(losses.values())
    rows = []
    for name, count in losses.items():
        kinds = ", ".join(f"{found[name]:,} {escape(kind)}" for kind, found in result.totals.items() if found.get(name))
        meaning = f"<b>{name}</b><small>{escape(_MEANINGS[name])}</small>"
        share = _bounds(count, attempts_of(result.totals))
        rows.append([meaning, f"{count:,}", share, _bar(count / most, "lost"), kinds])
    return _table("losses", ["how", "attempts", "95 %", "", "clients"], rows, words=(0, 3, 4))


def _bounds(lost: int, attempts: int) -> str:
    low, high = bounds(lost, attempts)
    return f"{percent(low)} &ndash; {percent(high)}" if lost else f"&lt; {percent(high)}"


def _latency(result: Result) -> str:
    rows = []
    for name, histogram in latency_by_phase(result).items():
        values = [milliseconds(histogram.percentile(share)) for share in PERCENTILES.values()]
        cells = [*values, milliseconds(histogram.maximum)] if len(histogram) else ["&ndash;"] * (len(PERCENTILES) + 1)
        rows.append([f'<i class="key {name}"></i>{name}', f"{len(histogram):,}", *cells])
    return _table("latency", ["", "answers", *PERCENTILES, "max"], rows)


def _restarts(result: Result) -> str:
    if not result.restarts:
        return '<p id="restarts">There was no restart.</p>'
    gaps = [gap or 0.0 for gap in result.accept_gap_ms]
    most = max([*gaps, 1.0])
    before, *lost = losses_by_restart(result)
    rows = []
    for mark, gap, losses in zip(result.restarts, result.accept_gap_ms, lost, strict=True):
        took = "not known" if mark.ended_ms is None else f"{mark.ended_ms - mark.began_ms:,.0f} ms"
        outcome = escape(mark.outcome or "no outcome")
        if mark.outcome not in ("done", "sent"):
            outcome = f'<span class="bad">{outcome}</span>'
        notes = (escape(mark.detail), _phases(mark), _connections(mark))
        more = "".join(f"<small>{note}</small>" for note in notes if note)
        gap_cell = "not measured" if gap is None else f"{gap:,.0f} ms"
        rows.append(
            [
                str(mark.number),
                f"{escape(mark.how)}{more}",
                f"{mark.began_ms / 1000:.2f} s",
                took,
                outcome,
                gap_cell,
                "" if gap is None else _bar(gap / most, "gap"),
                _losses_cell(losses),
            ]
        )
    note = f"<p>Lost before the first one: {_losses_cell(before)}.</p>" if before else ""
    headings = ["", "how", "began at", "took", "outcome", "accept gap", "", "lost until the next one"]
    return _table("restarts", headings, rows, words=(0, 1, 4, 6, 7)) + note


def _losses_cell(losses: Mapping[str, int]) -> str:
    if not losses:
        return "nothing"
    return f'<span class="bad">{", ".join(named(count, name) for name, count in losses.items())}</span>'


def _phases(mark: RestartMark) -> str:
    """The steps of hotport's own report."""
    phases = (mark.report or {}).get("phases") or []
    return ", ".join(f"{escape(str(phase.get('name')))} {phase.get('ms', 0):,.0f} ms" for phase in phases)


def _connections(mark: RestartMark) -> str:
    told = named_connections(mark)
    return f"its connections: {escape(told)}" if told else ""


def _answered(result: Result) -> str:
    found = answered_by(result.buckets)
    if not found:
        return '<p id="answered">The target does not tell.</p>'
    total = sum(found.values())
    rows = []
    for name, count in found.items():
        at = [bucket.at_ms for bucket in result.buckets if name in bucket.answered_by]
        since = f"{at[0] / 1000:.1f} to {(at[-1] + result.bucket_ms) / 1000:.1f} s"
        rows.append([escape(name), f"{count:,}", _bar(count / total, "answered"), since])
    return _table("answered", ["who", "answers", "", "seen from"], rows, words=(0, 2, 3))


def _incidents_heading(result: Result) -> str:
    if not result.incidents:
        return "No attempt was lost or late"
    kept = f"{count_of(len(result.incidents), 'attempt')} lost or late"
    if result.incidents_dropped:
        kept += f"; {result.incidents_dropped:,} more were counted, but not kept one by one"
    return kept


def _options(result: Result) -> str:
    rows = [
        ["target", escape(result.target.url)],
        *(["clients", escape(_load(load.kind, load.rate, load.count, load.think_ms))] for load in result.loads),
        ["duration", f"{result.duration_ms / 1000:,.1f} s, in buckets of {result.bucket_ms} ms"],
        ["late above", f"{result.late_ms:g} ms" if result.late_ms else "never"],
        ["engines", str(result.engines)],
        ["seed", str(result.seed)],
        ["own lag", ", ".join(f"{n} {milliseconds(v)}" for n, v in msgspec.structs.asdict(result.lag).items())],
        ["own limits", escape(", ".join(f"{n:,} {name}" for name, n in result.own_limits.items()) or "none met")],
        ["allowed losses", escape(_allowed(result.verdict.allowed))],
    ]
    return _table("options", ["option", "value"], rows, words=(0, 1))


def _load(kind: str, rate: float, count: int, think_ms: float) -> str:
    if not count:
        return f"{kind}, {rate:g} a second"
    return f"{kind}, {count:,} connections" + (f", {think_ms:g} ms between requests" if think_ms else "")


def _allowed(allowed: Mapping[str, int | None]) -> str:
    return ", ".join(f"{name}: {'any' if n is None else n}" for name, n in allowed.items()) or "none"


def _machine(machine: Mapping[str, Any]) -> str:
    rows = []
    for name, value in machine.items():
        if isinstance(value, Mapping):
            text = "<br>".join(f"{escape(str(key))} {escape(str(found))}" for key, found in value.items())
        elif isinstance(value, list | tuple):
            text = escape(", ".join(f"{each:.2f}" if isinstance(each, float) else str(each) for each in value))
        else:
            text = escape(str(value))
        rows.append([escape(name.replace("_", " ")), text])
    return _table("machine", ["what", "value"], rows, words=(0, 1))
