// Undo and redo without end, over values that share what didn't change.

/** @template T */
export class History {
  /** @param {T} value */
  constructor(value) {
    /** @type {T[]} */
    this.past = [];
    this.value = value;
    /** @type {T[]} */
    this.future = [];
  }

  /** A new value; what had been undone is gone.
   * @param {T} value */
  push(value) {
    if (value === this.value) return;
    this.past.push(this.value);
    this.value = value;
    this.future = [];
  }

  /** Change the value without a step of its own, as a slider does while it is dragged.
   * @param {T} value */
  amend(value) {
    this.value = value;
    this.future = [];
  }

  /** One step back; whether there was one. */
  undo() {
    if (!this.past.length) return false;
    this.future.push(this.value);
    this.value = /** @type {T} */ (this.past.pop());
    return true;
  }

  /** One step forth; whether there was one. */
  redo() {
    if (!this.future.length) return false;
    this.past.push(this.value);
    this.value = /** @type {T} */ (this.future.pop());
    return true;
  }
}
