"use strict";
// The table of rows. Texts come from models and data sets: they are only ever set as text, never as HTML.
(() => {
  const PAGE = 50;
  const RIGHT = { both: "Both right", azure: "Only hosted right", slm: "Only small right", neither: "Neither right" };
  const MARKS = { reference: "Reference may be wrong", broken: "Right before fine-tuning, wrong now", mended: "Wrong before fine-tuning, right now" };
  const WHOM = { both: "Sent to both models", azure: "Sent to the hosted model", slm: "Sent to the small model", row: "The row (how it was asked is not known)" };
  const { rows, texts } = JSON.parse(document.getElementById("data").textContent);
  const browser = document.getElementById("browser");
  const [right, error, group, mark, text] = ["right", "error", "group", "mark", "text"].map((name) => document.getElementById(`filter-${name}`));
  const [body, count, previous, next] = ["body", "count", "previous", "next"].map((name) => document.getElementById(name));
  const number = new Intl.NumberFormat("en");
  let found = rows;
  let first = 0;

  const whoWasRight = (row) => (row.azure.right ? (row.slm.right ? "both" : "azure") : row.slm.right ? "slm" : "neither");
  const errorsOf = (row) => [...new Set([row.azure.error, row.slm.error])].filter((name) => name !== null);
  const plain = (name) => name.replaceAll("_", " ");

  function element(name, properties = {}, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }

  // Names may break where their parts meet.
  const breakable = (name) => name.split(/(?<=[_./-])/).flatMap((part, at) => (at ? [document.createElement("wbr"), part] : [part]));

  // A select with how many rows each of its values has: those with names first, then the others by the alphabet.
  function fill(select, valuesOf, names, all) {
    const counts = new Map();
    for (const row of rows) for (const value of valuesOf(row)) counts.set(value, (counts.get(value) ?? 0) + 1);
    select.append(element("option", { value: "", textContent: all }));
    const others = [...counts.keys()].filter((value) => !Object.hasOwn(names, value)).sort();
    for (const value of [...Object.keys(names), ...others].filter((value) => counts.has(value))) {
      const name = Object.hasOwn(names, value) ? names[value] : value;
      select.append(element("option", { value: `=${value}`, textContent: `${name} (${number.format(counts.get(value))})` }));
    }
    return counts.size > 0;
  }

  // Both texts can be put together from a difference: parts in both, only in the reference, only in the reply, and so on.
  const side = (diff, left_out) => diff.filter((_, at) => at % 3 !== left_out).join("");
  const told = (part) => (typeof part === "number" ? texts[part] : part);
  // What all rows share, such as tools, is left out: every row would be found by it.
  const own = (row) => (row.sent ?? []).flatMap(([, parts]) => parts.map(([, part]) => part)).filter((part) => typeof part === "string");
  function textOf(row) {
    const texts = () => [row.id, row.group, ...own(row), side(row.azure.diff, 2), side(row.azure.diff, 1), side(row.slm.diff, 1)];
    return (row.searched ??= texts().join("\n").toLowerCase());
  }

  function search() {
    const wanted = text.value.toLowerCase();
    found = rows.filter(
      (row) =>
        (!right.value || right.value === `=${whoWasRight(row)}`) &&
        (!error.value || errorsOf(row).some((name) => error.value === `=${name}`)) &&
        (!group.value || group.value === `=${row.group}`) &&
        (!mark.value || row.marks.some((name) => mark.value === `=${name}`)) &&
        (!wanted || textOf(row).includes(wanted)),
    );
    first = 0;
    show();
    remember(null);
  }

  // The filters and the row that is open stand in the address: `#right=azure&row=row-17`.
  const FILTERS = { right, error, group, mark, text };
  function remember(id) {
    const given = Object.entries(FILTERS).filter(([, filter]) => filter.value).map(([name, filter]) => [name, filter.value.replace(filter === text ? "" : /^=/, "")]);
    const query = new URLSearchParams([...given, ...(id === null ? [] : [["row", id]])]).toString();
    history.replaceState(null, "", query ? `#${query}` : "#rows");
  }

  function recall() {
    if (!location.hash.includes("=")) return;
    const query = new URLSearchParams(location.hash.slice(1));
    for (const [name, filter] of Object.entries(FILTERS)) filter.value = query.has(name) ? (filter === text ? "" : "=") + query.get(name) : "";
    const wanted = query.get("row");
    search();
    const at = found.findIndex((row) => row.id === wanted);
    if (wanted !== null && at < 0) count.textContent += ` The row ${wanted} of the address is not among them.`;
    if (at >= 0) {
      first = at - (at % PAGE);
      show();
      body.children[at - first].querySelector("button").click();
    }
    (at >= 0 ? body.children[at - first] : browser).scrollIntoView();
  }

  function copyButton(label, textOf) {
    const button = element("button", { type: "button", className: "copy", textContent: label });
    copies(button, textOf);
    return button;
  }

  function copies(button, textOf) {
    const label = button.textContent;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(textOf());
        button.textContent = "Copied";
      } catch {
        button.textContent = "Copying is not allowed here";
      }
      setTimeout(() => (button.textContent = label), 2000);
    });
  }

  // A line of the download: what was sent, wanted and answered, as the page shows it.
  function exported(row) {
    const { id, group, request, marks } = row;
    const sent = row.sent?.map(([whom, parts]) => ({ to: whom, parts: parts.map(([title, part]) => ({ title, text: told(part) })) }));
    const [hosted, small] = [row.azure, row.slm].map(({ diff, ...rest }) => ({ reply: side(diff, 1), ...rest }));
    return JSON.stringify({ id, group, request, sent, reference: side(row.azure.diff, 2), hosted, small, marks });
  }

  function show() {
    const shown = found.slice(first, first + PAGE);
    body.replaceChildren(...shown.map(rowElement));
    const [from, to, all] = [first + 1, first + shown.length, found.length].map((at) => number.format(at));
    const range = shown.length ? `Rows ${from} to ${to} of ${all}` : "No row fits these filters";
    count.textContent = found.length < rows.length ? `${range} (${number.format(rows.length)} in all).` : `${range}.`;
    previous.disabled = first === 0;
    next.disabled = first + PAGE >= found.length;
  }

  function rowElement(row, at) {
    const button = element("button", { type: "button" }, "Show", element("span", { className: "hidden", textContent: ` row ${row.id}` }));
    button.setAttribute("aria-expanded", "false");
    const line = element(
      "tr", {},
      element("th", { scope: "row" }, ...["id", "group"].map((name) => element("bdi", { className: name }, ...breakable(row[name]))), ...(row.request ? [element("bdi", { className: "request", textContent: row.request })] : [])),
      outcome(row.azure), outcome(row.slm), element("td", {}, button),
    );
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") === "false";
      button.setAttribute("aria-expanded", String(open));
      button.firstChild.data = open ? "Hide" : "Show";
      remember(open ? row.id : null);
      line.classList.toggle("open", open);
      if (open) {
        const detail = details(row, `detail-${at}`);
        button.setAttribute("aria-controls", detail.id);
        line.after(detail);
      } else {
        line.nextSibling.remove();
        button.removeAttribute("aria-controls");
      }
    });
    return line;
  }

  function outcome(side) {
    return element("td", { className: side.right ? "right" : "wrong", textContent: side.right ? "✓ right" : `✗ ${plain(side.error ?? "not exact")}` });
  }

  function details(row, id) {
    const cell = element("td", { colSpan: 4 });
    const part = (title, ...content) => element("div", {}, element("h3", { textContent: title }), ...content);
    const note = (text) => element("p", { className: "note", textContent: text });
    const gone = browser.dataset.prompts === "yes" ? "Not in the dataset." : "Not stored: the dataset is not where it was, or has changed.";
    cell.append(element("p", { className: "copies" }, copyButton("Copy row as JSON", () => exported(row)), " ", copyButton("Copy link to this row", () => location.href)));
    for (const [whom, parts] of row.sent ?? [["row", []]]) cell.append(part(WHOM[whom], ...(row.sent ? parts.flatMap(shared) : [note(gone)])));
    cell.append(part("Reference", element("pre", { textContent: side(row.azure.diff, 2) })));
    const sides = element("div", { className: "sides" });
    for (const [name, title] of [["azure", "Hosted"], ["slm", "Small"]]) {
      const content = [element("pre", {}, ...marked(row[name].diff))];
      if (row[name].ended) content.unshift(note(`Ended by: ${row[name].ended}`));
      if (row[name].right && row[name].diff.length > 1) content.unshift(note("Equal as JSON: order of keys and spacing do not count."));
      if (!side(row[name].diff, 1)) content.unshift(note("The reply is empty."));
      content.unshift(note(spent(row[name])));
      sides.append(part(`${title}: ${browser.dataset[name]}${row[name].right ? "" : `, ${plain(row[name].error ?? "not exact")}`}`, ...content));
    }
    cell.append(sides);
    return element("tr", { className: "detail", id }, cell);
  }

  // A part that was sent: one that many rows share is folded.
  function shared([title, part]) {
    if (typeof part === "string") return [element("p", { className: "note", textContent: title }), element("pre", { textContent: part })];
    return [element("details", {}, element("summary", { textContent: title }), element("pre", { textContent: texts[part] }))];
  }

  function spent({ input_tokens, output_tokens, seconds, load }) {
    const amount = (tokens) => (tokens === undefined ? "?" : number.format(tokens));
    const tokens = (input_tokens ?? output_tokens) === undefined ? "tokens not known" : `tokens: ${amount(input_tokens)} in, ${amount(output_tokens)} out`;
    const time = seconds === undefined ? "time not known" : seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${number.format(seconds)} s`;
    return `${tokens}; ${time}${load === undefined ? "" : load === 1 ? ", asked alone" : `, ${load} at a time`}`;
  }

  function marked(diff) {
    return diff.map((part, at) => (at % 3 && part ? element(at % 3 === 1 ? "del" : "ins", { textContent: part }) : part));
  }

  fill(right, (row) => [whoWasRight(row)], RIGHT, "Any");
  fill(error, errorsOf, {}, "Any");
  fill(group, (row) => [row.group], { "": "(none)" }, "Any");
  if (!fill(mark, (row) => row.marks, MARKS, "Any")) document.getElementById("marks").hidden = true;
  for (const option of error.options) option.textContent = plain(option.textContent);
  for (const select of [right, error, group, mark]) select.addEventListener("change", search);
  let waiting;
  text.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(search, 150);
  });
  document.getElementById("clear").addEventListener("click", () => {
    for (const filter of [right, error, group, mark, text]) filter.value = "";
    search();
  });
  previous.addEventListener("click", () => turn(-PAGE));
  next.addEventListener("click", () => turn(PAGE));
  function turn(by) {
    first += by;
    show();
    if (previous.disabled || next.disabled) (previous.disabled ? next : previous).focus(); // a disabled button loses the focus
    document.getElementById("table").scrollIntoView();
  }
  copies(document.getElementById("copy"), () => location.href);
  document.getElementById("download").addEventListener("click", () => {
    const address = URL.createObjectURL(new Blob([...found.map((row) => `${exported(row)}\n`)], { type: "application/jsonl" }));
    element("a", { href: address, download: "rows.jsonl" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  });
  window.addEventListener("hashchange", recall);
  browser.hidden = false;
  show();
  recall();
})();
