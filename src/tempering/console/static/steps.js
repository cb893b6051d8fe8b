// The steps to undo and redo, as what JSON can hold.

import { packedProfile, unpackedProfile } from "./matrix.js";

/**
 * @typedef {import("./matrix.js").Painting} Painting
 * @typedef {{past: Painting[], future: Painting[]}} Steps the last of each is next to the present
 */

/** Steps, those next to the present first, as many as there is room for: one half for each list.
 * Steps share the profiles that didn't change.
 * @param {Steps} steps
 * @param {number} most characters
 * @returns undefined where there are no steps */
export function packedSteps({ past, future }, most) {
  if (!past.length && !future.length) return undefined;
  /** @type {ReturnType<typeof packedProfile>[]} */
  const profiles = [];
  const places = new Map();
  /** @param {Painting[]} steps */
  const packed = (steps) => {
    const found = [];
    let left = most / 2;
    for (const { columns, active } of steps.slice().reverse()) {
      const fresh = [...new Set(columns.map(({ profile }) => profile))].filter((profile) => !places.has(profile));
      const own = fresh.map(packedProfile);
      const step = { active, columns: columns.map(({ profile, ...rest }) => ({ ...rest, place: places.get(profile) ?? profiles.length + fresh.indexOf(profile) })) };
      left -= JSON.stringify([step, own]).length;
      if (left < 0) break;
      fresh.forEach((profile, i) => places.set(profile, profiles.length + i));
      profiles.push(...own);
      found.unshift(step);
    }
    return found;
  };
  return { past: packed(past), future: packed(future), profiles };
}

/** The inverse; throws unless they fit the model.
 * @param {any} kept what `packedSteps` gave
 * @param {number[]} heads
 * @returns {Steps} */
export function unpackedSteps(kept, heads) {
  const profiles = kept.profiles.map((/** @type {any} */ packed) => unpackedProfile(packed, heads));
  /** @param {any} step @returns {Painting} */
  const unpacked = ({ active, columns }) => ({
    active,
    columns: columns.map((/** @type {any} */ { place, ...rest }) => {
      if (!(place in profiles)) throw new Error(`a step has no profile ${place}`);
      return { ...rest, profile: profiles[place] };
    }),
  });
  return { past: kept.past.map(unpacked), future: kept.future.map(unpacked) };
}
