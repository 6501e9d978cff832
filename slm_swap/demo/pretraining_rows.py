"""The rows that the tiny model is pretrained on: calls of made-up tools, each row drawn from its seed and number alone.

The tools of the sample, their wordings and their conventions are not among them. What a row may have: several tools that look alike, a
request that names the tool or only what it is about, values asked for by the parameter's kind, by its name or in words never heard,
and earlier requests with their calls as `--few-shot` shows them, which may follow a convention that only they tell. Further requests may
follow, each with its call: reading the tools once, a row teaches several calls.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from slm_swap.demo.language import CODED, CONCEPTS, NOT_ASKED, WORDS, Concept, Parameter, Speaker, Tool, Value, sentence
from slm_swap.demo.make_sample_data import TOOLS
from slm_swap.rows.examples import Example
from slm_swap.rows.lines import dump_json
from slm_swap.rows.prompts import (
    CONVERSATION_PROMPTS,
    Messages,
    build_messages,
    shot_turns,
    structured_prompt,
    structured_schema,
    toolcall_completion,
    toolcall_prompt,
)
from slm_swap.rows.toolschema import xlam_tool

VERBS = (
    "accept activate add archive arrange audit book build buy call cancel check clear close collect compare copy count "
    "create delete deliver detect draw edit enable estimate export fetch file fill filter find fix get grade import inspect "
    "join list load lock log look_up make merge move notify open order pack pay pick plan play post print publish pull "
    "queue rate read record rename rent repair report reserve reset run save scan schedule search sell send set share ship "
    "show sign sort start stop store submit suggest switch sync tag test track train transfer translate update upload "
    "verify view watch weigh write"
).split()
INVENTED = (0.2, 0.6, 0.9)  # share of names and words that exist only in their row, where they have to be copied
FRAMES = ("{a} {{}}", "{a} {b} {{}}")  # a value in words never heard
BY_NAME = ("with {name} {{}}", "{name} {{}}", "the {name} is {{}}", "{name}: {{}}", "{{}} as the {name}")
SHOTS = (1, 1, 2, 3, 5)
SHOWN = 0.2  # share of rows with shots
FURTHER = (0, 0, 1, 2, 3)  # requests behind the first one
MANY = 0.35  # share of the toolcall rows with many small tools: which tool is due is learned late, and a choice among these has little else to learn
MADE_UP = "made_up"  # the key of a concept that the shots of its row alone explain
SAMPLE_NAMES = frozenset(tool.name for tool in TOOLS)
SAMPLE_ASKS = frozenset(ask for tool in TOOLS for ask in tool.asks)

Concepts = Mapping[str, Concept]


class Row(NamedTuple):
    """A pretraining row: `shots` are the turns between the system text and the prompt, `further` those behind the completion."""

    track: str
    prompt: str
    completion: str
    shots: Messages
    further: Messages
    system: str

    @property
    def messages(self) -> Messages:
        """Up to the completion."""
        system, asked = build_messages(self.track, self.prompt)
        return [system | {"content": self.system}, *self.shots, asked]

    @property
    def learned(self) -> Iterator[tuple[Messages, str]]:
        """(turns, the reply to be learned behind them), one after the other."""
        yield self.messages, self.completion
        for asked, reply in zip(self.further[::2], self.further[1::2], strict=True):
            yield [asked], reply["content"]


def make_row(seed: int, number: int) -> Row:
    """The row `number`, for the same seed always the same."""
    rng = Speaker(f"{seed}:{number}")
    rng.invented = rng.choice(INVENTED)
    track = rng.choice(("structured", "toolcall"))
    shown = rng.choice(SHOTS) if rng.random() < SHOWN else 0
    many = track == "toolcall" and rng.random() < MANY
    count = rng.randint(4, 8) if many else rng.choice((1, 2, 2, 3)) if track == "toolcall" else 1
    tools, concepts = make_tools(rng, count, small=many), CONCEPTS
    codes: Iterator[Value] = iter(())
    if shown and rng.random() < 0.4:
        table = make_table(rng, min(shown, rng.choice((1, 2, 3))))
        codes = itertools.cycle(table)
        tools[0], concept = with_made_up(rng, tools[0], codes)
        concepts = CONCEPTS | {MADE_UP: concept}
    offered = [xlam_tool(to_xlam(tool, concepts)) for tool in tools]
    schema = structured_schema(offered[0])

    def called(tool: Tool, request: str, arguments: dict) -> Example:
        if track == "structured":
            return Example(structured_prompt(schema, request), dump_json({"tool_name": tool.name, "arguments": arguments}), request=request)
        return Example(toolcall_prompt(shuffled, request), toolcall_completion(tool.name, arguments), request=request)

    shuffled = rng.sample(offered, len(offered))
    def turns(count: int, same: float) -> Messages:
        made: Messages = []
        for at in range(count):
            tool = tools[0] if rng.random() < same else rng.choice(tools)
            made += shot_turns(track, called(tool, *ask_for(rng, tool, concepts)), native=False, number=at)
        return made

    shots = turns(shown, 1.0 if MADE_UP in concepts else 0.8)
    for _ in range(rng.randrange(shown) if MADE_UP in concepts else 0):
        next(codes)  # any of the shots may be the one that tells
    own = called(tools[0], *ask_for(rng, tools[0], concepts))
    system = (CONVERSATION_PROMPTS if rng.random() < 0.25 else SYSTEM)[track]
    further = turns(rng.randint(3, 7) if many else rng.choice(FURTHER), 0.0)
    return Row(track, own.prompt, own.completion, shots, further, system)


SYSTEM = {track: build_messages(track, "")[0]["content"] for track in CONVERSATION_PROMPTS}


# -- Tools -----------------------------------------------------------------------------------------------------------------------


def make_tools(rng: Speaker, count: int, small: bool = False) -> list[Tool]:
    """The tool that is due, and others: strangers, or ones that look like it. Only beside strangers may the request leave the tool unnamed.

    `small` tools have one parameter.
    """
    alike = count > 1 and rng.random() < 0.5
    tools = [make_tool(rng, alike or small, small)]
    while len(tools) < count:
        tool = make_tool(rng, small=small)
        if alike:
            first = tools[0].parameters
            kept = rng.sample(first, rng.randint(1, len(first)))
            taken = {parameter.name for parameter in kept}
            others = [parameter for parameter in tool.parameters if parameter.name not in taken]
            tool = replace(tool, parameters=tuple(required_first([*kept, *others[: 0 if small else rng.randint(0, 2)]])))
        if tool.name not in {other.name for other in tools} and not {*tool.asks} & {*tools[0].asks}:
            tools.append(tool)
    return tools


def make_tool(rng: Speaker, named: bool = True, small: bool = False) -> Tool:
    """A made-up tool: any verb, any noun, a few parameters of the general concepts. Not `named`: it may be asked for in other words."""
    while True:
        verb, noun, word = rng.word(VERBS), rng.word(WORDS), rng.word(WORDS)
        name = rng.choice(NAMES).format(verb=verb, noun=noun, word=word, Noun=noun.title(), number=rng.randint(1, 9))
        spoken = verb.replace("_", " ")
        description, asks = describe(rng, spoken, noun, word, named)
        if name not in SAMPLE_NAMES and not SAMPLE_ASKS & {*asks}:
            return Tool(name, description, asks, make_parameters(rng, small))


NAMES = ("{verb}_{noun}", "{verb}_{noun}", "{verb}_{noun}_{word}", "{verb}_{noun}_v{number}", "{noun}.{verb}", "{verb}{Noun}", "{noun}", "{noun}_{word}")


def describe(rng: Speaker, verb: str, noun: str, word: str, named: bool) -> tuple[str, tuple[str, ...]]:
    """A description, and how the tool is asked for: by the words of its name, of its description, or by others."""
    drawn = rng.random()
    if drawn < 0.5:
        return f"{verb.capitalize()} a {noun}.", (f"{verb} the {noun}", f"{verb} a {noun}", f"{verb} {noun}", f"{verb} my {noun}")
    if drawn < 0.8 or named:
        say, thing = rng.word(VERBS).replace("_", " "), rng.word(WORDS)
        text = rng.choice((f"{say.capitalize()} a {thing} at a {noun}.", f"{say.capitalize()} the {thing} of a {noun}.", f"{thing.capitalize()} of a {noun}."))
        return text, (f"{say} the {thing}", f"{say} a {thing}", f"get me a {thing}", f"{verb} the {thing}", f"{say} us a {noun}")
    others = rng.words(WORDS, 4)
    asks = (f"{others[0]} the {others[1]}", f"get {others[2]}", f"{others[3]}", f"see how the {others[1]} is {others[2]}")
    return f"{rng.word(WORDS).capitalize()} of a {noun}.", asks


def make_parameters(rng: Speaker, small: bool = False) -> tuple[Parameter, ...]:
    keys = rng.sample(PLAIN, 1 if small else rng.choice((1, 2, 2, 3, 3, 4)))
    if rng.random() < 0.5:
        keys[0] = rng.choice(CODED)
    if len(keys) > 1 and rng.random() < 0.3:  # where from and where to, first and last day: chance alone seldom puts them side by side
        keys[:2] = rng.sample(rng.choice(ALIKE), 2)
    found: list[Parameter] = []
    for key in dict.fromkeys(keys):
        concept = CONCEPTS[key]
        name = name_parameter(rng, rng.choice(concept.names))
        if name in {parameter.name for parameter in found}:
            continue
        optional = bool(found) and rng.random() < 0.45
        default = concept.draw(rng)[1] if optional and concept.type in ("str", "int") and rng.random() < 0.5 else None
        found.append(Parameter(name, key, optional, default))
    return tuple(found)


PLAIN = tuple(key for key, concept in CONCEPTS.items() if not concept.convention and key not in CODED)


def name_parameter(rng: Speaker, known: str) -> str:
    word = rng.word(WORDS)
    return rng.choice((known, known, known, f"{known}_{word}", f"{word}_{known}", word, f"{word}_id"))


def required_first(parameters: list[Parameter]) -> list[Parameter]:
    """In order, but the first one is not optional: a request asks for something."""
    at = next((at for at, parameter in enumerate(parameters) if not parameter.optional), None)
    if at is None:
        return [replace(parameters[0], optional=False, default=None), *parameters[1:]]
    return [parameters[at], *parameters[:at], *parameters[at + 1 :]]


def to_xlam(tool: Tool, concepts: Concepts) -> dict:
    """As `Tool.to_xlam`, with a concept of this row."""
    if concepts is CONCEPTS:
        return tool.to_xlam()
    known = replace(tool, parameters=tuple(p for p in tool.parameters if p.concept != MADE_UP)).to_xlam()
    concept = concepts[MADE_UP]
    own = {p.name: {"description": f"{concept.description}.", "type": concept.type} for p in tool.parameters if p.concept == MADE_UP}
    return known | {"parameters": {p.name: (known["parameters"] | own)[p.name] for p in tool.parameters}}


# -- A convention that only shots tell ---------------------------------------------------------------------------------------------


def make_table(rng: Speaker, count: int) -> list[Value]:
    """Words and what a call has for each: a part of the word, a word, or letters that nobody could guess."""
    form, first = rng.choice(("head", "upper", "letters", "number", "word")), rng.randint(1, 9)
    codes = {
        "head": lambda word, at: word[:2],
        "upper": lambda word, at: word[:2].upper(),
        "letters": lambda word, at: "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=2)),
        "number": lambda word, at: first + at,
        "word": lambda word, at: rng.word(WORDS),
    }
    return [(rng.choice((word, word.title())), codes[form](word, at)) for at, word in enumerate(rng.words(WORDS, count))]


def with_made_up(rng: Speaker, tool: Tool, codes: Iterator[Value]) -> tuple[Tool, Concept]:
    """The tool with a parameter whose values the codes are, one after the other."""
    first = next(codes)
    codes_again = itertools.chain([first], codes)
    noun = rng.word(WORDS)
    kind = "int" if isinstance(first[1], int) else "str"
    phrases = (f"in {noun} {{}}", "in {}", "for {}", "with {}")
    concept = Concept(kind, f"The {noun}", lambda _: next(codes_again), phrases, (noun,), general=4)
    kept = [p for p in tool.parameters if p.name != noun][:3]
    at = rng.randint(0, len(kept))
    return replace(tool, parameters=(*kept[:at], Parameter(noun, MADE_UP), *kept[at:])), concept


# -- Requests ----------------------------------------------------------------------------------------------------------------------


def ask_for(rng: Speaker, tool: Tool, concepts: Concepts) -> tuple[str, dict]:
    """One request for a tool and the arguments that answer it."""
    arguments, phrases = {}, []
    kinds = [kind_of(parameter.concept) for parameter in tool.parameters]
    wordings = [concepts[parameter.concept].phrases for parameter in tool.parameters]
    for parameter, kind, wording in zip(tool.parameters, kinds, wordings, strict=True):
        if parameter.optional and rng.random() < NOT_ASKED:
            continue
        concept, drawn = concepts[parameter.concept], rng.random()
        said, arguments[parameter.name] = concept.draw(rng)
        if drawn < 0.15 or wordings.count(wording) > 1:  # only its name tells it from another one
            frame = rng.choice(BY_NAME).format(name=parameter.name.replace("_", " "))
        elif drawn < 0.75 or kinds.count(kind) > 1:
            frame = rng.choice(concept.phrases[: concept.general])
        else:
            frame = rng.choice(FRAMES).format(a=rng.word(WORDS), b=rng.word(WORDS))
        phrases.append(frame.format(said))
    return sentence(rng, rng.choice(tool.asks), phrases), arguments


SAME_KIND = {
    "origin": "city", "goal": "city", "until": "date", "spoken_time": "time", "spoken_minutes": "minutes", "fraction": "percent", "tags": "items",
    "base": "currency", "target": "currency", "nights": "number", "people": "number", "quantity": "number", "limit": "number",
    "amount": "number", "budget": "number",
}  # fmt: skip


def kind_of(key: str) -> str:
    """What tells a value's parameter from others where the wording does not: concepts of one kind have values that look alike."""
    bare = key.removesuffix("_word").removesuffix("_code")
    return SAME_KIND.get(bare, bare)


ALIKE = [keys for kind in sorted({*SAME_KIND.values()}) if len(keys := [key for key in (*PLAIN, *CODED) if kind_of(key) == kind]) > 1]
