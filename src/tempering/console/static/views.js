// What the matrix can show: temperatures, differences, and what heads keep of their keys.

import { floats } from "./api.js";
import { difference, short, withRoom } from "./matrix.js";
import * as page from "./page.js";

export const QUANTITIES = { support: "support", sink_share: "sink share", entropy: "entropy", peak: "peak", distance: "mean distance" };
export const LIVE = { support: "support", sink_share: "sink share", peak: "peak" };
export const WHEN = { before: "before", after: "after", change: "change" };

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

/** One more measurement; an earlier one of the same profile and text is replaced. @param {Measured} found */
export function measured(found) {
  measurements = [found, ...measurements.filter((m) => m.text !== found.text || !page.alike(m.of, found.of))].slice(0, MOST_MEASURED);
}

/** The newest measurements, for a page that is reloaded. */
export function keptMeasurements() {
  return measurements.length ? measurements.slice(0, 2).reverse() : undefined;
}

/** What the grid shows of a choice, such as "temperature" or "measured:support:after".
 * @param {string} shown @returns {import("./grid.js").View} */
export function view(shown) {
  const [kind, what, when] = shown.split(":");
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

/** Statistics of one step. @param {any} event */
export function live(event) {
  const values = floats(event.values);
  steps[event.step] = values;
  const most = Math.max(1, Math.floor(MOST_KEPT / values.byteLength));
  if (steps.length > most) delete steps[steps.length - 1 - most];
}

/** A new text is written: what heads kept in the last one is gone. @param {number} columns */
export function forget(columns) {
  steps = [];
  columnsWritten = columns;
}
