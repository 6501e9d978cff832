"""What the tests of training share: a few rows, and hyperparameters that are quick with the embedded model."""

import json

from slm_swap.common.settings import PACKAGE
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import structured_prompt, structured_schema
from slm_swap.tuning.hyperparameters import Hyperparameters

BASE = PACKAGE / "models/phi-tiny"
MATRICES = 4 * json.loads((BASE / "config.json").read_text())["num_hidden_layers"]  # matrices of its layers
QUICK = Hyperparameters(
    precision="fp32", batch_size=4, gradient_accumulation=1, epochs=4, learning_rate=5e-3, gradient_checkpointing=False
)
TOOL = {
    "name": "paint_wall",
    "description": "Paint a wall.",
    "parameters": {
        "type": "object",
        "properties": {"color": {"type": "string", "description": "The color."}},
        "required": ["color"],
    },
}


def example(color: str, completion: str | None = None) -> Example:
    """A made-up convention that the base cannot know: whatever is asked for, walls are painted white."""
    gold = completion or '{"tool_name":"paint_wall","arguments":{"color":"white"}}'
    return Example(prompt=structured_prompt(structured_schema(TOOL), f"Paint the wall in {color}"), completion=gold, id=color)


ROWS = [example(color) for color in ("red", "blue", "green", "black", "white", "gray", "brown", "pink")]
INPUTS = {"train": {"path": "rows.jsonl", "sha256": "0" * 64, "rows": len(ROWS)}}
