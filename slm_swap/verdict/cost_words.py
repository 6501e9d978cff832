"""A decision's `cost` in sentences, for the terminal and for the page. Keys may be null where nothing is known."""

from typing import Any

from slm_swap.verdict.decision import SWAP

MOST_INTERVALS = 5  # that a sentence lists; the decision file has all


def money(amount: float, unit: str = "") -> str:
    """`1,606.00 USD`, `0.042 USD`, without a sign; `unit` is the currency, perhaps none."""
    amount = abs(amount)
    if amount >= 0.995 or amount == 0:
        text = f"{amount:,.2f}" if amount else "0"
    else:
        text = f"{amount:.3g}" if amount >= 1e-4 else f"{amount:.1e}"
    return f"{text} {unit}".rstrip()


def utilised(share: float | None) -> str:
    """`0.0013% utilised`: the share of the paid hours in which the machines work."""
    return "utilisation not known" if share is None else f"{percent(share)} utilised"


def percent(share: float) -> str:
    """`51%`, `0.0013%`"""
    hundredths = 100 * share
    if hundredths >= 10:
        return f"{hundredths:.0f}%"
    return f"{hundredths:.2g}%" if hundredths >= 1e-4 or not hundredths else "under 0.0001%"


def known(cost: dict[str, Any]) -> bool:
    """Whether both bills are known, so that a saving is."""
    bills = cost["bills"] or []
    return cost["cheaper"] is not None and bool(bills) and all(None not in (own["azure"], own["slm"], own["saving"]) for own in bills)


def machines(bill: dict[str, Any]) -> str:
    """`2 machines, 50% utilised`; nothing where the small model is hosted too."""
    number = bill["machines"]
    return "" if number is None else f"{number:,} machine{'' if number == 1 else 's'}, {utilised(bill['utilisation'])}"


def difference(saving: float, unit: str) -> str:
    """What the small model costs against the hosted one: `19.00 USD more`."""
    return "the same" if saving == 0 else f"{money(saving, unit)} {'less' if saving > 0 else 'more'}"


def volumes(cost: dict[str, Any]) -> str | None:
    """The volumes at which the small model costs less: `from 10 to 19, and from 30 tasks a month on`; None where there are none."""
    intervals = cost["cheaper"] or []
    if not intervals:
        return None
    if intervals[0]["first"] <= 1 and intervals[0]["last"] is None:
        return "at every volume"
    shown = [_interval(own) for own in intervals]
    if len(shown) > MOST_INTERVALS:
        left_out = len(shown) - MOST_INTERVALS
        shown[MOST_INTERVALS - 1 : -1] = [f"in {left_out:,} further range{'' if left_out == 1 else 's'} of volume"]
    listed = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])}, and {shown[-1]}"
    return f"{listed} tasks a month" + (" on" if intervals[-1]["last"] is None else "")


def _interval(own: dict[str, int | None]) -> str:
    first, last = own["first"], own["last"]
    if last is None:
        return f"from {first:,}"
    return f"at {first:,}" if first == last else f"from {first:,} to {last:,}"


def headline(cost: dict[str, Any], unit: str) -> str:
    """Both bills at the volume of the price table, or that no saving is known, or where the bills stand."""
    bills, given = cost["bills"] or [], (cost["traffic"] or {}).get("tasks_per_month")
    if not known(cost):
        hosted = bills[0]["azure"] if given and bills else None
        told = "" if hosted is None else f" At {given:,} tasks a month the hosted model costs {money(hosted, unit)}."
        return f"Savings unknown: {cost['why'] or 'compare again'}.{told}"
    if not given:
        told = "; ".join(f"{money(own['azure'], unit)} and {_small(own, unit)} at {own['tasks']:,} tasks" for own in bills)
        return f"What a month costs, hosted and small: {told}. For your own volume set tasks_per_month in [traffic] of the prices."
    bill = bills[0]
    against = f"{difference(bill['saving'], unit)} a month" if bill["saving"] else "the same"
    return f"At {given:,} tasks a month the hosted model costs {money(bill['azure'], unit)} and the small one {_small(bill, unit)}: {against}."


def _small(bill: dict[str, Any], unit: str) -> str:
    """The small model's bill and beside it its utilisation."""
    run = machines(bill)
    return money(bill["slm"], unit) + (f" ({run})" if run else "")


def crossings(cost: dict[str, Any]) -> str | None:
    """At which volumes the small model is the cheaper one; None where that is not known."""
    if not known(cost):
        return None
    up_to = cost["looked_up_to"]
    rest = f" Volumes above {up_to:,} were not looked at." if up_to is not None and cost["cheaper"] else ""
    found = volumes(cost)
    return (f"The small model costs less {found}." if found else f"The small model never costs less: {cost['why']}.") + rest


def margin(cost: dict[str, Any], delta: float, unit: str) -> str | None:
    """What the margin costs beside the saving, at the volume of the price table; None without a margin."""
    if not delta:
        return None
    bill, traffic = (cost["bills"] or [{}])[0], cost["traffic"] or {}
    allows = f"The margin of {100 * delta:g} points allows up to"
    if not traffic.get("tasks_per_month") or bill.get("wrong_replies") is None:
        return f"{allows} {1000 * delta:g} more wrong replies per 1,000."
    told = f"{allows} {bill['wrong_replies']:,.0f} more wrong replies a month"
    if None in (bill["wrong_replies_cost"], traffic["cost_of_error"]):
        return f"{told} (not priced: cost_of_error in [traffic] of the prices)."
    told += f", worth {money(bill['wrong_replies_cost'], unit)} at {money(traffic['cost_of_error'], unit)} each"
    if (bill["saving"] or 0) <= 0:
        return f"{told}."
    return f"{told}: {'no less' if bill['wrong_replies_cost'] >= bill['saving'] else 'less'} than the saving of {money(bill['saving'], unit)}."


def paid_back(cost: dict[str, Any], verdict: str) -> str | None:
    """`0.4 months`: after which training is paid back at the volume of the price table; None beside any verdict but SWAP."""
    months = cost["paid_back_months"]
    if verdict != SWAP or months is None:
        return None
    shown = "less than 0.1" if months < 0.1 else f"{months:.2g}" if months < 10 else f"{months:,.0f}"
    return f"{shown} month{'' if shown in ('1', 'less than 0.1') else 's'}"


def unit_costs(cost: dict[str, Any], unit: str) -> str | None:
    """What 1,000 tasks cost as they were evaluated; None where neither is known."""
    azure, slm, found = cost["azure"] or {}, cost["slm"] or {}, []
    if azure.get("per_1000") is not None:
        rows, counted = azure.get("rows"), azure.get("rows_counted")
        part = f" (token counts of {counted:,} of {rows:,} rows)" if rows and counted is not None and counted < rows else ""
        found.append(f"hosted {money(azure['per_1000'], unit)}{part}")
    if slm.get("per_1000") is not None:
        share = slm.get("utilisation")
        run = "" if share is None and cost["bills"] else f" (machine {utilised(share)})"  # without bills it is an older file
        found.append(f"small {money(slm['per_1000'], unit)}{run}")
    return f"1,000 tasks as in the evaluation: {', '.join(found)}." if found else None


def sentences(cost: dict[str, Any], verdict: str, delta: float, unit: str) -> list[str]:
    """All that is said of money, the headline first."""
    months = paid_back(cost, verdict)
    back = f"Training is paid back after {months} at this volume." if months else None
    found = (headline(cost, unit), crossings(cost), margin(cost, delta, unit), back, unit_costs(cost, unit))
    return [text for text in found if text]
