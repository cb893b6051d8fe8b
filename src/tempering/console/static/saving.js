// What leaves the page: a profile, a record, a link, a baked model.

import { ask, stream } from "./api.js";
import { answers, budget, cost } from "./costs.js";
import { at, download } from "./dom.js";
import * as page from "./page.js";
import { measuredOf } from "./painting.js";
import { records } from "./stages.js";
import { asked, columns, earlier } from "./writing.js";

/** @param {() => Promise<string>} act */
async function told(act) {
  page.complain("save-error");
  at("save-facts").textContent = "";
  try {
    at("save-facts").textContent = await act();
  } catch (error) {
    page.complain("save-error", error);
  }
}

async function profile() {
  const column = page.active();
  const found = await ask("profile/save", { profile: page.acting(column) });
  download(`profile-${column.name}.json`, `${JSON.stringify(found, null, 1)}\n`, "application/json");
  return `profile of column ${column.name}`;
}

/**
 * Names for the profiles that wrote each column: one that was edited since has another name than
 * the one that is painted now, and so have those that acted until an edit in the middle of a text.
 * @returns {{columns: {label: string, column: page.Column}[], labels: string[][]}} labels: of each
 *   written column, for the part until each mark and the part after the last */
export function labelled() {
  const painted = page.history.value.columns;
  const all = painted.map((column) => ({ label: column.name, column }));
  const eras = [...earlier, page.shared.written];
  const labels = page.shared.written.map((own, i) =>
    eras.map((era, part) => {
      const found = all.find(({ column }) => column.name === own.name && page.alike(column, era[i]));
      if (found) return found.label;
      const label = `${own.name}, ${part < earlier.length ? `until edit ${part + 1}` : "as written"}`;
      all.push({ label, column: era[i] });
      return label;
    }),
  );
  return { columns: all, labels };
}

/** A finding's column among those of the record, if it is there as it was. @param {any} of @param {{label: string, column: page.Column}[]} all */
function labelOf(of, all) {
  return of && all.find(({ column }) => column.name === of.name && page.alike(column, of))?.label;
}

/** A row of a record's section of costs. @param {string} label @param {any} event of the meter */
function costRow(label, { cost: { value, se, low, high, n }, kl }) {
  return { label, cost: value, se, low, high, n, kl: kl.value, kl_se: kl.se, unit: "nats/token", level: 0.95 };
}

async function record() {
  if (!asked || !columns.columns.some((c) => c.tokens.length)) throw new Error("write something first: a record holds the texts");
  const { columns: all, labels } = labelled();
  const samples = columns.columns.map(({ name, tokens, marks, finish }, row) => {
    const own = labels[row - 1];
    /** @param {number} i */
    const part = (i) => (own && earlier.length ? { profile: own[marks.filter((mark) => mark <= i).length] } : {});
    return {
      label: own?.at(-1) ?? name,
      seed: asked.seed,
      text: tokens.map((t) => t.text).join(""),
      tokens: tokens.length,
      finish,
      trace: tokens.map((t, i) => ({ token: t.text, phase: t.phase, temperature: t.temperature, entropy: t.entropy, support: t.support, token_id: t.id, entropy_before: t.entropy_before, log_probability_raw: t.raw, log_probability: t.log_probability, ...(t.kl === undefined ? {} : { kl: t.kl }), ...part(i) })),
    };
  });
  const priced = labelOf(cost?.of, all);
  const asking = labelOf(answers?.of, all);
  const limited = labelOf(budget?.of, all);
  const measured = all.map(({ label, column }) => ({ label, found: measuredOf(column) })).filter(({ found }) => found);
  const found = await ask("record", {
    ...asked,
    columns: all.map(({ label, column }) => ({ label, ...page.acting(column) })),
    samples,
    measured: measured.length ? { before: measured[0].found?.before, after: Object.fromEntries(measured.map(({ label, found }) => [label, found?.after])) } : undefined,
    cost: cost && priced ? [costRow(priced, cost.found)] : undefined,
    budget: budget && limited ? [{ ...budget.found, label: limited }] : undefined,
    answers: asking && answers?.found.answers,
    answered: asking && answers?.found.answered,
  });
  records();
  return `record ${found.name}, in the list of records`;
}

async function link() {
  const address = location.href.split("#")[0] + (await page.fragment());
  if (!navigator.clipboard) return "this browser copies from secure pages alone; the address bar holds the same link";
  await navigator.clipboard.writeText(address);
  return "copied. The address holds this console's token: it works while this console runs. For another console, put the part from # on behind its address.";
}

async function bake() {
  const log = at("bake-log");
  log.hidden = false;
  log.textContent = "";
  let where = "";
  for await (const event of stream("bake", { profile: page.acting(page.active()), name: at("bake-name").value }, new AbortController().signal)) {
    if (event.type === "line") log.textContent += `${event.text}\n`;
    if (event.type === "baked") where = event.path;
  }
  return `baked into ${where}`;
}

export function start() {
  for (const [id, act] of /** @type {[string, () => Promise<string>][]} */ ([["save-profile", profile], ["save-record", record], ["copy-link", link], ["bake", bake]])) {
    at(id).addEventListener("click", async () => {
      at(id).disabled = true;
      await told(act);
      at(id).disabled = false;
    });
  }
}
