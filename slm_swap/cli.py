"""What the stage scripts share: flags that mean the same everywhere, and errors in one line."""

from slm_swap.common.interrupts import INTERRUPTED, end_in_one_line

end_in_one_line()  # scripts import this module first, and what they import takes a moment

import argparse
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from slm_swap.clients.engines import CONSTRAINTS, ENGINES, PRECISIONS, STARTS
from slm_swap.clients.thinking import THINKING
from slm_swap.common.errors import UserError
from slm_swap.common.os_errors import ELSEWHERE, mendable
from slm_swap.common.reports import code_version, sha256_file
from slm_swap.common.secrets import hide_in_tracebacks
from slm_swap.common.settings import PACKAGE, Settings, display_path, find_path, load_launch, load_settings, real_path, shown_path
from slm_swap.common.temporary import remove_leftovers
from slm_swap.evaluating.journal import elsewhere
from slm_swap.evaluating.recipe import FLAGS, read_recipe
from slm_swap.rows.examples import Dataset, Example
from slm_swap.rows.few_shot import FewShot
from slm_swap.rows.prompts import ASKS
from slm_swap.scoring.tracks import TRACKS
from slm_swap.tracing.runs import Tracing

SHOTS = 3  # rows that are shown with --few-shot
CONCURRENCY = 32
LOCAL = ("engine", "engine_start", "batch_size", "precision", "adapter", "thinking", "trust_remote_code")  # flags of the local model alone
MAX_NEW_TOKENS, MAX_WITH_THINKING = 256, 4096  # of a reply, where --max-new-tokens is not given


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults, takes no abbreviations and says what is wrong in one line."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        if load_launch().local_rank:
            sys.exit(2)  # the first process of the machine says it
        self.exit(2, f"{self.prog}: {' '.join(message.split())}: see {self.prog} --help\n")

    def parse_args(self, argv: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """As of argparse; a recipe's flags stand as if they had been given.

        Raises:
            UserError: as `read_recipe`.
        """
        args = super().parse_args(argv, namespace)
        if getattr(args, "recipe", None):
            self._take_recipe(args, sys.argv[1:] if argv is None else argv)
        if getattr(args, "shots", None) and not args.few_shot:
            self.error("--shots needs --few-shot FILE: the rows that are shown")
        if getattr(args, "max_new_tokens", 0) is None:
            args.max_new_tokens = MAX_WITH_THINKING if args.thinking == "on" else MAX_NEW_TOKENS
        return args

    def _take_recipe(self, args: argparse.Namespace, argv: Sequence[str]) -> None:
        recipe, given = read_recipe(args.recipe, args.track), {str(word).partition("=")[0] for word in argv}
        known = [name for name in self.of_recipe if hasattr(args, name)]
        for name in (*known, "model"):
            if (flag := f"--{name.replace('_', '-')}") in given:
                self.error(f"{flag} is a part of the recipe: leave it out, or leave --recipe out")
        vars(args).update({name: recipe.flags[name] for name in known if name in recipe.flags}, model=recipe.model)

    def add_recipe(self, flags: Sequence[str] = FLAGS) -> None:
        """Take `flags`, some of recipe.FLAGS, from a recipe."""
        self.of_recipe = flags
        self.add_argument("--recipe", metavar="FILE", help="how the small model is asked and run: a recipe.json of 04_ft/improve.py")

    def add_track(self) -> None:
        self.add_argument("--track", required=True, choices=TRACKS, help="the task")

    def add_seed(self) -> None:
        self.add_argument("--seed", type=int, default=42, help="seed of everything random")

    def add_rows(self) -> None:
        """Which rows: a split of the track, or any file."""
        rows = self.add_mutually_exclusive_group()
        rows.add_argument("--split", help="the rows of 02_dataset/<track>/<split>.jsonl (default: test)")
        rows.add_argument("--dataset", metavar="FILE", help="rows from this file instead of a split")
        self.add_argument("--limit", type=positive, metavar="N", help="only the first N rows")

    def add_ask(self) -> None:
        """How rows are asked: see prompts.request_of."""
        self.add_argument("--ask", choices=ASKS, help="how rows are asked (default: conversations native, others text)")
        self.add_argument("--few-shot", metavar="FILE", help="put the most similar rows of this file, with their replies, in front of each row: give a train split")
        self.add_argument("--shots", type=positive, metavar="K", help=f"how many rows --few-shot puts in front (default: {SHOTS})")

    def add_tracing(self) -> None:
        """How a run is traced: see tracing.runs.Tracing."""
        tracing = self.add_argument_group("Langfuse")
        tracing.add_argument("--session", metavar="NAME", help="the Langfuse session that groups this run with others (default: SLM_SWAP_SESSION)")
        tracing.add_argument("--langfuse-optional", action="store_true", help="run even if Langfuse cannot be reached, and send the trace later")
        tracing.add_argument("--no-trace-content", action="store_true", help="send metrics and hashes, but neither prompts nor replies")

    def add_client(self, replay: bool = True) -> None:
        """How a model is run: see factory.make_client."""
        self.add_argument("--engine", choices=ENGINES, default="auto", help="auto: vllm if it can run, else transformers")
        self.add_argument(
            "--engine-start", choices=STARTS, default="auto", help="vllm: eager starts faster, graphs runs faster; auto: the one that ends sooner"
        )
        self.add_argument("--batch-size", type=batch_size, default=8, help="transformers: rows in one batch, or auto: as many as fit")
        precisions = dict.fromkeys(precision for known in PRECISIONS.values() for precision in known)
        defaults = ", ".join(f"{known[0]} for {engine}" for engine, known in PRECISIONS.items())
        self.add_argument("--precision", choices=precisions, help=f"weights of the local model (default: {defaults})")
        self.add_argument("--adapter", metavar="DIR", help="LoRA adapter for the local model")
        self.add_argument("--thinking", choices=THINKING, help="ask the small model to think before it replies (default: off, if its chat template can switch it)")
        constrains = "decode replies under the grammar of the reply form; retry: only if a free reply is not of that form"
        self.add_argument("--constrain", choices=CONSTRAINTS, default="off", help=constrains)
        limits = f"longest reply in tokens, thinking included (default: {MAX_NEW_TOKENS}; with --thinking on {MAX_WITH_THINKING})"
        self.add_argument("--max-new-tokens", type=positive, help=limits)
        self.add_argument("--concurrency", type=positive, default=CONCURRENCY, help="rows sent to the hosted model at the same time")
        if replay:
            self.add_argument("--replies", metavar="FILE", help="recorded replies, for --model-kind replay")
        self.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it stands; defaults only where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or default is False or default == [] or action.required:
            return action.help
        if isinstance(default, list | tuple | Path):
            shown = default if isinstance(default, Path) else ",".join(map(str, default)) if action.nargs is None else " ".join(map(str, default))
            inside = isinstance(default, Path) and default.is_relative_to(PACKAGE)
            shown = str(default.relative_to(PACKAGE) if inside else shown).replace("%", "%%")
            return f"{action.help} (default: {shown})" if shown else action.help
        return super()._get_help_string(action) if default != "" else action.help


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def batch_size(text: str) -> int | str:
    """`positive`, or "auto"."""
    return text if text == "auto" else positive(text)


def not_negative(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return number


def minutes(text: str) -> float:
    """A number of at least 0 that is not infinite, for argparse."""
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return number


def positive_number(text: str) -> float:
    """A number above 0 that is not infinite, for argparse."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def share(text: str) -> float:
    """A number from 0 to 1, or 0% to 100%, for argparse."""
    number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def find_rows(args: argparse.Namespace, kinds: Sequence[str]) -> tuple[Dataset, dict[str, Any], str]:
    """The rows that `--dataset` or `--split` name: (rows, the report's inputs, a name for the report).

    A replay without either takes the rows that the file of replies itself holds.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    ask = getattr(args, "ask", None)
    own = "replay" in kinds and args.replies and not args.dataset and not args.split
    split = PACKAGE / "02_dataset" / args.track / f"{args.split or 'test'}.jsonl"
    path = find_path(args.replies if own else args.dataset or split)
    if not os.path.lexists(path):
        advice = "check --replies" if own else "make them with 02_dataset/prepare_data.py or pass --dataset FILE"
        raise UserError(f"no {'replies' if own else 'rows'} at {shown_path(path)}: {advice}")
    if own:
        from slm_swap.clients.replay_client import rows_of_replies

        dataset = Dataset(path, args.limit, rows_of_replies, ask)
    else:
        dataset = Dataset(path, args.limit, ask=ask, few_shot=few_shot_of(args))
    return dataset, {"path": display_path(path), "sha256": sha256_file(path)}, path.stem


def load_rows(args: argparse.Namespace, kinds: Sequence[str]) -> tuple[list[Example], dict[str, Any], str]:
    """As `find_rows`, with all rows in memory.

    Raises:
        UserError: the file is missing, empty or has a bad line.
    """
    dataset, inputs, name = find_rows(args, kinds)
    rows = list(dataset)
    warn_of_unknown_fields(dataset)
    return rows, inputs | few_shot_report(dataset.few_shot), name


def few_shot_of(args: argparse.Namespace) -> FewShot | None:
    """The index that `--few-shot` names.

    Raises:
        UserError: its file is missing or cannot be read.
    """
    return FewShot(find_path(args.few_shot), args.track, args.shots or SHOTS) if getattr(args, "few_shot", None) else None


def few_shot_report(few_shot: FewShot | None) -> dict[str, Any]:
    """What `inputs` says of the shots, once each row has been given its own; rows that have none are told."""
    if few_shot is None:
        return {}
    told = few_shot.report()
    if alone := few_shot.shown[0]:
        warn(f"{alone} of {few_shot.shown.total()} rows have no row like them in {told['path']}: they are asked without one")
    return {"few_shot": told}


def client_options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `Parser.add_client` as options of `factory.make_client`."""
    local = ("model", "engine", "engine_start", "precision", "adapter", "max_new_tokens", "batch_size", "trust_remote_code", "thinking", "constrain")
    options = {name: getattr(args, name) for name in (*local, "replies", "concurrency") if getattr(args, name, None) is not None}
    return options | ({"replies": find_path(args.replies)} if options.get("replies") else {})


def require_own_model(parser: Parser, args: argparse.Namespace, kinds: Sequence[str], used: Sequence[str] = ()) -> None:
    """Refuse --constrain where no model of ours is asked: a hosted one or recorded replies cannot be decoded under a grammar. Other flags of
    the local model that are given there have no effect, except for those `used`; a warning names them."""
    if "slm" in kinds:
        return
    if args.constrain != "off":
        parser.error(f"--constrain needs --model-kind slm: the replies of {', '.join(kinds)} are not decoded here")
    if idle := [f"--{name.replace('_', '-')}" for name in LOCAL if name not in used and getattr(args, name, None) != parser.get_default(name)]:
        warn(f"no effect: {', '.join(idle)} (for the local model, and {', '.join(kinds)} is asked): leave it out, or give --model-kind slm")


def check_out(*outs: Path, inputs: Sequence[str | Path | None] = (), advice: str | None = None) -> None:
    """Notice before the work starts that its results cannot be written, or would overwrite what they are made from; what a killed
    process left of writing them goes. The first of them is what --out names; `advice` is what to do where they go by another flag.

    Raises:
        UserError: a place is a folder, a pipe or a device, lies below a file or in a folder that may not be written, or is one of the inputs.
    """
    sources = {real_path(find_path(path)) for path in inputs if path is not None}
    for out in outs:
        folder = next(parent for parent in out.absolute().parents if parent.exists())
        if (out.exists() and not out.is_file()) or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"cannot write {shown_path(out)}: {advice or elsewhere(outs[0])}")
        if real_path(out) in sources:
            raise UserError(f"{shown_path(out)} is read and would be overwritten: {advice or ELSEWHERE}")
        remove_leftovers(out)


def tracing_options(args: argparse.Namespace, settings: Settings) -> Tracing:
    """The flags of `Parser.add_tracing` as options of `tracing.runs.trace_run`."""
    return Tracing(args.langfuse_optional, not args.no_trace_content, args.session or settings.session)


def run_metadata(args: argparse.Namespace) -> dict[str, Any]:
    """What a trace says of a run: the flags that have an effect there, as JSON values, and the code that it ran."""
    kinds = getattr(args, "models", None) or [getattr(args, "model_kind", "slm")]
    idle = () if "slm" in kinds else LOCAL
    flags = {name: _json_value(value) for name, value in vars(args).items() if value is not None and name not in idle}
    return flags | {"commit": code_version()["commit"] or ""}


def _json_value(value: Any) -> Any:
    if isinstance(value, Path):
        return display_path(value)
    if isinstance(value, list | tuple):
        return [_json_value(one) for one in value]
    return value if isinstance(value, bool | int | float | str) else str(value)


def quieten(rank: int) -> None:
    """Keep packages from talking of their own accord: all but errors where this is not rank 0, and progress where nobody looks."""
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    if rank or not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"


def warn_of_unknown_fields(dataset: Dataset) -> None:
    """Name the fields that nothing reads: perhaps a slip that loses a system text or a list of acceptable values."""
    if dataset.unknown:
        told = ", ".join(f"{name} ({count} rows)" for name, count in dataset.unknown.most_common(5))
        warn(f"fields that nothing reads: {told}")


def next_step(*commands: str, stream: TextIO | None = None) -> None:
    """What to do next, one command a line: the end of a script's output, or on `stream` where standard output is the result itself."""
    for command in commands:
        print(f"next: {command}", file=stream, flush=True)


def warn(message: str) -> None:
    """One line to standard error."""
    print(f"warning: {message}", file=sys.stderr)


def run(main: Callable[[], int], launched: bool = False) -> NoReturn:
    """Run a script's `main` and leave: the user's mistake is one line and exit 2, and so is an error of the operating system that they
    can correct; a bug keeps its traceback. Where nobody reads standard output any more (`| head`), it ends as other commands do.

    `launched` scripts can be started as several processes; of those, the first one of a machine speaks for all.
    """
    launch = load_launch()
    hide_in_tracebacks(lambda: load_settings().secrets)
    try:
        if launch.world > 1 and not launched:
            raise UserError("this script is one process: start it with python, not with accelerate launch or torchrun")
        code = main()
        sys.stdout.flush()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(128 + signal.SIGPIPE)
        told = error if isinstance(error, UserError) else mendable(error)
        if told is None:
            raise
        if launch.local_rank == 0:
            print(f"error: {' '.join(str(told).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        if launch.local_rank == 0:
            print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    gc.freeze()  # or the interpreter's last collection visits all that torch and transformers have made, for most of a second
    sys.exit(code)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone; then the interpreter's end does not try it again."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
