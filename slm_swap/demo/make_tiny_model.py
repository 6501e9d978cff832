"""Pretrain the embedded default model from scratch on generated text, reproducibly.

    python demo/make_tiny_model.py
    python demo/make_tiny_model.py --steps 20 --rows-per-step 8 --out /tmp/phi-tiny

The checkpoint has Phi-4-mini's architecture (Phi3ForCausalLM: grouped-query attention, partial rotary embedding, tied embeddings)
and its chat format, at a thousandth of its size. It learns to read requests on thousands of made-up tools; the tools of the sample
data, their wording and their conventions are not among them. On one GPU the defaults take minutes, on a CPU most of a day.
"""

import argparse
import json
import re
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, positive, run
from slm_swap.clients.loading import load_model, load_tokenizer
from slm_swap.common.reports import code_version, hardware, package_versions, read_json, sha256_file, write_json
from slm_swap.common.seeds import set_seed
from slm_swap.common.settings import PACKAGE, display_path
from slm_swap.demo.pretraining_rows import make_row

SOURCES = [Path(__file__).with_name(name) for name in ("make_tiny_model.py", "pretraining_rows.py", "language.py")]
VOCABULARY = 4096
SPECIAL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (  # Phi-4-mini's: tools are JSON text in the system message
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


def make_tokenizer(seed: int, rows: int):
    """A byte-level BPE trained on generated rows, with Phi-4-mini's chat format.

    Words, single digits and what stands between them are split first, so that a word has the same tokens in a request, in a
    schema and in a reply: a model this small can then copy it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\d|[^\p{L}\d]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for number in range(rows) for text in _texts(seed, -1 - number))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|endoftext|>",
        unk_token="<|endoftext|>", extra_special_tokens=list(SPECIAL[1:]), chat_template=CHAT_TEMPLATE, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _texts(seed: int, number: int) -> list[str]:
    row = make_row(seed, number)
    return [message["content"] for message in (*row.messages, *row.further)] + [row.completion]


class KnownWords(dict):
    """The token ids of words seen before: what `make_tokenizer` splits at is known without it, and most words come again and again.

    Whole texts by the tokenizer take most of a row's time, and workers that write rows too slowly leave a GPU waiting.
    """

    PARTS = re.compile(f"{'|'.join(map(re.escape, SPECIAL))}|[A-Za-z]+|[0-9]|(?:(?!{'|'.join(map(re.escape, SPECIAL))})[^A-Za-z0-9])+")
    MOST = 100_000  # made-up words never end

    def __init__(self, tokenizer):
        super().__init__()
        self.encode = partial(tokenizer.backend_tokenizer.encode, add_special_tokens=False)

    def __missing__(self, word: str) -> list[int]:
        if len(self) >= self.MOST:
            self.clear()
        found = self[word] = self.encode(word).ids
        return found

    def ids(self, text: str) -> list[int]:
        """The ids that the tokenizer gives the text."""
        if not text.isascii():  # other alphabets' letters are the tokenizer's to tell
            return self.encode(text).ids
        return [each for word in self.PARTS.findall(text) for each in self[word]]


class Steps:
    """The pretraining data as a map-style dataset of whole steps; step `number` is always the same.

    A step is a list of micro-batches (input ids, labels), int64 tensors of (rows, longest), rows of like length together and
    padded on the right. Only what is to be learned has labels; the prompts and the padding are -100.
    """

    def __init__(self, tokenizer, args: argparse.Namespace):
        self.tokenizer, self.args, self.known = tokenizer, args, KnownWords(tokenizer)

    def __len__(self) -> int:
        return self.args.steps

    def __getitem__(self, number: int) -> list[tuple]:
        first = (self.args.first_step + number) * self.args.rows_per_step
        rows = [list(make_row(self.args.seed, first + index).learned) for index in range(self.args.rows_per_step)]
        ids = self.known.ids
        tokens = sorted(([ids(text) for asked, reply in row for text in (self._asked(asked), reply + "<|end|>")] for row in rows), key=length)
        batches: list[list] = []
        for row in tokens:  # the longest one comes last and says how wide its micro-batch is
            if not batches or (len(batches[-1]) + 1) * length(row) > self.args.micro_tokens:
                batches.append([])
            batches[-1].append(row)
        return [pad_right(batch) for batch in batches]

    def _asked(self, messages: list[dict]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def length(row: list[list[int]]) -> int:
    return sum(map(len, row))


def pad_right(rows: list[list[list[int]]]) -> tuple:
    """Rows to one micro-batch; a row is asked, reply, asked, reply and so on, as token ids."""
    import torch

    shape = (len(rows), max(map(length, rows)))
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    for number, row in enumerate(rows):
        ids[number, : length(row)] = torch.tensor([token for part in row for token in part])
        end = 0
        for at, part in enumerate(row):
            start, end = end, end + len(part)
            if at % 2:
                labels[number, start:end] = torch.tensor(part)
    return ids, labels


def make_model(tokenizer, layers: int, intermediate: int):
    from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

    end, eos = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    config = Phi3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=4096, original_max_position_embeddings=4096, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        bos_token_id=eos, eos_token_id=eos, pad_token_id=eos,
    )  # fmt: skip
    model = Phi3ForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=eos, eos_token_id=[end, eos], pad_token_id=eos)
    return model


def completion_loss(model, ids, labels):
    """Sum of the cross-entropy over the tokens that have labels; logits are made for those alone.

    `labels` are on the CPU, so that a GPU need not be waited for to know which tokens these are. Padding on the right needs no
    attention mask: causal attention never looks there.
    """
    import torch

    wanted = labels[:, 1:]
    picked = (wanted != -100).flatten().nonzero().squeeze(1)
    targets = wanted.flatten()[picked]
    if ids.is_cuda:
        picked, targets = (each.pin_memory().to(ids.device, non_blocking=True) for each in (picked, targets))
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[picked]).float(), targets, reduction="sum")


def fuse_norms(model) -> None:
    """One kernel for each norm: a model this small is held up by what it writes to memory, not by products."""
    import torch
    from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm

    for norm in (module for module in model.modules() if isinstance(module, Phi3RMSNorm)):
        norm.forward = partial(torch.nn.functional.rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight, eps=norm.variance_epsilon)


def make_optimizers(model, args: argparse.Namespace) -> list:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for the rest."""
    import torch

    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is one for one in inner)]
    return [
        torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=others[0].is_cuda),
        torch.optim.Muon(inner, lr=args.muon_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]


def pretrain(model, tokenizer, args: argparse.Namespace) -> list[float]:
    """Warm-up and linear decay, loss on the replies only; gives the mean loss a token of every step."""
    import torch
    from tqdm import tqdm
    from transformers import get_linear_schedule_with_warmup

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    model.to(device).train()
    optimizers = make_optimizers(model, args)
    schedules = [get_linear_schedule_with_warmup(optimizer, min(200, args.steps // 10), args.steps) for optimizer in optimizers]
    fuse_norms(model)
    loader = torch.utils.data.DataLoader(
        Steps(tokenizer, args), batch_size=None, num_workers=args.workers, prefetch_factor=4 if args.workers else None
    )
    losses = []
    for step in (progress := tqdm(loader, desc="pretraining", mininterval=5, file=sys.stdout)):
        tokens, total = sum(int((labels != -100).sum()) for _, labels in step), 0.0
        for ids, labels in step:
            ids = ids.pin_memory().to(device, non_blocking=True) if device == "cuda" else ids
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                loss = completion_loss(model, ids, labels) / tokens
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append(total)
        if len(losses) % 100 == 0:
            progress.set_postfix(loss=f"{total.item():.4f}")
    return [loss.item() for loss in losses]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PACKAGE / "models/phi-tiny", help="the checkpoint's folder")
    parser.add_argument("--start-from", type=Path, metavar="DIR", help="go on from this checkpoint instead of from scratch")
    parser.add_argument("--steps", type=positive, default=3150, help="optimizer steps")
    parser.add_argument(
        "--first-step", type=int, default=0, help="number of the first step: with --start-from, rows not seen yet"
    )
    parser.add_argument("--rows-per-step", type=positive, default=256, help="rows in one step")
    parser.add_argument("--micro-tokens", type=positive, default=80_000, help="tokens at once, padding included: fewer where memory is short, 4000 on a CPU")
    parser.add_argument("--tokenizer-rows", type=positive, default=5_000, help="rows that the tokenizer learns from")
    parser.add_argument("--layers", type=positive, default=6, help="decoder layers")
    parser.add_argument("--intermediate", type=positive, default=512, help="width of the layers' inner part")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="highest learning rate of AdamW: embeddings and norms")
    parser.add_argument("--muon-rate", type=float, default=4e-3, help="highest learning rate of Muon: the layers' matrices")
    parser.add_argument("--workers", type=int, default=10, help="processes that write rows")
    parser.add_seed()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    import os

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS gives the same sums again only with a fixed workspace
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    set_seed(args.seed)
    history = []
    if args.start_from:
        tokenizer, model = load_tokenizer(args.start_from), load_model(args.start_from, "fp32", device_map=None)
        history = read_json(args.start_from / "training_info.json", "demo/make_tiny_model.py")["runs"]
    else:
        tokenizer = make_tokenizer(args.seed, args.tokenizer_rows)
        model = make_model(tokenizer, args.layers, args.intermediate)
    started = time.perf_counter()
    losses = pretrain(model, tokenizer, args)
    model.to("cpu", dtype=torch.bfloat16).eval()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    told = {
        "args": {name: value for name, value in vars(args).items() if name not in ("out", "start_from")},
        "start_from": sha256_file(args.start_from / "model.safetensors") if args.start_from else None,
        "loss": {str(step): round(losses[step - 1], 4) for step in sorted({1, args.steps // 4 or 1, args.steps // 2 or 1, args.steps})},
        "seconds": round(time.perf_counter() - started, 1),
        "code": code_version(), "sources": {path.name: sha256_file(path) for path in SOURCES}, "packages": package_versions(), "hardware": hardware(),
    }  # fmt: skip
    parameters = sum(parameter.numel() for parameter in model.parameters())
    what = "a tiny model pretrained on generated text; for demonstration and tests only"
    write_json(args.out / "training_info.json", {"what": what, "parameters": parameters, "runs": [*history, told]})
    print(json.dumps(told["loss"]), f"{parameters / 1e6:.1f} M parameters: {display_path(args.out)}")
    return 0


if __name__ == "__main__":
    run(main)
