"""The embedded model without what it learned of one token: as a base model that never saw the end of its chat template."""

import shutil
from pathlib import Path

from slm_swap.common.settings import PACKAGE

BASE = PACKAGE / "models/phi-tiny"
END = 4  # <|end|>
UNUSED = 32  # rows beyond the tokenizer


def untaught_end(folder: Path, tied: bool = True, learned: bool = False, spread: float = 0.01, unused: int = UNUSED) -> Path:
    """The embedded model with `unused` rows more than its tokenizer has tokens, all in one place, and there its end token's row too.

    Untied, the embedding keeps its end token's row; `learned` leaves that of the head, too, as it is. `spread` is how far the rows lie
    from their middle, in units of their own length.
    """
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(BASE, folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    weight = model.get_input_embeddings().weight.detach()
    middle = -weight.mean(0)
    rows = middle + spread * middle.norm() * torch.nn.functional.normalize(torch.randn(unused + 1, len(middle)), dim=1)
    head = torch.cat([weight, rows[1:]])
    if not learned:
        head[END] = rows[0]
    model.config.vocab_size, model.config.tie_word_embeddings = len(head), tied
    made = type(model)(model.config)
    state = model.state_dict() | {"lm_head.weight": head, "model.embed_tokens.weight": head if tied else torch.cat([weight, rows[1:]])}
    made.load_state_dict(state)
    made.generation_config = model.generation_config
    made.save_pretrained(folder)
    return folder
