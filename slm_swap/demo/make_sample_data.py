"""Make the raw sample that ships: rows in xLAM-60k's own format, its quirks included, over tools of our own.

    python demo/make_sample_data.py
    python demo/make_sample_data.py --rows 60000 --out /tmp/sample_60k.jsonl

Everything is generated (no row is copied from a data set) and seeded: the same arguments give the same bytes. Some gold is
wrong on purpose, as in real data: it writes out a default that nobody asked for, or holds another value than the request.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, next_step, positive, run
from slm_swap.common.reports import write_jsonl
from slm_swap.common.settings import PACKAGE, shown_path
from slm_swap.demo.language import Parameter, Speaker, Tool, draw_call

SEVERAL_ANSWERS = 0.10  # share of rows that need two calls
GOLD_NOISE = 0.03  # share of calls whose gold is wrong


def _tool(name: str, description: str, asks: str, *parameters: str) -> Tool:
    """A tool from one line: parameters as `name:concept`, with `?` where optional or `=default`."""
    made = []
    for text in parameters:
        head, _, default = text.partition("=")
        key, _, concept = head.rstrip("?").partition(":")
        made.append(Parameter(key, concept or key, "?" in head, json.loads(default) if default else None))
    return Tool(name, description, tuple(asks.split("|")), tuple(made))


TOOLS = (
    _tool("book_restaurant", "Reserve a table at a restaurant.", "book a table|reserve us dinner|get a restaurant table", "city", "date", "time:spoken_time", "people?"),
    _tool("get_forecast", "Weather forecast for a city and a day.", "check the weather|tell me the forecast|see if it will rain", "city", "date", 'units?="metric"'),
    _tool("convert_money", "Convert an amount between two currencies.", "convert money|change cash|work out the exchange", "amount", "base", "target"),
    _tool("send_email", "Send an e-mail message.", "send an e-mail|write|drop a line", "recipient:email", "body:message", "subject:title?"),
    _tool("search_flights", "Find flights between two cities.", "find flights|look for a plane|search airfares", "origin", "destination:goal", "date", 'cabin?="Y"'),
    _tool("book_hotel", "Book a hotel room.", "book a hotel|get a room|find us somewhere to sleep", "city", "check_in:date", "nights", "max_price:budget?"),
    _tool("create_event", "Put an event into the calendar.", "schedule a meeting|put an event in my calendar|set up an appointment", "title", "date", "start:spoken_time", "duration:spoken_minutes?=60"),
    _tool("translate_text", "Translate a text.", "translate a text|give me a translation|render a note", "text:message", "target_language:language"),
    _tool("order_groceries", "Order groceries for delivery.", "order groceries|buy food|get the shopping delivered", "items", "date?", "city"),
    _tool("track_parcel", "Where a parcel is.", "track my parcel|find out where the shipment is|locate a delivery", "parcel_id:code", "language?"),
    _tool("open_ticket", "Open a support ticket.", "open a ticket|report a problem|file a complaint", "summary:title", "priority=3", "customer:person?"),
    _tool("set_alarm", "Set an alarm.", "set an alarm|wake me|ring the bell", "time:spoken_time", "label:title?", "repeat?"),
    _tool("play_music", "Play music.", "play some music|put on a record|start a song", "title", "volume:percent?"),
    _tool("apply_discount", "Apply a discount to an order.", "apply a discount|take something off|reduce the bill", "order_id:code", "rate:fraction"),
    _tool("add_stock", "Add units of a product to the stock.", "add stock|book incoming goods|top up the inventory", "product_id:code", "quantity", "warehouse:city?"),
    _tool("buy_shirt", "Order a shirt.", "order a shirt|buy a t-shirt|get me a jersey", "size", "color", "quantity?=1"),
    _tool("find_jobs", "Search open positions.", "find jobs|look for open positions|search vacancies", "keywords:tags", "country", "limit?=10"),
    _tool("average", "Mean of a list of numbers.", "work out the average|compute the mean|find the middle value", "numbers", "digits:quantity?"),
    _tool("export_report", "Export a report to a file.", "export the report|download the figures|save the summary", "report_id:code", 'format?="pdf"'),
    _tool("transfer_funds", "Send money to a person.", "transfer money|wire funds|pay", "amount", "currency", "payee:person"),
    _tool("rent_car", "Rent a car.", "rent a car|hire a vehicle|get wheels", "city", "pickup:date", "dropoff:until", "seats:people?"),
    _tool("find_recipes", "Recipes that use the given ingredients.", "find recipes|suggest a dish|tell me what to cook", "ingredients:items", "minutes:spoken_minutes?", "limit?=5"),
    _tool("register_user", "Create a user account.", "register a user|create an account|sign up a customer", "name:person", "email", "country?"),
    _tool("cancel_order", "Cancel an order.", "cancel an order|stop a purchase|call off a sale", "order_id:code", "reason:message?"),
    _tool("call_taxi", "Send a taxi.", "call a taxi|send a cab|get me a ride", "pickup:origin", "dropoff:goal", "time:spoken_time?"),
    _tool("post_update", "Publish a post.", "publish a post|share an update|announce something", "text:message", "tags?", "language?"),
    _tool("set_thermostat", "Set the temperature of a room.", "set the thermostat|heat the house|adjust the temperature", "value:number", "units", "until:spoken_time?"),
    _tool("lookup_holidays", "Public holidays of a country.", "list the public holidays|look up bank holidays|tell me the days off", "country", "language?"),
    _tool("create_invoice", "Write an invoice.", "create an invoice|bill a client|write an invoice", "client:person", "amount", "currency", "due:until?"),
    _tool("search_products", "Search the catalogue.", "search the catalogue|look for products|browse the shop", "query:title", "max_price:budget?", 'sort:order?="newest"', "color?"),
    _tool("plan_route", "Plan a route.", "plan a route|find the way|map a trip", "start:origin", "end:goal", "stops:tags?"),
    _tool("invite_people", "Invite people to an event.", "invite people|send out invitations|ask colleagues", "event:title", "guests:team", "date?"),
    _tool("add_reminder", "Remember something.", "remind me|add a reminder|make a note", "note:message", "date", "priority?=3"),
    _tool("shorten_link", "Make a short link.", "shorten a link|make a short url|compress an address", "url:link", "alias:title?", "days:quantity?"),
    _tool("get_stock_price", "Price of a share.", "get the share price|quote a stock|see how a share is doing", "symbol:code", "currency?"),
    _tool("calculate_tax", "Tax on an amount.", "calculate the tax|work out VAT|see what the tax office takes", "amount", "country", "rate:fraction?"),
    _tool("reserve_seats", "Reserve seats at a show.", "reserve seats|get tickets|book places", "show:title", "date", "seats:people", "section:color?"),
    _tool("log_workout", "Write down a workout.", "log a workout|record my training|note down my exercise", "kind:title", "duration:spoken_minutes", "date?"),
    _tool("send_sms", "Send a text message.", "send a text|text someone|message a number", "phone", "message", "priority?=3"),
    _tool("start_backup", "Start a backup.", "start a backup|save a copy|run the nightly copy", "server_id:code", "repeat?", 'format?="xml"'),
    _tool("book_train", "Book a train journey.", "book a train|get a rail ticket|go by rail", "origin", "destination:goal", "date", "time:spoken_time?", 'cabin?="Y"'),
    _tool("find_doctor", "Find a doctor.", "find a doctor|look for a physician|get medical help", "city", "language?", "date?"),
    _tool("assign_task", "Assign a task to a person.", "assign a task|hand over work|delegate", "assignee:person", "task:title", "due:until?", "priority?=3"),
    _tool("order_pizza", "Order pizzas.", "order pizza|get pizzas|have a pizza brought", "size", "toppings:items", "quantity?=1"),
    _tool("news_search", "Search the news.", "search the news|find headlines|look up press coverage", "topic:title", "country?", "language?", "limit?=10"),
    _tool("set_budget", "Set a spending limit.", "set a budget|cap spending|limit my expenses", "category:title", "amount", "currency?", "until?"),
    _tool("ship_package", "Ship a package.", "ship a package|send a box|post a parcel", "destination:country", "weight:number", "contents:items?"),
    _tool("measure_distance", "Distance between two cities.", "measure the distance|see how far it is|compute the kilometers", "start:origin", "end:goal", "units?"),
)  # fmt: skip

# Other tools that look alike are the hard part of choosing one: neighbours share parameters.
NEIGHBOURS = {
    tool.name: [
        other
        for other in TOOLS
        if other is not tool and {p.concept for p in other.parameters} & {p.concept for p in tool.parameters}
    ]
    for tool in TOOLS
}


def draw_row(rng: Speaker, number: int) -> dict:
    """One row as xLAM-60k has it: `answers` and `tools` are JSON inside strings."""
    tools = [rng.choice(TOOLS)]
    if rng.random() < SEVERAL_ANSWERS:
        tools.append(rng.choice([tool for tool in TOOLS if tool is not tools[0]]))
    calls = [draw_call(rng, tool, noise=GOLD_NOISE) for tool in tools]
    query = calls[0][0] if len(calls) == 1 else f"{calls[0][0].rstrip('.!')}, and then {calls[1][0][0].lower()}{calls[1][0][1:]}"
    for _ in range(rng.choice((0, 1, 1)) if len(tools) == 1 else 1):
        others = [tool for tool in (NEIGHBOURS[tools[0].name] if rng.random() < 0.5 else TOOLS) if tool not in tools]
        tools.append(rng.choice(others))
    return {
        "id": number,
        "query": query,
        "answers": json.dumps([call for _, call in calls]),
        "tools": json.dumps([tool.to_xlam() for tool in tools]),
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--rows", type=positive, default=2000, help="how many rows")
    parser.add_argument("--out", type=Path, default=PACKAGE / "02_dataset/sample/xlam_sample.jsonl", help="the file to write")
    parser.add_seed()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rng = Speaker(str(args.seed))
    write_jsonl(args.out, (draw_row(rng, number) for number in range(args.rows)))
    print(f"{args.rows} rows over {len(TOOLS)} tools: {shown_path(args.out)}")
    next_step(f"python 02_dataset/prepare_data.py --source xlam --dataset-path {shown_path(args.out)}")
    return 0


if __name__ == "__main__":
    run(main)
