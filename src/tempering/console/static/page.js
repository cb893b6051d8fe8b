// What the page knows and holds. The server keeps none of it.

import { packed, unpacked } from "./address.js";
import { at, calm } from "./dom.js";
import { History } from "./history.js";
import { neutral, packedProfile, sameRows, unpackedProfile, withRoom } from "./matrix.js";
import * as session from "./session.js";
import { packedSteps, unpackedSteps } from "./steps.js";

/**
 * @typedef {import("./matrix.js").Profile} Profile
 * @typedef {import("./matrix.js").Column} Column
 * @typedef {import("./matrix.js").Painting} Painting
 */

/** @type {any} what the server said of its model */
export let known = null;
/** @type {History<Painting>} */
export let history = new History({ columns: [], active: 0 });

/** What other parts of the page are told of: "profile", "active", "token", "measured", "live", "writing", "written". */
const listeners = new Map();

/** @param {string} name @param {(detail?: any) => void} act */
export function on(name, act) {
  listeners.set(name, [...(listeners.get(name) ?? []), act]);
}

/** @param {string} name @param {any} [detail] */
export function emit(name, detail) {
  for (const act of listeners.get(name) ?? []) act(detail);
}

/** Things that several parts of the page read. */
export const shared = {
  /** @type {{row: number, index: number}|null} the chosen token */
  token: null,
  /** @type {string|null} the user's own text for the meter */
  text: null,
  writing: false,
  /** @type {Column[]} the columns that are written, as they were, after the untempered one */
  written: [],
};

/** The row of a column in what is written; 0, the untempered one's, where it is not among them.
 * @param {Column} column */
export function rowOf(column) {
  return 1 + shared.written.findIndex((own) => own.name === column.name);
}

/** @returns {number[]} heads of each layer */
export function heads() {
  return known.layers.map((/** @type {any} */ layer) => layer.heads);
}

/** @returns {Column} */
export function active() {
  return history.value.columns[history.value.active];
}

/** A column's profile as it acts: its room applied. @param {Column} column @returns {Profile} */
export function acting(column) {
  const { rows, rules, pattern } = column.profile;
  return { rows: withRoom(rows, column.room), rules, pattern: column.room === 1 ? pattern : null };
}

/** Whether two columns act alike: what was found out of one then holds for the other.
 * @param {Pick<Column, "profile"|"room">|null|undefined} a @param {Pick<Column, "profile"|"room">|null|undefined} b */
export function alike(a, b) {
  if (!a || !b) return false;
  return (
    a.room === b.room &&
    (a.profile === b.profile ||
      (sameRows(a.profile.rows, b.profile.rows) && a.profile.rules.every((rule, i) => rule === b.profile.rules[i])))
  );
}

/** Change the column that is painted. @param {Partial<Column>} change
 * @param {boolean} [within] part of a step that was begun */
export function change(change, within = false) {
  const { columns, active: place } = history.value;
  const next = { columns: columns.map((c, i) => (i === place ? { ...c, ...change } : c)), active: place };
  if (within) history.amend(next);
  else history.push(next);
  emit("profile");
}

/** @param {Painting} next @param {boolean} [step] */
export function repaint(next, step = true) {
  if (step) history.push(next);
  else history.amend(next);
  emit("profile");
  emit("active");
}

/** @param {string} name @returns {Column} */
export function blank(name) {
  return { name, profile: neutral(heads()), room: 1, text: "", amplitude: 1.3 };
}

/** Say something at the top of the page. @param {string} text */
export function say(text) {
  at("status").textContent = text;
}

/** Show or clear an error where it belongs. @param {string} id @param {unknown} [error] */
export function complain(id, error) {
  const place = at(id);
  place.hidden = error === undefined;
  place.textContent = error === undefined ? "" : error instanceof Error ? error.message : String(error);
}

const SETTINGS = [
  "prompt", "tokens", "seed", "policy", "token-colour", "edit", "brush", "tool", "shown", "attention-by", "budget",
  "named", "task", "widths", "stage-amplitude", "stage-tokens", "bake-name",
];
const SWITCHES = ["chat", "auto", "watch", "meter", "amplitude-on"];
const MOST_STEPS = 1_000_000; // characters, of the 4.5 million that a tab keeps
const LONGEST = 1_500_000; // characters; beyond 2 million a browser drops an address

/** Everything that a link carries. */
export function state() {
  return {
    v: 1,
    model: known.fingerprint,
    columns: history.value.columns.map(({ profile, ...rest }) => ({ ...rest, ...packedProfile(profile) })),
    active: history.value.active,
    settings: Object.fromEntries(SETTINGS.map((id) => [id, at(id).value])),
    switches: Object.fromEntries(SWITCHES.map((id) => [id, at(id).checked])),
  };
}

let saved = "";

/** The state as the part of an address after #; throws where it is too long for one. */
export async function fragment() {
  const found = await packed(state());
  if (found.length > LONGEST) throw new Error("what is painted and written here is too long for an address: a link can't carry it; save it as a profile or a record");
  return `#${found}`;
}

/** Put the state into the address, soon. */
export const keep = calm(150, async () => {
  try {
    saved = await fragment();
    window.history.replaceState(null, "", saved);
  } catch (error) {
    say(/** @type {Error} */ (error).message);
  }
});

/** Whether the address holds another state than the page put there. */
export function addressed() {
  return location.hash !== saved;
}

/** Come back to a state, by default that of the address; throws, with nothing changed, where it
 * doesn't fit the model. @param {any} [found] */
export async function restore(found) {
  found ??= await unpacked(location.hash);
  if (found === null) return;
  if (found.v !== 1 || !Array.isArray(found.columns) || !found.columns.length) {
    throw new Error("the link was made by another version of the console");
  }
  if (found.columns.length > known.columns) throw new Error(`the link has ${found.columns.length} columns, more than ${known.columns}`);
  /** @type {Column[]} */
  const columns = found.columns.map((/** @type {any} */ c, /** @type {number} */ i) => ({
    name: String(c.name ?? String.fromCharCode(65 + i)).slice(0, 40),
    room: Number.isFinite(c.room) ? c.room : 1,
    text: String(c.text ?? ""),
    amplitude: Number.isFinite(c.amplitude) ? c.amplitude : null,
    profile: unpackedProfile(c, heads()),
  }));
  history = new History({ columns, active: Math.min(columns.length - 1, Math.max(0, Number(found.active) || 0)) });
  for (const id of SETTINGS) if (typeof found.settings?.[id] === "string") set(id, found.settings[id]);
  for (const id of SWITCHES) if (typeof found.switches?.[id] === "boolean") at(id).checked = found.switches[id];
  if (found.model !== known.fingerprint) say("this link was made with another model of the same shape");
}

/** Have undo and redo kept over a reload. */
export function rememberSteps() {
  session.remember("steps to undo", () => packedSteps(history, MOST_STEPS), (kept) => {
    Object.assign(history, unpackedSteps(kept, heads()));
    emit("profile");
  });
}

/** Set a field; what a list doesn't offer leaves it as it is.
 * @param {string} id @param {string} value */
function set(id, value) {
  const field = at(id);
  const before = field.value;
  // What the matrix can show is listed when the columns are known; see `painting.fill`.
  if (id === "shown") field.dataset.wanted = value;
  field.value = value;
  if (field.value === "" && value !== "") field.value = before;
}

/** Begin, with what the server says of its model. @param {any} told */
export function begin(told) {
  known = told;
  const first = blank("A");
  if (told.start) {
    const { rows, rules, pattern } = told.start;
    Object.assign(first, { profile: { rows, rules, pattern }, amplitude: null });
  }
  history = new History({ columns: [first], active: 0 });
  for (const id of [...SETTINGS, ...SWITCHES]) at(id).addEventListener("change", keep);
  at("prompt").addEventListener("input", keep);
  session.remember("the state", state, () => {});
  on("profile", keep);
  on("active", keep);
}

