import assert from "node:assert/strict";
import test from "node:test";
import { packedSteps, unpackedSteps } from "../../../src/tempering/console/static/steps.js";

const HEADS = [2, 3];

/** @param {number} t @param {string|null} rule */
const profile = (t, rule = null) => ({ rows: [[t, 1], [1, 1, 1]], rules: [rule, null], pattern: null });

/** @param {any} own @param {string} name */
const column = (own, name = "A") => ({ name, profile: own, room: 1, text: "", amplitude: null });

/** @param {number} t */
const step = (t) => ({ columns: [column(profile(t))], active: 0 });

const over = (/** @type {any} */ steps, most = 1e6) => unpackedSteps(JSON.parse(JSON.stringify(packedSteps(steps, most))), HEADS);

test("steps come back as they were, and share what didn't change", () => {
  const [shared, other] = [profile(2), profile(3, "support(8)")];
  const past = [{ columns: [column(shared)], active: 0 }, { columns: [column(shared), column(other, "B")], active: 1 }];
  const future = [{ columns: [column(other)], active: 0 }];
  const found = over({ past, future });
  assert.deepEqual(found, { past, future });
  assert.equal(found.past[0].columns[0].profile, found.past[1].columns[0].profile);
  assert.equal(packedSteps({ past, future }, 1e6)?.profiles.length, 2);
});

test("no step is nothing to keep", () => {
  assert.equal(packedSteps({ past: [], future: [] }, 1e6), undefined);
});

test("the steps next to the present stay, in the room there is, and none leaves a profile behind", () => {
  const past = Array.from({ length: 500 }, (_, i) => step(1 + i));
  const future = Array.from({ length: 500 }, (_, i) => step(1000 + i));
  const found = over({ past, future }, 20_000);
  assert.ok(found.past.length > 10 && found.past.length < 200);
  assert.deepEqual(found.past, past.slice(-found.past.length));
  assert.deepEqual(found.future, future.slice(-found.future.length));
  const kept = packedSteps({ past, future }, 20_000);
  assert.equal(kept?.profiles.length, found.past.length + found.future.length);
  assert.ok(JSON.stringify(kept).length <= 20_100);
  assert.deepEqual(over({ past, future }, 10), { past: [], future: [] });
});

test("steps of another model, or torn ones, are refused", () => {
  const kept = packedSteps({ past: [step(2)], future: [] }, 1e6);
  assert.throws(() => unpackedSteps(kept, [2]), /layers/);
  assert.throws(() => unpackedSteps({ ...kept, profiles: [] }, HEADS), /no profile/);
});
