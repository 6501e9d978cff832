"""The rows on which every family is tried: both tracks, prompts of many lengths, made-up tools."""

from slm_swap.rows.examples import Example
from slm_swap.rows.lines import dump_json
from slm_swap.rows.prompts import SYSTEM_PROMPTS, structured_prompt, structured_schema, toolcall_completion, toolcall_prompt

_ASKED = {  # a tool's name: its one argument, and what is asked for
    "paint_wall": ("color", ["red", "light green", "Blau über Weiß"]),
    "open_door": ("room", ["kitchen", "the room at the end of the corridor", "garage 2"]),
    "play_song": ("title", ["Nine Million Bicycles", "Yesterday", "a song that everybody in the house knows by heart"]),
}
_REQUESTS = ["{}", "Do it: {}", "Please see to it that it is {} before the guests come at eight, and say nothing else"]


def _tool(name: str) -> dict:
    argument = _ASKED[name][0]
    properties = {argument: {"type": "string", "description": f"The {argument}."}}
    about = f"{name.replace('_', ' ').capitalize()}."
    return {"name": name, "description": about, "parameters": {"type": "object", "properties": properties, "required": [argument]}}


def _examples(track: str) -> list[Example]:
    tools, found = [_tool(name) for name in _ASKED], []
    for at, (name, (argument, values)) in enumerate(_ASKED.items()):
        for value, words in zip(values, _REQUESTS, strict=True):
            request, arguments = words.format(value), {argument: value}
            if track == "toolcall":
                prompt, completion = toolcall_prompt(tools[at : at + 1 + len(value) % 3], request), toolcall_completion(name, arguments)
            else:
                prompt, completion = structured_prompt(structured_schema(tools[at]), request), dump_json({"tool_name": name, "arguments": arguments})
            found.append(Example(prompt, completion, id=f"{name} {value}"))
    return found


ROWS = {track: _examples(track) for track in ("toolcall", "structured")}
TEXTS = [*SYSTEM_PROMPTS.values(), *(text for rows in ROWS.values() for row in rows for text in (row.prompt, row.completion))]
