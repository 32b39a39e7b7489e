"""Where a reference is behind, level and ahead, in words made from the numbers; losses first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from analysis.compare.paired import LOCAL, OUTCOMES, Compared, Outcome, Standing, titles
from analysis.report.measures import signed, span

ORDER: tuple[Standing, ...] = ("behind", "one pair", "level", "ahead", "missing")
WORDS: dict[Standing, str] = {
    "behind": "BEHIND",
    "one pair": "one seed only, hence no interval and nothing shown",
    "level": "level (the interval includes 0)",
    "ahead": "ahead of",
    "missing": "not compared with",
}
TITLES = {
    "local": "local {score}",
    "global": "global {score}",
    "worst tenth": "local {score} of the worst tenth of the clients",
    "new clients": "local {score} of new clients",
}


def shown_difference(own: Compared) -> str:
    """``−1.2 (−2.0 to −0.4)``: the mean difference and its t interval; the mean without one."""
    assert own.interval is not None, "there is a pair"
    mean = signed(own.interval.mean, own.factor, own.digits)
    low, high = own.interval.low, own.interval.high
    if low is None or high is None:
        return mean
    return f"{mean} ({span(low, high, own.factor, own.digits)})"


def verdict(
    compared: Sequence[Compared], pooled: Sequence[Compared], reference: str, failed: str = ""
) -> str:
    """The section of one reference, in Markdown.

    Args:
        failed: methods and seeds of runs of the reference and its baselines that failed.
    """
    mine = [own for own in compared if own.reference == reference and own.counted]
    over_all = [own for own in pooled if own.reference == reference]
    headline = _headline(mine, over_all, reference)
    if failed:
        headline += f" FAILED RUNS, in none of these numbers: {failed}."
    lines = [f"### Where {reference} stands", "", headline]
    for outcome in OUTCOMES:
        own = [one for one in mine if one.outcome is outcome]
        if own:
            lines += ["", *_outcome(own, outcome)]
            lines += _pooled([one for one in over_all if one.outcome is outcome])
    return "\n".join([*lines, *_harm(mine)])


def _headline(mine: Sequence[Compared], over_all: Sequence[Compared], reference: str) -> str:
    """Names every loss, in a scene or pooled, or says that none was shown."""
    counts = {s: sum(own.standing == s for own in mine) for s in ORDER}
    decided = counts["behind"] + counts["level"] + counts["ahead"]
    if not decided:
        return (
            f"Nothing is shown about {reference}: no comparison has two pairs of runs; "
            "run more seeds."
        )
    below = sum(own.standing == "level" and _favour(own) < 0 for own in mine)
    rest = (
        f"It is ahead in {counts['ahead']} and level, not told apart, in {counts['level']}; in "
        f"{below} of the level ones its mean is the worse one."
    )
    lost = _losses([*mine, *over_all])
    if lost:
        return (
            f"**{reference} does not win everywhere: it is behind in {counts['behind']} of "
            f"{decided} comparisons** ({'; '.join(lost)}). {rest}"
        )
    if not counts["ahead"]:
        return f"{reference} wins nowhere, and is behind in none of {decided} comparisons. {rest}"
    return f"{reference} is behind in none of {decided} comparisons. {rest}"


def _losses(compared: Sequence[Compared]) -> list[str]:
    """``scene: baseline, baseline (what); ...`` for every scene with a loss."""
    found = []
    for scene in titles(compared):
        lost = [own for own in compared if (own.scene, own.standing) == (scene, "behind")]
        if lost:
            pooled = " pooled" * (lost[0].num_scenes > 1)
            by_title: dict[str, list[str]] = {}
            for own in lost:
                by_title.setdefault(_title(own), []).append(own.baseline)
            told = "; ".join(f"{', '.join(names)} ({title})" for title, names in by_title.items())
            found.append(f"{scene}{pooled}: {told}")
    return found


def _favour(own: Compared) -> float:
    """The mean difference, positive in favour of the reference; 0 without one."""
    return 0.0 if own.interval is None else own.better * own.interval.mean


def _title(own: Compared) -> str:
    return TITLES[own.outcome.name].format(score=own.score)


def _outcome(own: Sequence[Compared], outcome: Outcome) -> Iterator[str]:
    counts = {s: sum(one.standing == s for one in own) for s in ORDER}
    decided = counts["behind"] + counts["level"] + counts["ahead"]
    names = " and ".join(dict.fromkeys(_title(one) for one in own))
    yield (
        f"- {names[0].upper()}{names[1:]}: behind in {counts['behind']}, level in "
        f"{counts['level']}, ahead in {counts['ahead']} of {decided} comparisons of a baseline in "
        "a scene."
    )
    for standing in ORDER:
        for scene in titles(own):
            here = [one for one in own if (one.standing, one.scene) == (standing, scene)]
            if here:
                yield f"  - {WORDS[standing]}, {scene}: {_list(here)}"


def _list(here: Sequence[Compared]) -> str:
    """Baselines with their numbers, the worst for the reference first."""
    if any(one.interval is None for one in here):
        return "; ".join(f"{one.baseline} ({one.reason})" for one in here)
    told = (f"{one.baseline} {shown_difference(one)}" for one in sorted(here, key=_favour))
    return "; ".join(told) + _unit(here[0])


def _unit(own: Compared) -> str:
    return " points" if own.factor != 1 else f" {own.score}, negative is better"


def _pooled(own: Sequence[Compared]) -> Iterator[str]:
    for standing in ORDER:
        for scene in titles(own):
            here = [one for one in own if (one.standing, one.scene) == (standing, scene)]
            if here:
                yield f"  - {WORDS[standing]}, {scene} pooled: {_list(here)}"


def _harm(mine: Sequence[Compared]) -> Iterator[str]:
    """Where more clients are harmed than helped, whatever the mean says."""
    local = [own for own in mine if own.outcome is LOCAL and own.shares is not None]
    if not local:
        return
    yield ""
    worse: dict[str, list[str]] = {}
    for own in local:
        assert own.shares is not None, "kept above"
        helped, _, harmed = (100 * share for share in own.shares)
        if harmed > helped:
            told = f"{own.baseline} ({harmed:.0f} % harmed, {helped:.0f} % helped)"
            worse.setdefault(own.scene, []).append(told)
    if not worse:
        yield "- Clients: nowhere are more of them harmed than helped."
    for scene, against in worse.items():
        yield f"- MORE CLIENTS HARMED THAN HELPED, {scene}, against: {', '.join(against)}."
