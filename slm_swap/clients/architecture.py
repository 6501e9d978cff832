"""What a checkpoint's configuration says of its text decoder, also where that is a part of a larger one."""

from typing import Any


def text_config(config: Any) -> Any:
    """The text decoder's part of a transformers configuration: of Gemma 3 of 4B and more, Qwen3.5 or Mistral 3 it is `text_config`."""
    return config.get_text_config(decoder=True)
