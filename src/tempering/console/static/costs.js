// What the painted temperatures cost, as it is measured; the budget; the demo's questions.

import { stream } from "./api.js";
import { at, calm, make } from "./dom.js";
import { isNeutral, short } from "./matrix.js";
import * as page from "./page.js";

/** @type {AbortController|null} */
let measuring = null;
/** @type {AbortController|null} */
let other = null;

/** @param {any} cost */
function interval(cost) {
  return cost.low === null ? "" : ` (95%: ${short(cost.low)} to ${short(cost.high)})`;
}

export function pause() {
  measuring?.abort();
  measuring = null;
}

async function measure() {
  pause();
  if (!at("meter").checked || page.shared.writing) return;
  const column = page.active();
  page.complain("cost-error");
  delete page.shared.results.cost;
  if (isNeutral(page.acting(column))) {
    at("cost").textContent = "0 nats/token";
    at("cost-facts").textContent = "every temperature is 1";
    return;
  }
  const mine = (measuring = new AbortController());
  at("cost").textContent = "measuring";
  at("cost-facts").textContent = "";
  try {
    for await (const event of stream("cost", { profile: page.acting(column), text: page.shared.text ?? undefined }, mine.signal)) {
      if (event.type !== "cost") continue;
      at("cost").textContent = `${short(event.cost.value)} nats/token${interval(event.cost)}`;
      at("cost-facts").textContent =
        `column ${column.name} on ${event.tokens} tokens of ${page.shared.text === null ? "the sample text" : "your text"} ` +
        `(${event.chunks} of ${event.of} chunks); ${short(event.untempered)} untempered, ${short(event.nll)} tempered; KL ${short(event.kl.value)}`;
      page.shared.results.cost = [{ label: column.name, cost: event.cost.value, se: event.cost.se, low: event.cost.low, high: event.cost.high, n: event.cost.n, kl: event.kl.value, kl_se: event.kl.se, unit: "nats/token", level: 0.95 }];
    }
  } catch (error) {
    if (!mine.signal.aborted) {
      at("cost").textContent = "not measured";
      page.complain("cost-error", error);
    }
  }
}

async function find() {
  pause();
  other?.abort();
  const mine = (other = new AbortController());
  const column = page.active();
  const nats = Number((10 ** Number(at("budget").value)).toPrecision(2));
  const pattern = column.profile.pattern && column.text ? column.text : undefined;
  at("budget-facts").textContent = "trying amplitudes";
  try {
    for await (const event of stream("budget", { profile: page.acting(column), pattern, nats, text: page.shared.text ?? undefined }, mine.signal)) {
      if (event.type === "tried") at("budget-facts").textContent = `amplitude ${short(event.amplitude)} costs ${short(event.cost.value)}`;
      if (event.type !== "budget") continue;
      const cost = event.cost ? `, which costs ${short(event.cost.value)}${interval(event.cost)}` : "; none above 1 is within the budget";
      at("budget-facts").textContent = `largest amplitude ${short(event.amplitude)}${cost}${event.bounded ? "" : `; even ${event.largest} stays within it`}`;
      if (pattern !== undefined) {
        at("amplitude-on").checked = true;
        at("amplitude").max = String(Math.max(3, Math.ceil(event.amplitude)));
        at("amplitude").step = "any";
        at("amplitude").value = String(event.amplitude);
        at("amplitude").dispatchEvent(new Event("input"));
      } else if (event.room !== null) page.change({ room: column.room * event.room });
    }
  } catch (error) {
    if (!mine.signal.aborted) at("budget-facts").textContent = error instanceof Error ? error.message : String(error);
  }
}

async function questions() {
  pause();
  other?.abort();
  const mine = (other = new AbortController());
  const column = page.active();
  const table = at("answers");
  at("answered").textContent = "reading the long text";
  try {
    for await (const event of stream("questions", { profile: page.acting(column), seed: Number(at("seed").value) }, mine.signal)) {
      if (event.type === "progress") at("answered").textContent = `question ${event.done} of ${event.total}`;
      if (event.type !== "answers") continue;
      const names = ["question", "stated", "untempered", event.label];
      table.hidden = false;
      table.tHead.replaceChildren(make("tr", {}, ...["question", "stated", "before", "after"].map((n) => make("th", { scope: "col" }, n))));
      table.tBodies[0].replaceChildren(...event.answers.map((/** @type {any} */ row) => make("tr", {}, ...names.map((n) => make("td", {}, row[n])))));
      at("answered").textContent = `right: ${event.answered["right, untempered"]} before, ${event.answered[`right, ${event.label}`]} after, of ${event.answered.questions}`;
      page.shared.results.answers = event.answers;
      page.shared.results.answered = event.answered;
    }
  } catch (error) {
    if (!mine.signal.aborted) at("answered").textContent = error instanceof Error ? error.message : String(error);
  }
  again();
}

const again = calm(900, measure);

export function start() {
  at("meter").addEventListener("change", () => (at("meter").checked ? measure() : pause()));
  at("budget").addEventListener("input", () => (at("budget-value").textContent = String(Number((10 ** Number(at("budget").value)).toPrecision(2)))));
  at("find").addEventListener("click", find);
  at("ask").addEventListener("click", questions);
  at("cost-file").addEventListener("change", async () => {
    const file = at("cost-file").files[0];
    if (!file) return;
    try {
      if (file.size > 8e6) throw new Error(`${file.name}: a text has at most 8 MB`);
      page.shared.text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
      at("own-text-off").hidden = false;
      measure();
    } catch (error) {
      page.complain("cost-error", error instanceof TypeError ? new Error(`${file.name} is no UTF-8 text`) : error);
    }
    at("cost-file").value = "";
  });
  at("own-text-off").addEventListener("click", () => {
    page.shared.text = null;
    at("own-text-off").hidden = true;
    measure();
  });
  // The model is for writing first: the meter waits from the first touch of the brush.
  for (const name of ["stroke", "writing"]) page.on(name, () => { again.cancel(); pause(); });
  page.on("profile", () => { pause(); again(); });
  page.on("active", again);
  page.on("written", again);
  addEventListener("pagehide", () => { pause(); other?.abort(); });
}
