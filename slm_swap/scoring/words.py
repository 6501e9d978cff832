"""The names that people read for metrics, errors, matchers and signals of confidence: on the console, in Markdown and on the page. JSON keeps the keys."""

METRICS = {  # a metric's name, and what it is the share of
    "json_valid_rate": ("Valid JSON", "replies that are one JSON value and nothing else"),
    "exact_match_rate": ("Fully right reply", "replies that equal the reference in every field"),
    "field_precision": ("Field precision", "the given fields that are right, averaged over rows"),
    "field_recall": ("Field recall", "the wanted fields that are given and right, averaged over rows"),
    "field_f1": ("Field F1", "precision and recall in one number (harmonic mean)"),
    "valid_call_rate": ("Well-formed call", "replies in the form that was asked for, whose calls can be read"),
    "decision_match_rate": ("Call or no call", "replies that call a tool exactly where a call is due"),
    "name_match_rate": ("Right tool", "replies that call the right tool"),
    "args_exact_rate": ("Fully right call", "replies with the right tool and every argument right"),
    "args_precision": ("Argument precision", "the given arguments that are right, averaged over rows"),
    "args_recall": ("Argument recall", "the wanted arguments that are given and right, averaged over rows"),
    "args_f1": ("Argument F1", "precision and recall in one number (harmonic mean)"),
}
ERROR_KINDS = {  # the kinds of the decision's gap, then the errors of single rows
    "format": "Wrong form",
    "calls": "Call or no call",
    "unwanted_call": "Unwanted call",
    "no_call": "No call",
    "missing_call": "Too few calls",
    "extra_call": "Too many calls",
    "wrong_tool": "Wrong tool",
    "missing": "Something missing",
    "extra": "Something too much",
    "type": "Wrong type",
    "value": "Wrong value",
    "truncated": "Cut off",
    "filtered": "Filtered or refused",
    "too_long": "Prompt too long",
    "prompt_too_long": "Prompt too long",
    "failed": "Request failed",
    "refused": "Refused",
    "no_json": "No JSON",
    "bad_json": "Broken JSON",
    "extra_text": "Other text around it",
    "wrong_shape": "Wrong shape",
    "missing_argument": "Missing argument",
    "extra_argument": "Extra argument",
    "wrong_type": "Wrong type of value",
    "wrong_value": "Wrong value in it",
}
MATCHERS = {
    "strict": ("Strict", "equal as JSON, in the exact form asked for: what the verdict goes by"),
    "schema": ("By schema", "types that the schema can convert and its defaults count as right"),
    "lenient": ("Lenient", "also other upper and lower case, white space and text around the reply"),
}
SIGNALS = {  # of a reply's confidence
    "min_logprob": ("Least sure token", "the smallest log-probability of a token of the values and the tool's name"),
    "sum_logprob": ("All tokens", "the sum of these log-probabilities"),
    "tool_logprob": ("Tool's name", "the log-probability of the tool's name"),
    "min_margin": ("Smallest margin", "between the most likely and the second token"),
    "parses": ("Parses", "the reply is JSON, or calls a tool on offer"),
    "keeps_schema": ("Keeps the schema", "it parses and keeps to the schema"),
}
POOLED = "_micro"  # how the names of means over all leaves end


def metric_name(metric: str) -> str:
    """A metric's name for people; one that is not known here keeps its own."""
    if metric.endswith(POOLED):
        return f"{metric_name(metric.removesuffix(POOLED))}, pooled"
    return METRICS.get(metric, (metric, ""))[0]


def level(error: float) -> str:
    """How sure one is of what is wrong in a share `error` (above 0) of all cases: `95%`, and never 100%."""
    return "over 99.99%" if error < 0.0001 else f"{100 * (1 - error):g}%"


def error_name(error: str) -> str:
    """An error's name for people, as it is written in the middle of a line."""
    name = ERROR_KINDS.get(error, error)
    return name if name[1:2].isupper() else name[0].lower() + name[1:]
