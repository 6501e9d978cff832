"""Write the conversations of an invented shop's bot in each form in which teams keep theirs.

    python tests/data/make_forms.py

Everything is invented. SHOP has six conversations with eleven replies: six with one call, one with two calls, four without a call.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent


def _tool(name: str, description: str, **properties: dict) -> dict:
    required = [key for key, schema in properties.items() if not schema.pop("optional", False)]
    return {"name": name, "description": description, "parameters": {"type": "object", "properties": properties, "required": required}}


def tools() -> list[dict]:
    text, number = {"type": "string"}, {"type": "integer"}
    return [
        _tool("order_status", "Where an order is.", order_id=dict(text)),
        _tool("find_product", "Search the shop.", words=dict(text), limit=number | {"optional": True}),
        _tool("add_to_basket", "Put a product into the basket.", product_id=dict(text), count=dict(number)),
        _tool("shop_hours", "When the shop is open."),
    ]


SYSTEM = "You are the bot of the Blue Door shop. Be brief. Never promise a date."


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


def calls(*made: tuple[str, dict]) -> dict:
    return {"role": "assistant", "calls": [{"name": name, "arguments": arguments} for name, arguments in made]}


def result(text: str) -> dict:
    return {"role": "tool", "content": text}


SHOP = [  # in an order in which no file's first row is the easy one
    [user("Where is my order A17?"), calls(("order_status", {"order_id": "A17"})), result('{"state": "sent"}'), says("A17 is on its way.")],
    [
        user("Please find a red lamp and tell me when the shop is open"),
        calls(("find_product", {"words": "red lamp"}), ("shop_hours", {})),
        result("P4 red lamp"),
        result("9 to 5"),
        says("We have P4, a red lamp. We are open from 9 to 5."),
        user("Two of them please"),
        calls(("add_to_basket", {"product_id": "P4", "count": 2})),
    ],
    [user("Do you like poems about the sea?"), says("I can only help with the shop.")],
    [
        user("Search for a blue chair"),
        calls(("find_product", {"words": "blue chair", "limit": 3})),
        result("P9 blue chair"),
        user("Put one into my basket"),
        calls(("add_to_basket", {"product_id": "P9", "count": 1})),
    ],
    [user("My parcel is late, can you look?"), says("Which order is it?"), user("It is order B2"), calls(("order_status", {"order_id": "B2"}))],
    [user("When does the shop open in the morning?"), calls(("shop_hours", {}))],
]


def openai(messages: list[dict]) -> list[dict]:
    """In OpenAI's form, each call with an id."""
    made, waiting, number = [], [], 0
    for message in messages:
        if "calls" in message:
            told = []
            for call in message["calls"]:
                number += 1
                waiting.append(f"call_{number}")
                function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
                told.append({"id": waiting[-1], "type": "function", "function": function})
            made.append({"role": "assistant", "content": None, "tool_calls": told})
        elif message["role"] == "tool":
            made.append({"role": "tool", "tool_call_id": waiting.pop(0), "content": message["content"]})
        else:
            made.append(message)
    return made


def anthropic(messages: list[dict]) -> list[dict]:
    made = []
    for message in openai(messages):
        if message.get("tool_calls"):
            blocks = [
                {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": json.loads(call["function"]["arguments"])}
                for call in message["tool_calls"]
            ]
            made.append({"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, *blocks]})
        elif message["role"] == "tool":
            block = {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": message["content"]}
            if made and made[-1]["role"] == "user" and isinstance(made[-1]["content"], list):
                made[-1]["content"].append(block)
            else:
                made.append({"role": "user", "content": [block]})
        else:
            made.append({"role": message["role"], "content": [{"type": "text", "text": message["content"]}]})
    return made


def sharegpt(messages: list[dict]) -> list[dict]:
    made = []
    for message in messages:
        if "calls" in message:
            value = message["calls"] if len(message["calls"]) > 1 else message["calls"][0]
            made.append({"from": "function_call", "value": json.dumps(value)})
        else:
            names = {"user": "human", "assistant": "gpt", "tool": "observation"}
            made.append({"from": names[message["role"]], "value": message["content"]})
    return made


HERMES = (
    "You are a function calling AI model. You are provided with function signatures within <tools></tools> XML tags. You may call one or "
    "more functions. Here are the available tools: <tools> {tools} </tools> For each function call return a json object within "
    '<tool_call></tool_call> tags as follows:\n<tool_call>\n{{"name": <function-name>, "arguments": <args-dict>}}\n</tool_call>\n' + SYSTEM
)


def hermes(messages: list[dict]) -> list[dict]:
    listed = json.dumps([{"type": "function", "function": tool} for tool in tools()])
    made = [{"from": "system", "value": HERMES.format(tools=listed)}]
    for message in messages:
        if "calls" in message:
            value = "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in message["calls"])
            made.append({"from": "gpt", "value": f"<think>\nOne moment.\n</think>\n{value}"})
        elif message["role"] == "tool":
            block = f"<tool_response>\n{message['content']}\n</tool_response>"
            if made[-1]["from"] == "tool":
                made[-1]["value"] += f"\n{block}"
            else:
                made.append({"from": "tool", "value": block})
        else:
            made.append({"from": {"user": "human", "assistant": "gpt"}[message["role"]], "value": message["content"]})
    return made


def replies() -> Iterator[tuple[str, list[dict], dict]]:
    """(id, messages before it with the system text, the reply) for each reply, in OpenAI's form."""
    for number, messages in enumerate(SHOP):
        told = [{"role": "system", "content": SYSTEM}, *openai(messages)]
        for at, message in enumerate(told):
            if message["role"] == "assistant":
                yield f"c{number}-{at}", told[:at], message


def completion(reply: dict) -> dict:
    reason = "tool_calls" if reply.get("tool_calls") else "stop"
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [{"index": 0, "finish_reason": reason, "message": reply}]}


def forms() -> dict[str, list[dict]]:
    """Rows of each form, by file name."""
    nested = [{"type": "function", "function": tool} for tool in tools()]
    system = {"role": "system", "content": SYSTEM}
    chat = [{"messages": [system, *openai(messages)], "tools": nested, "parallel_tool_calls": True} for messages in SHOP]
    legacy = [{"messages": row["messages"], "functions": tools()} for row in chat]
    blocks = [{"name": tool["name"], "description": tool["description"], "input_schema": tool["parameters"]} for tool in tools()]
    told = list(replies())
    bodies = [(name, {"model": "gpt-4o", "messages": messages, "tools": nested}, reply) for name, messages, reply in told]
    observations = [
        {
            "id": f"o-{name}", "traceId": f"t-{name}", "sessionId": name.partition("-")[0], "type": "GENERATION", "name": "bot", "level": "DEFAULT",
            "startTime": f"2026-03-0{number % 9 + 1}T10:00:00.000Z", "model": "gpt-4o", "modelParameters": {"temperature": "0"}, "metadata": {},
            "input": {"messages": body["messages"], "tools": nested}, "output": reply,
        }
        for number, (name, body, reply) in enumerate(bodies)
    ]  # fmt: skip
    return {
        "openai_chat.jsonl": chat,
        "openai_functions.jsonl": legacy,
        "anthropic.jsonl": [{"system": SYSTEM, "tools": blocks, "messages": anthropic(messages)} for messages in SHOP],
        "trl_prompt_completion.jsonl": [
            {"prompt": messages, "completion": [reply], "tools": nested} for _, messages, reply in told
        ],
        "sharegpt.json": [{"conversations": sharegpt(messages), "system": SYSTEM, "tools": json.dumps(tools())} for messages in SHOP],
        "hermes.jsonl": [{"id": f"h{number}", "conversations": hermes(messages)} for number, messages in enumerate(SHOP)],
        "tau.json": [
            {"task_id": number, "trial": 0, "reward": 1.0, "info": {"tools": nested}, "traj": [system, *openai(messages)]}
            for number, messages in enumerate(SHOP)
        ],
        "stored_completions.jsonl": [completion(reply) | body | {"id": name} for name, body, reply in bodies],
        "batch_input.jsonl": [
            {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body} for name, body, _ in bodies
        ],
        "batch_output.jsonl": [
            {"id": f"b-{name}", "custom_id": name, "error": None, "response": {"status_code": 200, "body": completion(reply)}}
            for name, _, reply in bodies
        ],
        "requests.jsonl": [{"request": body, "response": completion(reply)} for _, body, reply in bodies],
        "langfuse_observations.jsonl": [
            row | {"input": json.dumps(row["input"]), "output": json.dumps(row["output"])} for row in observations
        ],
        "langfuse_observations.json": observations,
        "langfuse_observations.csv": observations,
        "langfuse_items.jsonl": [
            {"id": f"i-{name}", "input": {"messages": body["messages"], "tools": nested}, "expectedOutput": reply, "metadata": None}
            for name, body, reply in bodies
        ],
        "extraction.jsonl": extraction(),
        "alpaca.json": [
            {"instruction": f"Name the places in: from {here} to {there}", "input": "", "output": {"from": here, "to": there}}
            for here, there in PLACES
        ],
        "rft.jsonl": [
            {"messages": [user(f"Name the places in: from {here} to {there}")], "reference_answer": {"from": here, "to": there}}
            for here, there in PLACES
        ],
    }  # fmt: skip


PLACES = [("Oslo", "Bergen"), ("Graz", "Wien"), ("Lyon", "Paris"), ("Porto", "Faro")]


def extraction() -> list[dict]:
    """Replies in JSON: by a schema, by json_object, without either, in a fence, and a list."""
    schema = {"type": "object", "properties": {"from": {"type": "string"}, "to": {"type": "string"}}, "required": ["from", "to"]}
    asked = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "trip", "schema": schema, "strict": True}}},
        {"response_format": {"type": "json_object"}},
        {},
        {},
    ]
    rows = []
    for number, ((here, there), more) in enumerate(zip(PLACES, asked, strict=True)):
        value = json.dumps([{"from": here, "to": there}] if number == 3 else {"from": here, "to": there})
        text = f"```json\n{value}\n```" if number == 2 else value
        rows.append({"messages": [user(f"Name the places in: from {here} to {there}"), says(text)]} | more)
    return rows


def content(name: str, rows: list[dict]) -> str:
    if name.endswith(".jsonl"):
        return "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".json"):
        return json.dumps(rows, indent=1) + "\n"
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()} for row in rows)
    return stream.getvalue()


if __name__ == "__main__":
    for name, rows in forms().items():
        (HERE / name).write_text(content(name, rows), encoding="utf-8", newline="")
