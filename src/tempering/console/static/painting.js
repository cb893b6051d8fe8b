// The matrix: what is painted, and what is measured behind it.

import { ask, floats, Refusal, stream } from "./api.js";
import { freeName } from "./columns.js";
import { at, calm, make } from "./dom.js";
import { drawCurve, drawScale, Grid } from "./grid.js";
import { brushOf, difference, painted, short, withRoom } from "./matrix.js";
import * as page from "./page.js";
import * as session from "./session.js";

const QUANTITIES = { support: "support", sink_share: "sink share", entropy: "entropy", peak: "peak", distance: "mean distance" };
const LIVE = { support: "support", sink_share: "sink share", peak: "peak" };
const WHEN = { before: "before", after: "after", change: "change" };

/** @type {Grid} */
export let grid;
/**
 * What every head kept on a text: of the model as it is, and under a column as it was then.
 * @typedef {{of: Pick<page.Column, "profile"|"room">, text: string|null, before: any, after: any}} Measured
 * @type {Measured[]} the newest first
 */
let measurements = [];
const MOST_MEASURED = 8;
/** What every head kept, for each step of the text: [statistic, column, layer, head].
 * @type {Float32Array[]} */
let steps = [];
let columnsWritten = 0;
const MOST_KEPT = 64 * 2 ** 20; // bytes of statistics kept for tokens that may be chosen

/** @type {Map<string, any>} curves by schedule and amplitude: one comes back with undo, a tab, a reload */
const curves = new Map();

/** @param {page.Column} column */
const curveOf = (column) => `${column.amplitude} ${column.text}`;

/** Draw the active column's schedule, or none. */
function curve() {
  const found = curves.get(curveOf(page.active()));
  at("curve").hidden = !found;
  if (found) drawCurve(at("curve"), found);
}

// -- views

/** @returns {import("./grid.js").View} */
function view() {
  const [kind, what, when] = at("shown").value.split(":");
  const rows = withRoom(page.active().profile.rows, page.active().room);
  if (kind === "difference") {
    const other = page.history.value.columns[Number(what)];
    if (other) return logs(difference(rows, withRoom(other.profile.rows, other.room)), (v) => `×${short(Math.exp(v))}`);
  }
  if (kind === "measured" || kind === "live") {
    const [before, after] = kind === "measured" ? measuredTables(what) : liveTables(what);
    return quantity(what, when, before, after);
  }
  return logs(rows.map((row) => row.map(Math.log)), (v) => short(Math.exp(v)));
}

/** @param {number[][]} values @param {(v: number) => string} label @returns {import("./grid.js").View} */
function logs(values, label) {
  let reach = Math.log(1.5);
  for (const row of values) for (const v of row) reach = Math.max(reach, Math.abs(v));
  return { values, kind: "diverging", low: -reach, high: reach, label };
}

/** What was measured under a column as it is now, on the text that is chosen now.
 * @param {page.Column} column */
export function measuredOf(column) {
  return measurements.find((m) => m.text === page.shared.text && page.alike(m.of, column));
}

/** @param {string} what @returns {[number[][], number[][]]} */
function measuredTables(what) {
  const table = (/** @type {any} */ from) => (from ? from[what].map((/** @type {any[]} */ row) => row.map((v) => v ?? NaN)) : []);
  // The model as it is was measured with any of them.
  const before = measurements.find((m) => m.text === page.shared.text)?.before;
  return [table(before), table(measuredOf(page.active())?.after)];
}

/** @param {string} what @returns {[ArrayLike<number>[], ArrayLike<number>[]]} */
function liveTables(what) {
  const chosen = page.shared.token;
  const values = (chosen && steps[chosen.index]) ?? steps.at(-1);
  const sizes = page.heads();
  const wide = Math.max(0, ...sizes);
  const place = Object.keys(LIVE).indexOf(what);
  const table = (/** @type {number} */ column) => {
    if (!values || column >= columnsWritten) return [];
    const start = (place * columnsWritten + column) * sizes.length * wide;
    return sizes.map((n, layer) => values.subarray(start + layer * wide, start + layer * wide + n));
  };
  return [table(0), table(page.rowOf(page.active()) || Infinity)];
}

/** @param {string} what @param {string} when @param {ArrayLike<number>[]} before @param {ArrayLike<number>[]} after
 * @returns {import("./grid.js").View} */
function quantity(what, when, before, after) {
  // Supports and distances differ by factors; shares, peaks and entropies by amounts.
  const factor = what === "support" || what === "distance";
  const of = (/** @type {number} */ v) => (factor ? Math.log(v) : v);
  const map = (/** @type {ArrayLike<number>[]} */ t, /** @type {(v: number, l: number, h: number) => number} */ f) =>
    t.map((row, l) => Array.from(row, (v, h) => f(v, l, h)));
  if (when === "change") {
    const values = before.length && after.length ? map(after, (v, l, h) => of(v) - of(before[l][h])) : [];
    let reach = factor ? Math.log(1.2) : 0.05;
    for (const row of values) for (const v of row) if (Number.isFinite(v)) reach = Math.max(reach, Math.abs(v));
    return { values, kind: "diverging", low: -reach, high: reach, label: (v) => (factor ? `×${short(Math.exp(v))}` : short(v)) };
  }
  const values = map(when === "before" ? before : after, of);
  const share = what === "peak" || what === "sink_share";
  let high = share ? 1 : 0.1;
  for (const row of [...map(before, of), ...values]) for (const v of row) if (Number.isFinite(v)) high = Math.max(high, v);
  return { values, kind: "sequential", low: 0, high, label: (v) => short(factor ? Math.exp(v) : v) };
}

/** Show what is chosen, with its legend. */
export function show() {
  const found = view();
  grid.show(found);
  at("low").textContent = found.label(found.low);
  at("high").textContent = found.label(found.high);
  drawScale(at("scale"), found.kind, found.low, found.high);
  at("undo").disabled = !page.history.past.length;
  at("redo").disabled = !page.history.future.length;
  tell(grid.cursor);
}

/** @param {import("./matrix.js").Cell} cell */
function tell([layer, head]) {
  const found = grid?.view; // as it is shown
  if (!found || !page.known.layers.length) return;
  const value = found.values[layer]?.[head];
  const t = page.active().profile.rows[layer][head] ** page.active().room;
  const rule = page.active().profile.rules[layer];
  const missing = at("shown").value.startsWith("measured") ? "not measured for this profile; press Measure" : "nothing written with heads live yet";
  const own = at("shown").selectedOptions[0].textContent;
  const known = page.known.layers[layer];
  at("cell").textContent =
    `${known.stack === "decoder" ? "" : `${known.stack} `}layer ${known.index}, head ${head}: T = ${short(t)}` +
    (rule ? `, rule ${rule}` : "") +
    (at("shown").value === "temperature" ? "" : value === undefined || Number.isNaN(value) ? `; ${own}: ${missing}` : `; ${own}: ${found.label(value)}`);
  at("exact-layer").value = String(layer);
  at("exact-head").value = String(head);
  if (document.activeElement !== at("exact-value")) at("exact-value").value = short(t);
}

// -- painting

/** @param {import("./matrix.js").Cell[]} cells @param {import("./matrix.js").Brush} brush @param {boolean} [within] */
function paint(cells, brush, within = false) {
  const column = page.active();
  try {
    // What is painted is what acts: a room is folded into the temperatures first.
    const rows = painted(withRoom(column.profile.rows, column.room), cells, brush, page.known);
    page.change({ profile: { ...column.profile, rows, pattern: null }, room: 1 }, within);
    page.complain("brush-error");
  } catch (error) {
    page.complain("brush-error", error);
  }
}

/** @param {import("./matrix.js").Cell[]} cells @param {boolean} [within] */
function brush(cells, within = false) {
  try {
    paint(cells, brushOf(at("brush").value), within);
  } catch (error) {
    page.complain("brush-error", error);
  }
}

/** @param {KeyboardEvent} event */
function key(event) {
  const cells = grid.selection();
  if (event.key === "Enter" || event.key === " ") brush(cells);
  else if (event.key === "+" || event.key === "=") paint(cells, { times: 1.05 });
  else if (event.key === "-") paint(cells, { times: 1 / 1.05 });
  else if (event.key === "0") paint(cells, { set: 1 });
  else if (event.key === "l" || event.key === "L") page.emit("look", grid.cursor);
  else if (/^[1-9.]$/.test(event.key)) {
    at("exact-value").value = event.key;
    at("exact-value").focus();
  } else return false;
  return true;
}

// -- schedules

let asked = 0;

/** @param {string} text @param {number|null} amplitude */
function asking(text, amplitude) {
  const isRule = page.known.rules.some((/** @type {string} */ r) => text.startsWith(r.slice(0, r.indexOf("(") + 1)));
  return ask("pattern", { text, ...(amplitude === null || isRule ? {} : { amplitude }) });
}

/** Read the schedule in the box; its error stands under the column where it is.
 * @param {boolean} [within] part of a step that was begun */
export async function read(within = false) {
  const column = page.active();
  const text = at("schedule").value.trim();
  const amplitude = at("amplitude-on").checked ? Number(at("amplitude").value) : null;
  const mine = ++asked;
  page.complain("schedule-error");
  if (!text) {
    at("curve").hidden = true;
    return;
  }
  try {
    const found = await asking(text, amplitude);
    if (mine !== asked || column.name !== page.active().name) return;
    const profile = { rows: found.rows, rules: found.rules, pattern: found.pattern };
    curves.set(`${amplitude} ${text}`, found.curve);
    page.change({ profile, text, amplitude, room: 1 }, within);
  } catch (error) {
    if (mine !== asked) return;
    at("curve").hidden = true;
    page.complain("schedule-error", error instanceof Refusal ? error.message : String(error));
  }
}

/** Ask for the curve of a schedule that came with a link or a reload. */
async function recalled() {
  const column = page.active();
  if (!column.text || curves.has(curveOf(column))) return curve();
  curves.set(curveOf(column), null); // asked once
  try {
    curves.set(curveOf(column), (await asking(column.text, column.amplitude)).curve);
    curve();
  } catch {
    // a link's text that is no schedule: the temperatures stand for themselves
  }
}

/** Take a profile from the gallery or a file. @param {string} path @param {any} body @param {string} name */
async function take(path, body, name) {
  try {
    const found = await ask(path, body);
    at("schedule").value = "";
    page.complain("schedule-error");
    page.change({ profile: { rows: found.rows, rules: found.rules, pattern: found.pattern }, text: "", room: 1 });
    at("profile-note").hidden = false;
    at("profile-note").textContent = found.note ?? `${name} is in column ${page.active().name}`;
  } catch (error) {
    at("profile-note").hidden = false;
    at("profile-note").textContent = `${name}: ${error instanceof Error ? error.message : error}`;
  }
}

// -- columns

/** Tabs, sliders and boxes as the active column has them. */
function fill() {
  const { columns, active } = page.history.value;
  at("columns-tabs").replaceChildren(
    ...columns.map((column, i) => {
      const tab = make("button", { role: "radio", "aria-checked": String(i === active), tabIndex: i === active ? 0 : -1 }, column.name);
      tab.addEventListener("click", () => page.repaint({ columns, active: i }, false));
      tab.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (!step) return;
        event.preventDefault();
        page.repaint({ columns: page.history.value.columns, active: (i + step + columns.length) % columns.length }, false);
        at("columns-tabs").querySelector("[aria-checked=true]").focus();
      });
      return tab;
    }),
  );
  at("remove-column").disabled = columns.length < 2;
  at("add-column").disabled = columns.length >= page.known.columns;
  const chosen = at("shown").dataset.wanted ?? (at("shown").value || "temperature");
  delete at("shown").dataset.wanted;
  const options = [make("option", { value: "temperature" }, "temperature")];
  columns.forEach((other, i) => i !== active && options.push(make("option", { value: `difference:${i}` }, `difference from ${other.name}`)));
  for (const [kind, title, names] of /** @type {any[]} */ ([["measured", "Measured on the text", QUANTITIES], ["live", "Live, while it writes", LIVE]])) {
    const group = make("optgroup", { label: title });
    for (const [name, words] of Object.entries(names)) {
      for (const when of Object.keys(WHEN)) group.append(make("option", { value: `${kind}:${name}:${when}` }, `${words} ${when}${kind === "live" ? ", live" : ""}`));
    }
    options.push(group);
  }
  at("shown").replaceChildren(...options);
  at("shown").value = chosen;
  if (!at("shown").value) at("shown").value = "temperature";
}

/** The boxes and sliders of the active column. */
function boxes() {
  const column = page.active();
  if (document.activeElement !== at("schedule")) at("schedule").value = column.text;
  if (column.amplitude !== null) at("amplitude").value = String(column.amplitude);
  at("amplitude-value").textContent = at("amplitude").value;
  at("room").value = String(column.room);
  at("room-value").textContent = short(column.room);
  grid.tool = at("tool").value;
  curve();
}

/** @param {1|-1} way */
export function travel(way) {
  if (way < 0 ? page.history.undo() : page.history.redo()) {
    page.emit("active");
    page.emit("profile");
    page.say(way < 0 ? "undone" : "redone");
  }
}

async function measure() {
  const { profile, room } = page.active();
  /** @type {any} */
  const found = { of: { profile, room }, text: page.shared.text };
  try {
    for await (const event of stream("measure", { profile: page.acting(page.active()), text: found.text ?? undefined }, new AbortController().signal)) {
      if (event.type === "waiting") page.say(event.words);
      if (event.type === "turn") page.say(`measuring ${found.text === null ? "the sample text" : "your text"}`);
      if (event.type === "measured") found[event.when] = event;
    }
    measurements = [found, ...measurements.filter((m) => m.text !== found.text || !page.alike(m.of, found.of))].slice(0, MOST_MEASURED);
    page.say(`measured on ${found.after.tokens} tokens`);
    if (at("shown").value === "temperature") at("shown").value = "measured:support:change";
    show();
  } catch (error) {
    page.say(error instanceof Error ? error.message : String(error));
  }
}

/** Statistics of one step. @param {any} event */
export function live(event) {
  const values = floats(event.values);
  steps[event.step] = values;
  const most = Math.max(1, Math.floor(MOST_KEPT / values.byteLength));
  if (steps.length > most) delete steps[steps.length - 1 - most];
  if (at("shown").value.startsWith("live:")) show();
}

/** A new text is written: what heads kept in the last one is gone. @param {number} columns */
export function forget(columns) {
  steps = [];
  columnsWritten = columns;
}

export function start() {
  const { known } = page;
  let stroke = false;
  grid = new Grid(at("matrix"), known.rows, page.heads(), {
    begin: () => {
      stroke = false;
      page.emit("stroke");
    },
    paint: (cells) => {
      brush(cells, stroke);
      stroke = true;
    },
    end: () => {},
    moved: tell,
    chosen: (cell) => grid.tool === "look" && page.emit("look", cell),
    key,
  });
  fill();
  boxes();
  show();
  recalled();
  page.on("active", recalled);
  session.remember("what was measured", () => measurements.length ? measurements.slice(0, 2) : undefined, (kept) => {
    measurements = kept;
    show();
  });
  at("tool").addEventListener("change", () => (grid.tool = at("tool").value));
  at("shown").addEventListener("change", show);
  at("exact").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    const [layer, head] = [Number(at("exact-layer").value), Number(at("exact-head").value)];
    const sizes = page.heads();
    if (!(layer in sizes) || !(head >= 0 && head < sizes[layer] && Number.isInteger(head))) {
      page.complain("brush-error", new Error(`the model has layers 0 to ${sizes.length - 1}, and heads 0 to ${(sizes[layer] ?? sizes[0]) - 1}`));
      return;
    }
    const one = layer === grid.cursor[0] && head === grid.cursor[1];
    const cells = one ? grid.selection() : [/** @type {[number, number]} */ ([layer, head])];
    try {
      paint(cells, brushOf(at("exact-value").value));
    } catch (error) {
      page.complain("brush-error", error);
    }
    if (!one) grid.move([layer, head], false);
    grid.canvas.focus();
  });
  at("schedule").addEventListener("input", calm(120, () => read()));
  let stretching = false;
  const readSoon = calm(60, () => {
    read(stretching);
    stretching = true;
  });
  at("amplitude").addEventListener("input", () => {
    at("amplitude-value").textContent = at("amplitude").value;
    if (at("schedule").value.trim()) readSoon();
  });
  at("amplitude").addEventListener("pointerdown", () => (stretching = false));
  at("amplitude").addEventListener("focus", () => (stretching = false));
  at("amplitude-on").addEventListener("change", () => at("schedule").value.trim() && read());
  let sliding = false;
  at("room").addEventListener("input", () => {
    const room = Number(at("room").value);
    at("room-value").textContent = short(room);
    if (page.active().profile.rules.some((r) => r)) return page.complain("brush-error", new Error("a rule has no room; change its level or its bounds"));
    page.change({ room }, sliding);
    sliding = true;
  });
  at("room").addEventListener("change", () => (sliding = false));
  at("gallery").append(...known.gallery.map((/** @type {string} */ name) => make("option", { value: name }, name)));
  at("gallery").addEventListener("change", () => {
    const name = at("gallery").value;
    if (name) take("profile/load", { name }, name);
    at("gallery").value = "";
  });
  at("file").addEventListener("change", async () => {
    const file = at("file").files[0];
    if (!file) return;
    try {
      if (file.size > 12e6) throw new Error("a profile's file has at most 12 MB");
      await take("profile/read", { profile: JSON.parse(await file.text()) }, file.name);
    } catch (error) {
      at("profile-note").hidden = false;
      at("profile-note").textContent = `${file.name}: ${error instanceof SyntaxError ? "this file is no JSON" : /** @type {Error} */ (error).message}`;
    }
    at("file").value = "";
  });
  at("patterns").append(...known.patterns.map((/** @type {string[]} */ [signature, summary, example]) => make("option", { value: example.startsWith("x|") ? "" : example }, `${signature}: ${summary}`)));
  at("add-column").addEventListener("click", () => {
    const { columns } = page.history.value;
    // Nor the name of a column that is written and was removed: its text and its heads keep it.
    const name = freeName([...columns, ...page.shared.written].map((c) => c.name));
    page.repaint({ columns: [...columns, { ...page.active(), name }], active: columns.length });
  });
  at("remove-column").addEventListener("click", () => {
    const { columns, active } = page.history.value;
    if (columns.length > 1) page.repaint({ columns: columns.filter((_, i) => i !== active), active: Math.max(0, active - 1) });
  });
  at("measure").addEventListener("click", measure);
  at("undo").addEventListener("click", () => travel(-1));
  at("redo").addEventListener("click", () => travel(1));
  page.on("profile", () => {
    boxes();
    show();
  });
  page.on("active", () => {
    fill();
    boxes();
    show();
  });
  page.on("token", show);
  page.on("text", show);
  new ResizeObserver(calm(60, () => grid.size())).observe(at("grid-box"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
}
