"""What a calibration found, in sentences: for the terminal, the page, and beside a verdict."""

from collections.abc import Mapping
from typing import Any

from slm_swap.scoring.words import SIGNALS, level
from slm_swap.verdict import cost_words

CLASS_NAMES = {"call": "replies that call a tool", "no_call": "replies that call none", "value": "replies"}


def percent(share: float) -> str:
    """`12.3%`, and of a share that is not 0 never `0.0%`."""
    return "under 0.1%" if 0 < share < 0.0005 else f"{100 * share:.1f}%"


def sure(told: Mapping[str, Any]) -> str:
    """`95% sure`"""
    return f"{level(told['alpha'])} sure"


def units(told: Mapping[str, Any]) -> str:
    """What is counted: requests, or groups of them."""
    return "groups" if told["units"]["by"] == "group" else "requests"


def headline(told: Mapping[str, Any]) -> str:
    """What may be answered locally at which risk; or that nothing may, in one sentence."""
    target = f"{100 * told['delta']:g}%"
    if not any(rule["threshold"] is not None for rule in told["rules"].values()):
        what = "wrong where the hosted model is right" if told["guarantee"] == "regret" else "different from the hosted model's"
        return (
            f"Nothing may be answered locally yet: on {told['calibration']['rows']} rows no threshold shows that its answer is {what} in at most "
            f"{target} of the {units(told)} ({sure(told)})."
        )
    wrong = "the answer is wrong where the hosted model is right" if told["guarantee"] == "regret" else "the answer differs from the hosted model's"
    classes = " of each class" if sum(rule["threshold"] is not None for rule in told["rules"].values()) > 1 else ""
    return (
        f"The small model may answer {percent(told['share_local'])} of the requests, the hosted one the rest: in at most {target} of all {units(told)}{classes} "
        f"{wrong} ({sure(told)}; seen in {percent(told['regret']['seen'])})."
    )


def brief(told: Mapping[str, Any]) -> str:
    """The same beside a verdict: `told` is the decision's `cascade`."""
    wrong = "wrong where the hosted model is right" if told["guarantee"] == "regret" else "different from the hosted model's"
    return (
        f"It may answer {percent(told['share_local'])} of the traffic now, with the hosted model behind it: {wrong} in at most "
        f"{100 * told['delta']:g}% of all ({sure(told)}, by {told['path']})."
    )


def of_class(kind: str, told: Mapping[str, Any]) -> str:
    """One class: its rule, what it answers, what was lost."""
    rule, name = told["rules"][kind], CLASS_NAMES[kind]
    name = name[0].upper() + name[1:]
    if not rule["rows"]:
        return f"{name}: there are none in these rows, so none is answered locally."
    if rule["threshold"] is None:
        return f"{name} ({rule['rows']} rows): never answered locally."
    only = rule["local_only"]
    return (
        f"{name}: {rule['rows_local']} of {rule['rows']} rows ({percent(rule['rows_local'] / rule['rows'])}) are answered locally, where "
        f"“{SIGNALS[rule['signal']][0]}” is at least {rule['threshold']:.6g}. {rule['losses']} of {rule['units']} {units(told)} were lost ({percent(rule['seen'])}, bound "
        f"{percent(rule['bound'])}); among those answered locally {percent(only['seen'])} (bound {percent(only['bound'])})."
    )


def more_of(kind: str, told: Mapping[str, Any]) -> str | None:
    """What further rows would add to a class; None where there is nothing to add."""
    more, rule = told["more"][kind], told["rules"][kind]
    if not rule["rows"]:
        return None
    if more is None:
        few = rule["threshold"] is None
        return f"{CLASS_NAMES[kind].capitalize()}: too few may be answered locally at all; further rows do not help before more of them are fit and have {rule['signal']}." if few else None
    without, seen = more["rows_without_losses"], more["rows_as_seen"]
    told_without = "no number of further rows would do" if without is None else f"{without:,} further rows without a loss would do"
    told_seen = "at the share of losses seen no number does" if seen is None else f"at the share of losses seen about {seen:,}"
    return f"To answer {percent(more['share'])} of the {CLASS_NAMES[kind]} locally: {told_without}, {told_seen}."


def disagreement(told: Mapping[str, Any]) -> str | None:
    """How often local answers differ from the hosted model's."""
    found = told["disagreement"]
    if found["seen"] is None:
        return None
    return f"Of what is answered locally {percent(found['seen'])} differs from the hosted model's answer (bound {percent(found['bound'])}, {found['units']} {units(told)})."


def bill(told: Mapping[str, Any]) -> str:
    """A month of the cascade against the hosted model alone."""
    cost = told["costs"]
    unit, bills = cost["currency"] or "", cost["bills"] or []
    if not bills or any(None in (own["azure"], own["slm"], own["saving"]) for own in bills):
        return "Savings unknown: " + ("; ".join(cost["unknown"]) or cost["why"] or "a measurement is missing") + "."
    parts = [
        f"at {own['tasks']:,} tasks {cost_words.money(own['azure'], unit)} hosted alone, {cost_words.money(own['slm'], unit)} with the small model in front: "
        f"{cost_words.difference(own['saving'], unit)}"
        for own in bills
    ]
    return f"A month costs {'; '.join(parts)}."


def latency(told: Mapping[str, Any]) -> str | None:
    """Both models' latencies; what goes on to the hosted model waits for both."""
    parts = []
    for side, name in (("slm", "small"), ("azure", "hosted")):
        for way, load in (("alone", "alone"), ("loaded", "under load")):
            if found := (told["latency"][side] or {}).get(way):
                parts.append(f"{name} {1000 * found['p50']:,.0f}/{1000 * found['p95']:,.0f} ms {load}")
    return f"Latency p50/p95: {', '.join(parts)}; a request that goes on to the hosted model waits for both." if parts else None


def sentences(told: Mapping[str, Any]) -> list[str]:
    """All of it, the headline first."""
    kinds = list(told["rules"])
    found = [headline(told), *(of_class(kind, told) for kind in kinds), disagreement(told), *(more_of(kind, told) for kind in kinds)]
    if told["share_local"]:
        found += [bill(told), latency(told)]
    return [text for text in found if text]
