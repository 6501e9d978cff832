"""An invented shop bot's log in OpenAI's chat form: eight tools, its own system text, several turns, several calls, and none."""

import json
from pathlib import Path
from random import Random

SYSTEM = "You are Nook, the assistant of a small furniture shop. Be brief. Use the tools; ask where something is missing."
ITEMS = ("oak table", "desk lamp", "blue sofa", "bookshelf", "garden chair", "wall clock", "wool rug", "mirror", "bar stool", "bed frame")
CITIES = ("Porto", "Lyon", "Graz", "Ghent", "Malmo", "Turin", "Bergen", "Split", "Bilbao", "Leeds")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
NAMES = ("Ana", "Ben", "Carla", "Dmitri", "Elif", "Femi", "Greta", "Hugo", "Ines", "Jonas")
TEXT, NUMBER = {"type": "string"}, {"type": "integer"}


def _tool(name: str, says: str, required: dict, optional: dict | None = None) -> dict:
    schema = {"type": "object", "properties": required | (optional or {}), "required": list(required), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": says, "parameters": schema}}


TOOLS = [
    _tool("find_item", "Search the shop", {"query": TEXT}, {"max_price": NUMBER}),
    _tool("check_stock", "How many of an item are in the shop of a city", {"item": TEXT, "city": TEXT}),
    _tool("order_status", "Where an order is", {"order": NUMBER}),
    _tool("cancel_order", "Cancel an order", {"order": NUMBER}, {"reason": {"enum": ["late", "price", "mistake"]}}),
    _tool("book_delivery", "Book a delivery", {"order": NUMBER, "day": {"type": "string", "enum": list(DAYS)}}),
    _tool("change_address", "Change where an order goes", {"order": NUMBER, "city": TEXT}),
    _tool("reserve", "Put an item aside", {"item": TEXT, "name": TEXT, "count": NUMBER}),
    _tool("open_ticket", "Hand the case to a person", {"topic": {"type": "string", "enum": ["broken", "wrong item", "refund"]}, "order": NUMBER}),
]


def _call(tool: str, number: int, /, **arguments: object) -> dict:
    return {"id": f"call_{number}", "type": "function", "function": {"name": tool, "arguments": json.dumps(arguments)}}


def _turn(kind: int, rng: Random) -> tuple[str, list[dict] | str]:
    """What a customer says, and the calls or the words that answer it."""
    item, other = rng.sample(ITEMS, 2)
    city, day, name, order = rng.choice(CITIES), rng.choice(DAYS), rng.choice(NAMES), rng.randrange(1000, 99999)
    reason = rng.choice(("late", "price", "mistake"))
    topic = rng.choice(("broken", "wrong item", "refund"))
    price, count = rng.randrange(20, 900), rng.randrange(2, 9)
    turns: list[tuple[str, list[dict] | str]] = [
        (f"Have you got a {item} for less than {price} euros?", [_call("find_item", 1, query=item, max_price=price)]),
        (f"Is the {item} in stock in {city}?", [_call("check_stock", 1, item=item, city=city)]),
        (f"Where is my order {order}?", [_call("order_status", 1, order=order)]),
        (f"Please cancel order {order}, it was a matter of {reason}.", [_call("cancel_order", 1, order=order, reason=reason)]),
        (f"Bring order {order} on {day}, please.", [_call("book_delivery", 1, order=order, day=day)]),
        (f"Order {order} should go to {city} instead.", [_call("change_address", 1, order=order, city=city)]),
        (f"Put {count} of the {item} aside for {name}.", [_call("reserve", 1, item=item, name=name, count=count)]),
        (f"Order {order} is a case for {topic}.", [_call("open_ticket", 1, topic=topic, order=order)]),
        (
            f"Are the {item} and the {other} in stock in {city}?",
            [_call("check_stock", 1, item=item, city=city), _call("check_stock", 2, item=other, city=city)],
        ),
        (
            f"Cancel order {order}, and where is order {order + 7}?",
            [_call("cancel_order", 1, order=order), _call("order_status", 2, order=order + 7)],
        ),
        (f"Hello, {name} here. Do you also make a {item} by hand in {city}?", f"Hello {name}. We only sell what is in the shop in {city}."),
        (f"Thank you, the {item} looks lovely on {day}s.", f"We are glad that you like the {item}."),
        (f"I want something changed about my {item} from {city}.", f"Which order is the {item} from, and what should be changed?"),
    ]
    return turns[kind % len(turns)]


def conversations(replies: int, seed: int = 1) -> list[dict]:
    """Fine-tuning rows of one to three turns, until they hold so many replies; results of tools stand between."""
    rng, rows, made = Random(seed), [], 0
    while made < replies:
        messages: list[dict] = [{"role": "system", "content": SYSTEM}]
        for _ in range(min(rng.choice((1, 1, 2, 3)), replies - made)):
            said, reply = _turn(made, rng)
            messages.append({"role": "user", "content": said})
            if isinstance(reply, str):
                messages.append({"role": "assistant", "content": reply})
            else:
                calls = [call | {"id": f"call_{made}_{number}"} for number, call in enumerate(reply)]
                messages.append({"role": "assistant", "content": None, "tool_calls": calls})
                messages += [{"role": "tool", "tool_call_id": call["id"], "content": '{"ok": true}'} for call in calls]
                messages.append({"role": "assistant", "content": "Done.", "weight": 0})
            made += 1
        while messages[-1]["role"] != "assistant" or messages[-1].get("weight") == 0:  # nothing is learned behind the last reply
            messages.pop()
            if messages[-1]["role"] == "assistant" and messages[-1].get("weight") != 0:
                break
        rows.append({"messages": messages, "tools": TOOLS, "parallel_tool_calls": True})
    return rows


def write_log(path: Path, replies: int, seed: int = 1) -> Path:
    """The log as a file of fine-tuning rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in conversations(replies, seed)), encoding="utf-8")
    return path
