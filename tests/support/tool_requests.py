"""Requests for two tools as the embedded tiny model understands them: as messages, alone and in a batch of different lengths."""

from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import Request, request_of, text_request, toolcall_prompt

CITY = {"city": {"type": "string", "description": "The city."}}
DATE = {"date": {"type": "string", "description": "The date as YYYY-MM-DD."}}
TOOLS = [
    {
        "name": "check_weather",
        "description": "Check a weather.",
        "parameters": {"type": "object", "properties": CITY, "required": ["city"]},
    },
    {
        "name": "open_calendar",
        "description": "Open a calendar.",
        "parameters": {"type": "object", "properties": DATE, "required": ["date"]},
    },
]
REQUESTS = (
    "Check the weather in Oslo",
    "Open the calendar on 3 May 2026, please",
    "Check weather for Lima",
    "Hi, open my calendar for June 9, 2027",
)


def ask(request: str, tools: int = 2) -> Request:
    return text_request("toolcall", toolcall_prompt(TOOLS[:tools], request))


BATCH = [ask(request, 1 + index % 2) for index, request in enumerate(REQUESTS * 2)]
GRAMMAR_ROWS = [  # whose replies a grammar describes, of two sets of tools
    request_of("toolcall", Example(toolcall_prompt(TOOLS[:tools], text), "", id=text, tools=TOOLS[:tools]))
    for text in ("Check the weather in Oslo", "Something else", "Open it on 3 May 2026", "42", "Check weather for Lima")
    for tools in (1, 2)
]
