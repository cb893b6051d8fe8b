// What the painted temperatures cost, as it is measured; the budget; the demo's questions.

import { stream } from "./api.js";
import { at, calm, make } from "./dom.js";
import { isNeutral, short } from "./matrix.js";
import * as page from "./page.js";
import { read } from "./painting.js";
import * as session from "./session.js";

/**
 * What was found out of a column as it was then.
 * @template T
 * @typedef {{of: Pick<page.Column, "name"|"profile"|"room">, found: T}} Finding
 */
/** @type {Finding<any>|null} the last event of the meter */
export let cost = null;
/** @type {Finding<{answers: any[], answered: any, label: string}>|null} */
export let answers = null;
/** @type {Finding<any>|null} the budget's amplitude, of the column that has it */
export let budget = null;

/** @type {AbortController|null} */
let measuring = null;
/** @type {AbortController|null} */
let other = null;

/** @param {any} estimate */
function interval(estimate) {
  return estimate.low === null ? "" : ` (95%: ${short(estimate.low)} to ${short(estimate.high)})`;
}

/** @param {page.Column} column @returns {Finding<any>["of"]} */
function stamp({ name, profile, room }) {
  return { name, profile, room };
}

/** What was found of another profile is not shown as this one's. */
function stale() {
  const column = page.active();
  if (!page.alike(cost?.of, column)) {
    cost = null;
    at("cost").textContent = "not measured";
    at("cost-facts").textContent = "";
  }
  at("answered-of").hidden = !answers || page.alike(answers.of, column);
  at("answered-of").textContent = answers ? `asked of column ${answers.of.name} before it was edited` : "";
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
  cost = null;
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
      if (event.type === "waiting") at("cost-facts").textContent = event.words;
      if (event.type !== "cost") continue;
      at("cost").textContent = `${short(event.cost.value)} nats/token${interval(event.cost)}`;
      at("cost-facts").textContent =
        `column ${column.name} on ${event.tokens} tokens of ${page.shared.text === null ? "the sample text" : "your text"} ` +
        `(${event.chunks} of ${event.of} chunks); ${short(event.untempered)} untempered, ${short(event.nll)} tempered; KL ${short(event.kl.value)}`;
      cost = { of: stamp(column), found: event };
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
      if (event.type === "waiting") at("budget-facts").textContent = event.words;
      if (event.type === "tried") at("budget-facts").textContent = `amplitude ${short(event.amplitude)} costs ${short(event.cost.value)}`;
      if (event.type !== "budget") continue;
      const priced = event.cost ? `, which costs ${short(event.cost.value)}${interval(event.cost)}` : "; none above 1 is within the budget";
      if (pattern !== undefined) {
        at("amplitude-on").checked = true;
        at("amplitude").max = String(Math.max(3, Math.ceil(event.amplitude)));
        at("amplitude").step = "any";
        at("amplitude").value = String(event.amplitude);
        at("amplitude-value").textContent = at("amplitude").value;
        await read();
      } else if (event.room !== null) page.change({ room: column.room * event.room });
      const { amplitude, bounded } = event;
      at("budget-facts").textContent = `largest amplitude ${short(amplitude)}${priced}${bounded ? "" : `; even ${event.largest} stays within it`}`;
      budget = { of: stamp(page.active()), found: { label: column.name, pattern: pattern ?? null, nats, amplitude, bounded, cost: event.cost?.value ?? null, low: event.cost?.low ?? null, high: event.cost?.high ?? null } };
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
  at("answered").textContent = "reading the long text";
  try {
    for await (const event of stream("questions", { profile: page.acting(column), seed: Number(at("seed").value) }, mine.signal)) {
      if (event.type === "waiting") at("answered").textContent = event.words;
      if (event.type === "progress") at("answered").textContent = `question ${event.done} of ${event.total}`;
      if (event.type !== "answers") continue;
      answers = { of: stamp(column), found: event };
      tabulate();
    }
  } catch (error) {
    if (!mine.signal.aborted) at("answered").textContent = error instanceof Error ? error.message : String(error);
  }
  again();
}

/** The answers as a table. */
function tabulate() {
  if (!answers) return;
  const { answers: rows, answered, label } = answers.found;
  const table = at("answers");
  const names = ["question", "stated", "untempered", label];
  table.hidden = false;
  table.tHead.replaceChildren(make("tr", {}, ...["question", "stated", "before", "after"].map((n) => make("th", { scope: "col" }, n))));
  table.tBodies[0].replaceChildren(...rows.map((row) => make("tr", {}, ...names.map((n) => make("td", {}, row[n])))));
  at("answered").textContent = `right: ${answered["right, untempered"]} before, ${answered[`right, ${label}`]} after, of ${answered.questions}`;
  stale();
}

const again = calm(900, measure);

/** Show what the budget's slider says in nats. */
function nats() {
  at("budget-value").textContent = String(Number((10 ** Number(at("budget").value)).toPrecision(2)));
}

/** @param {string|null} text to measure on; null is the sample text */
function measureOn(text) {
  page.shared.text = text;
  at("own-text-off").hidden = text === null;
  page.emit("text");
  measure();
}

export function start() {
  at("meter").addEventListener("change", () => (at("meter").checked ? measure() : pause()));
  nats();
  at("budget").addEventListener("input", nats);
  session.remember("your own text", () => page.shared.text ?? undefined, measureOn);
  session.remember("the answers", () => answers ?? undefined, (kept) => {
    answers = kept;
    tabulate();
  });
  at("find").addEventListener("click", find);
  at("ask").addEventListener("click", questions);
  at("cost-file").addEventListener("change", async () => {
    const file = at("cost-file").files[0];
    if (!file) return;
    try {
      if (file.size > 8e6) throw new Error(`${file.name}: a text has at most 8 MB`);
      measureOn(new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer()));
    } catch (error) {
      page.complain("cost-error", error instanceof TypeError ? new Error(`${file.name} is no UTF-8 text`) : error);
    }
    at("cost-file").value = "";
  });
  at("own-text-off").addEventListener("click", () => measureOn(null));
  // The model is for writing first: the meter waits from the first touch of the brush.
  for (const name of ["stroke", "writing"]) page.on(name, () => { again.cancel(); pause(); });
  page.on("profile", () => { pause(); stale(); again(); });
  page.on("active", () => { nats(); stale(); again(); });
  page.on("written", again);
  addEventListener("pagehide", () => { pause(); other?.abort(); });
  again(); // a link or a reload may have brought a profile
}
