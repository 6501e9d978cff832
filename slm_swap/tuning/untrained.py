"""Tokens that a base model never learned to write, though its chat template ends replies with one of them.

Pretraining touches the output head's row of a token that never occurs only by pushing it away, together with those of all other unused
tokens: these rows end up in one place, and the frozen head cannot tell such a token from the thousands of its like. LoRA alone then
teaches a model whole replies that go on with odd tokens.

A token counts as untrained where both hold:

- Its row lies within NEAR of the unused rows' middle, in units of the median distance of ordinary tokens from there. The middle is that
  of at least FEWEST tokens whose names say that they are unused, or that no text gives, half of which lie within NEAR themselves. With
  fewer of them, or where they lie as far apart as ordinary tokens (random weights, an untied head that was never pushed), nothing is said.
- Where a reply of the training rows has the token next, the model prefers some unused token to it, or gives both the same logit. An
  instruct checkpoint that learned its end does not, however near the row still lies.

Gemma 3 270M (base, tied head, 6,242 <unusedN> of which a third are in use) in these units: unused tokens 0.015 (median), its
<end_of_turn> 0.12, its <start_of_turn> 0.31, ordinary tokens 0.64 (the nearest 1%; 0.4% are tokens that never occurred), <eos> 1.35. At the
end of a reply 4,116 or more of the 4,134 unused tokens near the middle have a higher logit than <end_of_turn>, in each of 8 rows; <eos>
is 25 nats above it. Rows that are all equal, zero included (reserved tokens, rows beyond the tokenizer), are 0 apart, and so is the end.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from slm_swap.clients.endings import reply_ends, require_ending
from slm_swap.common.errors import UserError

# <unused7>, <|unused_7|>, <|reserved_special_token_7|>, <|reserved_200013|>, <|extra_7|>, <|placeholder7|>, [control_7], <SPECIAL_7>, ...
UNUSED = re.compile(
    r"[<\[]\W?(unused|reserved|reserved_special_token|extra|extra_id|placeholder|place.holder.no|dummy|control|special|empty|pad)\W?_?\d+\W?[>\]]", re.IGNORECASE
)
FEWEST = 8
NEAR = 0.25
ORDINARY = 4096  # ordinary tokens that are looked at
ROWS = 8  # training rows that the model is shown for each token
UNTRAINED = "this base model never learned to write a token that its replies need"
INSTEAD = "use an instruct checkpoint"


def unused_tokens(tokenizer: Any, size: int) -> list[int]:
    """The tokens of a head of `size` rows whose names say that they are unused, and those that no text gives."""
    known = tokenizer.get_vocab()
    named = {token for text, token in known.items() if UNUSED.fullmatch(text)}
    return sorted(token for token in named | (set(range(size)) - set(known.values())) if token < size)


def untrained_tokens(model: Any, tokenizer: Any, rows: Sequence[dict[str, list[int]]]) -> dict[int, int | None]:
    """The special and added tokens in the replies of `rows` ({"input_ids", "labels"}) that `model` never learned to write.

    Each with the token whose row its own may begin with: for what ends a reply the end of a text, where that was learned; else None.
    The model is asked only where a row of its head lies among the unused ones.
    """
    weight = model.get_output_embeddings().weight
    own = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    unused = unused_tokens(tokenizer, len(weight))
    taught = sorted((own & {token for row in rows for token in row["labels"]}) - set(unused))
    near, like = near_unused(weight, taught, unused)
    untrained = [token for token in near if not prefers(model, token, like, rows)]
    if not untrained:
        return {}
    ends = [token for token in sorted(reply_ends(tokenizer, model.generation_config.eos_token_id)) if token < len(weight)]
    learned = set(ends) - set(near_unused(weight, ends, unused)[0])
    ending = require_ending(tokenizer).id
    return {token: min(learned, default=None) if token == ending else None for token in untrained}


def near_unused(weight: Any, tokens: Sequence[int], unused: Sequence[int]) -> tuple[list[int], list[int]]:
    """Those of `tokens` and of `unused` whose rows of `weight` (vocabulary, size) lie near the unused rows' middle; none where they have none."""
    import torch

    if len(unused) < FEWEST:
        return [], []
    middle = _rows(weight, unused).median(0).values

    def distances(of: Sequence[int]) -> Any:
        return (_rows(weight, of) - middle).norm(dim=1)

    ordinary = torch.ones(len(weight), dtype=torch.bool)
    ordinary[list(unused)] = False
    ordinary = ordinary.nonzero().flatten()
    ordinary = ordinary[:: -(-len(ordinary) // ORDINARY)].tolist()
    if not ordinary:
        return [], []
    limit = NEAR * distances(ordinary).median()
    like = [token for token, distance in zip(unused, distances(unused), strict=True) if distance <= limit]
    if 2 * len(like) < len(unused):
        return [], []
    return [token for token, distance in zip(tokens, distances(tokens), strict=True) if distance <= limit], like


def prefers(model: Any, token: int, others: Sequence[int], rows: Sequence[dict[str, list[int]]]) -> bool:
    """Whether, in most of the first rows whose reply has `token`, the model gives it there a higher logit than all of `others`."""
    import torch

    found = [row for row in rows if token in row["labels"]][:ROWS]
    training, won = model.training, 0
    model.eval()
    try:
        for row in found:
            before = row["input_ids"][: row["labels"].index(token)]
            with torch.no_grad():
                ids = torch.tensor([before], device=model.device)
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            won += int(logits[token] > logits[list(others)].max())
    finally:
        model.train(training)
    return 2 * won > len(found)


def _rows(weight: Any, tokens: Sequence[int]) -> Any:
    import torch

    return weight.detach()[torch.tensor(list(tokens), dtype=torch.long, device=weight.device)].float()


def token_indices(model: Any, tokens: Iterable[int]) -> dict[str, list[int]] | None:
    """What LoraConfig's `trainable_token_indices` is to be, so that the head's rows of `tokens` are trained; None for no tokens.

    With tied weights the embedding is named, and PEFT ties the head to it; else the head alone is: only what is written was never learned.

    Raises:
        UserError: the head has a bias, which PEFT would leave out.
    """
    tokens = list(tokens)
    if not tokens:
        return None
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError(f"{UNTRAINED}, and its output head has a bias, with which PEFT does not train it: {INSTEAD}")
    part = embeddings if head.weight is embeddings.weight else head
    return {next(name for name, module in model.named_modules() if module is part): tokens}


def start_rows(model: Any, tokens: dict[int, int | None]) -> None:
    """Give the trained rows of a PEFT model's head the values to begin with: the row of the token named for each, or the mean of all.

    Gemma 3 270M, 8 rows of training: the loss of the end is 31 nats with its own row, 19 with the mean, 5 with the row of <eos>. From there
    it needs no learning rate of its own: after an epoch of 80 rows at 2e-4, 28 of 32 replies end within 96 tokens; after one of 160 rows with
    the row frozen, none.

    Raises:
        UserError: PEFT has not made the head's rows trainable.
    """
    import torch

    adapter = getattr(model.get_base_model().get_output_embeddings(), "token_adapter", None)
    if adapter is None:
        raise UserError(f"{UNTRAINED}, and PEFT cannot train it there: {INSTEAD}")
    weight = adapter.base_layer.weight.detach()
    rows = [weight.mean(0, dtype=torch.float32) if source is None else weight[source].float() for source in tokens.values()]
    adapter.trainable_tokens_delta["default"].data = torch.stack(rows)  # in 32 bits: in 16, steps would be lost


def trained_tokens(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """What `training_info.json` says of a PEFT model's trained rows: [{"id", "token"}]."""
    told = model.peft_config["default"].trainable_token_indices or {}
    return [{"id": token, "token": tokenizer.convert_ids_to_tokens(token)} for token in sorted(set().union(*told.values()))]


def say_trained(model: Any, tokenizer: Any, say: Callable[[str], object]) -> None:
    """Say before training which tokens' rows are trained, where any are."""
    if told := trained_tokens(model, tokenizer):
        names = ", ".join(one["token"] for one in told)
        say(f"the base model never learned to write {names}: trained too, by PEFT's trainable_token_indices (merge_adapter.py for vLLM)")
