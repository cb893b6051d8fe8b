// What a reload must not lose and no link carries: texts, measurements, answers. It lies in the
// tab's own storage, which the browser gives to this address alone and drops with the tab.

const KEY = "tempering console";
const MOST = 4_500_000; // characters; browsers have room for about 5 million

/**
 * keep: what JSON can hold; undefined where there is nothing.
 * @typedef {{name: string, keep: () => unknown, restore: (kept: any) => void}} Part
 * @typedef {{whose: string, address: string, dropped: string[]}} Head
 */
/** @type {Part[]} those that are named first have room first */
const parts = [];

/** Have a part of the page kept.
 * @param {string} name in words @param {Part["keep"]} keep @param {Part["restore"]} restore */
export function remember(name, keep, restore) {
  parts.push({ name, keep, restore });
}

/** Parts as texts, as many as there is room for, and the names of those that are too long.
 * @param {Pick<Part, "name"|"keep">[]} from @param {number} most characters
 * @returns {{kept: Map<string, string>, dropped: string[]}} */
export function fitted(from, most) {
  const kept = new Map();
  const dropped = [];
  let left = most;
  for (const { name, keep } of from) {
    const text = JSON.stringify(keep());
    if (text === undefined) continue;
    if (text.length <= left) {
      left -= text.length;
      kept.set(name, text);
    } else dropped.push(name);
  }
  return { kept, dropped };
}

/** Keep everything now. @param {string} whose model's page this is */
export function store(whose) {
  const { kept, dropped } = fitted(parts, MOST);
  sessionStorage.clear();
  for (const [name, text] of kept) {
    try {
      sessionStorage.setItem(`${KEY}: ${name}`, text);
    } catch {
      dropped.push(name); // this browser has less room
    }
  }
  sessionStorage.setItem(KEY, JSON.stringify({ whose, address: location.hash, dropped }));
}

/** What was kept, if this page was reloaded or come back to and is of the same model and address.
 * @param {string} whose @returns {Head|null} */
export function kept(whose) {
  const [how] = /** @type {PerformanceNavigationTiming[]} */ (performance.getEntriesByType("navigation"));
  if (how?.type !== "reload" && how?.type !== "back_forward") return null;
  const head = stored(KEY);
  return head?.whose === whose && head.address === location.hash ? head : null;
}

/** One part of what was kept, or null. @param {string} name */
export function part(name) {
  return stored(`${KEY}: ${name}`);
}

/** @param {string} key */
function stored(key) {
  try {
    return JSON.parse(sessionStorage.getItem(key) ?? "null");
  } catch {
    return null; // not what was put there
  }
}

/** Give every part back what it kept; the names of those that are lost. @param {Head} head */
export function restore(head) {
  const lost = [...head.dropped];
  for (const { name, restore } of parts) {
    const found = part(name);
    if (found === null) continue;
    try {
      restore(found);
    } catch {
      lost.push(name); // another version of this page kept it
    }
  }
  return lost;
}
