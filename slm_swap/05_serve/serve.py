"""Serve: an endpoint of chat completions in front of the hosted model, which lets the small model answer what it was measured to answer.

    python 05_serve/serve.py --track toolcall --mode shadow --cascade 03_compare/cascade_toolcall.json
    python 05_serve/serve.py --track toolcall --mode cascade --cascade 03_compare/cascade_toolcall.json --workers 2 --audit-share 0.02

An application changes only its base URL, to http://127.0.0.1:8080/v1 (OpenAI) or http://127.0.0.1:8080 (Azure). `hosted`: the hosted model
answers everything. `shadow`: the same, and the small model answers beside it for comparison. `cascade`: the small model answers what cascade.json
allows, the hosted model everything else. `local`: the small model answers everything that it can. Requests that the small model was not measured
on go to the hosted model unchanged. The header x-slm-swap says who answered and why.
"""

import argparse
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import (
    Parser,
    client_options,
    few_shot_of,
    next_step,
    not_negative,
    positive,
    positive_number,
    run,
    share,
    tracing_options,
)
from slm_swap.clients.endpoint import is_loopback
from slm_swap.clients.pricing import load_prices
from slm_swap.clients.protocol import Client
from slm_swap.common.errors import UserError
from slm_swap.common.reports import sha256_file
from slm_swap.common.settings import Settings, find_path, load_settings, shown_path
from slm_swap.evaluating.recipe import read_recipe
from slm_swap.serving import state
from slm_swap.serving.options import MODES, Options, read_keys
from slm_swap.serving.processes import serve
from slm_swap.tracing.runs import connect
from slm_swap.verdict.cascade import Cascade, read_cascade

SEED = 42  # that of evaluations: greedy decoding draws nothing, and a served model is sent it


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    parser.add_track()
    add("--mode", choices=MODES, default="shadow", help="who answers")
    add("--cascade", metavar="FILE", help="the calibrated rule of 03_compare/calibrate.py; --mode cascade needs it")
    add("--host", default="127.0.0.1", help="address to listen on; any other than loopback needs keys")
    add("--port", type=not_negative, default=8080, help="0 is any free port")
    add("--workers", type=positive, default=1, metavar="N", help="processes that speak HTTP; all share one small model")
    add("--state", type=Path, default=state.STATE, metavar="DIR", help="folder of the flag, the audits and the minutes")
    add("--keys", type=Path, metavar="FILE", help="the clients' keys, one a line, besides those of SLM_SWAP_KEYS")
    add("--deadline", type=positive_number, default=10.0, metavar="SECONDS", help="longest wait for the small model before the hosted model is asked")
    add("--queue", type=positive, default=64, metavar="N", help="most requests that wait for the small model; further ones go to the hosted model")
    add("--timeout", type=positive_number, default=600.0, metavar="SECONDS", help="longest silence of the hosted model")
    add("--max-body", type=positive, default=16 * 2**20, metavar="BYTES", help="largest body of a request")
    add("--max-prompt-tokens", type=positive, default=4096, metavar="N", help="vllm: longest prompt of the small model")
    add("--audit-share", type=share, default=0.02, metavar="P", help="share of local answers for which the hosted model is asked too, 0..1")
    add("--audit-budget", type=positive_number, metavar="MONEY", help="most money a day for audits, by prices.toml")
    add("--no-audit-content", action="store_true", help="keep no request and no reply in audits.jsonl")
    add("--log-content", action="store_true", help="print requests and replies to standard error")
    add("--json-in-prompt", action="store_true", help="structured: all requests ask for JSON, also those without response_format")
    parser.add_ask()
    parser.add_client(replay=False)
    parser.add_recipe()
    parser.add_tracing()
    args = parser.parse_args(argv)
    if args.mode == "cascade" and not args.cascade:
        parser.error("--mode cascade needs --cascade FILE: make it with 03_compare/calibrate.py")
    return args


def read_rule(args: argparse.Namespace) -> Cascade | None:
    """
    Raises:
        UserError: the file is no cascade of this track, or is of another recipe than --recipe.
    """
    if not args.cascade:
        return None
    cascade = read_cascade(find_path(args.cascade))
    if cascade.track != args.track:
        raise UserError(f"{args.cascade} is of track {cascade.track}, not {args.track}: name the cascade of this track")
    recipe = cascade.told.get("recipe") or {}
    wanted, given = recipe.get("sha256"), sha256_file(find_path(args.recipe)) if args.recipe else None
    if wanted != given:
        named = f"pass --recipe {recipe['path']}" if recipe else "leave --recipe out"
        raise UserError(f"{args.cascade} was calibrated with another recipe than this: {named}, or calibrate again")
    return cascade


def make_small(settings: Settings, args: argparse.Namespace) -> Client:
    """The small model, in its own process.

    Raises:
        UserError: as of the clients.
    """
    from slm_swap.clients.engines import Workload

    options = client_options(args)
    options.pop("concurrency", None)
    if settings.slm_base_url:
        from slm_swap.clients.served_client import ServedClient, refuse_local_options

        refuse_local_options(options)
        return ServedClient(settings, args.max_new_tokens, SEED, args.queue, args.thinking, timeout=args.deadline, max_retries=0)
    from slm_swap.common.seeds import set_seed
    from slm_swap.rows.prompts import Request
    from slm_swap.slm_client import SLMClient

    set_seed(SEED)
    workload = Workload(10**9, args.max_prompt_tokens + args.max_new_tokens)
    client = SLMClient(settings, workload=workload, apart=True, **options)
    client.generate([Request([{"role": "user", "content": "Hello."}])])  # the first request would wait for what is made once
    return client


def listen(host: str, port: int) -> socket.socket:
    """
    Raises:
        UserError: the address cannot be listened on.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # The protocol is named, as asyncio sets TCP_NODELAY only where it is: else a kept connection waits 40 ms for each second packet's acknowledgement.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host} port {port} ({getattr(error, 'strerror', None) or error}): choose another --port or --host") from None
    listener.listen(2048)
    return listener


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    settings = load_settings()
    keys = read_keys(settings, args.keys)
    if not keys and not is_loopback(args.host):
        raise UserError(f"--host {args.host} is open to others: give clients keys by SLM_SWAP_KEYS or --keys FILE")
    prices = load_prices(settings.prices_file)
    if args.audit_budget is not None and prices.deployment(settings.azure_deployment or "").input is None:
        raise UserError(f'--audit-budget needs the hosted model\'s prices: write them under [hosted."{settings.azure_deployment}"] in {prices.path}')
    options: dict[str, Any] = {name: getattr(args, name) for name in ("mode", "track", "ask", "constrain", "max_new_tokens", "deadline", "queue", "timeout")}
    options |= {name: getattr(args, name) for name in ("max_body", "audit_share", "audit_budget", "log_content", "workers")}
    made = Options(
        settings, state=args.state, cascade=read_rule(args), recipe=read_recipe(args.recipe, args.track) if args.recipe else None,
        few_shot=few_shot_of(args) if args.mode != "hosted" else None,
        keys=keys, prices=prices, audit_content=not args.no_audit_content, plain_json=args.json_in_prompt, tracing=tracing_options(args, settings), **options,
    )  # fmt: skip
    if made.small and made.recipe:
        made.recipe.check_place(settings)
    if made.mode != "local" or settings.azure_endpoint:
        from slm_swap.serving.hosted import Hosted

        Hosted(settings, made.timeout)  # a set-up that is wrong is told now
    connect(settings, made.tracing)
    state_flag = "" if args.state == state.STATE else f" --state {shown_path(args.state)}"

    def up(listener: socket.socket) -> None:
        host, port = listener.getsockname()[:2]
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1 ({made.mode})", flush=True)
        if made.small:
            next_step(f"python 05_serve/watch.py{state_flag}")

    code = serve(made, partial(listen, args.host, args.port), partial(make_small, settings, args) if made.small else None, up)
    if code == 0:
        print(f"stopped; what was counted and audited is in {shown_path(args.state)}")
        if made.small:
            next_step(f"python 05_serve/watch.py --once{state_flag}")
    return code


if __name__ == "__main__":
    run(main)
