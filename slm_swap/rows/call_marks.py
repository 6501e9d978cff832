"""How models write calls where nobody reads them as such. Scoring takes such a text for a call, so a grammar keeps it out of answers in words.

The expressions are Python's, and mean at least as much to llguidance (`clients.grammar` says how).
"""

_SPACE = r"[\s\x1c-\x1f]"  # Python's \s, for both

# Chat formats' own marks, in capitals or not.
MARKS = (
    r"<\|?/?tool_calls?\b|<functioncall>|<\|tool_calls|<｜tool▁calls?|<function=|<function_calls?>|functools\s*\[|\[TOOL_CALLS\]|<\|python_tag\|>|<invoke\b|\bto=functions\."
).replace(r"\s", _SPACE)
# Python's form, alone in a text.
PYTHON_CALL = r"\s*\[?\s*[A-Za-z_][\w.]*\(\s*(?:[A-Za-z_][\w]*\s*=[^=](?s:.*))?\)\s*\]?\s*".replace(r"\s", _SPACE)
# JSON: both of them somewhere in a text.
NAME = r'"(?:name|tool|tool_name|function|function_name)"\s*:\s*["{]'.replace(r"\s", _SPACE)
ARGUMENTS = r'"(?:arguments|parameters|args|tool_input)"\s*:'.replace(r"\s", _SPACE)
